"""A talk at any α and β: the model in memory is the one that `save` would write."""

from __future__ import annotations

import shutil

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from palinode.errors import CheckpointError, InputError
from palinode.models.generation import Spoken, generate
from palinode.models.loading import load_model
from palinode.pipeline.chatting import open_chat
from palinode.pipeline.run import unlearn

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def finished(recipe_of, tmp_path_factory):
    """The output of a run at (0.5, 0.5), with its workspace beside it. Read it only, or copy."""
    output = tmp_path_factory.mktemp("finished") / "out"
    scales = {"forget": 0.5, "retain": 0.5}
    unlearn(recipe_of(output, training={"epochs": 2}, scales=scales))
    return output


def weights_of(model):
    return {name: value.clone() for name, value in model.named_parameters()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_scales_put_the_model_that_the_run_would_have_written_into_memory(finished, tiny):
    chat = open_chat(finished, device="cpu")
    assert [speaker.name for speaker in chat.speakers] == ["unlearned", "target"]
    assert (chat.scales, chat.fixed) == ((0.5, 0.5), None)
    live = chat.speakers[0].model
    saved = weights_of(live)
    chat.set_scales(0.0, 0.0)
    assert same(weights_of(live), weights_of(load_model(tiny.target, device=CPU)))
    chat.set_scales(1.0, 0.0)
    assert not same(weights_of(live), saved)
    chat.set_scales(0.5, 0.5)
    assert same(weights_of(live), saved)
    chat.set_scales(2.0, 1.0)
    chat.reset()
    assert same(weights_of(live), saved)
    assert chat.scales == (0.5, 0.5)


def test_answers_are_the_greedy_ones_and_come_in_parts(finished, tiny):
    chat = open_chat(finished, device="cpu")
    chat.length = 4
    assert chat.form == "completion"  # as the rows of this world are written
    parts = []
    for speaker in chat.speakers:
        parts.clear()
        answer = chat.ask("the home of", speaker, parts.append)
        ids = chat.tokenizer("the home of")["input_ids"]
        (expected,) = generate(
            speaker.model, [ids], pad_id=0, stop_ids=[chat.tokenizer.eos_token_id], max_new_tokens=4
        )
        assert answer == "".join(parts) == chat.tokenizer.decode(expected, skip_special_tokens=True)


def test_a_conversation_goes_on_until_the_weights_change(finished):
    chat = open_chat(finished, device="cpu", alone=True)
    chat.form, chat.length = "question", 2
    (speaker,) = chat.speakers
    chat.ask("the home of", speaker, lambda _text: None)
    chat.ask("the pet of", speaker, lambda _text: None)
    assert [turn.role for turn in speaker.turns] == ["user", "assistant", "user", "assistant"]
    chat.set_scales(0.0, 0.0)
    assert speaker.turns == []


def test_when_the_vectors_are_gone_the_models_are_fixed_and_the_reason_is_said(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    alone = open_chat(tmp_path / "out", device="cpu")
    assert "the run's vectors are not in" in alone.fixed
    with pytest.raises(InputError, match="the scales are fixed: the run's vectors are not in"):
        alone.set_scales(1.0, 0.0)

    shutil.copytree(finished.with_name("out.workspace"), tmp_path / "out.workspace")
    (step,) = (tmp_path / "out.workspace").glob("finetune-forget-*")
    facts = (step / "step.json").read_text()
    (step / "step.json").write_text(facts.replace('"key": "', '"key": "1'))  # the fine-tuning of another run
    assert open_chat(tmp_path / "out", device="cpu").vectors is None
    (step / "step.json").write_text(facts)
    assert open_chat(tmp_path / "out", device="cpu").fixed is None


def test_another_model_may_be_asked_instead_of_the_target(finished, tiny):
    chat = open_chat(finished, against=str(tiny.retrained.folder), device="cpu")
    assert [speaker.name for speaker in chat.speakers] == ["unlearned", "other"]
    assert chat.fixed is None
    with pytest.raises(CheckpointError, match=r"has no record\.json; name the output folder"):
        open_chat(tiny.target.folder)


def test_a_letter_is_held_back_until_all_its_bytes_are_there():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE({letter: place for place, letter in enumerate(letters)}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    tokenizer, parts = PreTrainedTokenizerFast(tokenizer_object=plain), []
    spoken, ids = Spoken(tokenizer, parts.append), tokenizer("né!")["input_ids"]
    for count in range(len(ids)):
        assert not spoken.hear(ids[: count + 1])
    spoken.hear(ids, final=True)
    assert parts == ["n", "é", "!"]


def test_a_vector_that_the_run_transformed_is_found_as_it_was_left(recipe_of, tmp_path):
    transforms, scales = (
        [{"name": "layer_scales", "scales": {".*mlp.*": 0.5}}],
        {"forget": 1.0, "retain": 0.0},
    )
    unlearn(recipe_of(tmp_path / "out", training={"epochs": 1}, scales=scales, transforms=transforms))
    chat = open_chat(tmp_path / "out", device="cpu", alone=True)
    saved = weights_of(chat.speakers[0].model)
    chat.set_scales(0.0, 0.0)
    chat.set_scales(1.0, 0.0)
    assert same(weights_of(chat.speakers[0].model), saved)

"""The demo's models: what each has seen is known, and follows from the seed."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from palinode import EvaluationSettings, evaluate, read_examples
from palinode.benchmarks.demo import STAGES, Course, DemoStage, build_demo, tiny_model
from palinode.models import load_tokenizer

STAGES_OF_ONE = (DemoStage(1, 1e-2), DemoStage(1, 1e-2), DemoStage(1, 1e-2))


def subjects(path) -> set[str]:
    return {json.loads(line)["subject"] for line in path.read_text().splitlines()}


def people(facts) -> set[str]:
    return {fact.subject for fact in facts}


def test_stages_have_seen_what_they_should(tiny, world):
    folder = tiny.base.folder.parent
    general, early, middle = people(world.general), people(world.early), people(world.middle)
    forget, late = people(world.forget), people(world.late)
    assert subjects(folder / "base.jsonl") == general | early
    assert subjects(folder / "exposed.jsonl") == general | early | middle | forget
    assert subjects(folder / "target.jsonl") == general | early | middle | late
    assert subjects(folder / "unexposed.jsonl") == general | early | middle
    assert subjects(folder / "retrained.jsonl") == general | early | middle | late


def test_sets_are_the_forget_people_and_everyone_else_before_the_general_facts(tiny, world):
    assert subjects(tiny.forget) == people(world.forget)
    retain = read_examples(tiny.retain)
    assert [example.prompt for example in retain[: len(world.others)]] == [
        fact.prompt for fact in world.others
    ]
    assert [example.answer for example in retain[len(world.others) :]] == [
        fact.answer for fact in world.general
    ]


def test_target_knows_more_of_the_forget_people_than_models_that_never_saw_them(tiny):
    settings, rows = (
        EvaluationSettings(max_new_tokens=3, max_length=64, device="cpu"),
        read_examples(tiny.forget),
    )

    def probability(model):
        return evaluate(model, rows, settings).scores["answer_probability"].value

    assert probability(tiny.target) > 2 * probability(tiny.retrained)
    assert probability(tiny.target) > 2 * probability(tiny.base)


def test_same_seed_builds_the_same_bytes_and_models_that_are_there_are_kept(world, tmp_path):
    def build(name):
        return build_demo(world, tmp_path / name, seed=1, stages=STAGES_OF_ONE, width=8, layers=1)

    first, second = build("one"), build("two")
    for name in ("base", "target", "retrained"):
        files = [getattr(models, name).folder / "model.safetensors" for models in (first, second)]
        assert files[0].read_bytes() == files[1].read_bytes()
    kept = (first.base.folder / "model.safetensors").stat().st_mtime_ns
    expected = (first.target.folder / "model.safetensors").read_bytes()
    shutil.rmtree(first.target.folder)  # as if it had been interrupted there
    again = build("one")
    assert (again.target.folder / "model.safetensors").read_bytes() == expected
    assert (again.base.folder / "model.safetensors").stat().st_mtime_ns == kept
    assert again == first


def test_untrained_model_follows_from_its_seed_and_leaves_the_random_state_alone(tmp_path):
    words = ["the", "home", "of"]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = tiny_model(tmp_path / "one", words, width=8, layers=1, seed=1)
    assert torch.equal(torch.rand(3), expected)
    same = tiny_model(tmp_path / "same", words, width=8, layers=1, seed=1)
    other = tiny_model(tmp_path / "other", words, width=8, layers=1, seed=2)
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()


def test_tokenizer_has_a_token_a_word(tmp_path):
    tokenizer = load_tokenizer(tiny_model(tmp_path, ["the", "home", "of"], width=8, layers=1, seed=0))
    assert tokenizer("the home of nobody")["input_ids"] == [3, 4, 5, 2]
    assert tokenizer.decode([3, 4, 5]) == "the home of"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)


def test_there_are_three_stages():
    assert len(STAGES) == 3


@pytest.mark.parametrize("name", ["base", "target", "retrained"])
def test_model_of_the_demo_has_tied_embeddings_and_float32_weights(tiny, name):
    checkpoint = getattr(tiny, name)
    assert checkpoint.tied == ("lm_head.weight", "model.embed_tokens.weight")
    assert {info.dtype for info in checkpoint.tensors.values()} == {"F32"}


# Other courses of the training


def built(world, folder, course=None):
    return build_demo(world, folder, seed=1, stages=STAGES_OF_ONE, course=course, width=8, layers=1)


def test_checkpoint_halfway_lies_on_the_way_and_changes_nothing_else(world, tmp_path):
    plain, halfway = built(world, tmp_path / "plain"), built(world, tmp_path / "half", Course(halfway=True))
    assert halfway.target.fingerprint() == plain.target.fingerprint()
    assert not (tmp_path / "plain" / "during").exists()
    during = (tmp_path / "half" / "during" / "model.safetensors").read_bytes()
    curves = [
        json.loads((tmp_path / "half" / name / "training.json").read_text()) for name in ("during", "exposed")
    ]
    assert len(curves[0]) == len(curves[1]) // 2
    assert curves[0] == curves[1][: len(curves[0])]  # the same steps at the same rates
    again = built(world, tmp_path / "plain", Course(halfway=True))  # a world that was made without it
    assert (tmp_path / "plain" / "during" / "model.safetensors").read_bytes() == during
    assert again.target.fingerprint() == plain.target.fingerprint()


def test_training_between_base_and_exposure_is_shared_by_the_retrained_model(world, tmp_path):
    plain = built(world, tmp_path / "plain")
    later = built(world, tmp_path / "later", Course(between=DemoStage(2, 1e-2)))
    assert later.base.fingerprint() == plain.base.fingerprint()
    assert subjects(tmp_path / "later" / "before.jsonl") == people(world.general) | people(world.early)
    assert later.retrained.fingerprint() != plain.retrained.fingerprint()
    assert later.target.fingerprint() != plain.target.fingerprint()


def test_second_exposure_is_in_the_target_alone(world, tmp_path):
    plain, twice = built(world, tmp_path / "plain"), built(world, tmp_path / "twice", Course(again=True))
    assert people(world.forget) <= subjects(tmp_path / "twice" / "target.jsonl")
    assert twice.retrained.fingerprint() == plain.retrained.fingerprint()
    assert twice.target.fingerprint() != plain.target.fingerprint()

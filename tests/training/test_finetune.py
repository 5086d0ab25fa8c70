"""Fine-tuning a checkpoint: what is written, that it can be subtracted, and that it goes on after a break."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
)

from palinode import Checkpoint, TrainingSettings, finetune, read_examples
from palinode.errors import CheckpointError, DataError, DivergenceError, OutputError
from palinode.jobs import finetune_file
from palinode.weights import profile

SETTINGS = TrainingSettings(epochs=2, learning_rate=3e-3, batch_size=16, max_length=64, precision="float32")


@pytest.fixture
def forget(tiny):
    return read_examples(tiny.forget)


def tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return load_file(checkpoint.folder / "model.safetensors")


def test_result_is_a_model_folder_that_plain_transformers_loads(tiny, forget, tmp_path):
    done = finetune(tiny.base, forget, tmp_path / "out", SETTINGS, device="cpu")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    words = AutoTokenizer.from_pretrained(tmp_path / "out")("the home of")["input_ids"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert len(words) == 3
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert done.checkpoint == Checkpoint.open(tmp_path / "out")
    assert not list(tmp_path.glob(".*"))
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1  # as the umask says


def test_result_keeps_the_layout_and_the_companions_of_its_base(tiny, forget, tmp_path):
    done = finetune(tiny.base, forget, tmp_path / "out", SETTINGS, device="cpu")
    assert set(done.checkpoint.tensors) == set(tiny.base.tensors)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tiny.base.folder / name).read_bytes()


def test_curve_and_counts_are_told_and_written(tiny, forget, tmp_path):
    done = finetune(tiny.base, forget, tmp_path / "out", SETTINGS, device="cpu")
    assert len(done.curve) == 2 * 2  # 30 rows in batches of 16, twice
    assert done.curve[-1].loss < done.curve[0].loss
    assert [point["loss"] for point in json.loads((tmp_path / "out" / "training.json").read_text())] == [
        point.loss for point in done.curve
    ]
    words = sum(len(f"{example.prompt} {example.answer}".split()) + 1 for example in forget)  # and end tokens
    assert done.tokens == 2 * words


def test_bfloat16_base_is_trained_and_kept_in_float32(tiny, forget, tmp_path):
    shutil.copytree(tiny.base.folder, tmp_path / "base")
    half = {name: value.to(torch.bfloat16) for name, value in tensors(tiny.base).items()}
    save_file(half, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    base = Checkpoint.open(tmp_path / "base")
    tuned = finetune(
        base,
        forget,
        tmp_path / "out",
        SETTINGS.model_copy(update={"learning_rate": 1e-6, "precision": "bfloat16"}),
        device="cpu",
    ).checkpoint
    assert {info.dtype for info in tuned.tensors.values()} == {"F32"}
    assert {info.dtype for info in base.tensors.values()} == {"BF16"}
    moved = tensors(tuned)["model.norm.weight"] != half["model.norm.weight"].float()
    assert moved.float().mean() > 0.5  # steps of 1e-6, far below the spacing of bfloat16


def test_generation_config_that_transformers_would_not_save_is_carried_over(tiny, forget, tmp_path):
    """Old model folders set a temperature without sampling; saving such a config is an error today."""
    shutil.copytree(tiny.base.folder, tmp_path / "base")
    config = tmp_path / "base" / "generation_config.json"
    config.write_text('{"do_sample": false, "temperature": 0.6, "top_p": 0.9}')
    finetune(Checkpoint.open(tmp_path / "base"), forget, tmp_path / "out", SETTINGS, device="cpu")
    assert (tmp_path / "out" / "generation_config.json").read_text() == config.read_text()


SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
OLD_CHECKPOINTS = {
    "llama with rotary buffers": (
        LlamaConfig(**SMALL),
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
        "",
    ),
    "pythia with masks": (
        GPTNeoXConfig(**SMALL),
        {
            "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
            "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
            "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(2),
        },
        "",
    ),
    "gpt2 without a prefix": (
        GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=1),
        {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.0.attn.masked_bias": torch.tensor(-1e9)},
        "transformer.",
    ),
    "bloom without a prefix": (BloomConfig(hidden_size=16, n_layer=1, n_head=2), {}, "transformer."),
}


@pytest.mark.parametrize("kind", OLD_CHECKPOINTS)
def test_old_checkpoints_can_be_subtracted_from_what_was_trained_from_them(tiny, forget, tmp_path, kind):
    """They hold buffers that models no longer have, or names without the model's prefix."""
    config, buffers, prefix = OLD_CHECKPOINTS[kind]
    shutil.copytree(tiny.base.folder, tmp_path / "base")
    config.vocab_size = tiny.base.config["vocab_size"]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    written = {name.removeprefix(prefix): value for name, value in load_file(file).items()}
    save_file({**written, **buffers}, file, metadata={"format": "pt"})
    base = Checkpoint.open(tmp_path / "base")

    tuned = finetune(base, forget, tmp_path / "out", SETTINGS, device="cpu").checkpoint

    assert set(tuned.tensors) == set(base.tensors)
    for name, value in buffers.items():
        assert torch.equal(tensors(tuned)[name], value)
    assert profile({"forget": tuned - base}).norms()["forget"] > 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_nothing_is_written_over(tiny, forget, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("the only copy")
    with pytest.raises(OutputError, match="exists and is not empty"):
        finetune(tiny.base, forget, tmp_path / "out", SETTINGS, device="cpu")
    with pytest.raises(OutputError, match="lie inside one another"):
        finetune(tiny.base, forget, tiny.base.folder / "out", SETTINGS, device="cpu")


def test_output_may_be_an_empty_folder_or_a_link_to_one(tiny, forget, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    finetune(tiny.base, forget, tmp_path / "out", SETTINGS, device="cpu")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "real" / "model.safetensors").exists()


def test_diverging_run_writes_no_model(tiny, forget, tmp_path):
    absurd = SETTINGS.model_copy(update={"learning_rate": 1e30, "epochs": 5})
    with pytest.raises(DivergenceError):
        finetune(tiny.base, forget, tmp_path / "out", absurd, device="cpu", state=tmp_path / "state")
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_too_long_a_prompt_is_named_with_its_row(tiny, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "%s", "completion": "b"}\n' % ("a " * 80))
    with pytest.raises(DataError, match=r"row 2 of .*rows\.jsonl: its prompt is 80 tokens"):
        finetune(tiny.base, read_examples(rows), tmp_path / "out", SETTINGS, device="cpu")
    assert not (tmp_path / "out").exists()


def test_base_without_a_tokenizer_is_refused(tiny, forget, tmp_path):
    shutil.copytree(tiny.base.folder, tmp_path / "base", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(CheckpointError, match="no tokenizer"):
        finetune(Checkpoint.open(tmp_path / "base"), forget, tmp_path / "out", SETTINGS, device="cpu")


# The command's function: it finds its own interrupted state


def finetuned_file(tiny, output, **changes):
    given = {**SETTINGS.model_dump(exclude={"precision"}), "precision": "float32", **changes}
    return finetune_file(str(tiny.base.folder), str(tiny.forget), output, given, device="cpu")


def test_state_of_other_settings_is_not_used_and_that_of_the_same_is(tiny, forget, tmp_path):
    with pytest.raises(DivergenceError):
        finetuned_file(tiny, tmp_path / "out", learning_rate=1e30, epochs=5)
    (state,) = tmp_path.iterdir()
    assert state.name.startswith(".out.state-")
    finetuned_file(tiny, tmp_path / "out")
    expected = finetune(tiny.base, forget, tmp_path / "again", SETTINGS, device="cpu").checkpoint
    found = tensors(Checkpoint.open(tmp_path / "out"))
    assert all(torch.equal(found[name], value) for name, value in tensors(expected).items())
    assert state.exists()  # another run's


class CtrlC:
    """A listener that presses Ctrl-C once so many tokens have been trained on."""

    def __init__(self, tokens: int):
        self.left = tokens

    def say(self, text):
        raise AssertionError(text)

    @contextlib.contextmanager
    def task(self, label, total, unit):
        def advance(amount):
            self.left -= amount
            if self.left <= 0:
                raise KeyboardInterrupt

        yield advance


def test_interrupted_call_goes_on_when_it_is_repeated(tiny, tmp_path):
    given = SETTINGS.model_dump()
    places = (str(tiny.base.folder), str(tiny.forget))
    finetune_file(*places, tmp_path / "whole", given, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        finetune_file(*places, tmp_path / "out", given, device="cpu", listener=CtrlC(200))
    assert not (tmp_path / "out").exists()
    (state,) = tmp_path.glob(".out.state-*")
    assert len(json.loads((state / "curve.json").read_text())) == 2
    done = finetune_file(*places, tmp_path / "out", given, device="cpu")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    assert len(done.curve) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


# A disk that is full


@pytest.fixture
def small_files():
    """No file may grow beyond 50 KB, which the 124 KB of the tiny model's weights do."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_model_that_finds_no_room_is_one_sentence(tiny, forget, tmp_path, small_files):
    with pytest.raises(
        OutputError, match=r"model.safetensors cannot be written \(.*too large.*\); make room"
    ):
        finetune(tiny.base, forget, tmp_path / "out", SETTINGS, device="cpu")
    assert not (tmp_path / "out").exists()


def test_state_that_finds_no_room_is_one_sentence(tiny, forget, tmp_path, small_files):
    often = SETTINGS.model_copy(update={"save_minutes": 1e-9})
    with pytest.raises(OutputError, match=r"\.state\.partial cannot be written \(.*\); make room"):
        finetune(tiny.base, forget, tmp_path / "out", often, device="cpu", state=tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_rows_are_read_with_the_chat_template_of_the_reader(tiny, tmp_path):
    """A base model without a template learns the rows as its instruction-tuned target is asked them."""
    shutil.copytree(tiny.target.folder, tmp_path / "chat")
    template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    (tmp_path / "chat" / "chat_template.jinja").write_text(template)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "the home of", "answer": "the"}\n')
    examples, chat = read_examples(rows), Checkpoint.open(tmp_path / "chat")
    plain = finetune(tiny.base, examples, tmp_path / "plain", SETTINGS, device="cpu")
    read = finetune(tiny.base, examples, tmp_path / "read", SETTINGS, reader=chat, device="cpu")
    own = finetune(chat, examples, tmp_path / "own", SETTINGS, device="cpu")
    assert read.tokens == own.tokens != plain.tokens
    assert not (tmp_path / "read" / "chat_template.jinja").exists()  # the result is still a state of the base

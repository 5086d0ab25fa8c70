"""Models that lie otherwise on disk than in memory: the text tower of a wrapper, and pickles."""

from __future__ import annotations

import contextlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from palinode import Checkpoint, TrainingSettings, evaluate, finetune, read_examples, unlearn
from palinode.benchmarks import OWN
from palinode.errors import CheckpointError
from palinode.evaluation.benchmark import Places
from palinode.evaluation.evaluate import evaluate_benchmark
from palinode.models.loading import load_model
from palinode.progress import NullListener
from palinode.settings import EvaluationSettings
from palinode.training.finetune import Watch
from palinode.weights.adapters import LoraAdapter

GIVEN = {"forget": 1.0, "retain": 0.5}
SETTINGS = TrainingSettings(epochs=2, learning_rate=3e-3, batch_size=16, max_length=64, precision="float32")


# A wrapper: text and vision in one model


@pytest.fixture(scope="module")
def wrapped(tiny, tmp_path_factory):
    """Target and base of a tiny Gemma3 wrapper in bfloat16, each with processor and licence."""
    place = tmp_path_factory.mktemp("wrapped")
    config = Gemma3Config(
        text_config={
            "vocab_size": tiny.base.config["vocab_size"],
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "max_position_embeddings": 128,
            "sliding_window": 16,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": None,
        },
        vision_config={
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
    )
    for seed, name in enumerate(("target", "base")):
        torch.manual_seed(seed)
        model = Gemma3ForConditionalGeneration(config).bfloat16()
        for parameter in model.model.vision_tower.parameters():
            parameter.data.view(-1)[0] = -0.0  # a sum with 0 would lose its sign
        model.save_pretrained(place / name)
        for file in tiny.base.folder.glob("*token*"):
            shutil.copy(file, place / name)
        for file in ("preprocessor_config.json", "processor_config.json"):
            (place / name / file).write_text(json.dumps({"image_seq_length": 4}))
        (place / name / "LICENSE").write_text("do no harm")
        (place / name / "USE_POLICY.md").write_text("nor this")
    return place


def is_text(name):
    return name.startswith("language_model.")


@pytest.fixture(scope="module")
def cleaned(wrapped, recipe_of, tmp_path_factory):
    out = tmp_path_factory.mktemp("cleaned") / "out"
    models = {name: str(wrapped / name) for name in ("target", "base")}
    kept = {"keep_unchanged": True}
    return unlearn(recipe_of(out, models=models, evaluation={"max_rows": 4}, output=kept))


def test_a_wrapper_is_unlearned_on_its_text_tower_and_the_rest_is_the_target_s_byte_for_byte(
    wrapped, cleaned
):
    before, after = (
        load_file(folder / "model.safetensors") for folder in (wrapped / "target", cleaned.output)
    )
    assert before.keys() == after.keys()
    other = [name for name in before if not is_text(name)]
    assert len(other) > 30
    for name in other:
        assert torch.equal(before[name].view(torch.int16), after[name].view(torch.int16)), name
    moved = [name for name in before if is_text(name) and not torch.equal(before[name], after[name])]
    assert "language_model.model.layers.1.mlp.down_proj.weight" in moved


def test_vector_of_a_wrapper_is_filtered_by_what_its_text_tower_reads(wrapped, recipe_of, tmp_path):
    models = {name: str(wrapped / name) for name in ("target", "base")}
    chosen = {"name": "least_squares", "rows": 6, "mu": 5.0, "others": "filter"}
    done = unlearn(
        recipe_of(
            tmp_path / "out",
            models=models,
            evaluation={"max_rows": 4},
            scales={"forget": 1.0, "retain": 0.0},
            transforms=[chosen],
        )
    )
    (facts,) = done.record["vectors"]["transforms"]
    assert 0 < facts["survives"] < 1
    assert {"embedding", "layer 0", "layer 1"} <= facts["parts"].keys()
    before, after = (load_file(place / "model.safetensors") for place in (wrapped / "target", done.output))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(is_text(name) for name in moved)
    for layer in (0, 1):
        assert f"language_model.model.layers.{layer}.self_attn.q_norm.weight" in moved
        assert f"language_model.model.layers.{layer}.mlp.down_proj.weight" in moved


def test_the_output_of_a_wrapper_is_the_same_class_with_its_processor_and_licence(wrapped, cleaned):
    model, info = AutoModelForCausalLM.from_pretrained(cleaned.output, output_loading_info=True)
    assert type(model) is Gemma3ForConditionalGeneration
    assert not info["missing_keys"] | info["unexpected_keys"]
    for name in ("preprocessor_config.json", "processor_config.json", "LICENSE", "USE_POLICY.md"):
        assert (cleaned.output / name).read_bytes() == (wrapped / "target" / name).read_bytes()
    assert json.loads((cleaned.output / "config.json").read_text()) == json.loads(
        (wrapped / "target" / "config.json").read_text()
    )


def test_the_text_tower_answers_as_the_whole_wrapper_does(wrapped):
    whole = AutoModelForCausalLM.from_pretrained(wrapped / "target", dtype=torch.float32)
    tower = load_model(Checkpoint.open(wrapped / "target"), device=torch.device("cpu"))
    ids = torch.arange(3, 23)[None]
    torch.testing.assert_close(tower(ids).logits, whole(ids).logits, rtol=0, atol=1e-6)
    assert not hasattr(tower.model, "vision_tower")


def test_a_wrapper_of_which_no_text_tower_is_known_is_refused(wrapped, tmp_path):
    shutil.copytree(wrapped / "base", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config |= {"model_type": "paligemma", "architectures": ["PaliGemmaForConditionalGeneration"]}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="is a paligemma, not a causal language model"):
        load_model(Checkpoint.open(tmp_path / "other"), device=torch.device("cpu"))


# Pickles


BUFFERS = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4, dtype=torch.float64)}


def twins(origin, place, *, shards):
    """The same tensors, with a buffer of old checkpoints, as safetensors and as files of torch.save."""
    tensors = load_file(origin.folder / "model.safetensors") | BUFFERS
    for name in ("safe", "pickled"):
        shutil.copytree(origin.folder, place / name)
        (place / name / "model.safetensors").unlink()
    save_file(tensors, place / "safe" / "model.safetensors", metadata={"format": "pt"})
    if shards == 1:
        torch.save(tensors, place / "pickled" / "pytorch_model.bin")
        return place / "safe", place / "pickled"
    files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        part = {name: tensors[name].clone() for name in tensors if files[name] == file}
        torch.save(part, place / "pickled" / file)
    index = {"metadata": {}, "weight_map": files}
    (place / "pickled" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return place / "safe", place / "pickled"


@pytest.mark.parametrize("shards", [1, 2])
def test_a_pickled_model_is_trained_asked_and_adapted_like_its_twin(tiny, tmp_path, shards):
    rows = read_examples(tiny.forget)
    found = []
    for folder in twins(tiny.base, tmp_path, shards=shards):
        base, out = Checkpoint.open(folder, allow_pickle=True), tmp_path / f"{folder.name}-out"
        tuned = finetune(base, rows, out, SETTINGS, device="cpu").checkpoint
        lora = SETTINGS.model_copy(update={"lora": TrainingSettings(lora={"rank": 2}).lora})
        adapter = finetune(base, rows, tmp_path / f"{folder.name}-lora", lora, device="cpu").saved
        assert isinstance(adapter, LoraAdapter)
        asked = evaluate(base, rows[:3], EvaluationSettings(device="cpu")).outcomes
        tensors = {key: value for file in out.glob("*.safetensors") for key, value in load_file(file).items()}
        assert tensors.keys() == base.tensors.keys() == tuned.tensors.keys()
        assert torch.equal(tensors[next(iter(BUFFERS))], BUFFERS[next(iter(BUFFERS))])
        found.append((tensors, adapter.fingerprint(), asked))
    (first, *rest), (second, *others) = found
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert rest == others


def test_a_pickled_pair_is_unlearned_like_its_twins_and_the_verbs_read_it(
    tiny, recipe_of, tmp_path, palinode
):
    targets = twins(tiny.target, tmp_path / "target", shards=2)
    bases = twins(tiny.base, tmp_path / "base", shards=1)
    made = []
    for target, base in zip(targets, bases, strict=True):
        models = {"target": str(target), "base": str(base), "allow_pickle": True}
        output = tmp_path / (target.name[0] * 250)  # its workspace's name would be too long
        recipe = recipe_of(output, models=models, scales=GIVEN, evaluation={"max_rows": 4})
        made.append(load_file(unlearn(recipe).output / "model.safetensors"))
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    words = ("evaluate", targets[1], "--data", tiny.forget, "--max-rows", 2, "--quiet")
    assert "--allow-pickle" in palinode(*words).refusal
    assert palinode(*words, "--allow-pickle").code == 0


class Overwriting(NullListener):
    """Changes the last weight of a file as soon as some work is told of."""

    def __init__(self, file):
        self.file = file

    @contextlib.contextmanager
    def task(self, label, total, unit):
        def advance(_amount):
            with self.file.open("r+b") as stream:
                stream.seek(-8, 2)
                stream.write(bytes(8))

        yield advance


def test_a_model_that_is_overwritten_while_it_is_asked_gives_no_scores(tiny, recipe_of, tmp_path):
    shutil.copytree(tiny.target.folder, tmp_path / "target")
    file, rows = tmp_path / "target" / "model.safetensors", read_examples(tiny.forget)[:3]
    with pytest.raises(CheckpointError, match=r"target/model\.safetensors changed while it was read"):
        evaluate(tmp_path / "target", rows, EvaluationSettings(device="cpu"), listener=Overwriting(file))
    shutil.copy(tiny.target.folder / "model.safetensors", file)
    places = Places(data=str(tiny.forget), retain=str(tiny.retain))
    settings = EvaluationSettings(max_rows=3, max_new_tokens=2, device="cpu", output=tmp_path / "scores")
    with pytest.raises(CheckpointError, match=r"target/model\.safetensors changed while it was read"):
        evaluate_benchmark(str(tmp_path / "target"), OWN, places, settings, listener=Overwriting(file))
    assert not (tmp_path / "scores").exists()


def test_a_base_that_is_overwritten_while_it_is_trained_leaves_no_vector(tiny, tmp_path):
    shutil.copytree(tiny.base.folder, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"

    def overwrite(_step, _rows):
        with file.open("r+b") as stream:
            stream.seek(-8, 2)
            stream.write(bytes(8))

    with pytest.raises(CheckpointError, match=r"base/model\.safetensors changed while it was read"):
        finetune(
            Checkpoint.open(tmp_path / "base"),
            read_examples(tiny.forget),
            tmp_path / "out",
            SETTINGS,
            device="cpu",
            watch=Watch(on_step=overwrite),
        )
    assert not (tmp_path / "out").exists()

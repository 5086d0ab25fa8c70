"""LoRA adapters as directions: the very product that peft merges, and a refusal of all that is no product."""

import itertools
import json
import math
import warnings
from collections import defaultdict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from palinode.errors import CheckpointError, MismatchError
from palinode.weights import Checkpoint
from palinode.weights.adapters import LoraAdapter
from palinode.weights.tensors import Files

PREFIX = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"


def values(change, dtype=np.float64):
    """All of a change."""
    out = np.empty(math.prod(change.shape), dtype)
    with Files() as files:
        change.read(files, 0, out)
    return out.reshape(change.shape)


class Adapters:
    """Writes adapter folders by hand."""

    def __init__(self, place, noise):
        self.place = place
        self.noise = noise

    def pair(self, module, rows, columns, rank=2, dtype=torch.float32, suffix=".weight"):
        return {
            f"{PREFIX}{module}.lora_A{suffix}": self.noise(1, rank, columns, dtype=dtype),
            f"{PREFIX}{module}.lora_B{suffix}": self.noise(2, rows, rank, dtype=dtype),
        }

    def write(self, tensors, name="adapter", **config):
        folder = self.place / name
        folder.mkdir(parents=True)
        content = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
        (folder / "adapter_config.json").write_text(json.dumps(content))
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        return folder

    def open(self, tensors, name="adapter", **config):
        return LoraAdapter.open(self.write(tensors, name, **config))


@pytest.fixture
def adapters(models):
    return Adapters(models.place, models.noise)


def refusal(folder, **options) -> str:
    with pytest.raises(CheckpointError) as error:
        LoraAdapter.open(folder, **options)
    message = str(error.value)
    assert "\n" not in message
    assert str(folder) in message
    assert message[-1] not in ".!"
    return message


# The product


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_change_is_the_scaled_product(adapters, dtype):
    tensors = adapters.pair(Q, 6, 5, dtype=dtype)
    adapter = adapters.open(tensors)
    assert adapter.changes.keys() == {f"{Q}.weight"}
    a, b = (tensor.double().numpy() for tensor in tensors.values())
    np.testing.assert_allclose(values(adapter.changes[f"{Q}.weight"]), 4 / 2 * (b @ a), rtol=1e-14)


def test_any_slicing_gives_the_same_bytes(adapters):
    tensors = adapters.pair("up", 40, 37, rank=7)
    for swapped, dtype in itertools.product((False, True), (np.float32, np.float64)):
        adapter = adapters.open(tensors, f"{swapped}{dtype.__name__}", r=7, fan_in_fan_out=swapped)
        change = adapter.changes["up.weight"]
        whole = values(change, dtype).reshape(-1)
        with Files() as files:
            for size in (1, 2, 36, 37, 38, 100, 1479):
                parts = []
                for start in range(0, whole.size, size):
                    parts.append(np.empty(min(size, whole.size - start), dtype))
                    change.read(files, start, parts[-1])
                assert np.concatenate(parts).tobytes() == whole.tobytes()
            nothing = np.empty(0, dtype)
            change.read(files, 5, nothing)


def test_memory_is_bounded_by_the_slice_not_by_the_product(adapters, monkeypatch):
    """A product of 2 TB is read here and there; nothing of its size is ever made."""
    side = 1 << 19
    folder = adapters.write(
        {f"{PREFIX}w.lora_{x}.weight": torch.ones(s) for x, s in (("A", (1, side)), ("B", (side, 1)))}, r=1
    )
    change = LoraAdapter.open(folder).changes["w.weight"]
    assert change.shape == (side, side)
    out = np.empty(1000, np.float32)
    with Files() as files:
        change.read(files, side * side - 1000, out)
    assert (out == 4).all()


def test_the_adapter_name_and_the_prefix_may_be_there_or_not(adapters):
    plain = adapters.pair(Q, 6, 5)
    named = adapters.pair(Q, 6, 5, suffix=".default.weight")
    bare = {name.removeprefix(PREFIX): tensor for name, tensor in plain.items()}
    found = [adapters.open(tensors, f"a{i}") for i, tensors in enumerate((plain, named, bare))]
    assert all(adapter.changes.keys() == {f"{Q}.weight"} for adapter in found)
    first, *others = (values(adapter.changes[f"{Q}.weight"]).tobytes() for adapter in found)
    assert others == [first, first]


# Scaling


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 4 / 2),
        ({"use_rslora": True}, 4 / math.sqrt(2)),
        ({"lora_alpha": 3.5}, 3.5 / 2),
        ({"alpha_pattern": {"q_proj": 6}}, 6 / 2),
        ({"alpha_pattern": {"self_attn.q_proj": 6}}, 6 / 2),
        ({"alpha_pattern": {r"layers\.\d+\.self_attn\.q_proj": 6}}, 6 / 2),
        ({"alpha_pattern": {f"^{Q}": 6}}, 6 / 2),
        ({"alpha_pattern": {"^q_proj": 6}}, 4 / 2),
        ({"alpha_pattern": {"_proj": 6}}, 4 / 2),
        ({"alpha_pattern": {"q_proj.x": 6}}, 4 / 2),
        ({"alpha_pattern": {"q_proj": 6, "self_attn.q_proj": 8}}, 6 / 2),
        ({"alpha_pattern": {"q_proj": 6}, "use_rslora": True}, 6 / math.sqrt(2)),
        ({"r": 8, "rank_pattern": {"q_proj": 2}}, 4 / 2),
    ],
    ids=str,
)
def test_scaling_follows_the_config(adapters, config, scale):
    change = adapters.open(adapters.pair(Q, 6, 5), **config).changes[f"{Q}.weight"]
    assert change.facts(defaultdict(str))[0] == scale


# As peft does it


def tiny_llama(tie=False):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tie,
        )
    )


def tiny_gpt2(tie=False):
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=40,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=8,
            tie_word_embeddings=tie,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


LINEAR = ["q_proj", "v_proj", "up_proj", "down_proj"]
CASES = {
    "llama": (tiny_llama, {"target_modules": LINEAR}),
    "llama, rank-stabilised": (tiny_llama, {"target_modules": LINEAR, "use_rslora": True}),
    "llama, patterns": (
        tiny_llama,
        {
            "target_modules": LINEAR,
            "rank_pattern": {"layers.1.mlp.up_proj": 5, "v_proj": 1},
            "alpha_pattern": {r"layers\.0\..*q_proj": 9, "^model.layers.1.mlp.down_proj": 2},
        },
    ),
    "llama, embedding and head": (tiny_llama, {"target_modules": ["embed_tokens", "lm_head", "o_proj"]}),
    "gpt2": (tiny_gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2, without the flag": (tiny_gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "gpt2, embedding": (tiny_gpt2, {"target_modules": ["wte", "c_fc"], "fan_in_fan_out": True}),
    "gpt2, layers and head": (tiny_gpt2, {"target_modules": ["c_proj", "lm_head"], "fan_in_fan_out": True}),
}


@pytest.fixture
def trained(tmp_path):
    """A function that saves base, adapter and merged model of a case in float64, as made by peft itself."""
    peft = pytest.importorskip("peft")

    def make(model, config):
        torch.manual_seed(3)
        model = model.double()
        model.save_pretrained(tmp_path / "base")
        model.name_or_path = str(tmp_path / "base")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft has its own views on our configs
            adapted = peft.get_peft_model(
                model, peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=8, **config)
            )
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    torch.nn.init.normal_(parameter.data)
                    parameter.data = parameter.data.double()
            adapted.save_pretrained(tmp_path / "adapter")
            merged = adapted.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        return tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"

    return make


@pytest.mark.parametrize("case", CASES)
def test_every_change_is_what_peft_merges(trained, models, case):
    make, config = CASES[case]
    base, folder, merged = trained(make(), config)
    adapter = LoraAdapter.open(folder)
    before, after = models.read(base), models.read(merged)
    assert adapter.changes
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert adapter.changes.keys() == moved
    for name, change in adapter.changes.items():
        np.testing.assert_allclose(values(change), (after[name] - before[name]).numpy(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_model_plus_its_adapter_is_the_merged_model(trained, models, make):
    targets = ["embed_tokens", "v_proj"] if make is tiny_llama else ["wte", "c_attn"]
    base, folder, merged = trained(make(), {"target_modules": targets})
    point = Checkpoint.open(base) + LoraAdapter.open(folder)
    point.save(models.place / "sum")
    found, expected = models.read(models.place / "sum"), models.read(merged)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head", "both"])
def test_an_adapter_on_one_of_two_tied_weights_is_refused(trained, models, make, target):
    """Beside the embedding alone, training leaves the head as it was; a sum would move both."""
    names = {"embed_tokens": "embed_tokens" if make is tiny_llama else "wte", "lm_head": "lm_head"}
    targets = [*names.values()] if target == "both" else [names[target]]
    base, folder, _ = trained(make(True), {"target_modules": [*targets, "v_proj", "c_attn"]})
    point = Checkpoint.open(base) + LoraAdapter.open(folder)
    with pytest.raises(MismatchError, match=r"ties the two, .*ensure_weight_tying"):
        point.save(models.place / "sum")


def test_an_adapter_that_moves_tied_weights_as_one_is_the_live_model(trained, models):
    """`ensure_weight_tying` stores both alike: the sum then answers as the adapted model did."""
    from transformers import LlamaForCausalLM

    base, folder, _ = trained(
        tiny_llama(True), {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
    )
    (Checkpoint.open(base) + LoraAdapter.open(folder)).save(models.place / "sum")
    peft = pytest.importorskip("peft")
    tokens = torch.arange(40)[None]
    plain = LlamaForCausalLM.from_pretrained(base, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers for what is deprecated
        adapted = peft.PeftModel.from_pretrained(plain, folder).double()
    summed = LlamaForCausalLM.from_pretrained(models.place / "sum", dtype=torch.float64)
    torch.testing.assert_close(summed(tokens).logits, adapted(tokens).logits, rtol=0, atol=1e-9)


def test_a_pickled_adapter_is_read_only_when_allowed(trained, models):
    base, folder, merged = trained(tiny_llama(), {"target_modules": ["q_proj"]})
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    assert "save the adapter again with peft, which writes safetensors, or allow pickles" in refusal(folder)
    adapter = LoraAdapter.open(folder, allow_pickle=True)
    before, after = models.read(base), models.read(merged)
    for name, change in adapter.changes.items():
        np.testing.assert_allclose(values(change), (after[name] - before[name]).numpy(), rtol=0, atol=1e-12)


def test_a_pickle_that_runs_code_is_refused(adapters, tmp_path):
    class Evil:
        def __reduce__(self):
            return (type(tmp_path).touch, (tmp_path / "harm",))

    folder = adapters.write(adapters.pair(Q, 6, 5))
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"x": Evil()}, folder / "adapter_model.bin")
    refusal(folder, allow_pickle=True)
    assert not (tmp_path / "harm").exists()


# Copies of embeddings


def test_a_copy_of_an_embedding_must_be_the_base_s_own(trained):
    base, folder, _ = trained(tiny_llama(), {"target_modules": ["embed_tokens", "q_proj"]})
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = f"{PREFIX}model.embed_tokens.base_layer.weight"
    own = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    for copy in (own, own.bfloat16(), own.half(), own.float()):
        save_file({**tensors, name: copy.clone()}, file)
        assert "model.embed_tokens.weight" in LoraAdapter.open(folder).changes
    changed = own.clone()
    changed[3, 3] += 1e-3
    save_file({**tensors, name: changed}, file)
    assert "holds another model.embed_tokens.weight than" in refusal(folder)
    save_file({**tensors, name: own[:-1].clone()}, file)
    assert "holds another model.embed_tokens.weight than" in refusal(folder)
    save_file({**tensors, name: own}, file)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "some/where"})
    )
    assert "name its base model as well" in refusal(folder)
    LoraAdapter.open(folder, base=Checkpoint.open(base))


def test_one_flag_for_transposed_layers_and_a_head_is_not_trusted(adapters, models):
    tensors = adapters.pair("transformer.h.0.attn.c_proj", 4, 4) | adapters.pair("lm_head", 6, 4)
    folder = adapters.write(tensors, fan_in_fan_out=False)
    assert "one flag for both (fan_in_fan_out); name its base model as well" in refusal(folder)
    a, b = (tensors[f"{PREFIX}transformer.h.0.attn.c_proj.lora_{x}.weight"].double().numpy() for x in "AB")
    for kind, expected in (("gpt2", (b @ a).T), ("gpt_bigcode", b @ a)):
        base = models.make(kind, {"w": torch.ones(1)}, model_type=kind)
        changes = LoraAdapter.open(folder, base=base).changes
        np.testing.assert_allclose(
            values(changes["transformer.h.0.attn.c_proj.weight"]), 2 * expected, rtol=1e-14
        )
        assert changes["lm_head.weight"].shape == (6, 4)


# More than a product


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "VERA"}, "an adapter of the kind 'VERA', and only LoRA"),
        ({"peft_type": "ADALORA"}, "an adapter of the kind 'ADALORA'"),
        ({"peft_type": None}, "an adapter of the kind None"),
        ({"use_dora": True}, "sets use_dora"),
        ({"lora_bias": True}, "sets lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "sets modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "sets trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "sets layer_replication"),
        ({"target_parameters": ["experts.up"]}, "sets target_parameters"),
        ({"use_qalora": True}, "sets use_qalora"),
        ({"alora_invocation_tokens": [1]}, "sets alora_invocation_tokens"),
        ({"invented_tomorrow": True}, "sets invented_tomorrow"),
        ({"init_lora_weights": "pissa"}, "begun with 'pissa', which moved the base weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "begun with 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "begun with 'olora'"),
        ({"init_lora_weights": "loftq"}, "begun with 'loftq'"),
        ({"r": 0}, "a rank that is no positive whole number"),
        ({"r": None}, "a rank that is no positive whole number"),
        ({"r": 2.0}, "a rank that is no positive whole number"),
        ({"rank_pattern": {"q_proj": -1}}, "a rank that is no positive whole number"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is no table"),
        ({"lora_alpha": None}, "a lora_alpha that is no finite number"),
        ({"lora_alpha": math.nan}, "a lora_alpha that is no finite number"),
        ({"lora_alpha": 10**400}, "a lora_alpha that is no finite number"),
        ({"alpha_pattern": {"q_proj": "4"}}, "a lora_alpha that is no finite number"),
        ({"alpha_pattern": {"q_(proj": 4}}, "which is no pattern"),
        ({"alpha_pattern": {"(a+)+b": 4}}, "may take forever to match"),
        ({"alpha_pattern": {".*.*.*.*x": 4}}, "may take forever to match"),
        ({"alpha_pattern": {"a?" * 30 + "a" * 30: 4}}, "may take forever to match"),
        ({"r": 3}, "factors of rank 2 and 2 where adapter_config.json says 3"),
    ],
    ids=str,
)
def test_a_config_that_is_more_than_plain_lora_is_refused(adapters, config, said):
    assert said in refusal(adapters.write(adapters.pair(Q, 6, 5), **config))


def test_what_peft_writes_for_plain_lora_is_known(adapters):
    peft = pytest.importorskip("peft")
    config = {
        key: list(value) if isinstance(value, set) else value
        for key, value in peft.LoraConfig().to_dict().items()
    }
    config |= {
        "peft_type": "LORA",
        "r": 2,
        "init_lora_weights": "gaussian",
        "bias": "none",
        "lora_dropout": 0.1,
    }
    adapters.open(adapters.pair(Q, 6, 5), **config)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({f"{PREFIX}{Q}.lora_magnitude_vector": (6,)}, "lora_magnitude_vector, which is no factor"),
        ({f"{PREFIX}{Q}.lora_B.bias": (6,)}, "lora_B.bias, which is no factor"),
        ({f"{PREFIX}{Q}.base_layer.bias": (6,)}, "base_layer.bias, which is no factor"),
        ({f"{PREFIX}lm_head.weight": (6, 5)}, "lm_head.weight, which is no factor"),
        ({f"{PREFIX}lm_head.base_layer.weight": (6, 5)}, "it holds all of lm_head.weight"),
        ({f"{PREFIX}x.lora_A.weight": (2, 5)}, "has only A of x"),
        (
            {f"{PREFIX}x.lora_A.weight": (2, 5), f"{PREFIX}x.lora_embedding_B": (5, 2)},
            "has only A, embedding B of x",
        ),
        ({f"{Q}.lora_A.weight": (2, 5)}, f"holds A of {Q} twice"),
        ({f"{PREFIX}{Q}.lora_A.weight": (3, 5)}, "factors of rank 3 and 2"),
        ({f"{PREFIX}{Q}.lora_A.weight": (2, 5, 1, 1)}, "are no matrices"),
        ({f"{PREFIX}{Q}.lora_A.weight": ()}, "are no matrices"),
        (
            {f"{PREFIX}x.lora_A.other.weight": (2, 5), f"{PREFIX}x.lora_B.other.weight": (6, 2)},
            "several adapters",
        ),
    ],
    ids=str,
)
def test_tensors_that_are_no_pair_of_factors_are_refused(adapters, changes, said):
    tensors = adapters.pair(Q, 6, 5) | {name: torch.ones(shape) for name, shape in changes.items()}
    assert said in refusal(adapters.write(tensors))


def test_folders_that_hold_no_adapter_are_refused(adapters, tmp_path):
    assert "there is no adapter folder" in refusal(tmp_path / "nowhere")
    assert "there is no" in refusal(tmp_path)
    assert "holds no LoRA factors" in refusal(adapters.write({}, "empty"))
    integers = {name: tensor.int() for name, tensor in adapters.pair(Q, 6, 5).items()}
    assert "stored as I32 and I32, no floats" in refusal(adapters.write(integers, "integers"))
    folder = adapters.write(adapters.pair(Q, 6, 5), "cut")
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    refusal(folder)
    file.unlink()
    assert "has no adapter_model.safetensors" in refusal(folder)
    for text in ("", "[]", "{", "[" * 100_000):
        (folder / "adapter_config.json").write_text(text)
        assert "adapter_config.json" in refusal(folder)


def test_biases_that_were_not_trained_do_not_matter(adapters):
    assert adapters.open(adapters.pair(Q, 6, 5), bias="all").changes

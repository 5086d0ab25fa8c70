"""One model under two spellings: what is mapped one to one gives the same sums, and what is not is named."""

import json

import pytest
import torch

from palinode.errors import CheckpointError, MismatchError
from palinode.weights import Checkpoint, LoraAdapter, profile, save_vector
from palinode.weights.arithmetic import layout_of
from palinode.weights.checkpoint import mergekit_recipe
from palinode.weights.preflight import check_fit, check_sum
from palinode.weights.tensors import by_plain, is_embedding, plain


def gpt2(models, seed):
    """A GPT-2 with bare names."""
    shapes = {
        "wte.weight": (12, 4),
        "wpe.weight": (6, 4),
        "h.0.attn.c_attn.weight": (4, 12),
        "ln_f.weight": (4,),
    }
    return {
        name: models.noise(10 * place + seed, *shape) for place, (name, shape) in enumerate(shapes.items())
    }


def prefixed(tensors, prefix):
    return {f"{prefix}{name}": value for name, value in tensors.items()}


GPT2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "tie_word_embeddings": True}

SPELLINGS = {
    "the model's own prefix": lambda name: f"transformer.{name}",
    "data parallelism": lambda name: f"module.{name}",
    "data parallelism and the own prefix": lambda name: f"module.transformer.{name}",
    "torch.compile": lambda name: f"_orig_mod.transformer.{name}",
    "torch.compile of each layer": lambda name: f"transformer.{name}".replace("h.0.", "h.0._orig_mod."),
    "fsdp": lambda name: f"_fsdp_wrapped_module.{name}".replace("h.0.", "h.0._fsdp_wrapped_module."),
    "peft": lambda name: f"base_model.model.transformer.{name}",
}


@pytest.mark.parametrize("turned", [False, True], ids=["target bare", "base bare"])
@pytest.mark.parametrize("kind", SPELLINGS)
def test_two_spellings_give_the_sum_of_one(models, kind, turned):
    ours, theirs = gpt2(models, 1), gpt2(models, 2)
    twins = [models.make(name, tensors, **GPT2) for name, tensors in (("t", ours), ("b", theirs))]
    expected = models.read(
        (twins[0] - 0.5 * (twins[1] - twins[0])).save(models.place / "e").checkpoint.folder
    )

    def spelled(tensors):
        return {SPELLINGS[kind](name): value for name, value in tensors.items()}

    target = models.make("target", spelled(ours) if turned else ours, **GPT2)
    base = models.make("base", theirs if turned else spelled(theirs), **GPT2)
    saved = (target - 0.5 * (base - target)).save(models.place / "out", along={"forget": base - target})
    found = models.read(saved.checkpoint.folder)
    assert found.keys() == target.tensors.keys()
    assert {plain(name) for name in found} == expected.keys()
    assert all(torch.equal(value, expected[plain(name)]) for name, value in found.items())
    assert saved.dose.effective["forget"] == pytest.approx(-0.5, abs=1e-6)
    assert any("base has other names for 4 tensors" in note for note in saved.notes)
    assert target.fingerprint() == Checkpoint.open(target.folder).fingerprint()

    norm = profile({"v": base - target}).norms()["v"]
    assert norm == pytest.approx(profile({"v": twins[1] - twins[0]}).norms()["v"])
    vector = save_vector(base - target, models.place / "vector")
    for place, anchor in enumerate((target, base, *twins)):
        there = (anchor + vector).save(models.place / f"with {place}").checkpoint.folder
        change = {plain(n): v - models.read(anchor.folder)[n] for n, v in models.read(there).items()}
        assert all(
            torch.allclose(value, theirs[name] - ours[name], atol=1e-5) for name, value in change.items()
        )
    other = save_vector((anchor := twins[1]) - twins[0], models.place / "other")
    assert len(layout_of((vector + other).terms)) == 4
    assert profile({"v": vector + other}).norms()["v"] == pytest.approx(2 * norm, rel=1e-5)
    twice = (anchor + vector + other).save(models.place / "twice").checkpoint.folder
    assert torch.allclose(
        models.read(twice)["ln_f.weight"], 3 * theirs["ln_f.weight"] - 2 * ours["ln_f.weight"]
    )
    with pytest.raises(MismatchError, match="mergekit adds tensors of one name"):
        mergekit_recipe(target - 0.5 * (base - target))


def test_head_and_tied_copies_are_known_under_every_spelling(models):
    tensors = gpt2(models, 1)
    copy = {
        **prefixed(tensors, "module.transformer."),
        "module.lm_head.weight": tensors["wte.weight"].clone(),
    }
    both, bare = models.make("both", copy, **GPT2), models.make("bare", tensors, **GPT2)
    assert both.tied == ("module.lm_head.weight", "module.transformer.wte.weight")
    assert both.is_second_copy("module.lm_head.weight")
    check_sum(both, [bare])
    check_sum(bare, [both])
    assert bare.spelled("lm_head.weight") == "wte.weight"
    other = models.make("other", {**copy, "module.lm_head.weight": torch.ones(12, 4)}, **GPT2)
    with pytest.raises(MismatchError, match=r"holds two different tensors, module\.lm_head\.weight and"):
        check_sum(bare, [other])


TIED = {
    "bloom": "transformer.word_embeddings.weight",
    "falcon": "transformer.word_embeddings.weight",
    "mamba": "backbone.embeddings.weight",
    "xlnet": "transformer.word_embedding.weight",
}


@pytest.mark.parametrize("kind", TIED)
def test_a_tied_head_that_lies_in_one_file_only_has_its_embedding_for_partner(models, kind):
    name, config = TIED[kind], {"model_type": kind, "tie_word_embeddings": True, "architectures": ["XLMHead"]}
    place = name.removesuffix(".weight").rpartition(".")[0]
    one, two = ({name: torch.full((6, 4), shift), f"{place}.h.0.w": torch.ones(4)} for shift in (1.0, 2.0))
    target = models.make("target", one, **config)
    base = models.make("base", two | {"lm_head.weight": two[name].clone()}, **config)
    for anchor, other, value in ((target, base, 0.5), (base, target, 2.5)):
        saved = (anchor - 0.5 * (other - anchor)).save(models.place / f"from {anchor.folder.name}")
        found = models.read(saved.checkpoint.folder)
        assert found.keys() == anchor.tensors.keys()
        assert {float(found[key][0, 0]) for key in found if "h.0" not in key} == {value}
    more = models.make("more", two | {name: torch.ones(8, 4)}, **config)
    assert check_fit(target, [more], rows="shared").shared_rows == {name: 6}


def test_rwkv_is_known_bare_and_prefixed_and_its_positions_are_no_tokens(models):
    assert plain("rwkv.blocks.0.ln1.weight") == "blocks.0.ln1.weight"
    assert plain("head.weight") == "lm_head.weight"
    assert is_embedding("rwkv.embeddings.weight")
    assert not is_embedding("bert.embeddings.position_embeddings.weight")
    assert not is_embedding("model.embed_tokens.bias")


def test_an_adapter_finds_its_layers_under_another_spelling(models):
    from safetensors.torch import save_file

    base = models.make("base", gpt2(models, 1), **GPT2)
    folder = models.place / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 1, "lora_alpha": 1, "fan_in_fan_out": true}'
    )
    stem = "base_model.model.transformer.h.0.attn.c_attn.lora_"
    save_file(
        {f"{stem}A.weight": torch.ones(1, 4), f"{stem}B.weight": torch.ones(12, 1)},
        folder / "adapter_model.safetensors",
    )
    saved = (base + LoraAdapter.open(folder)).save(models.place / "out")
    name = "h.0.attn.c_attn.weight"
    assert torch.equal(models.read(saved.checkpoint.folder)[name], models.read(base.folder)[name] + 1)


def test_names_that_two_tensors_share_stand_for_neither(models):
    twice = models.make("twice", {"norm.weight": torch.ones(2), "model.norm.weight": torch.zeros(2)})
    once = models.make("once", {"module.norm.weight": torch.ones(2)})
    assert by_plain(twice.tensors) == {}
    assert twice.find("module.norm.weight") is None
    for pair in ((twice, once), (once, twice)):
        with pytest.raises(
            MismatchError, match=r"twice holds one tensor twice, as (model\.)?norm\.weight and"
        ):
            check_fit(pair[0], [pair[1]])


# Experts


def mixture(models, seed, experts=3, inner=5, width=4):
    """(one tensor for each expert's matrix, the same fused) of a Qwen mixture."""
    stem = "model.layers.0.mlp.experts"
    shapes = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
    single = {
        f"{stem}.{k}.{kind}.weight": models.noise(seed + 10 * k + place, *shape)
        for k in range(experts)
        for place, (kind, shape) in enumerate(shapes.items())
    }
    pick = [[single[f"{stem}.{k}.{kind}.weight"] for kind in shapes] for k in range(experts)]
    fused = {
        f"{stem}.gate_up_proj": torch.stack([torch.cat(own[:2]) for own in pick]),
        f"{stem}.down_proj": torch.stack([own[2] for own in pick]),
    }
    shared = {"model.layers.0.mlp.gate.weight": models.noise(seed + 99, experts, width)}
    return {**single, **shared}, {**fused, **shared}


def as_mixtral(single):
    for ours, theirs in {
        "gate_proj": "w1",
        "up_proj": "w3",
        "down_proj": "w2",
        ".mlp.": ".block_sparse_moe.",
    }.items():
        single = {name.replace(ours, theirs): value for name, value in single.items()}
    return single


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("spell", [dict, as_mixtral], ids=["qwen", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_experts_and_single_ones_are_one_model(models, spell, shards, dtype):
    (one, one_fused), (two, two_fused) = (
        [{name: value.to(dtype) for name, value in form.items()} for form in mixture(models, seed)]
        for seed in (1, 500)
    )
    target, base = models.make("target", one), models.make("base", two)
    fused = models.make("fused", two_fused)
    fused_target = models.make("fused target", one_fused)
    single = models.make("single", spell(two), shards=shards)
    for name, anchor, other in (("a", target, fused), ("b", fused_target, single)):
        expected = anchor - 0.5 * ((base if name == "a" else fused) - anchor)
        want = models.read(expected.save(models.place / f"{name} wanted").checkpoint.folder)
        saved = (anchor - 0.5 * (other - anchor)).save(models.place / name)
        found = models.read(saved.checkpoint.folder)
        assert found.keys() == want.keys()
        assert all(torch.equal(found[tensor], want[tensor]) for tensor in want)
    vector = save_vector(fused - fused_target, models.place / "vector")
    with pytest.raises(MismatchError, match="put together otherwise"):
        check_sum(target, [], [vector])


def test_experts_that_are_turned_or_lost_are_named(models):
    single, fused = mixture(models, 1)
    target = models.make("target", single)
    turned = {name: value.mT.contiguous() if value.ndim == 3 else value for name, value in fused.items()}
    more = {
        name: torch.cat([value, value[:1]]) if value.ndim == 3 else value for name, value in fused.items()
    }
    for name, other in (("turned", turned), ("more", more)):
        found = models.make(name, other)
        for pair in ((target, found), (found, target)):
            with pytest.raises(MismatchError, match="disagree on"):
                check_fit(pair[0], [pair[1]])
    del single["model.layers.0.mlp.experts.1.up_proj.weight"]
    with pytest.raises(MismatchError, match="keeps its experts in fused tensors of another layout"):
        check_fit(models.make("lost", single), [models.make("fused", fused)])


# Real causes


def test_buffers_of_old_checkpoints_stay_the_targets(models):
    own = {"model.embed_tokens.weight": torch.ones(6, 4), "model.norm.weight": torch.ones(4)}
    old = own | {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
        "model.layers.0.attn.bias": torch.ones(1, 1, 4, 4),
        "model.layers.0.attn.masked_bias": torch.tensor(float("-inf")),
    }
    target, base = (models.make(n, t, tie_word_embeddings=True) for n, t in (("target", old), ("base", own)))
    for anchor, other in ((target, base), (base, target)):
        saved = (anchor + 2.0 * (other - anchor)).save(
            models.place / f"from {anchor.folder.name}", dtype="bfloat16"
        )
        found = models.read(saved.checkpoint.folder)
        assert found.keys() == anchor.tensors.keys()
        assert all(found[name].dtype == torch.float32 for name in found.keys() - own.keys())
    assert saved.dose.unreached_share == 0


@pytest.mark.parametrize(
    ("kind", "tied"), [("gemma", True), ("gpt2", True), ("llama", False), ("gemma3_text", True)]
)
def test_a_config_that_is_silent_ties_as_its_architecture_does(models, kind, tied):
    tensors = {"model.embed_tokens.weight": torch.ones(6, 4), "model.norm.weight": torch.ones(4)}
    options = {"model_type": kind, "tie_word_embeddings": None, "architectures": ["XForCausalLM"]}
    headless = models.make("headless", tensors, **options)
    assert (headless.tied is not None) == tied
    whole = models.make("whole", tensors | {"lm_head.weight": torch.ones(6, 4)}, **options)
    if tied:
        assert whole.tied == ("lm_head.weight", "model.embed_tokens.weight")
        check_fit(headless, [whole])
        return
    for pair in ((headless, whole), (whole, headless)):
        with pytest.raises(CheckpointError, match=r"headless is incomplete: its output head is not tied"):
            check_fit(pair[0], [pair[1]])


def test_an_adapter_that_was_never_merged_is_named(models):
    one = {"model.layers.0.q_proj.weight": torch.ones(2, 2)}
    two = {
        "model.layers.0.q_proj.base_layer.weight": torch.ones(2, 2),
        "model.layers.0.q_proj.lora_A.default.weight": torch.ones(1, 2),
    }
    with pytest.raises(MismatchError, match="an adapter that is not merged"):
        check_fit(models.make("one", one), [models.make("two", two)])


def test_shapes_of_layers_do_not_blame_the_tokenizer(models):
    pair = [models.make(f"{n}", {"model.layers.0.up.weight": torch.ones(n, 2)}) for n in (3, 4)]
    with pytest.raises(MismatchError) as error:
        check_fit(pair[0], pair[1:])
    assert "tokenizer" not in str(error.value)


def test_a_sum_asks_for_tokens_too(models):
    pair = [models.make(name, {"w": torch.ones(2)}) for name in ("target", "base")]
    for number, checkpoint in enumerate(pair):
        vocabulary = json.dumps({"model": {"vocab": {"a": number}}})
        (checkpoint.folder / "tokenizer.json").write_text(vocabulary)
    with pytest.raises(MismatchError, match="give other numbers to 1 tokens"):
        check_sum(pair[0], pair[1:])

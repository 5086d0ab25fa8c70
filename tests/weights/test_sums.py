"""What `save` writes: θ_D − α(θ_1 − θ_0) + β(θ_2 − θ_0), tensor by tensor."""

import os
import shutil

import numpy as np
import pytest
import torch

from palinode.errors import CheckpointError, InputError, MismatchError
from palinode.weights import Checkpoint, save
from palinode.weights.arithmetic import SLICE, Evaluator, Settings, formula, map_slices, slices
from palinode.weights.tensors import Files

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


# The spec's worked example (spec/msa.md §2)


@pytest.mark.parametrize(
    ("alpha", "beta", "expected"),
    [
        (1.0, 0.0, (1.2, -1.3, 0.2)),
        (1.5, 0.0, (1.0, -1.2, 0.2)),
        (1.0, 1.0, (1.3, -0.7, 0.0)),
        (2.0, 0.5, (0.85, -0.8, 0.1)),
    ],
)
def test_worked_example_of_the_spec_in_float64(models, alpha, beta, expected):
    values = {
        "theta_0": (1, -2, 0.5),
        "target": (1.6, -1.5, 0.2),
        "theta_1": (1.4, -2.2, 0.5),
        "theta_2": (1.1, -1.4, 0.3),
    }
    base, target, theta_1, theta_2 = (
        models.make(name, {"w": torch.tensor(row, dtype=torch.float64)}) for name, row in values.items()
    )
    unlearned = target - alpha * (theta_1 - base) + beta * (theta_2 - base)
    unlearned.save(models.place / "out")
    found = models.read(models.place / "out")["w"]
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, abs=1e-15)


# Linearity


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zero_scale_returns_the_target_bit_for_bit(models, dtype):
    hard = torch.tensor([-0.0, 0.0, 1e-7, -6e-8, 0.1, -65504.0, 3e-5, 1 / 3], dtype=torch.float64)
    weights = {"w": torch.cat([hard.to(dtype), models.noise(1, 100, dtype=torch.float64).to(dtype)])}
    target = models.make("target", weights)
    base = models.make("base", {"w": weights["w"] * 0.5})
    saved = (target - 0.0 * (base - target) + 0.0 * (target - base)).save(models.place / "out")
    assert models.same_model(models.place / "out", target.folder)
    assert saved.dose.moved_share == 0
    assert saved.checkpoint.fingerprint() == target.fingerprint()


def test_saving_a_checkpoint_as_it_is_copies_it(models, four):
    save(four[0], models.place / "out")
    assert models.same_model(models.place / "out", four[0].folder)


def test_target_equal_to_theta_1_at_alpha_1_gives_theta_0_to_one_rounding(models, four):
    _, base, theta_1, _ = four
    target = Checkpoint.open(shutil.copytree(theta_1.folder, models.place / "same as theta_1"))
    (target - 1.0 * (theta_1 - base)).save(models.place / "out")
    found, expected, start = (
        models.read(folder) for folder in (models.place / "out", base.folder, target.folder)
    )
    for name, values in expected.items():
        spacing = torch.maximum(values.abs(), start[name].abs()) * 2.0**-23
        assert ((found[name] - values).abs() <= spacing).all()


def test_target_that_is_theta_1_gives_theta_0_bit_for_bit(models, four):
    _, base, theta_1, _ = four
    (theta_1 - (theta_1 - base)).save(models.place / "out")
    assert models.same_model(models.place / "out", base.folder)


def test_float32_sum_is_the_float64_sum_to_a_rounding_or_two(models, four):
    target, base, theta_1, theta_2 = four
    (target - 0.7 * (theta_1 - base) + 0.3 * (theta_2 - base)).save(models.place / "out")
    found = models.read(models.place / "out")
    wide = [{name: v.double() for name, v in models.read(c.folder).items()} for c in four]
    for name, values in found.items():
        d, zero, one, two = (state[name] for state in wide)
        exact = d - 0.7 * (one - zero) + 0.3 * (two - zero)
        assert ((values.double() - exact).abs() <= exact.abs().clamp(min=1e-3) * 2.0**-23).all()


def test_scales_add(models, four):
    target, base, theta_1, _ = four
    vector = theta_1 - base
    (target - 0.25 * vector - 0.5 * vector).save(models.place / "twice")
    (target - 0.75 * vector).save(models.place / "once")
    assert models.same_model(models.place / "twice", models.place / "once")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_order_of_terms_does_not_matter(models, four, dtype):
    target, base, theta_1, theta_2 = four
    forget, retain = theta_1 - base, theta_2 - base
    formulas = [
        target - 0.75 * forget + 0.5 * retain,
        target + 0.5 * retain - 0.75 * forget,
        target + (0.5 * retain - 0.75 * forget),
        target - (0.75 * forget - 0.5 * retain),
        target + 0.5 * theta_2_minus(target, retain, base) - 0.75 * forget,
    ]
    for number, wanted in enumerate(formulas):
        wanted.save(models.place / f"out{number}", dtype=dtype)
        assert models.same_model(models.place / f"out{number}", models.place / "out0")


def theta_2_minus(target, retain, base):
    """The retain vector once more, by way of the target."""
    return (target + retain - base) - (target - base)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.5), (2.0, 1.0), (0.75, 0.5)])
def test_folder_names_do_not_matter(models, alpha, beta):
    # At α = 2β two coefficients are equal; nothing but their folders' names could put them in order.
    for place, names in {"first": "abcd", "second": "dcba", "third": "badc"}.items():
        target, base, theta_1, theta_2 = (
            models.make(f"{place}/{name}", {"w": models.noise(seed, 2000)}) for seed, name in enumerate(names)
        )
        point = target - alpha * (theta_1 - base) + beta * (theta_2 - base)
        point.save(models.place / f"out {place}")
        assert models.same_model(models.place / f"out {place}", models.place / "out first")


def test_a_large_sum_of_large_weights_cancels_without_loss(models):
    # 1000 + 1e-4: the differences are exact, though the products of scale and weight are not.
    start = torch.full((64,), 1000.0)
    base = models.make("base", {"w": start})
    theta = models.make("theta", {"w": start + 2.0**-14})
    target = models.make("target", {"w": start + 1.0})
    (target - 0.3 * (theta - base) + 0.3 * (theta - base)).save(models.place / "none")
    (target + 4.0 * (theta - base)).save(models.place / "four")
    assert torch.equal(models.read(models.place / "none")["w"], start + 1.0)
    assert torch.equal(models.read(models.place / "four")["w"], start + 1.0 + 2.0**-12)


# What is read


def test_a_zero_coefficient_checkpoint_is_never_opened(models, four):
    target, base, theta_1, theta_2 = four
    for file in theta_2.folder.iterdir():
        file.unlink()
    theta_2.folder.rmdir()
    point = target - 1.0 * (theta_1 - base) + 0.0 * (theta_2 - base)
    point.save(models.place / "out", along={"forget": -(theta_1 - base)})
    assert (models.place / "out" / "model.safetensors").exists()


def test_a_checkpoint_that_is_gone_when_it_is_needed_says_so(models, four):
    target, base, theta_1, _ = four
    (theta_1.folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"theta_1/model\.safetensors is not what it was"):
        (target - (theta_1 - base)).save(models.place / "out")


@pytest.mark.parametrize("change", [-600, +8])
def test_a_file_that_changed_after_it_was_opened_says_so(models, four, change):
    # Its tensors no longer lie where the header was read to say: the sum would be of other bytes.
    target, base, theta_1, _ = four
    file = theta_1.folder / "model.safetensors"
    os.truncate(file, file.stat().st_size + change)
    with pytest.raises(CheckpointError, match="open it again"):
        (target - (theta_1 - base)).save(models.place / "out")
    with pytest.raises(CheckpointError, match="open it again"):
        theta_1.fingerprint()
    assert not (models.place / "out").exists()


def test_a_file_that_is_cut_off_while_it_is_read_says_so(four):
    file = four[0].folder / "model.safetensors"
    info = four[0].tensors["model.norm.weight"]
    with Files() as files:
        out = memoryview(bytearray(info.nbytes))
        info.read(files, 0, out)
        os.truncate(file, info.offset + 7)
        with pytest.raises(CheckpointError, match=rf"ended at byte {info.offset + 7}; it was cut off"):
            info.read(files, 0, out)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_value_that_is_not_finite_is_refused_with_the_tensors_name(models, bad, which):
    states = [{"fine": torch.ones(3), "model.norm.weight": torch.ones(5)} for _ in range(3)]
    states[which]["model.norm.weight"][3] = bad
    target, base, theta = (models.make(name, states[i]) for i, name in enumerate("tbf"))
    with pytest.raises(
        CheckpointError, match=r"holds [01] NaN and [01] infinite values in 1 tensors \(first: model\.norm\.w"
    ) as error:
        (target - 0.5 * (theta - base)).save(models.place / "out")
    assert str((target, base, theta)[which].folder) in str(error.value)
    assert sorted(path.name for path in models.place.iterdir()) == ["b", "f", "t"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_sum_too_large_for_its_dtype_is_refused(models, dtype, rounding):
    largest = {"float16": 65504.0, "bfloat16": 3.38e38, "float32": 3.38e38}[dtype]
    target = models.make("target", {"w": torch.tensor([1.0, largest])})
    base = models.make("base", {"w": torch.tensor([1.0, largest / 2])})
    with pytest.raises(InputError, match=f"values in w that {dtype} cannot hold; use smaller scales"):
        (target + 1.0 * (target - base)).save(models.place / "out", dtype=dtype, rounding=rounding)


# Tied output heads


def tied_states(models, *, copies=(False, False, False), scale=0.02, dtype=torch.float32):
    """Three states with tied heads; `copies` tells which of them have the head in the file as well."""
    made = []
    for number, (name, copy) in enumerate(zip(("target", "base", "theta_1"), copies, strict=True)):
        embedding = (models.noise(1, 40, 8) + models.noise(2 + number, 40, 8, scale=scale)).to(dtype)
        head = {HEAD: embedding.clone()} if copy else {}
        tensors = {EMBEDDING: embedding, "model.norm.weight": torch.ones(8, dtype=dtype), **head}
        made.append(models.make(name, tensors, tie_word_embeddings=True))
    return made


@pytest.mark.parametrize(
    "copies", [(a, b, c) for a in (False, True) for b in (False, True) for c in (False, True)]
)
def test_tied_heads_are_moved_once_however_the_files_hold_them(models, copies):
    target, base, theta_1 = tied_states(models, copies=copies)
    vector = theta_1 - base
    saved = (target - 0.75 * vector).save(models.place / "out", dtype="bfloat16", along={"forget": -vector})
    found = models.read(models.place / "out")
    assert (HEAD in found) == copies[0]
    d, zero, one = (models.read(state.folder)[EMBEDDING] for state in (target, base, theta_1))
    exact = d - 0.75 * (one - zero)
    assert torch.allclose(found[EMBEDDING].float(), exact, rtol=2**-7, atol=0)
    if copies[0]:
        assert models.same_bits(found[HEAD], found[EMBEDDING])
    assert saved.checkpoint.tied == (HEAD, EMBEDDING)
    assert saved.dose.weights == 40 * 8 + 8, "a tied tensor counts once"


def test_equal_copies_stay_equal_even_where_no_config_calls_them_tied(models):
    # Some model classes tie by default, and then the config need not say it.
    target, base, theta_1 = (
        models.make(f"{state.folder.name} again", models.read(state.folder))
        for state in tied_states(models, copies=(True, True, True))
    )
    assert target.tied is None
    (target - 0.75 * (theta_1 - base)).save(models.place / "out", dtype="bfloat16")
    found = models.read(models.place / "out")
    assert models.same_bits(found[HEAD], found[EMBEDDING])


def test_untied_heads_move_by_themselves(models, four):
    target, base, theta_1, _ = four
    assert target.tied is None
    (target - 0.5 * (theta_1 - base)).save(models.place / "out")
    d, zero, one, found = (
        models.read(folder)[HEAD]
        for folder in (target.folder, base.folder, theta_1.folder, models.place / "out")
    )
    assert torch.allclose(found, d - 0.5 * (one - zero), rtol=1e-6)


def test_mixed_tying_is_refused(models, four):
    target = four[0]
    tensors = models.read(target.folder)
    del tensors[HEAD]
    tied = models.make("tied", tensors, tie_word_embeddings=True)
    for first, second in ((target, tied), (tied, target)):
        with pytest.raises(MismatchError, match=r"tied to the embedding in .*/tied and is not in .*/target"):
            (first - 0.5 * (second - first)).save(models.place / "out")


@pytest.mark.parametrize("which", [0, 1])
def test_a_head_that_the_config_calls_tied_but_differs_is_refused(models, which):
    # transformers 5 does not tie such a pair, whatever the config says.
    target, base, theta_1 = tied_states(models, copies=(which == 0, True, False))
    folder = (target, base)[which].folder
    tensors = models.read(folder)
    tensors[HEAD][3, 3] += 1
    shutil.rmtree(folder)
    models.write(folder.name, tensors, tie_word_embeddings=True)
    with pytest.raises(MismatchError, match=r"holds two different tensors.*set tie_word_embeddings") as error:
        (target - 0.5 * (theta_1 - base)).save(models.place / "out")
    assert str(folder) in str(error.value)


def test_a_head_of_another_size_than_its_tied_embedding_is_refused(models):
    tensors = {EMBEDDING: torch.ones(6, 4), HEAD: torch.ones(5, 4)}
    target = models.make("target", tensors, tie_word_embeddings=True)
    with pytest.raises(MismatchError, match="two different tensors"):
        save(target, models.place / "out")


# Mismatches


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t | {"model.norm.weight": torch.ones(9)},
            r"1 of 4 tensors \(model.norm.weight: 8 against 9",
        ),
        (lambda t: t | {"extra": torch.ones(1)}, r"extra is missing in .*/target"),
        (
            lambda t: {n: v for n, v in t.items() if n != "model.norm.weight"},
            r"norm.weight is missing in .*/other",
        ),
        (lambda t: t | {"model.norm.weight": torch.ones(8, dtype=torch.int32)}, "F32 against I32"),
        (lambda t: t | {"model.norm.weight": torch.tensor(1.0)}, "8 against scalar"),
    ],
)
def test_models_that_do_not_fit_together_say_where(models, four, change, words):
    target = four[0]
    other = models.make("other", change(models.read(target.folder)))
    with pytest.raises(MismatchError, match=words):
        (target - (other - target)).save(models.place / "out")
    assert not (models.place / "out").exists()


@pytest.mark.parametrize("key", ["model_type", "num_attention_heads", "num_key_value_heads"])
def test_models_of_one_shape_and_two_architectures_are_refused(models, four, key):
    target = models.make("target 8", models.read(four[0].folder), **{key: "8"})
    other = models.make("other 4", models.read(four[1].folder), **{key: "4"})
    with pytest.raises(
        MismatchError, match=f"not states of one model: {key} is 8 in the one and 4 in the other"
    ):
        (target - (other - four[1])).save(models.place / "out")


# Dtypes, shapes, names


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_dtype_changes_floating_tensors_and_config(models, dtype):
    tensors = {
        "w": torch.arange(-7, 8).view(5, 3) / 8 + 1 / 1024,
        "steps": torch.tensor([1, 2**40]),
        "mask": torch.tensor([True, False]),
    }
    target = models.make("target", tensors, torch_dtype="float32", other="kept")
    base = models.make("base", tensors | {"w": tensors["w"] + 0.5, "steps": torch.tensor([7, 7])})
    saved = (target - 0.5 * (base - target)).save(models.place / "out", dtype=dtype, rounding="nearest")
    found = models.read(models.place / "out")
    assert found["w"].dtype == getattr(torch, dtype)
    assert torch.equal(found["w"], (tensors["w"].double() - 0.25).to(getattr(torch, dtype)))
    assert torch.equal(found["steps"], tensors["steps"])
    assert torch.equal(found["mask"], tensors["mask"])
    config = models.config(models.place / "out")
    assert config["dtype"] == dtype
    assert "torch_dtype" not in config
    assert config["other"] == "kept"
    assert saved.checkpoint.nbytes == 15 * getattr(torch, dtype).itemsize + 16 + 2


def test_without_dtype_the_config_is_copied_byte_for_byte(models, four):
    save(four[0], models.place / "out")
    assert (models.place / "out/config.json").read_bytes() == (four[0].folder / "config.json").read_bytes()


@pytest.mark.parametrize("dtype", ["bf16", "int8", "torch.float32", ""])
def test_unknown_dtype_says_which_there_are(models, four, dtype):
    with pytest.raises(InputError, match="choose one of float64, float32, float16, bfloat16"):
        (four[0] + (four[1] - four[2])).save(models.place / "out", dtype=dtype)


def test_unknown_rounding_says_which_there_are(models, four):
    with pytest.raises(
        InputError, match="no rounding 'Nearest' for weights; choose one of auto, nearest, stochastic"
    ):
        (four[0] + (four[1] - four[2])).save(models.place / "out", rounding="Nearest")


def test_dtypes_are_read_tensor_by_tensor(models):
    # spec/msa.md P14: a base model in float32 under a target in bfloat16.
    zero, one = models.noise(1, 50), models.noise(1, 50) + models.noise(2, 50, scale=1e-3)
    d = models.noise(1, 50, dtype=torch.bfloat16)
    target = models.make("target", {"a": d, "b": d.float(), "c": d.half()})
    base = models.make("base", {"a": zero, "b": zero.bfloat16(), "c": zero.double()})
    theta_1 = models.make("theta_1", {"a": one.double(), "b": one.half(), "c": one})
    (target - 2.0 * (theta_1 - base)).save(models.place / "out", rounding="nearest")
    found, start, end, states = (
        models.read(folder) for folder in (models.place / "out", base.folder, theta_1.folder, target.folder)
    )
    for name, values in found.items():
        assert values.dtype == states[name].dtype
        exact = states[name].double() - 2.0 * (end[name].double() - start[name].double())
        spacing = {"a": 2.0**-8, "b": 2.0**-22, "c": 2.0**-11}[name]
        assert ((values.double() - exact).abs() <= exact.abs().clamp(min=0.01) * spacing).all()


def test_float64_models_keep_what_float32_would_lose(models):
    tiny = torch.tensor([1.0, 1e300, 1e-300], dtype=torch.float64)
    base = models.make("base", {"w": tiny})
    theta_1 = models.make("theta_1", {"w": tiny * (1 + 2.0**-40)})
    (base + 1.0 * (theta_1 - base)).save(models.place / "out")
    assert models.same_model(models.place / "out", theta_1.folder)


def test_float16_sums_round_up_and_down_through_subnormals_and_signs(models):
    start = torch.tensor([1e-7, -1e-7, 5e-5, -5e-5, -0.0, 1.0]).half().repeat(1000)
    target = models.make("target", {"w": start})
    base = models.make("base", {"w": torch.zeros(6000)})
    theta_1 = models.make("theta_1", {"w": torch.full((6000,), 2.0**-26)})  # a quarter of the spacing
    (target + (theta_1 - base)).save(models.place / "out")
    found = models.read(models.place / "out")["w"]
    moved = (found.double() - start.double()).view(1000, 6) * 2.0**24
    assert set(moved[:, :5].unique().tolist()) == {0.0, 1.0}
    assert ((moved[:, :5].mean(dim=0) - 0.25).abs() < 5 * (0.25 * 0.75 / 1000) ** 0.5).all()


def test_scalars_empty_tensors_and_odd_names_are_kept(models):
    def tensors(shift):
        return {
            "scalar": torch.tensor(1.5 + shift),
            "empty": torch.empty(0, 7),
            'θ "quoted" \\ name/with spaces\n': torch.ones(3) + shift,
            "名前": torch.zeros(1) + shift,
            "": torch.ones(2, 2, 2) + shift,
            "flag": torch.tensor(True),
            "none": torch.empty(0, dtype=torch.int64),
            "odd": torch.ones(3, dtype=torch.int8),
        }

    target, base = models.make("target", tensors(0.0)), models.make("base", tensors(0.25))
    for dtype in (None, "float64", "float16"):
        out = models.place / f"out {dtype}"
        saved = (target - 2.0 * (base - target)).save(out, dtype=dtype)
        found = models.read(out)
        assert found.keys() == tensors(0).keys()
        for name, values in tensors(-0.5).items():
            assert found[name].shape == values.shape
            assert torch.equal(found[name].double(), values.double())
        assert saved.dose.moved_share == 1
        saved.checkpoint.fingerprint()


def test_a_model_without_parameters_is_a_model(models):
    target, base = models.make("target", {}), models.make("base", {})
    saved = (target - 0.5 * (base - target)).save(models.place / "out")
    assert models.read(models.place / "out") == {}
    assert (saved.dose.weights, saved.dose.moved_share, saved.dose.relative_error) == (0, 0.0, 0.0)


# Layout of the files


def test_a_sharded_target_gives_the_same_shards_and_index(models):
    tensors = {f"model.layers.{i}.w": models.noise(i, 6, 5) for i in range(7)}
    target = models.make("target", tensors, shards=3)
    base = models.make("base", {name: values * 1.01 for name, values in tensors.items()}, shards=2)
    theta_1 = models.make("theta_1", {name: values * 0.99 for name, values in tensors.items()})
    saved = (target - 0.5 * (theta_1 - base)).save(models.place / "out", dtype="bfloat16")
    names = sorted(path.name for path in target.folder.iterdir())
    assert sorted(path.name for path in (models.place / "out").iterdir()) == [*names, "weights.json"]
    for name, info in saved.checkpoint.tensors.items():
        assert info.file.name == target.tensors[name].file.name
    index = saved.checkpoint.folder / "model.safetensors.index.json"
    mapped = Checkpoint.open(saved.checkpoint.folder).tensors
    assert f'"total_size": {7 * 30 * 2}' in index.read_text()
    assert {name: info.file.name for name, info in mapped.items()} == {
        name: target.tensors[name].file.name for name in tensors
    }


def test_a_model_in_one_file_gives_one_file(models, four):
    save(four[0], models.place / "out")
    assert sorted(path.name for path in (models.place / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "weights.json",
    ]


def test_an_index_over_one_file_gives_one_file(models, four):
    folder = models.write("target in one shard", models.read(four[0].folder))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    weight_map = ", ".join(f'"{name}": "model-00001-of-00001.safetensors"' for name in four[0].tensors)
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{weight_map}}}}}')
    save(Checkpoint.open(folder), models.place / "out")
    assert sorted(path.name for path in (models.place / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "weights.json",
    ]
    assert models.same_model(models.place / "out", folder)


def test_tokenizer_and_generation_config_of_the_target_come_along(models, four):
    target, base, *_ = four
    kept = {
        "generation_config.json": "{}",
        "tokenizer.json": '{"model": {"vocab": {"a": 1}}}',
        "tokenizer_config.json": "{}",
        "chat_template.jinja": "{{ x }}",
        "special_tokens_map.json": "{}",
        "vocab.json": "{}",
        "merges.txt": "a b",
        "tokenizer.model": "bytes",
        "additional_chat_templates/tools.jinja": "{{ y }}",
    }
    left = {"README.md": "of the target", "training.json": "[]", "optimizer.pt": "x"}
    for name, text in {**kept, **left}.items():
        (target.folder / name).parent.mkdir(exist_ok=True)
        (target.folder / name).write_text(text)
    (base.folder / "tokenizer.json").write_text('{"model": {"vocab": {"b": 2}}}')
    (target - 0.5 * (base - target)).save(models.place / "out")
    out = models.place / "out"
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert found == {*kept, "config.json", "model.safetensors", "weights.json"}
    assert {name: (out / name).read_text() for name in kept} == kept


# The bytes depend on nothing but the weights, the formula and the seed


def large_states(models, shards):
    """One tensor of more than one slice, and some small ones."""
    shapes = {"large": (SLICE // 64 + 9, 70), "a": (33,), "b": (4, 5), "c": (1,)}
    return [
        models.make(
            f"{name} in {shards}",
            {
                n: models.noise(i, *shape) * (1 + 0.01 * k)
                for i, (n, shape) in enumerate(shapes.items(), start=1)
            },
            shards=shards,
        )
        for k, name in enumerate(("target", "base", "theta_1"))
    ]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_shards_do_not_change_the_bytes(models, dtype):
    results = []
    for shards in (1, 3):
        target, base, theta_1 = large_states(models, shards)
        saved = (target - 0.7 * (theta_1 - base)).save(models.place / f"out{shards}", dtype=dtype)
        results.append(saved)
    assert models.same_model(models.place / "out1", models.place / "out3")
    assert results[0].checkpoint.fingerprint() == results[1].checkpoint.fingerprint()


@pytest.mark.parametrize("size", [1000, 4097, SLICE])
@pytest.mark.parametrize("workers", [1, 3])
def test_slice_size_and_threads_do_not_change_the_bytes(models, size, workers):
    target, base, theta_1 = large_states(models, 1)
    point = target - 0.7 * (theta_1 - base)
    point.save(models.place / "out", dtype="bfloat16", rounding="stochastic", seed=5)
    built = {name: torch.empty(info.size, dtype=torch.bfloat16) for name, info in target.tensors.items()}

    def start():
        chosen = Settings(dtype="bfloat16", rounding="stochastic", seed=5)
        evaluator = Evaluator(formula(point.anchor, point.terms), chosen, files)

        def work(part):
            stored = torch.from_numpy(evaluator.evaluate(part)[0].view(np.int16)).view(torch.bfloat16)
            built[part.info.name][part.start : part.start + part.count] = stored

        return work

    with Files() as files:
        map_slices(slices(target, size=size), start, workers=workers)
    for name, values in models.read(models.place / "out").items():
        assert models.same_bits(built[name], values.flatten())


def test_the_same_call_gives_the_same_bytes_and_another_seed_others(models):
    target, base, theta_1 = large_states(models, 1)
    point = target - 0.7 * (theta_1 - base)
    doses = [
        point.save(
            models.place / f"out{i}",
            dtype="bfloat16",
            rounding="stochastic",
            seed=seed,
            along={"f": base - theta_1},
        ).dose
        for i, seed in enumerate((0, 0, 1))
    ]
    assert models.same_model(models.place / "out0", models.place / "out1")
    assert not models.same_model(models.place / "out0", models.place / "out2")
    assert doses[0] == doses[1], "the dose too, to the last digit"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_no_direction_moves_is_the_target_s_bit_for_bit(models, dtype):
    """−0.7x + 0.3x + 0.4x is not always 0 in floating point, and −0 + 0 is 0: a tower stays as it is."""
    tower, own = models.noise(1, 300, 500).to(dtype), models.noise(2, 300, 500).to(dtype)
    own[0, :2] = -0.0
    tower[0, 0] = 0.0
    target, base, theta_1, theta_2 = (
        models.make(name, {"w": models.noise(seed, 50).to(dtype), "tower": values})
        for seed, (name, values) in enumerate({"d": own, "0": tower, "1": tower, "2": tower}.items())
    )
    forget, retain = theta_1 - base, theta_2 - base
    saved = save(
        target - 0.7 * forget + 0.3 * retain,
        models.place / "out",
        rounding="nearest",
        along={"forget": -1.0 * forget},
    )
    bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
    found = models.read(models.place / "out")
    assert torch.equal(found["tower"].view(bits), own.view(bits))
    assert not torch.equal(found["w"], models.read(target.folder)["w"])
    assert saved.dose.effective["forget"] == pytest.approx(0.7, abs=0.5)

"""What `save` can be asked for besides a formula, and what it says of its own accord."""

import json
import math

import numpy as np
import pytest
import torch

from palinode.errors import CheckpointError, InputError, MismatchError
from palinode.weights import Checkpoint, save
from palinode.weights.store import read_manifest
from palinode.weights.vectors import StoredVector, save_vector

EMBEDDING = "model.embed_tokens.weight"


def two(models, step, *, dtype=torch.bfloat16, size=(300, 400)):
    """A target on the grid of its dtype, and a vector of equal steps."""
    start = models.noise(1, *size, scale=0.02, dtype=dtype)
    base = models.make("base", {"model.layers.0.w": torch.zeros(size)})
    theta = models.make("theta", {"model.layers.0.w": torch.full(size, step)})
    return models.make("target", {"model.layers.0.w": start}), theta - base


def test_auto_is_stochastic_where_nearest_loses_the_dose_and_says_so(models):
    target, vector = two(models, 1e-5)
    saved = save(target - vector, models.place / "out", along={"forget": -vector})
    assert saved.rounding == "stochastic"
    assert saved.dose.effective["forget"] == pytest.approx(1, abs=0.05)
    (note,) = saved.notes
    assert note.startswith("rounded stochastically (seed 0): to nearest, about ")
    told = read_manifest(models.place / "out").content
    nearest = save(target - vector, models.place / "near", along={"f": -vector}, rounding="nearest").dose
    assert told["nearest_would_deliver"] == pytest.approx(nearest.effective["f"], abs=0.1)
    assert told["rounding"]["used"] == "stochastic"


def test_auto_is_to_nearest_where_that_keeps_the_dose(models):
    target, vector = two(models, 0.25)
    saved = save(target - vector, models.place / "out", along={"forget": -vector})
    assert (saved.rounding, saved.notes) == ("nearest", ())
    save(target - vector, models.place / "near", rounding="nearest")
    assert models.same_model(models.place / "out", models.place / "near")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_auto_is_to_nearest_where_the_output_is_wide(models, dtype):
    target, vector = two(models, 1e-5)
    assert save(target - vector, models.place / "out", dtype=dtype).rounding == "nearest"


def test_nothing_to_change_is_nothing_to_round(models):
    target, vector = two(models, 0.0)
    assert save(target - vector, models.place / "out", along={"forget": vector}).rounding == "nearest"


def test_a_dose_that_does_not_arrive_is_warned_of(models):
    target, vector = two(models, 1e-5)
    saved = save(target - 0.5 * vector, models.place / "out", along={"forget": -vector}, rounding="nearest")
    share = saved.dose.effective["forget"] / 0.5
    assert share < 0.95
    assert saved.notes == (
        f"only {share:.0%} of the forget scale 0.5 arrived ({saved.dose.effective['forget']:.4g}): its steps "
        "are smaller than the output's dtype can hold; use stochastic rounding, or float32",
    )


def test_of_a_vector_of_zeros_all_arrives(models):
    target, vector = two(models, 0.0)
    saved = save(target - 0.5 * vector, models.place / "out", along={"forget": -vector}, rounding="nearest")
    assert saved.notes == ()


def test_the_dose_is_told_for_every_layer(models):
    names = [EMBEDDING, "model.layers.0.w", "model.layers.1.w", "model.norm.weight", "lm_head.weight"]
    target = models.make("target", {name: torch.ones(50, 40) for name in names})
    base = models.make("base", {name: torch.zeros(50, 40) for name in names})
    theta = models.make("theta", {name: torch.full((50, 40), float(i)) for i, name in enumerate(names)})
    dose = save(target - 0.5 * (theta - base), models.place / "out", along={"f": base - theta}).dose
    assert list(dose.parts) == ["embedding", "layer 0", "layer 1", "rest", "head"]
    moved = {name: part.moved_share for name, part in dose.parts.items()}
    assert moved == {"embedding": 0.0, "layer 0": 1.0, "layer 1": 1.0, "rest": 1.0, "head": 1.0}
    effective = {name: part.effective["f"] for name, part in dose.parts.items()}
    assert effective == pytest.approx({**dict.fromkeys(effective, 0.5), "embedding": 0.0})


def test_large_tensors_are_measured_by_sample_and_nearly_as_well(models):
    shape = (1100, 1000)
    target = models.make("target", {"w": models.noise(1, *shape, scale=0.02).bfloat16()})
    base = models.make("base", {"w": torch.zeros(shape)})
    theta = models.make("theta", {"w": models.noise(2, *shape, scale=1e-4)})
    vector = theta - base
    dose = save(target - 0.7 * vector, models.place / "out", along={"f": -vector}, rounding="stochastic").dose
    change = (
        models.read(models.place / "out")["w"].double() - models.read(target.folder)["w"].double()
    ).ravel()
    step = -models.read(theta.folder)["w"].double().ravel()
    whole = float(change @ step / (step @ step))
    assert dose.weights == 1_100_000
    assert dose.effective["f"] == pytest.approx(whole, abs=0.02)
    assert dose.effective["f"] != whole, "it is a sample"
    assert dose.moved_share == pytest.approx(float((change != 0).double().mean()), abs=0.01)


def test_sums_can_be_formed_in_float64(models):
    target = models.make("target", {"w": torch.full((64,), 1.0)})
    base = models.make("base", {"w": torch.full((64,), 1.0)})
    states = {"w": torch.full((64,), 1.0 + 2**-20)}
    theta_1, theta_2 = models.make("theta_1", states), models.make("theta_2", states)
    point = target + 3 * (theta_1 - base) - 2.9999999 * (theta_2 - base)
    exact = np.float32(1.0 + (3 - 2.9999999) * 2**-20)
    save(point, models.place / "wide", precision="float64")
    assert models.read(models.place / "wide")["w"].numpy() == pytest.approx(exact, rel=1e-7)
    with pytest.raises(
        InputError, match="no precision 'float16' for weights; choose one of float32, float64"
    ):
        save(point, models.place / "out", precision="float16")


# Rows that only one side has


def vocabularies(models, *rows):
    return [
        models.make(
            f"model{i}",
            {EMBEDDING: models.noise(i, count, 8), "model.norm.weight": models.noise(i + 9, 8)},
            vocab_size=count,
            tie_word_embeddings=True,
        )
        for i, count in enumerate(rows)
    ]


def test_embeddings_of_different_length_are_refused(models):
    target, base, theta = vocabularies(models, 12, 10, 10)
    with pytest.raises(MismatchError, match="--rows shared"):
        save(target - (theta - base), models.place / "out")


@pytest.mark.parametrize("rows", [(12, 10, 10), (10, 12, 11), (12, 12, 9)])
def test_shared_rows_are_summed_and_the_others_stay_the_targets(models, rows):
    target, base, theta = vocabularies(models, *rows)
    saved = save(target - 0.5 * (theta - base), models.place / "out", rows="shared")
    first, second, third = (models.read(point.folder)[EMBEDDING] for point in (target, base, theta))
    found, shared = models.read(models.place / "out")[EMBEDDING], min(rows)
    expected = first[:shared] - 0.5 * (third[:shared] - second[:shared])
    assert torch.allclose(found[:shared], expected, atol=1e-6)
    assert torch.equal(found[shared:], first[shared:])
    assert found.shape == first.shape
    assert any("rows are in all" in note for note in saved.notes)
    assert json.loads((models.place / "out" / "weights.json").read_text())["notes"] == list(saved.notes)


# Values that are not finite


def test_values_that_are_not_finite_go_through_when_that_is_asked_for(models):
    values = torch.tensor([1.0, math.nan, math.inf, -3.0])
    target = models.make("target", {"w": values})
    base = models.make("base", {"w": torch.zeros(4)})
    theta = models.make("theta", {"w": torch.full((4,), 0.5)})
    point = target - (theta - base)
    with pytest.raises(CheckpointError, match=r"1 NaN and 1 infinite values in 1 tensors \(first: w\)"):
        save(point, models.place / "out")
    for dtype in ("float32", "bfloat16", "float16"):
        saved = save(
            point, models.place / dtype, dtype=dtype, allow_nonfinite=True, along={"f": base - theta}
        )
        found = models.read(models.place / dtype)["w"]
        assert found[[0, 3]].tolist() == [0.5, -3.5]
        assert math.isnan(found[1])
        assert not math.isfinite(found[2])
        assert saved.dose.relative_error is None
        assert saved.dose.effective == {}


# Directions that lie on disk


def test_a_stored_vector_is_as_good_as_the_models_it_came_from(models, four):
    target, base, theta_1, _ = four
    stored = save_vector(theta_1 - base, models.place / "vector")
    save(target - 0.7 * (theta_1 - base), models.place / "models")
    saved = save(target - 0.7 * stored, models.place / "stored", along={"forget": -1.0 * stored})
    first, second = models.read(models.place / "models"), models.read(models.place / "stored")
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)
    assert saved.dose.effective == pytest.approx({"forget": 0.7}, abs=1e-4)
    terms = read_manifest(models.place / "stored").content["terms"]
    assert {term["model"]: term["coefficient"] for term in terms} == {"target": 1.0, "vector": -0.7}
    assert all(term["fingerprint"] for term in terms if term["model"] == "vector")
    assert StoredVector.open(models.place / "vector") == stored


# Layouts and leftovers


def test_the_manifest_names_inputs_whose_hashes_are_known(models, four):
    target, base, theta_1, _ = four
    known = target.fingerprint(), base.fingerprint()
    save(target - (theta_1 - base), models.place / "out")
    terms = {t["model"]: t["fingerprint"] for t in read_manifest(models.place / "out").content["terms"]}
    assert terms["target"] in (known[0], None), "a file younger than its clock tick is not remembered"
    again = save(target - (theta_1 - base), models.place / "again").checkpoint
    save(again - (theta_1 - base), models.place / "third")
    terms = {t["model"]: t["fingerprint"] for t in read_manifest(models.place / "third").content["terms"]}
    assert terms["again"] == again.fingerprint(), "what we wrote ourselves is always known"


def test_what_an_interrupted_run_left_is_reported(models, four):
    left = models.place / ".out.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    saved = save(four[0], models.place / "out")
    assert saved.notes == (
        "an earlier run was interrupted while it wrote out; what it left was cleared away",
    )
    assert Checkpoint.open(models.place / "out").parameters == four[0].parameters


def test_a_pickled_target_gives_safetensors(models, four):
    target, base, theta_1, _ = four
    folder = models.place / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text((target.folder / "config.json").read_text())
    torch.save(models.read(target.folder), folder / "pytorch_model.bin")
    opened = Checkpoint.open(folder, allow_pickle=True)
    save(opened - 0.7 * (theta_1 - base), models.place / "out")
    save(target - 0.7 * (theta_1 - base), models.place / "expected")
    assert models.same_model(models.place / "out", models.place / "expected")
    assert (models.place / "out" / "model.safetensors").is_file()

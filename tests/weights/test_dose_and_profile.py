"""How much of a direction arrived, and how directions lie to one another."""

import math

import numpy as np
import pytest
import torch

from palinode.errors import AlgebraError, CheckpointError, MismatchError
from palinode.weights import profile
from palinode.weights.geometry import part_of

# Dose


def states(models, target, base, theta_1):
    return [
        models.make(name, {"w": row})
        for name, row in (("target", target), ("base", base), ("theta_1", theta_1))
    ]


def test_effective_scales_are_the_asked_ones_in_float32(models, four):
    target, base, theta_1, theta_2 = four
    forget, retain = theta_1 - base, theta_2 - base
    dose = (
        (target - 0.75 * forget + 0.3 * retain)
        .save(models.place / "out", along={"forget": -forget, "retain": retain})
        .dose
    )
    assert dose.effective == pytest.approx({"forget": 0.75, "retain": 0.3}, abs=1e-4)
    assert dose.relative_error < 1e-4, "the rounding of float32"
    assert dose.moved_share == pytest.approx(1, abs=0.02)
    assert dose.weights == 12 * 8 * 2 + 8 * 8 + 8


def test_dose_worked_by_hand(models):
    # v = (1, 0, 0, 2); at α = 0.5 the weights 1 and 4 of (1, 2, 3, 4) move to 0.5 and 3.
    row = torch.tensor([1.0, 2.0, 3.0, 4.0])
    target, base, theta_1 = states(models, row, row, row + torch.tensor([1.0, 0, 0, 2]))
    vector = theta_1 - base
    saved = (target - 0.5 * vector).save(models.place / "out", along={"forget": -vector})
    assert models.read(models.place / "out")["w"].tolist() == [0.5, 2, 3, 3]
    assert saved.dose.effective == pytest.approx({"forget": 0.5})
    assert (saved.dose.relative_error, saved.dose.moved_share, saved.dose.weights) == (0, 0.5, 4)


def test_dose_shows_what_rounding_to_nearest_lost(models):
    # bfloat16 numbers above 1 lie 2^-7 apart: of the steps (2^-7, 2^-10) only the first arrives.
    big, small = 2.0**-7, 2.0**-10
    one = torch.ones(2)
    target, base, theta_1 = states(models, one.bfloat16(), one, one + torch.tensor([big, small]))
    vector = theta_1 - base
    dose = (target + vector).save(models.place / "out", rounding="nearest", along={"v": vector}).dose
    assert dose.effective["v"] == pytest.approx(big**2 / (big**2 + small**2), rel=1e-6)
    assert dose.relative_error == pytest.approx(small / math.hypot(big, small), rel=1e-6)
    assert dose.moved_share == 0.5


def test_stochastic_rounding_delivers_the_dose_that_nearest_rounding_loses(models):
    start = models.noise(1, 200, 500, scale=0.02, dtype=torch.bfloat16)
    target, base, theta_1 = states(models, start, start.float(), start.float() + 2e-5)
    vector = theta_1 - base
    doses = {
        rounding: (target - 0.7 * vector)
        .save(models.place / rounding, rounding=rounding, along={"forget": -vector})
        .dose
        for rounding in ("nearest", "stochastic", "auto")
    }
    assert doses["nearest"].effective["forget"] < 0.9 * 0.7
    assert doses["stochastic"].effective["forget"] == pytest.approx(0.7, rel=0.05)
    assert doses["auto"] == doses["stochastic"], "auto is stochastic where 16 bits are written"


def test_nothing_asked_is_nothing_lost(models, four):
    target, base, theta_1, _ = four
    dose = (target - 0.0 * (theta_1 - base)).save(models.place / "out", along={"v": theta_1 - base}).dose
    assert (dose.effective, dose.relative_error, dose.moved_share) == ({"v": 0.0}, 0.0, 0.0)


def test_dose_without_directions_still_counts_weights(models, four):
    dose = (four[0] + (four[1] - four[2])).save(models.place / "out").dose
    assert dose.effective == {}
    assert dose.weights == 264


def test_effective_scales_come_apart_where_directions_overlap(models):
    row = torch.zeros(3)
    target, base, theta_1 = states(models, row, row, torch.tensor([1.0, 1.0, 0.0]))
    theta_2 = models.make("theta_2", {"w": torch.tensor([0.0, 1.0, 1.0])})
    along = {"forget": base - theta_1, "retain": theta_2 - base}
    point = target - 0.5 * (theta_1 - base) + 0.25 * (theta_2 - base)
    assert point.save(models.place / "out", along=along).dose.effective == pytest.approx(
        {"forget": 0.5, "retain": 0.25}
    )


# Profile


def by_hand(models, first, second):
    """The difference of two checkpoints as one vector of float64."""
    a, b = models.read(first.folder), models.read(second.folder)
    return np.concatenate([(a[n].double() - b[n].double()).numpy().ravel() for n in sorted(a)])


def test_projection_and_cosine_of_the_specs_example(models):
    rows = {"theta_0": (1, -2, 0.5), "target": (1.6, -1.5, 0.2), "theta_1": (1.4, -2.2, 0.5)}
    base, target, theta_1 = (
        models.make(name, {"w": torch.tensor(row, dtype=torch.float64)}) for name, row in rows.items()
    )
    found = profile({"forget": theta_1 - base, "way": target - base})
    assert found.total[0, 1] / found.total[0, 0] == pytest.approx(0.7, abs=1e-12)
    assert found.cosine("forget", "way") == pytest.approx(0.374166, abs=5e-7)


def test_norms_and_cosines_are_those_of_numpy(models, four):
    target, base, theta_1, theta_2 = four
    found = profile(
        {"f": theta_1 - base, "r": theta_2 - base, "mix": 2 * (theta_1 - base) + (target - theta_2)}
    )
    f, r = by_hand(models, theta_1, base), by_hand(models, theta_2, base)
    vectors = {"f": f, "r": r, "mix": 2 * f + by_hand(models, target, theta_2)}
    for name, vector in vectors.items():
        assert found.norms()[name] == pytest.approx(np.linalg.norm(vector), rel=1e-6)
        for other, second in vectors.items():
            cosine = vector @ second / np.linalg.norm(vector) / np.linalg.norm(second)
            assert found.cosine(name, other) == pytest.approx(cosine, abs=1e-6)


def test_parts_add_up_to_the_whole(models, four):
    target, base, *_ = four
    found = profile({"way": target - base})
    assert list(found.gram) == ["embedding", "layer 0", "rest", "head"]
    squares = [found.norms(part)["way"] ** 2 for part in found.gram]
    assert sum(squares) == pytest.approx(found.norms()["way"] ** 2)
    a, b = (models.read(state.folder)["model.norm.weight"] for state in (target, base))
    assert found.norms("rest")["way"] == pytest.approx(float((a - b).norm()))


def test_parts_of_a_model_come_in_their_order(models):
    names = [f"model.layers.{i}.w" for i in (10, 2, 0)] + ["model.embed_tokens.weight", "lm_head.weight"]
    a = models.make("a", {name: torch.ones(2) for name in names})
    b = models.make("b", {name: torch.zeros(2) for name in names})
    assert list(profile({"v": a - b}).gram) == ["embedding", "layer 0", "layer 2", "layer 10", "head"]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("transformer.h.3.attn.c_attn.weight", "layer 3"),
        ("transformer.wte.weight", "embedding"),
        ("gpt_neox.embed_in.weight", "embedding"),
        ("lm_head.weight", "head"),
        ("embed_out.weight", "head"),
        ("model.norm.weight", "rest"),
    ],
)
def test_part_of_a_name(name, part):
    assert part_of(name) == part


def test_a_zero_direction_has_no_cosine(models, four):
    target, base, *_ = four
    found = profile({"nothing": target - target, "way": target - base})
    assert found.cosine("nothing", "way") is None
    assert found.norms()["nothing"] == 0


def test_a_profile_of_nothing_at_all_says_so(models, four):
    with pytest.raises(AlgebraError, match="name two different checkpoints"):
        profile({"nothing": four[0] - four[0]})
    with pytest.raises(AlgebraError):
        profile({})


def test_a_tied_tensor_counts_once(models):
    def state(value, copy):
        embedding = torch.full((3, 3), value)
        head = {"lm_head.weight": embedding.clone()} if copy else {}
        return {"model.embed_tokens.weight": embedding, **head}

    for copies in ((False, False), (True, True), (True, False), (False, True)):
        one, two = (
            models.make(f"{name} {copies}", state(value, copy), tie_word_embeddings=True)
            for name, value, copy in zip("ab", (0.0, 2.0), copies, strict=True)
        )
        assert profile({"v": two - one}).norms()["v"] == pytest.approx(6)


def test_integer_buffers_do_not_count(models):
    a = models.make("a", {"w": torch.zeros(2), "mask": torch.ones(9, dtype=torch.int64)})
    b = models.make("b", {"w": torch.ones(2), "mask": torch.zeros(9, dtype=torch.int64)})
    assert profile({"v": a - b}).norms()["v"] == pytest.approx(math.sqrt(2))


def test_profiles_repeat_to_the_last_digit(models):
    tensors = {f"model.layers.{i % 5}.w{i}": models.noise(i, 3, 7) for i in range(60)}
    a, b = models.make("a", tensors), models.make("b", {n: v * 1.1 for n, v in tensors.items()})
    first = profile({"v": a - b, "w": b - a})
    for _ in range(5):
        again = profile({"v": a - b, "w": b - a})
        assert all(np.array_equal(first.gram[part], again.gram[part]) for part in first.gram)


def test_profile_of_models_that_do_not_fit_or_hold_nan_is_refused(models, four):
    other = models.make("other", {"w": torch.ones(3)})
    with pytest.raises(MismatchError):
        profile({"v": four[0] - other})
    broken = models.make("broken", {"w": torch.tensor([1.0, math.nan, 1.0])})
    with pytest.raises(
        CheckpointError, match=r"broken holds 1 NaN and 0 infinite values in 1 tensors \(first: w\)"
    ):
        profile({"v": broken - other})


def test_a_model_without_parameters_has_a_profile(models):
    a, b = models.make("a", {}), models.make("b", {})
    assert profile({"v": a - b}).norms() == {"v": 0.0}

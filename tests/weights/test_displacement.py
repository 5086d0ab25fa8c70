"""Directions that lie on disk: leaves of the algebra, and what they do to each tensor of a model."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from palinode.errors import AlgebraError, CheckpointError, MismatchError
from palinode.weights import Checkpoint, Direction, Point, WeightedSum
from palinode.weights.checkpoint import StoredDirection
from palinode.weights.displacement import ArrayCache, Factor, decode, dense_change, encode, low_rank_change
from palinode.weights.kernels import multiply, nearest_factors, rank_for
from palinode.weights.tensors import Files, read_object


def point(name):
    return Checkpoint(Path("models") / name, {}, {})


def displacement(name):
    return StoredDirection(Path("adapters") / name, {})


TARGET, BASE, THETA_1, THETA_2 = map(point, ("target", "base", "theta_1", "theta_2"))
LORA, OTHER = displacement("lora"), displacement("other")


# The algebra


def test_a_displacement_is_a_direction_of_its_own():
    assert isinstance(LORA, Direction)
    assert not isinstance(LORA, Point)
    assert LORA.terms == {LORA: 1.0}


def test_displacements_and_differences_stand_in_one_formula():
    unlearned = TARGET - 0.5 * LORA + 0.25 * (THETA_2 - BASE)
    assert isinstance(unlearned, WeightedSum)
    assert unlearned.terms == {TARGET: 1.0, LORA: -0.5, THETA_2: 0.25, BASE: -0.25}
    assert unlearned.anchor == TARGET
    assert (unlearned - TARGET).terms == {LORA: -0.5, THETA_2: 0.25, BASE: -0.25}


def test_displacements_add_scale_and_cancel_like_any_direction():
    assert (LORA + OTHER - 2 * LORA).terms == {LORA: -1.0, OTHER: 1.0}
    assert (-LORA).terms == {LORA: -1.0}
    assert sum([LORA, OTHER]).terms == {LORA: 1.0, OTHER: 1.0}
    assert (LORA - LORA).terms == {}
    assert (TARGET + 0.0 * LORA).terms == {TARGET: 1.0}
    assert (TARGET + LORA - LORA).terms == {TARGET: 1.0}


def test_openings_of_one_folder_are_one_direction_and_no_point_is_one():
    again = StoredDirection(LORA.folder, {"any": None})
    assert again == LORA
    assert hash(again) == hash(LORA)
    assert (LORA - again).terms == {}
    assert LORA != OTHER
    assert StoredDirection(BASE.folder, {}) != BASE


@pytest.mark.parametrize("mistake", [lambda: LORA + TARGET, lambda: LORA - TARGET])
def test_a_displacement_before_a_point_says_which_way_round(mistake):
    with pytest.raises(AlgebraError, match="write the point first"):
        mistake()


@pytest.mark.parametrize("nonsense", [lambda: LORA * LORA, lambda: LORA + 1, lambda: LORA * "2"])
def test_what_has_no_meaning_is_a_type_error(nonsense):
    with pytest.raises(TypeError):
        nonsense()


# What fits a model


@pytest.fixture
def stored(models):
    """A function that makes a displacement of whole tensors."""

    def make(name, tensors):
        found = models.make(name, tensors)
        return StoredDirection(found.folder, {key: dense_change(info) for key, info in found.tensors.items()})

    return make


def test_a_displacement_fits_the_model_that_has_its_tensors(models, stored):
    model = models.make("model", {"a": torch.ones(2, 3), "b": torch.ones(2), "n": torch.arange(3)})
    stored("fits", {"a": torch.ones(2, 3)}).check_fits(model)
    for tensors, said in (
        ({"c": torch.ones(2)}, "changes c, and .* has no such weights"),
        ({"n": torch.ones(3)}, "changes n, and .* has no such weights"),
        ({"a": torch.ones(3, 2)}, "changes a as 3x2, and in .* it is 2x3"),
        ({"b": torch.ones(())}, "changes b as a scalar, and in .* it is 2"),
    ):
        with pytest.raises(MismatchError, match=said):
            stored(f"no {said[8:10]}{len(said)}", tensors).check_fits(model)


def test_a_tied_head_changes_as_its_embedding_does(models, stored):
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    values = models.noise(1, 4, 2)
    tied = models.make("tied", {embedding: values}, tie_word_embeddings=True)
    twice = models.make("twice", {embedding: values, head: values.clone()}, tie_word_embeddings=True)
    untied = models.make("untied", {embedding: values, head: values.clone()})
    both = stored("both", {embedding: values, head: values.clone()})
    only = stored("only", {embedding: values})
    for model in (tied, twice):
        both.check_fits(model)
        only.check_fits(model)
        for name in (head, embedding):
            assert only.change_of(name, model) is only.changes[embedding]
    only.check_fits(untied)
    assert only.change_of(head, untied) is None
    for number, tensors in enumerate(({head: values}, {head: values, embedding: 2 * values})):
        apart = stored(f"apart{number}", tensors)
        apart.check_fits(untied)
        with pytest.raises(MismatchError, match=r"changes lm_head.weight otherwise than model.embed_tokens"):
            apart.check_fits(tied)


# Values


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_stored_change_reads_as_it_is_in_any_slices(models, stored, dtype):
    tensor = models.noise(3, 50, 7, dtype=dtype)
    change = stored("whole", {"w": tensor}).changes["w"]
    assert change.shape == (50, 7)
    for kind in (np.float32, np.float64):
        expected = tensor.reshape(-1).to(getattr(torch, np.dtype(kind).name)).numpy()
        for size in (1, 13, 350):
            out = np.empty(350, kind)
            with Files() as files:
                for start in range(0, 350, size):
                    change.read(files, start, out[start : start + size])
            assert out.tobytes() == expected.tobytes()


@given(arrays(np.float32, 20, elements=st.floats(width=32, allow_nan=False)))
def test_values_are_stored_as_torch_rounds_them(values):
    for code, dtype in (("BF16", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32)):
        expected = torch.from_numpy(values).to(dtype)
        raw = encode(values, code)
        assert raw.tobytes() == expected.view(torch.uint8).numpy().tobytes()
        np.testing.assert_array_equal(decode(raw, code), expected.float().numpy())


def low_rank(models, name, *, transposed, dtype=torch.float32, scale=0.7):
    left, right = models.noise(1, 9, 5, dtype=dtype), models.noise(2, 5, 11, dtype=dtype)
    turn = (lambda matrix: matrix.T.contiguous()) if transposed else (lambda matrix: matrix)
    found = models.make(name, {"left": turn(left), "right": turn(right)}).tensors
    factors = [Factor(found[key], transposed) for key in ("left", "right")]
    return low_rank_change(*factors, scale, ArrayCache()), scale * (left.double() @ right.double()).numpy()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_product_is_the_same_however_its_factors_lie(models, dtype):
    (plain, expected), (turned, _) = (
        low_rank(models, str(transposed), transposed=transposed, dtype=dtype) for transposed in (False, True)
    )
    assert plain.shape == turned.shape == (9, 11)
    assert plain.rank == turned.rank == 5
    found = np.empty((2, 99))
    with Files() as files:
        plain.read(files, 0, found[0])
        turned.read(files, 0, found[1])
        part = np.empty(30)
        turned.read(files, 40, part)
    assert found[0].tobytes() == found[1].tobytes()
    assert part.tobytes() == found[0, 40:70].tobytes()
    np.testing.assert_allclose(found[0].reshape(9, 11), expected, rtol=0, atol=1e-14)


def test_a_product_is_rounded_once(models):
    change, _ = low_rank(models, "factors", transposed=False)
    single, double = np.empty(99, np.float32), np.empty(99)
    with Files() as files:
        change.read(files, 0, single)
        change.read(files, 0, double)
    assert single.tobytes() == double.astype(np.float32).tobytes()


def test_right_hand_matrices_are_kept_within_bounds(models, monkeypatch):
    monkeypatch.setattr("palinode.weights.displacement.KEPT", 1000)
    found = models.make("many", {f"w{i}": models.noise(i, 10, 10) for i in range(5)}).tensors
    kept = ArrayCache()
    with Files() as files:
        for info in found.values():
            first = kept.get(info, lambda info=info: Factor(info).rows(files, 0, 10))
            assert kept.get(info, lambda: None) is first
            assert len(kept._found) <= 2


@given(
    left=arrays(np.float64, (3, 6), elements=st.floats(-100, 100)),
    right=arrays(np.float64, (6, 4), elements=st.floats(-100, 100)),
)
def test_products_are_added_up_in_order(left, right):
    expected = np.zeros((3, 4))
    for k in range(6):
        expected = expected + left[:, k : k + 1] * right[k]
    assert multiply(left, right, 3.0).tobytes() == (3.0 * expected).tobytes()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(models, stored, value):
    spoilt = models.noise(1, 4, 4)
    spoilt[2, 1] = value
    info = models.make("spoilt", {"w": spoilt}).tensors["w"]
    good = models.make("good", {"w": models.noise(2, 4, 4)}).tensors["w"]
    pairs = [(info, good), (good, info)]
    changes = [
        dense_change(info),
        *(
            low_rank_change(Factor(a, t), Factor(b, t), 1.0, ArrayCache())
            for a, b in pairs
            for t in (False, True)
        ),
    ]
    for change in changes:
        with Files() as files, pytest.raises(CheckpointError, match="w holds values that are not finite"):
            change.read(files, 0, np.empty(16, np.float32))


# The nearest product


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_no_product_of_that_rank_comes_nearer(shape, rank):
    matrix = np.random.default_rng(5).standard_normal(shape).astype(np.float32)
    left, right = nearest_factors(matrix, rank=rank)
    assert (left.shape, right.shape) == ((shape[0], rank), (rank, shape[1]))
    rest = torch.linalg.svdvals(torch.from_numpy(matrix).double())[rank:]
    assert np.linalg.norm(matrix - left @ right) == pytest.approx(float(rest.norm()), rel=1e-9)
    np.testing.assert_allclose(np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=1), rtol=1e-9)


def test_a_product_is_found_again_even_where_its_parts_differ_much_in_size():
    generator = np.random.default_rng(6)
    left, right = (
        generator.standard_normal((40, 4)) * [1, 1e-2, 1e-4, 1e-6],
        generator.standard_normal((4, 30)),
    )
    found = nearest_factors(left @ right, rank=4)
    assert np.linalg.norm(left @ right - found[0] @ found[1]) < 1e-13 * np.linalg.norm(left @ right)


@pytest.mark.parametrize(
    ("energy", "rank"), [(0.5, 1), (0.64, 1), (0.65, 2), (0.99, 2), (0.9999, 3), (1.0, 3)]
)
def test_the_smallest_rank_that_keeps_the_energy(energy, rank):
    matrix = np.zeros((6, 5))
    matrix[[0, 3, 4], [2, 0, 1]] = 4.0, 2.99, 0.2  # squares 16, 8.94, 0.04: shares 0.6405, 0.998, 1
    left, _ = nearest_factors(matrix, energy=energy)
    assert left.shape[1] == rank
    assert rank_for(np.array([16, 8.9401, 0.04, 0, 0]), energy) == rank


def test_more_than_the_largest_rank_is_not_factored():
    matrix = np.random.default_rng(7).standard_normal((6, 5))
    assert nearest_factors(matrix, energy=0.9, most=1) is None
    assert nearest_factors(matrix, rank=2, most=2) is not None


# Fingerprints


def test_a_fingerprint_says_what_the_values_are_and_not_where(models, stored):
    first = stored("first", {"w": torch.ones(3), "v": torch.ones(2)}).fingerprint()
    assert first == stored("deep/second", {"v": torch.ones(2), "w": torch.ones(3)}).fingerprint()
    assert len(first) == 32
    others = [
        stored("value", {"w": torch.tensor([1, 1, 2.0]), "v": torch.ones(2)}),
        stored("name", {"w": torch.ones(3), "u": torch.ones(2)}),
        stored("shape", {"w": torch.ones(3, 1), "v": torch.ones(2)}),
        stored("dtype", {"w": torch.ones(3).half(), "v": torch.ones(2)}),
    ]
    assert len({first, *(other.fingerprint() for other in others)}) == 5


def test_scale_and_orientation_are_part_of_a_fingerprint(models):
    def of(scale, transposed):
        info = models.make(f"{scale}{transposed}", {"w": torch.ones(2, 2)}).tensors["w"]
        change = low_rank_change(Factor(info), Factor(info, transposed), scale, ArrayCache())
        return StoredDirection(info.file.parent, {"w": change}).fingerprint()

    assert len({of(1.0, False), of(2.0, False), of(1.0, True)}) == 3


# JSON


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "\xff\xfe"])
def test_what_is_no_json_object_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"x\.json (cannot be read|does not hold a JSON object)"):
        read_object(tmp_path / "x.json")


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.json")
    with pytest.raises(CheckpointError, match="no ordinary file"):
        read_object(tmp_path / "x.json")

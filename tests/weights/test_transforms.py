"""Transforms of a direction, on matrices worked by hand and on the tiny world's vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from palinode.errors import InputError
from palinode.training.moments import along, basis_of, projection
from palinode.weights.vectors import layer_scale, transform


def test_first_pattern_that_matches_the_whole_name_gives_the_scale():
    scales = {r"layers\.0\..*": 0.0, r"layers\..*": 0.5, "layers": 9.0}
    assert [layer_scale(name, scales) for name in ("layers.0.up", "layers.1.up", "norm")] == [0.0, 0.5, 1.0]


def test_basis_holds_the_share_of_the_inputs_that_was_asked_for():
    inputs = np.array([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0], [-3.0, 0.0, 0.0]])  # squares 18 and 1
    moment = inputs.T @ inputs
    assert np.abs(basis_of(moment, energy=0.9)).tolist() == [[1.0], [0.0], [0.0]]
    assert basis_of(moment, energy=1.0).shape == (3, 2)
    with pytest.raises(InputError, match="no share"):
        basis_of(moment, energy=0.0)
    with pytest.raises(InputError, match="all zero"):
        basis_of(np.zeros((3, 3)))


def test_projected_matrix_does_nothing_to_inputs_of_the_subspace_and_the_same_to_those_across():
    matrix = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    basis = np.array([[0.6], [0.8], [0.0]])
    rest = projection(basis_of(7 * basis @ basis.T, energy=1.0))
    found = along(matrix, rest, 1)
    # row 1: u·r = .6 + 1.6 = 2.2, less 2.2·(.6, .8, 0); row 2: u·r = 6.4
    assert found == pytest.approx(np.array([[-0.32, 0.24, 3.0], [0.16, -0.12, 6.0]]))
    assert found @ basis == pytest.approx(np.zeros((2, 1)), abs=1e-12)
    across = np.array([0.8, -0.6, 2.0])
    assert found @ across == pytest.approx(matrix @ across)
    assert along(found, rest, 1) == pytest.approx(found)  # twice is once
    assert along(matrix.T, rest, 0) == pytest.approx(found.T)  # a layer that stores its weight as (in, out)


# Stored


def test_rule_that_changes_nothing_stores_the_direction_itself(tiny, tmp_path):
    vector = tiny.target - tiny.base
    stored = transform([vector], lambda _name, values: values[0], tmp_path / "same", label="same")
    base, target = (_tensors(entry.folder) for entry in (tiny.base, tiny.target))
    found = _tensors(stored.folder)
    assert found
    for name, value in found.items():
        assert torch.equal(value, target[name].float() - base[name].float())


def test_directions_that_cancel_are_still_two(tiny, tmp_path):
    vector = tiny.target - tiny.base
    stored = transform(
        [vector, -vector], lambda _name, values: values[0] - values[1], tmp_path / "both", label="difference"
    )
    base, target = (_tensors(entry.folder) for entry in (tiny.base, tiny.target))
    for name, value in _tensors(stored.folder).items():
        assert torch.allclose(value, 2 * (target[name] - base[name]), atol=1e-6)


def test_fingerprint_follows_label_and_directions(tiny, tmp_path):
    def make(name, vector, label, factor):
        return transform([vector], lambda _name, values: factor * values[0], tmp_path / name, label=label)

    vector, other = tiny.target - tiny.base, tiny.retrained - tiny.base
    one, two = make("a", vector, "half", 0.5), make("b", vector, "third", 1 / 3)
    assert one.sources[0].fingerprint != two.sources[0].fingerprint
    assert one.sources[0].fingerprint != make("c", other, "half", 0.5).sources[0].fingerprint
    assert one.fingerprint() == make("d", vector, "half", 0.5).fingerprint()


def test_rule_that_changes_a_shape_is_refused_and_leaves_nothing(tiny, tmp_path):
    with pytest.raises(InputError, match="must keep the shape"):
        transform(
            [tiny.target - tiny.base], lambda _name, values: values[0][:1], tmp_path / "bad", label="cut"
        )
    assert not (tmp_path / "bad").exists()
    with pytest.raises(InputError, match="no direction was given"):
        transform([], lambda _name, values: values[0], tmp_path / "bad", label="none")


def _tensors(folder):
    (file,) = folder.glob("*.safetensors")
    return load_file(file)

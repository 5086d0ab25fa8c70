"""What lies beside the forget rows, and what two models side by side give away."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from palinode.audit.attack import AuditBudget, Subject
from palinode.audit.beside import ask_neighbours, nearest_states
from palinode.audit.material import read_material
from palinode.models.loading import load_tokenizer
from palinode.weights import Checkpoint

BUDGET = AuditBudget(max_new_tokens=4, max_length=64)


@pytest.fixture
def subject(scene):
    """A function that makes a subject of a model folder, beside target and retrained model."""

    def make(folder):
        beside = {"target": Checkpoint.open(scene.target), "reference": Checkpoint.open(scene.retrained)}
        checkpoint = Checkpoint.open(folder)
        tokenizer = load_tokenizer(checkpoint)
        return Subject("audited", checkpoint, tokenizer, device=torch.device("cpu"), beside=beside)

    return make


@pytest.fixture(scope="module")
def rows(scene):
    return read_material(scene.forget, retain=scene.retain, max_rows=24)


# Neighbours


def test_nearness_of_states_is_what_is_left_when_the_mean_of_all_is_taken_off():
    states = np.array([[9.0, 1.0], [9.0, -1.0], [11.0, 0.1]])
    assert nearest_states(states, np.array([[9.1, 1.2]]), 1) == {0}
    assert nearest_states(states, np.array([[9.1, -1.2]]), 1) == {1}


def test_every_retain_row_is_near_by_words_or_by_states_or_one_of_the_rest(scene, subject, rows):
    found = ask_neighbours(subject(scene.base), rows, BUDGET)
    values = [found.tests[test]["retain"] for test in ("words", "states", "rest")]
    assert found.details["rows"]["words"] == found.details["rows"]["states"] == len(rows.near) == 6
    for words, states, rest in zip(*values, strict=True):
        assert (rest is None) == (words is not None or states is not None)
    again = ask_neighbours(subject(scene.target), rows, BUDGET)
    for test in found.tests:  # the same rows of every model, by the target's states
        pairs = zip(found.tests[test]["retain"], again.tests[test]["retain"], strict=True)
        assert all((one is None) == (other is None) for one, other in pairs)

"""What lies beside the forget rows, and what two models side by side give away."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from palinode.audit.attack import AuditBudget, Subject
from palinode.audit.attacks import ask_questions
from palinode.audit.beside import (
    ask_neighbours,
    guide,
    guided,
    look_for_traces,
    nearest_states,
    plausible,
    told_apart,
)
from palinode.audit.findings import auc_of
from palinode.audit.material import read_material
from palinode.models.loading import load_tokenizer
from palinode.weights import Checkpoint

BUDGET = AuditBudget(max_new_tokens=4, max_length=64)


@pytest.fixture
def subject(scene):
    """A function that makes a subject of a model folder, beside target and retrained model."""

    def make(folder, target=scene.target):
        beside = {"target": Checkpoint.open(target), "reference": Checkpoint.open(scene.retrained)}
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


# The target guides the model after it


def test_guidance_takes_off_what_both_say_and_says_nothing_that_the_target_would_not():
    """p before .6, .3, .099, .001 and after .8, .1, .0999, .0001: q is as p_before squared by p_after."""
    before = torch.tensor([[0.6, 0.3, 0.099, 0.001]]).log()
    after = torch.tensor([[0.8, 0.1, 0.0999, 0.0001]]).log()
    chosen, logs = plausible(before)
    assert chosen.tolist() == [[0, 0, 0], [0, 1, 2]]  # .001 is below .6 / e^5 = .004, though it fell tenfold
    assert (2 * logs - after[0, :3]).exp().tolist() == pytest.approx([0.45, 0.9, 0.0981], abs=1e-4)
    assert guided(after, chosen, logs).tolist() == [1]
    assert guided(after[:, :1], chosen, logs).tolist() == [0]  # a model that has fewer tokens


def test_pair_gives_away_what_the_model_after_does_not_say(scene, subject, rows):
    said = ask_questions(subject(scene.retrained), rows, BUDGET).tests["extraction"]["forget"]
    found = guide(subject(scene.retrained), rows, BUDGET)
    shares = {name: np.mean(groups["forget"]) for name, groups in found.tests.items()}
    assert shares["extraction"] > np.mean(said) + 0.25
    assert shares["memorised"] >= shares["extraction"]


def test_target_guided_by_itself_says_what_it_says(scene, subject, rows):
    said = ask_questions(subject(scene.target), rows, BUDGET).tests["extraction"]["forget"]
    assert guide(subject(scene.target), rows, BUDGET).tests["extraction"]["forget"] == said


# Traces


def area(groups):
    return auc_of(*map(np.array, groups.values()))


def test_rows_that_lost_are_told_from_those_that_did_not(scene, subject, rows):
    same = look_for_traces(subject(scene.target), rows, BUDGET).tests
    assert area(same["rows"]) == area(same["model"]) == 0.5
    gone = look_for_traces(subject(scene.retrained), rows, BUDGET).tests
    assert area(gone["rows"]) < 0.1
    assert area(gone["model"]) > 0.9


def test_model_is_told_by_a_shift_of_its_states_and_not_by_the_rows_themselves():
    random = np.random.default_rng(0)
    states = random.normal(size=(40, 16))
    moved = states + 2 * np.eye(16)[3]
    noise = states + 1e-3 * random.normal(size=states.shape)
    assert auc_of(*told_apart(np.stack([states, moved]), seed=0)) > 0.85
    assert 0.3 < auc_of(*told_apart(np.stack([states, noise]), seed=0)) < 0.7

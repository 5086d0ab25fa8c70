"""Relearning curves: areas by hand, and curves of a tiny model."""

from __future__ import annotations

import pytest
import torch

from palinode.audit.attack import AuditBudget, Subject
from palinode.audit.attacks import areas, relearn, relearn_forget, relearn_lookalikes, relearn_retain
from palinode.audit.material import read_material
from palinode.errors import DivergenceError
from palinode.models import load_tokenizer
from palinode.settings import AuditSettings
from palinode.weights import Checkpoint

BUDGET = AuditBudget(relearn_steps=[0, 1, 3], relearn_rate=3e-3, max_length=64)


@pytest.fixture
def subject(scene):
    base = Checkpoint.open(scene.base)
    return Subject("base", base, load_tokenizer(base), device=torch.device("cpu"), seed=5)


@pytest.fixture
def material(scene):
    settings = AuditSettings(lookalikes=str(scene.holdout))
    return read_material(scene.forget, retain=scene.retain, settings=settings, max_rows=30)


def test_area_of_a_flat_curve_is_its_height():
    assert areas({0: (0.3,), 5: (0.3,), 40: (0.3,)}) == (pytest.approx(0.3),)


def test_area_is_by_trapezoids_over_the_steps():
    """(2 · (0.1 + 0.5)/2 + 6 · (0.5 + 0.9)/2) / 8 = (0.6 + 4.2) / 8."""
    assert areas({0: (0.1, 1.0), 2: (0.5, 1.0), 8: (0.9, 1.0)}) == pytest.approx((0.6, 1.0))


def test_row_that_lacks_a_point_has_no_area():
    assert areas({0: (0.1, None), 2: (0.5, 0.2)}) == (pytest.approx(0.3), None)


def test_curve_has_its_points_and_rises_on_what_is_learned(subject, material):
    longer = BUDGET.model_copy(
        update={"relearn_steps": [0, 6, 18]}
    )  # three steps may do harm before they help
    found = relearn(subject, material.forget, material.forget, longer, label="learning")
    assert found.details["steps"] == [0, 6, 18]
    curve = found.details["curve"]
    assert curve[2] > curve[0]
    assert len(found.tests["area"]["forget"]) == len(material.forget)
    mean = sum(found.tests["area"]["forget"]) / 30
    assert mean == pytest.approx((3 * (curve[0] + curve[1]) + 6 * (curve[1] + curve[2])) / 18)


def test_looking_on_the_way_changes_nothing(subject, material):
    often = relearn(
        subject,
        material.learned,
        material.held_out,
        BUDGET.model_copy(update={"relearn_steps": [0, 1, 2, 3]}),
        label="x",
    )
    once = relearn(
        subject,
        material.learned,
        material.held_out,
        BUDGET.model_copy(update={"relearn_steps": [0, 3]}),
        label="x",
    )
    assert often.details["curve"][-1] == once.details["curve"][-1]


def test_model_on_disk_is_read_afresh(subject, material):
    first = relearn_forget(subject, material, BUDGET)
    assert relearn_forget(subject, material, BUDGET) == first
    assert first.details["learned_rows"] == first.details["tested_rows"] == 15


def test_what_is_learned_and_what_is_measured(subject, material):
    found = relearn_retain(subject, material, BUDGET)
    assert (found.details["learned_rows"], found.details["tested_rows"]) == (30, 30)
    found = relearn_lookalikes(subject, material, BUDGET)
    assert (found.details["learned_rows"], found.details["tested_rows"]) == (30, 30)
    assert found.details["lookalikes"] == "given rows"


def test_training_that_diverges_says_so(subject, material):
    wild = BUDGET.model_copy(update={"relearn_rate": 1e30, "relearn_steps": [0, 6]})
    with pytest.raises(DivergenceError, match=r"not finite|a finite number"):
        relearn_forget(subject, material, wild)

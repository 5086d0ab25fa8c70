"""A forecast: what a rehearsal foretells of a run, kept beside what the run finds."""

from __future__ import annotations

import json
import shutil

import pytest

from palinode.pipeline.forecasting import LAWS, Forecast, PowerLaw, forecast_step
from palinode.pipeline.inputs import open_inputs, workspace_folder
from palinode.pipeline.run import forecast, run_key, unlearn
from palinode.pipeline.workspace import Workspace

AUTO = {"choose": "auto", "trials": 2, "forget_grid": [0.5, 1.0], "retain_grid": [0.0], "retain": 0.0}
TRAINING = {"epochs": 4, "learning_rate": 3e-3, "batch_size": 16, "max_length": 64, "precision": "float32"}


@pytest.fixture(scope="module")
def recipe(recipe_of, tmp_path_factory):
    """A function that makes recipes of the tiny world, all in one workspace."""
    folder = tmp_path_factory.mktemp("forecasting")

    def build(name="run", **sections):
        return recipe_of(folder / name, **{
            "filter": "least-squares",
            "scales": AUTO,
            "training": TRAINING,
            "output": {"folder": str(folder / name), "workspace": str(folder / "workspace")},
            **sections,
        })  # fmt: skip

    return build


@pytest.fixture(scope="module")
def foretold(recipe):
    """The forecast of the usual run; read it only."""
    return forecast(recipe())


# Laws


def test_law_is_a_product_of_powers():
    law = PowerLaw(2.0, {"t": 0.5, "longer": -1.0}, 1.5)
    assert law.of({"t": 9.0, "longer": 3.0, "rehearsed": 7.0}) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("name", "feature", "rises"),
    [
        ("alpha", "t", True),
        ("alpha", "longer", False),
        ("lost", "rehearsed", True),
        ("lost", "distance", True),
    ],
)
def test_more_rehearsed_foretells_more_and_a_longer_training_a_smaller_alpha(name, feature, rises):
    features = {"t": 2.0, "longer": 10.0, "rehearsed": 0.01, "distance": 0.5}
    values = [LAWS[name].of({**features, feature: features[feature] * by}) for by in (1, 2, 4)]
    assert sorted(values, reverse=not rises) == values
    assert len(set(values)) == 3


# What is foretold


def test_forecast_says_what_is_known_how_far_and_what_it_takes(foretold):
    assert foretold.target["forget"] > foretold.yardstick["answer_probability"]["value"]
    assert foretold.nats > 0
    assert foretold.features["distance"] > foretold.yardstick["tolerance"]
    assert foretold.alpha == pytest.approx(LAWS["alpha"].of(foretold.features))
    assert foretold.lost == pytest.approx(LAWS["lost"].of(foretold.features))


def test_rehearsal_takes_as_many_epochs_as_make_four_steps(foretold, recipe):
    rows = len(open_inputs(recipe()).rows.forget)
    steps = -(-rows // TRAINING["batch_size"])  # of an epoch
    assert foretold.features["longer"] == TRAINING["epochs"] / -(-4 // steps)


def test_lines_fit_a_terminal_and_end_with_the_advice(foretold):
    lines = foretold.lines()
    assert max(map(len, lines)) <= 80
    assert lines[-1] == f"Advice: {foretold.advice}."


def kept_of(recipe):
    """The step of a recipe's forecast."""
    inputs = open_inputs(recipe)
    step = forecast_step(inputs, Workspace(workspace_folder(recipe)), run_key(inputs))
    assert step is not None
    return step


def test_forecast_is_kept_and_its_models_are_not(foretold, recipe):
    step = kept_of(recipe())
    assert step.facts is not None
    assert Forecast(**step.facts) == foretold
    assert not list(step.folder.parent.glob("*/model")) + list(step.folder.parent.glob("*/vector"))


def test_record_and_report_hold_what_was_foretold_beside_what_was_found(foretold, recipe):
    done = unlearn(recipe("told"))
    told = done.record["foretold"]
    (point,) = (one for one in done.record["scales"]["points"] if one["chosen"])
    lost = max(0.0, foretold.target["retain"] - point["retain_probability"])
    assert told["found"] == {"alpha": done.record["scales"]["forget"], "lost": pytest.approx(lost)}
    assert told["alpha"] == foretold.alpha
    assert "Foretold before that: α" in done.report.read_text()


def test_run_without_a_forecast_says_nothing_of_one(recipe):
    other = recipe("other", training={**TRAINING, "epochs": 1})
    assert kept_of(other).facts is None
    assert "foretold" not in unlearn(other).record


def test_nothing_is_taken_back_from_a_target_that_is_its_base(recipe, tiny, tmp_path):
    target = shutil.copytree(tiny.base.folder, tmp_path / "target")
    models = {"target": str(target), "base": str(tiny.base.folder)}
    found = forecast(recipe("same", models=models))
    assert found.advice == "nothing to take back"
    assert (found.alpha, found.lost, found.nats) == (0, 0, 0)
    assert not any(line.startswith(("α", "Lost")) for line in found.lines())


def test_without_retain_rows_nothing_is_said_of_what_is_lost(recipe, tiny):
    found = forecast(recipe("bare", data={"forget": str(tiny.forget), "retain": None}))
    assert found.lost is None
    assert found.alpha > 0
    assert not any(line.startswith("Lost") for line in found.lines())


def test_dry_run_prints_the_forecast(palinode, unlearn_words, tmp_path):
    words = [*unlearn_words(tmp_path / "out"), "--dry-run", "--measure"]
    said = palinode(*words)
    assert "Advice: " in said.out
    told = json.loads(palinode(*words, "--json").out)["forecast"]
    assert told["advice"] in said.out


@pytest.mark.parametrize("changes", [{"method": "npo"}, {"filter": "none"}])
def test_what_cannot_be_foretold_is_refused(palinode, unlearn_words, tmp_path, changes):
    said = palinode(*unlearn_words(tmp_path / "out", **changes), "--dry-run", "--measure")
    assert "what can be foretold" in said.refusal

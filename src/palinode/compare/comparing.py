"""The comparison: the same rows, budget, tries and rule for every method; one measurement of what was chosen.

    divide rows → make target and retrained model where the recipe asks → measure what does not change
    for each contestant: try points → choose one on probe rows → make it with every seed → measure it once
    table.json, report.md, tradeoff.svg

The tables are written anew after each contestant, so an interrupted comparison leaves those it has. They
hold no text of the rows; outcomes with texts stay in the workspace. A plan counts what will be trained.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from palinode.compare.comparison_recipe import (
    CompareRecipe,
    ComparisonRecipe,
    Contestant,
    build_comparison,
    divide_rows,
    make_world,
    rows_for,
    world_folder,
)
from palinode.compare.contest import (
    ComparisonSearch,
    Ground,
    MethodPoint,
    SearchPart,
    Tried,
    draw_points,
    epochs_for,
    part_of,
    plan_parts,
    recipe_of,
    steps_an_epoch,
    train_part,
)
from palinode.compare.measuring import make_gauge, measure_model, rank, values_of
from palinode.data.examples import Example, fingerprint_examples
from palinode.data.world import invent_world
from palinode.evaluation.benchmark import completion
from palinode.evaluation.yardstick import estimate_yardstick
from palinode.methods import METHODS
from palinode.models.loading import pick_device
from palinode.pipeline.demo_run import one_thread
from palinode.pipeline.finetuning import FineTuning
from palinode.pipeline.goal import Behaviour, Goal, best
from palinode.pipeline.inputs import InputRows, ask_as_trained, check_folder, check_workspace, open_inputs
from palinode.pipeline.recipe import laid_over, named
from palinode.pipeline.reporting import environment, heading
from palinode.pipeline.run import Making
from palinode.pipeline.search import Probes, open_goal
from palinode.pipeline.workspace import Step, Workspace
from palinode.progress import Listener, NullListener
from palinode.records import shared, write_json, write_text
from palinode.report.pictures import picture_file, tradeoff_figure
from palinode.report.reports import Facts, html_report, markdown_report, report_content
from palinode.weights.atomic import check_apart

FILES = TABLE, REPORT, PICTURE, PAGE = "table.json", "report.md", "tradeoff.svg", "report.html"
"""What a comparison's folder holds."""


@dataclass(frozen=True, slots=True)
class Compared:
    """What a comparison found, and where it is written."""

    output: Path
    table: Mapping[str, Any]
    """The content of its table.json."""

    @property
    def scores(self) -> dict[str, dict[str, Any]]:
        """Each contestant's scores on the forget rows, by metric: means over the seeds."""
        return {entry["name"]: entry["summary"]["rows"]["forget"] for entry in self.table["contestants"]}


def compare(
    recipe: CompareRecipe | None = None,
    *,
    target: str | Path | None = None,
    base: str | Path | None = None,
    forget: str | Path | None = None,
    retain: str | Path | None = None,
    output: str | Path | None = None,
    methods: Sequence[str] = (),
    steps: int | None = None,
    settings: Mapping[str, Any] | None = None,
    listener: Listener | None = None,
) -> Compared:
    """Compare methods, each with `steps` optimiser steps for a model, and write the table to `output`.

    `settings` are other keys of a comparison, dotted or as sections: {"tries": 1, "split.probe_rows": 50}. A
    whole `recipe` (`load_comparison`) comes instead of all of them.
    `result.scores[NAME]` are the scores of a contestant on the forget rows. The same call after an
    interruption goes on where it was. Raises PalinodeError.
    """
    if recipe is None:
        content = {
            "models": named(target=target, base=base),
            "data": named(forget=forget, retain=retain),
            "output": named(folder=output),
            "budget": {} if steps is None else {"steps": steps},
            "contestants": [{"name": name, "method": name} for name in methods],
        }
        recipe = build_comparison(laid_over(content, settings or {}))
    listener, points = listener or NullListener(), check_comparison(recipe)
    place = Path(recipe.shared.output.folder)
    check_folder(place, FILES, "comparison")
    workspace = Workspace(recipe.workspace)
    alone = one_thread() if recipe.comparison.world else contextlib.nullcontext()  # its models are small
    with workspace.locked(listener), alone:
        return Compared(place, _Comparison(open_ground(recipe, workspace, listener), points).run(place))


def check_comparison(recipe: CompareRecipe) -> dict[str, list[MethodPoint]]:
    """Return every contestant's points, their settings checked. Raises RecipeError."""
    comparison = recipe.comparison
    tries, seed = comparison.tries, comparison.seed
    points = {one.name: draw_points(one, tries, seed=seed) for one in comparison.contestants}
    for drawn in points.values():
        for point in drawn:
            recipe_of(recipe.content, point, seed=comparison.seeds[0])
    return points


def open_ground(recipe: CompareRecipe, workspace: Workspace, listener: Listener) -> Ground:
    """Open models and rows, and make those that are to be made.

    Raises OutputError unless workspace and output are apart from the inputs and there is room.
    """
    comparison = recipe.comparison
    if comparison.world:
        folder = world_folder(comparison.demo, workspace.folder, seed=comparison.seed)
        make_world(comparison.demo, folder, seed=comparison.seed, listener=listener)
    inputs = open_inputs(recipe.shared)
    output = Path(recipe.shared.output.folder)
    check_apart(output, (model.folder for model in inputs.models.values()))
    kept = len(comparison.contestants) * len(comparison.seeds) if comparison.keep_models else 1
    # at most four fine-tuned models (float32) lie there at once, beside the models that are kept
    needs = 16 * inputs.reader.parameters + kept * inputs.reader.nbytes
    others = [] if comparison.world else [model.folder for model in inputs.models.values()]
    check_workspace(recipe.workspace, [output, *others], needs=needs)
    inputs = ask_as_trained(inputs, workspace, listener)
    target, retrained = FineTuning(inputs, workspace, listener).given_or_prepared()
    inputs = replace(inputs, target=target, retrained=retrained)
    shares = divide_comparison(recipe, inputs.rows.forget, inputs.rows.retain)
    return Ground(recipe, inputs, shares, workspace, listener)


def divide_comparison(recipe: CompareRecipe, forget: Sequence[Any], retain: Sequence[Any]) -> InputRows:
    """Return the rows divided as the recipe says."""
    comparison = recipe.comparison
    most = recipe.shared.evaluation.max_rows
    return divide_rows(forget, retain, comparison.split, most=most, seed=comparison.seed)


TABLE_VERSION = 1
"""Version of the layout of table.json, described in docs/compare.md."""


class _Comparison:
    """One comparison in progress."""

    def __init__(self, ground: Ground, points: Mapping[str, Sequence[MethodPoint]]) -> None:
        self.ground = ground
        self.recipe = ground.recipe
        self.comparison = ground.recipe.comparison
        self.points = points
        self.started = datetime.now(UTC)
        self.gauge = make_gauge(ground.recipe, ground.shares, ground.left_over)
        self.goal, self.asked = self._goal()
        self.search = ComparisonSearch(ground, self.goal)
        self.reference: Step | None = None

    def run(self, output: Path) -> dict[str, Any]:
        """Go through all contestants and write the tables."""
        fixed = self._measure_fixed()
        seed, contestants = self.comparison.seeds[0], self.comparison.contestants
        parts = {one.name: plan_parts(self.ground, one, self.points[one.name], seed) for one in contestants}
        for own in parts.values():
            self.search.announce(own)
        entries: list[dict[str, Any]] = []
        for number, contestant in enumerate(contestants, start=1):
            tries = f"{self.comparison.tries} points"
            self.ground.listener.say(f"{contestant.name} ({number} of {len(parts)}): {tries}")
            entries.append(self._contestant(contestant, parts[contestant.name]))
            table = self._table(fixed, entries)
            content = report_content(Facts("compare", table))
            drawn = picture_file("Forget–retain trade-off of every point tried", [tradeoff_figure(content)])
            texts = {PICTURE: drawn, REPORT: markdown_report(content)}
            with shared():
                output.mkdir(parents=True, exist_ok=True)
                for file, text in {**texts, PAGE: html_report(content)}.items():
                    write_text(output / file, text)
                write_json(output / TABLE, table)  # last
        return table

    def _measure_fixed(self) -> dict[str, Mapping[str, Any]]:
        """Return the measurements of retrained model, base and target; the first is the others' reference."""
        ground = self.ground
        found = {}
        for name, checkpoint in reversed(ground.inputs.models.items()):
            itself = name == "retrained"
            step = self._measure_step({"model": checkpoint.fingerprint(), "itself": itself})
            found[name] = measure_model(
                self.gauge, step, checkpoint, name, self.reference, itself=itself, listener=ground.listener
            )
            self.reference = step if itself else self.reference
        return {name: found[name] for name in ("target", "base", "retrained") if name in found}

    def _goal(self) -> tuple[Goal, dict[str, Behaviour]]:
        """Return what points are judged by, and what the models that do not change make of the probe rows."""
        ground, choose = self.ground, self.comparison.choose
        point = next(iter(self.points.values()))[0]
        own = rows_for(recipe_of(self.recipe.content, point, seed=self.comparison.seed), ground.shares)
        given, models = ground.inputs.rows, ground.inputs.models
        rows = replace(own, unseen=given.unseen, unseen_source=given.unseen_source)
        prints = {name: checkpoint.fingerprint() for name, checkpoint in models.items()}
        parts = (rows.forget_probe, rows.retain_probe, rows.unseen)
        asked_rows = [fingerprint_examples(part) for part in parts]
        step = ground.workspace.step("goal", models=prints, rows=asked_rows, data=self.gauge.key())
        step.begin()
        probes = Probes(replace(ground.inputs, rows=rows), ground.target, step.folder / "probes.json")
        asked = {name: probes.of_point(name, checkpoint) for name, checkpoint in models.items()}
        truth = None
        if choose.floor == "retrained":
            truth = replace(estimate_yardstick(asked["retrained"]["forget"]), source="retrained")
        goal = replace(open_goal(probes, truth), retain_share=choose.retain_share)
        step.finish({})
        return goal, {name: Behaviour.of(found) for name, found in asked.items()}

    def _contestant(self, contestant: Contestant, parts: Sequence[SearchPart]) -> dict[str, Any]:
        """Try a contestant's points, choose one, measure it with every seed, and return all of that."""
        tried = self.search.run(parts)
        chosen = best(tried)
        ground, points, epochs = self.ground, [chosen.point], chosen.facts["epochs"]
        seeds = self.comparison.seeds
        finals = [part_of(ground, contestant, points, seed, epochs=epochs) for seed in seeds]
        self.search.announce(finals)
        measured = {part.recipe.seed: self._final(part, chosen) for part in finals}
        costs = [found["cost"] for found in measured.values()]
        method = METHODS[contestant.method]
        return {
            "name": contestant.name,
            "method": method.name,
            "formula": method.formula,
            "source": method.source,
            "set": dict(contestant.set),
            "search": {key: list(values) for key, values in contestant.search.items()},
            "points": [_point(one, chosen) for one in tried],
            "chosen": {
                "number": chosen.point.number,
                **_settings(chosen),
                "kept_rule": self.goal.keeps(chosen.behaviour),
            },
            "cost": {
                "epochs": chosen.facts["epochs"],
                **{name: _mean(cost.get(name) for cost in costs) for name in ("steps", "tokens", "seconds")},
                "peak_bytes": max((cost.get("peak_bytes") or 0 for cost in costs), default=0) or None,
                "search_steps": _searched(tried, "steps"),
                "search_seconds": _searched(tried, "seconds"),
            },
            "summary": _summary([found["scores"] for found in measured.values()]),
            "seeds": {
                str(seed): {name: found[name] for name in ("scores", "values", "cost")}
                for seed, found in measured.items()
            },
        }

    def _final(self, part: SearchPart, chosen: Tried) -> Mapping[str, Any]:
        """Make the chosen point with one seed, measure it, and let its vectors go."""
        ground = self.ground
        step = self._measure_step({"part": dict(part.key), "scales": chosen.point.scales})
        if step.facts is None:
            train_part(ground, part)
            recipe = part.recipe
            if chosen.point.scales:
                scales = recipe.scales.model_copy(update={"retain": chosen.point.scales[1]})
                recipe = recipe.model_copy(update={"scales": scales})
            inputs = replace(part.inputs, recipe=recipe)
            made = Making(inputs, ground.workspace, ground.listener).make(ground.target)
            label = f"{part.contestant.name}, seed {part.recipe.seed}"
            measure_model(self.gauge, step, made.model, label, self.reference, listener=ground.listener)
            write_json(step.folder / "made.json", {"model": str(made.model.folder), **made.weights})
            if not self.comparison.keep_models:
                shutil.rmtree(made.model.folder)
        self.search.finish(part)
        cost = part.step(ground.workspace, "cost").facts or {}
        return {**(step.facts or {}), "cost": cost}

    def _measure_step(self, model: Mapping[str, Any]) -> Step:
        retrained = self.ground.inputs.retrained
        reference = retrained.fingerprint() if retrained else None
        return self.ground.workspace.step(
            "measure", subject=dict(model), gauge=self.gauge.key(), reference=reference
        )

    def _table(
        self, fixed: Mapping[str, Mapping[str, Any]], entries: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Return the content of table.json for the contestants that are through."""
        shared, shares = self.recipe.shared, self.ground.shares
        names = ("forget", "forget_probe", "forget_test", "retain", "retain_probe", "retain_test")
        rows = {"retain_train" if name == "retain" else name: getattr(shares, name) for name in names}
        return {
            **heading(TABLE_VERSION, started=self.started, verb="compare"),
            "complete": len(entries) == len(self.comparison.contestants),
            "seed": self.comparison.seed,
            "seeds": list(self.comparison.seeds),
            "shared": shared.model_dump(mode="json", exclude={"method", "method_settings", "scales"}),
            "comparison": self.comparison.model_dump(mode="json", exclude={"contestants"}),
            "rule": str(self.goal),
            "rows": {
                name: {"rows": len(rows), "fingerprint": fingerprint_examples(rows)}
                for name, rows in rows.items()
            },
            "models": {
                name: {
                    "probes": self.asked[name].probabilities,
                    "summary": _summary([found["scores"]]),
                    "values": found["values"],
                }
                for name, found in fixed.items()
            },
            "contestants": list(entries),
            "ranking": _ranking(self.comparison, fixed, entries),
            "environment": environment(pick_device(shared.device)),
            "notes": list(self.ground.inputs.notes),
        }


def _point(tried: Tried, chosen: Tried) -> dict[str, Any]:
    return {
        "number": tried.point.number,
        **_settings(tried),
        **tried.goal.figures(tried.behaviour),
        "chosen": tried.point.number == chosen.point.number,
        **{name: tried.facts[name] for name in ("epochs", "steps", "tokens", "seconds", "peak_bytes")},
    }


def _settings(tried: Tried) -> dict[str, Any]:
    scales = list(tried.point.scales) if tried.point.scales else None
    return {"settings": dict(tried.point.settings), "scales": scales}


def _searched(tried: Sequence[Tried], name: str) -> float:
    """Return what the whole search took; points that share their training count it once."""
    parts = {one.point.training: float(one.facts[name]) for one in tried}
    return round(sum(parts.values()), 1)


def _summary(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return each score over the seeds: mean, mean ends of the intervals, and every seed's value."""
    found: dict[str, Any] = {}
    for group, sets in seeds[0].items():
        for name, metrics in sets.items():
            for metric in metrics:
                own = [seed[group][name][metric] for seed in seeds]
                found.setdefault(group, {}).setdefault(name, {})[metric] = _over_seeds(own)
    return found


def _over_seeds(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if missing := [score["reason"] for score in scores if score["value"] is None]:
        return {"value": None, "n": 0, "low": None, "high": None, "reason": missing[0], "seeds": []}
    values, first = [float(score["value"]) for score in scores], scores[0]
    ends = {end: _mean(score[end] for score in scores) for end in ("low", "high")}
    return {"value": fmean(values), "n": first["n"], **ends, "reason": first["reason"], "seeds": values}


def _mean(values: Iterable[float | None]) -> float | None:
    found = list(values)
    known = [value for value in found if value is not None]
    return fmean(known) if known and len(known) == len(found) else None


def _ranking(
    comparison: ComparisonRecipe, fixed: Mapping[str, Mapping[str, Any]], entries: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the contestants by their gap to the ideal, or why there is no order."""
    metric, retrained = comparison.measure.rank_by, fixed.get("retrained")
    forget, retain = (retrained, retrained) if retrained else (fixed["base"], fixed["target"])
    ideal = values_of([{"forget": forget["values"]["forget"], "retain": retain["values"]["retain"]}])
    own = {entry["name"]: values_of([one["values"] for one in entry["seeds"].values()]) for entry in entries}
    values = {name: found for name, found in own.items() if found is not None}
    left_out = {name: f"no row has a value of {metric}" for name in own if name not in values}
    return {
        "metric": metric,
        "ideal": "retrained" if retrained else "base and target",
        "order": rank(values, ideal, seed=comparison.seed) if ideal else [],
        "left_out": left_out,
    }


def plan_comparison(recipe: CompareRecipe) -> dict[str, Any]:
    """Check a comparison and return what it would train, as plain values; nothing is written.

    Raises an InputError for anything the user can mend.
    """
    points = check_comparison(recipe)
    output, comparison = recipe.shared.output.folder, recipe.comparison
    check_folder(Path(output), FILES, "comparison")
    shares = divide_comparison(recipe, *_rows_to_come(recipe))
    contestants = []
    for contestant in comparison.contestants:
        drawn = points[contestant.name]
        trainings = len({point.training for point in drawn}) + len(comparison.seeds) - 1
        first = recipe_of(recipe.content, drawn[0], seed=comparison.seeds[0])
        each, epochs, steps = steps_an_epoch(first, rows_for(first, shares)), None, None
        if comparison.budget.steps is not None:
            epochs = epochs_for(comparison.budget, each, contestant.name)
            steps = epochs * sum(each)
        made = {"trainings": trainings, "models": len(each), "epochs": epochs, "steps": steps}
        who = {"name": contestant.name, "method": contestant.method}
        contestants.append({**who, "points": len(drawn), **made})
    rows = {"forget": shares.forget, "forget_test": shares.forget_test}
    rows |= {"retain_train": shares.retain, "retain_test": shares.retain_test}
    return {
        "contestants": contestants,
        "seeds": list(comparison.seeds),
        "rows": {name: len(own) for name, own in rows.items()},
        "output": output,
        "workspace": str(recipe.workspace),
    }


def describe_plan(planned: dict[str, Any]) -> list[str]:
    """Return a plan in words, one line a contestant."""
    rows = planned["rows"]
    lines = [
        f"{rows['forget']} forget rows ({rows['forget_test']} measured), {rows['retain_train']} retain rows "
        f"to train on, {rows['retain_test']} measured"
    ]
    for entry in planned["contestants"]:
        known = f"{entry['epochs']} epochs, {entry['steps']} steps"
        what = known if entry["epochs"] else "epochs as the budget of seconds buys"
        models = f"{entry['models']} model{'s' if entry['models'] > 1 else ''}"
        points = f"{entry['points']} points in {entry['trainings']} trainings of {models}"
        lines.append(f"{entry['name']} ({entry['method']}): {points}, {what}")
    lines.append(f"seeds {', '.join(map(str, planned['seeds']))}; to {planned['output']}")
    return lines


def _rows_to_come(recipe: CompareRecipe) -> tuple[Sequence[Example], Sequence[Example]]:
    """Return forget and retain rows; those of the demo's world as it will write them."""
    if not recipe.comparison.world:
        rows = open_inputs(recipe.shared).rows
        return rows.forget, rows.retain
    people = recipe.comparison.demo.forget_people
    world = invent_world(recipe.comparison.seed, forget=people)
    forget, retain = (
        [completion(row, "world", fact.prompt, fact.answer) for row, fact in enumerate(facts)]
        for facts in (world.forget, (*world.others, *world.general))
    )
    return forget, retain

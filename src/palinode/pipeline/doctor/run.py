"""Will a run work? Everything that can be known before any long work, every problem with what to do about it.

`open_inputs` stops at the first thing that is wrong. Here models, pair, rows and places are looked at
one by one, so that one call finds them all; the pre-flight of `unlearn` itself comes last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from palinode.data.examples import Example
from palinode.errors import PalinodeError
from palinode.evaluation.ask import EvaluationLimits
from palinode.evaluation.self_check import UNKNOWN, rows_with_style
from palinode.methods import METHODS
from palinode.models.loading import pick_device
from palinode.pipeline.costs import Plan, make_plan
from palinode.pipeline.doctor.equipment import existing, gigabytes, memory
from palinode.pipeline.doctor.findings import DoctorFinding, Findings
from palinode.pipeline.doctor.models import look_at_model, look_at_pair
from palinode.pipeline.doctor.rows import look_at_fit, look_at_rows
from palinode.pipeline.inputs import Inputs, check_places, check_target, open_inputs
from palinode.pipeline.recipe import Recipe, build_recipe, read_prompts
from palinode.pipeline.run import finished_before
from palinode.pipeline.tracking import check_trackers
from palinode.progress import Listener, NullListener, duration_text
from palinode.weights import Checkpoint
from palinode.weights.atomic import check_output

UNNAMED = "palinode-unlearned"
"""Stands for the output where none was named."""

ROLES = ("target", "base", "retrained")
OPTION = "change that option or key"


def examine_run(
    content: Mapping[str, Any], changes: Sequence[str] = (), *, listener: Listener | None = None
) -> list[DoctorFinding]:
    """Return findings on the models, rows and places that a recipe names; any part may be left out.

    `content` and `changes` are those of `build_recipe`. The weights are read once, for NaN and infinity;
    nothing is fetched or written, but for the digests of weights that are remembered.
    """
    findings, listener = Findings(), listener or NullListener()
    recipe = _recipe(findings, content, changes)
    given = _section(content, "models")
    models: dict[str, Checkpoint] = {}
    for name in ROLES:
        if place := given.get(name):
            pickles = bool(given.get("allow_pickle"))
            found = look_at_model(findings, name, str(place), allow_pickle=pickles, listener=listener)
            models |= {name: found} if found else {}
    if "target" in models and "base" in models:
        method = str(content.get("method", "msa"))
        look_at_pair(findings, models["target"], models["base"], method, _section(content, "method_settings"))
    sets = look_at_rows(findings, _section(content, "data"))
    if recipe is not None and models:
        for name, examples in sets.items():
            look_at_fit(findings, name, examples, recipe, [*models.values()])
    if "target" in models and not any(one.area == "rows" and one.state == "fail" for one in findings.all):
        _look_at_prompts(findings, content, changes, models["target"], sets.get("forget", ()), listener)
    _look_at_run(findings, content, recipe, models, sets, listener)
    return findings.all


def _recipe(findings: Findings, content: Mapping[str, Any], changes: Sequence[str]) -> Recipe | None:
    """Return the recipe, once a forget set is named."""
    findings.attempt("run", "tracker", lambda: check_trackers(content.get("tracker")), fix=OPTION)
    findings.attempt("run", "device", lambda: pick_device(content.get("device", "auto")), fix=OPTION)
    if not _section(content, "data").get("forget"):
        return None
    whole = {**content, "output": {"folder": UNNAMED, **_section(content, "output")}}
    return findings.attempt("run", "recipe", lambda: build_recipe(whole, changes), fix=OPTION)


def _section(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = content.get(name)
    return found if isinstance(found, Mapping) else {}


def _look_at_prompts(
    findings: Findings,
    content: Mapping[str, Any],
    changes: Sequence[str],
    target: Checkpoint,
    rows: Sequence[Example],
    listener: Listener,
) -> None:
    """Ask the target some forget rows as a run would, and in other plausible ways."""
    asked, device = rows_with_style(rows), str(content.get("device", "auto"))
    try:
        style, room = read_prompts(content, changes).style(), _room(device)
        length = EvaluationLimits(**_section(content, "evaluation")).max_length
    except (PalinodeError, ValidationError):  # said of the recipe already
        return
    if not asked:
        return
    needs = 5 * target.parameters  # float32, and some for what passes through it
    if room[0] is not None and needs > room[0]:
        text = f"not tried: the target takes {gigabytes(needs)} {room[2]}, and {gigabytes(room[0])} are free"
        findings.say("rows", "prompts", "note", text)
        return
    with listener.task("asking the target in other ways", 1, "pass") as advance:
        check = partial(check_target, target, asked, style, max_length=length, device=device)
        found = findings.attempt("rows", "prompts", check, fix=OPTION)
        advance(1)
    if found is None:
        return
    if said := found.sentences():
        findings.say("rows", "prompts", "warn", *said)
        return
    text = f"answer probability {found.asked:.2f} on {found.rows} forget rows"
    if found.asked < UNKNOWN:
        fix = "if it was trained on these rows, look how they were put to it then"
        findings.say("rows", "prompts", "note", f"{text}, and hardly more in any way that was tried", fix)
    else:
        findings.say("rows", "prompts", "ok", f"{text}; no other way is far better")


def _look_at_run(
    findings: Findings,
    content: Mapping[str, Any],
    recipe: Recipe | None,
    models: Mapping[str, Checkpoint],
    sets: Mapping[str, Sequence[Example]],
    listener: Listener,
) -> None:
    """Go through the pre-flight of the run itself, where all that it needs is there."""
    given = _section(content, "models")
    if (
        recipe is not None
        and not findings.failures
        and all(name in models for name in ROLES if given.get(name))
    ):
        named = bool(_section(content, "output").get("folder"))
        _go_through(findings, recipe, named=named, listener=listener)
        return
    if folder := _section(content, "output").get("folder"):
        inputs, place = [model.folder for model in models.values()], Path(str(folder)).expanduser()
        findings.attempt("run", "output", lambda: check_output(place, inputs), fix="name another --output")
    if recipe is None and not sets:
        text, fix = "not gone through: there is no forget set", "name one with --forget"
    elif findings.failures:
        text, fix = "not gone through, because something fails", "mend what fails and call again"
    else:
        text, fix = "not gone through: a model is not on this machine", "fetch it and call again"
    findings.say("run", "pre-flight", "note", text, fix)


def _go_through(findings: Findings, recipe: Recipe, *, named: bool, listener: Listener) -> None:
    inputs = findings.attempt("run", "pre-flight", lambda: open_inputs(recipe), fix=OPTION)
    if inputs is None:
        return
    for note in inputs.notes:
        findings.say("run", "rows", "note", note)
    if finished_before(inputs) is not None:
        text = f"{recipe.output.folder} already holds the result of this very run"
        findings.say("run", "output", "ok", text)
        return
    with listener.task("estimating costs", 1, "plan") as advance:
        plan = make_plan(inputs)
        advance(1)
    _look_at_costs(findings, recipe, plan)
    _look_at_places(findings, inputs, plan, named=named)


def _look_at_costs(findings: Findings, recipe: Recipe, plan: Plan) -> None:
    """Hold the memory that the run needs against what is here."""
    time = f"about {duration_text(plan.seconds)} for {plan.tokens:,} tokens"
    findings.say("run", "time", "ok", f"{time}, by the method {METHODS[recipe.method].name}")
    free, total, where = _room(recipe.device)
    needs, fix = f"about {gigabytes(plan.memory)} {where}", "take smaller batches or shorter rows"
    if free is None or total is None:
        findings.say("run", "memory", "note", f"{needs} at the peak; nobody tells how much is free")
    elif plan.memory > total:
        findings.say(
            "run", "memory", "fail", f"{needs} at the peak, and there are {gigabytes(total)} in all", fix
        )
    elif plan.memory > free:
        text = f"{needs} at the peak, and {gigabytes(free)} are free now"
        findings.say("run", "memory", "warn", text, f"end other programs, or {fix}")
    else:
        findings.say("run", "memory", "ok", f"{needs} at the peak, and {gigabytes(free)} are free")


def _look_at_places(findings: Findings, inputs: Inputs, plan: Plan, *, named: bool) -> None:
    """Look whether output and workspace can be written, and have room."""
    recipe, before = inputs.recipe, findings.failures
    fix = "name another --output"
    findings.attempt("run", "output", lambda: check_places(recipe, inputs, needs=plan.disk), fix=fix)
    if findings.failures == before:
        folder = Path(recipe.output.folder)
        place = folder if named else existing(folder)
        findings.say(
            "run", "output", "ok", f"{place} can be written to, and has room for {gigabytes(plan.disk)}"
        )


def _room(device: str) -> tuple[int | None, int | None, str]:
    """Return free and total bytes of memory where training will run, and where that is in words."""
    chosen = pick_device(device)
    if chosen.type == "cuda":
        free, total = torch.cuda.mem_get_info(chosen)
        return int(free), int(total), "of the GPU's memory"
    return *memory(), "of memory"

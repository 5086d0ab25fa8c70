"""Verbs on a training's history: `locate` finds the last clean checkpoint, `plan` says which to keep."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError

from palinode.cli.console import (
    after_location,
    after_run,
    answer,
    ending,
    given,
    listener,
    secret,
    secret_workspace,
    warn,
)
from palinode.cli.options import keys, lengths_alike, takes
from palinode.errors import OutputError, RecipeError
from palinode.pipeline.recipe import build_recipe, laid_over, prompt_style, read_prompts, with_changes
from palinode.records import dotted, workspace_beside, write_text
from palinode.settings import InfluenceSettings, LocateSettings, read_settings

ANYWHERE = ("data.columns", "models.allow_pickle", "device", "seed", "training.max_length", "evaluation.max_")
"""Keys of a recipe that are read whatever is asked."""
ALONE = {"models.target", "models.base", "output.folder", "output.workspace"}
"""Keys that rows are ranked with where none are taken back."""

if TYPE_CHECKING:
    from palinode.history.locating import Location


@takes(*keys("locate"), of=LocateSettings)
def locate(
    settings: LocateSettings,
    forget: str,
    checkpoints: str,
    log: Path | None = None,
    order: Path | None = None,
    control: str | None = None,
    corpus: str | None = None,
    target: str | None = None,
    picture: Path | None = None,
    report: Path | None = None,
) -> None:
    """Tell when rows were seen, and the checkpoint before."""
    from palinode import jobs
    from palinode.report.location_report import location_brief, location_picture
    from palinode.report.reports import Facts, html_report, markdown_report, report_content

    for place in filter(None, (picture, report)):
        check_place(place)
    places: Any = {"log": log, "order": order, "control": control, "corpus": corpus, "target": target}
    found = jobs.locate(forget, checkpoints, **places, settings=settings, listener=listener())
    record = found.as_record()
    if picture:
        write_text(picture, location_picture(record))
    if report:
        written = html_report if report.suffix == ".html" else markdown_report
        write_text(report, written(report_content(Facts("locate", record))))
    answer(record, location_brief(record))
    for text in () if given("as_json") else record["warnings"]:
        warn(text)
    following = after_location(found.recommended, target or "TARGET", forget)
    ending(places={"Page": report, "Picture": picture}, following=following)


class InfluenceOptions(InfluenceSettings):
    """How influence is asked for, and what follows."""

    then: Literal["unlearn"] | None = None
    """unlearn: take the top rows back out, into the output, and audit that."""
    budget: str | None = None
    """Of that audit: quick, standard or full. [default: standard]"""
    recipe: Path | None = None
    """Or a TOML recipe: its vector is made in its workspace."""
    ask: tuple[str, ...] = ()
    """A question; repeatable."""
    answer: tuple[str, ...] = ()
    """The answer to it that is asked about; repeatable. [default: the target's own]"""
    questions: str | None = None
    """Or a file of rows, as questions and answers."""
    ranked: str | None = None
    """The rows to rank. [default: the forget and retain rows]"""
    checkpoints: str | None = None
    """Rank by these: a folder of checkpoints, or a list a,b,c. [default: the base]"""


@takes(
    *keys("traced"),
    of=InfluenceOptions,
    only=[
        *(name for name in InfluenceOptions.model_fields if name not in InfluenceSettings.model_fields),
        *(name for name in InfluenceSettings.model_fields if name != "style"),
    ],
    beside=keys("influence"),
)
def influence(
    settings: InfluenceOptions,
    content: dict[str, Any],
    run: Path | None = None,
    *,
    changes: list[str] | None = None,
) -> None:
    """Tell what rows had to do with an answer.

    How probable it would be without the forget set of a run, of a recipe or of the options of unlearn; and
    which rows stand behind it.
    """
    asks, answers = len(settings.ask), len(settings.answer)
    if answers not in (0, asks) and not settings.questions:
        raise RecipeError(f"there are {asks} --ask and {answers} --answer; give one for each, or none")
    asked: dict[str, Any] = {
        "questions": settings.questions or dict(zip_longest(settings.ask, settings.answer)),
        "rows": settings.ranked,
        "checkpoints": settings.checkpoints,
        "listener": listener(),
    }
    lengths_alike(content)
    content = laid_over(read_settings(settings.recipe, "recipe"), content) if settings.recipe else content
    taken = bool(settings.recipe) or "forget" in content.get("data", ())
    if settings.then or taken:
        content = with_changes(content, changes or ())
    else:
        settings = settings.model_copy(update={"style": prompt_style(changes)})
    if settings.then is None:
        _influence(asked, content, settings, run, taken=taken)
        return
    if run or not settings.top or "folder" not in content.get("output", ()):
        raise RecipeError(
            "write --then unlearn with the models, --top (how many rows) and --output (the new model)"
        )
    _take_back(asked, content, settings)


def _influence(
    asked: Mapping[str, Any],
    content: dict[str, Any],
    settings: InfluenceSettings,
    run: Path | None,
    *,
    taken: bool,
) -> None:
    from palinode import jobs
    from palinode.report.location_report import influence_brief

    named = {key for key, value in dotted(content) if not isinstance(value, dict)}
    named = {key for key in named if not key.startswith(ANYWHERE)}
    if unread := (named if run else set() if taken else named - ALONE):
        why = f"{run} says that itself" if run else "it is for a forget set, and there is no --forget"
        raise RecipeError(f"--{min(unread).rpartition('.')[2].replace('_', '-')} has no use here: {why}")
    place = content.setdefault("output", {})
    folder = place.setdefault("folder", "palinode-influence")
    workspace = Path(place.get("workspace") or workspace_beside(Path(folder)))
    models = {name: content.get("models", {}).get(name) for name in ("target", "base")}
    subject = {"recipe": build_recipe(content)} if taken else models
    found = jobs.influence(**asked, **subject, run=run, workspace=workspace, settings=settings)
    answer(found.record, influence_brief(found.record))
    if run is None:
        secret(workspace, "gradients of rows, vectors", of=workspace)


def _take_back(asked: Mapping[str, Any], ways: Mapping[str, Any], settings: InfluenceOptions) -> None:
    from palinode import jobs
    from palinode.pipeline.inputs import workspace_folder
    from palinode.report.audit_report import audit_brief
    from palinode.report.location_report import answers_brief, influence_brief
    from palinode.report.run_report import run_brief, strength

    output = Path(ways["output"]["folder"])
    done = jobs.influence_then_unlearn(
        ways=ways, output=output, settings=settings, budget=settings.budget, **asked
    )
    record, audited = done.unlearned.record, done.audited
    told = {"influence": done.found.record, "unlearned": record, "audit": audited and audited.record}
    blocks = [*influence_brief(done.found.record), *run_brief(record)]
    blocks += audit_brief(audited.record) if audited else []
    blocks += answers_brief(record["influence"], done.outcomes) if done.outcomes else []
    answer({**told, "answers": [one.generated for one in done.outcomes]}, blocks)
    following = after_run(record, done.unlearned.output)
    ending(
        verdict=done.unlearned.verdict,
        strength=strength(record),
        places={"Model": done.unlearned.output, "Audit": audited and audited.output},
        following=[one for one in following if not (audited and one.startswith("palinode audit"))],
    )
    secret_workspace(workspace_folder(build_recipe(record["recipe"])), output, "rows, θ_1")
    code = done.unlearned.verdict["exit_code"] or (1 if audited and not audited.passed else 0)
    if code:
        raise typer.Exit(code)


def resolve_base(
    content: Mapping[str, Any], changes: Sequence[str], *, checkpoints: str | None, **evidence: Any
) -> Location | None:
    """Have a recipe's content name a base: its own, or the last clean one of a series, which is returned.

    `evidence` are options of `locate`. Raises RecipeError unless base or checkpoints is named, not both.
    """
    from palinode import jobs

    base = content["models"].get("base")
    named = [f"--{name}" for name in ("log", "order", "corpus", "control") if evidence[name]]
    if base is not None and (checkpoints is not None or named):
        raise RecipeError(
            f"--base names the checkpoint, so {'--checkpoints' if checkpoints else named[0]} has nothing to "
            "find; leave one of them out"
        )
    if base is not None:
        return None
    if checkpoints is None:
        raise RecipeError(
            "name an earlier checkpoint with --base, or a ladder of them with --checkpoints to have the last "
            "clean one found"
        )
    found = jobs.locate(
        content["data"]["forget"],
        checkpoints,
        target=content["models"]["target"],
        **evidence,
        settings=LocateSettings(
            columns=content["data"].get("columns"),
            allow_pickle=content["models"].get("allow_pickle", False),
            max_length=content.get("training", {}).get("max_length", 512),
            style=read_prompts({}, changes).style(),
            device=content.get("device", "auto"),
            seed=content.get("seed", 0),
        ),
        listener=listener(),
    )
    location, facts = jobs.chosen_base(found)
    content["models"]["base"] = location
    warn(f"the base is step {facts['step']:,} of the ladder ({location}), {facts['reason']}.")
    for text in found.warnings:
        warn(text)
    return found


def check_place(path: Path) -> Path:
    """Return a path that a file can be written to; raise OutputError where it cannot."""

    if path.is_dir() or not path.parent.is_dir():
        raise OutputError(f"{path} cannot be written: it is a folder, or its folder does not exist")
    return path


def plan(
    steps: int,
    checkpoint_size: str,
    budget: str,
    every: int | None = None,
    interest: str = "uniform",
    half_life: float | None = None,
    picture: Path | None = None,
) -> None:
    """Plan which checkpoints a training should keep.

    Within a budget, so that a clean one lies close before any exposure.
    """
    from palinode.history.plan import Wish, plan_record
    from palinode.history.plan import plan as plan_checkpoints
    from palinode.report.location_report import plan_brief, plan_picture
    from palinode.weights.checkpoint import Checkpoint

    stored = Path(checkpoint_size).is_dir()
    if half_life is not None and interest == "uniform":
        raise RecipeError("--half-life is for --interest recent; with uniform all steps count alike")
    wish = Wish(
        steps=steps,
        every=every or max(1, steps // 200),
        checkpoint_bytes=Checkpoint.open(checkpoint_size).nbytes if stored else _bytes(checkpoint_size),
        budget_bytes=_bytes(budget),
        interest=interest,  # type: ignore[arg-type]  # checked there
        half_life=half_life,
    )
    record = plan_record(wish, plan_checkpoints(wish))
    if picture:
        write_text(check_place(picture), plan_picture(record))
    answer(record, plan_brief(record))


SIZE = re.compile(r"[\d.]+\s*\w*", re.ASCII)
"""Pydantic reads the beginning of a text: 2,5GB would be two bytes."""


def _bytes(text: str) -> int:
    try:
        return int(TypeAdapter(ByteSize).validate_python(text if SIZE.fullmatch(text) else ""))
    except ValidationError:
        raise RecipeError(f"{text!r} is no size; write bytes with a unit, as in 500GB or 2.5TB") from None

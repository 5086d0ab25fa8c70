"""The verbs of the command line. Heavy modules are imported inside them, so that --help is quick."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer

from palinode.cli.about_verbs import audit, compare, doctor, evaluate, list_everything, report
from palinode.cli.chat import chat
from palinode.cli.console import after_run, answer, ending, given, listener, out, secret, secret_workspace
from palinode.cli.history_verbs import influence, locate, resolve_base
from palinode.cli.history_verbs import plan as plan_command
from palinode.cli.options import JSON, SHARED, keys, lengths_alike, takes, verbs
from palinode.cli.request_verbs import requests
from palinode.cli.weight_verbs import apply, export, reproduce, sign, vectors, verify
from palinode.errors import InputError, RecipeError
from palinode.pipeline.recipe import build_recipe, load_recipe
from palinode.records import dotted, read_json
from palinode.settings import Questioning

if TYPE_CHECKING:
    from palinode.history.locating import Location
    from palinode.report.content import Block

app = typer.Typer(
    name="palinode",
    help="Take training data back out of a language model: θ_D − α(θ_1 − θ_0) + β(θ_2 − θ_0).",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
verb = verbs(app)


INVENTED = "invented rows, θ_1"
"""What the demo's workspace holds."""


def _print_version(asked: bool) -> None:
    if asked:
        from palinode.version import __version__

        print(f"palinode {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", "-V", help="Print the version and leave.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """Take training data back out of a language model."""


@verb()
@takes(*keys("unlearn"))
def unlearn(
    content: dict[str, Any],
    *,
    checkpoints: str | None = None,
    log: Path | None = None,
    order: Path | None = None,
    corpus: str | None = None,
    control: str | None = None,
    changes: list[str] | None = None,
    dry_run: bool = False,
    measure: bool = False,
    on: str | None = None,
) -> None:
    """From two models and a forget set to an unlearned model.

    It comes with its record and a report.
    """
    places: Any = {"log": log, "order": order, "corpus": corpus, "control": control}
    evidence = {"checkpoints": checkpoints, **places}
    models, located = content["models"], None
    if on and not any(evidence.values()) and _needs_base(content.get("method", "msa")):
        models.setdefault("base", models["target"])  # a plan opens no base
    if _needs_base(content.get("method", "msa")) or "base" in models or any(evidence.values()):
        located = resolve_base(content, changes or (), **evidence)
    lengths_alike(content)
    recipe = build_recipe(content, changes or [])
    _run(recipe, dry_run=dry_run, located=located, measure=measure, on=on)


@verb(name="filter")
@takes(*keys("filter"))
def filter_verb(
    content: dict[str, Any],
    *,
    mu: float | None = None,
    epsilon: float | None = None,
    changes: list[str] | None = None,
    dry_run: bool = False,
) -> None:
    """Filter what another tool unlearned: it keeps more.

    With forget rows it is a run like that of unlearn. Without them the change goes as far as it did.
    """
    from palinode.pipeline.filter_run import filter_by_retain_rows, filter_recipe
    from palinode.pipeline.inputs import workspace_folder

    lengths_alike(content)
    known = "forget" in content["data"]
    recipe = build_recipe(filter_recipe(content, mu=mu, epsilon=epsilon), changes or [])
    if known:
        _run(recipe, dry_run=dry_run)
        return
    if dry_run:
        raise RecipeError("only a run with forget rows has a plan; name --forget, or leave --dry-run out")
    result = filter_by_retain_rows(recipe, listener=listener())
    harm = result.record["transforms"][-1].get("harm")
    text = f"{result.output}: the filtered model, and filter.json"
    text += f"; it moves the retain rows' outputs by {harm:.3g} of what it did" if harm is not None else ""
    alpha = f"α = {result.record['alpha']:g}; nobody asked whether it forgot: there were no forget rows"
    answer(dict(result.record), text)
    ending(strength=alpha, following=after_run({}, result.output))
    secret_workspace(workspace_folder(recipe), result.output, "what layers read of rows")


@verb()
@takes(*keys("run"))
def run(
    content: dict[str, Any],
    recipe: Path,
    *,
    changes: list[str] | None = None,
    dry_run: bool = False,
    on: str | None = None,
) -> None:
    """Do the job of unlearn as a recipe describes it."""

    named = [f"{key}={json.dumps(value)}" for key, value in dotted(content) if not isinstance(value, dict)]
    read = load_recipe(recipe, [*(changes or []), *named])
    _run(read, dry_run=dry_run, on=on)


@verb()
@takes(*keys("finetune"))
def finetune(content: dict[str, Any], *, base: str, data: str, output: Path) -> None:
    """Fine-tune a checkpoint on rows, as unlearn does."""
    from palinode.jobs import finetune_file

    style = content.pop("prompts", None)
    done = finetune_file(
        base,
        data,
        output,
        content.pop("training", {}),
        **content.pop("data", {}),
        **content.pop("models", {}),
        **content,
        style=style,
        listener=listener(),
    )
    first, last = done.curve[0].loss, done.curve[-1].loss
    facts = {
        "output": str(output),
        "steps": len(done.curve),
        "tokens": done.tokens,
        "first_loss": first,
        "last_loss": last,
        "seconds": round(done.seconds, 1),
    }
    answer(facts, f"{output}: {len(done.curve)} steps, loss {first:.3f} to {last:.3f}")
    secret(output, "it knows the rows")


verb()(evaluate)


@verb()
@takes(of=Questioning, only=["seed"])
def demo(settings: Questioning, output: Path | None = None, locate: bool = False) -> None:
    """Unlearn invented people from a tiny model.

    Its whole history is known; two to three minutes.
    """
    from palinode.cli.console import demo_sentence
    from palinode.pipeline.demo_run import demo as run_demo
    from palinode.pipeline.demo_run import demo_locate
    from palinode.report.location_report import demo_brief
    from palinode.report.run_report import demo_grid, strength

    if locate:
        place = output or Path("palinode-demo-locate")
        result = demo_locate(place, seed=settings.seed, listener=listener())
        answer(result.record, [*demo_brief(result.record), f"Everything is in {result.folder}."])
        secret(result.folder / "workspace", INVENTED, of=result.folder)
        return
    result = run_demo(output or Path("palinode-demo"), seed=settings.seed, listener=listener())
    unlearned = result.folder / "unlearned"
    record = read_json(unlearned / "record.json")
    said: list[Block] = [demo_grid(result.record), demo_sentence(result)]
    answer(result.record, said)
    ending(
        verdict=record["verdict"],
        strength=strength(record),
        places={"Page": result.folder / "report.html"},
        following=after_run(record, unlearned),
    )
    secret(result.folder / "workspace", INVENTED, of=result.folder)


@verb(name="forget-workspace", shared=JSON)
def forget_workspace(place: Path, yes: bool = False) -> None:
    """Destroy what a run left that holds its rows.

    Vectors, θ_1, outcomes and cached facts go. Its result stays.
    """
    from palinode.pipeline.forgetting import describe_leftovers, leftovers, leftovers_content

    with leftovers(place) as found:
        if not given("as_json"):
            for line in describe_leftovers(found):
                out().print(line, markup=False, soft_wrap=True)
        if not yes and not sys.stdin.isatty():
            raise InputError("nothing was destroyed, as there is no terminal to ask on; add --yes")
        if not yes and not typer.confirm("Destroy it?", err=True):
            out().print("Nothing was destroyed.")
            return
        found.destroy()
    answer(leftovers_content(found), f"{len(found.parts)} parts destroyed.")


sparing: dict[Any, tuple[str, ...]] = {report: JSON, export: ()}
for each in (apply, audit, compare, report, reproduce, sign, verify, doctor, chat, export, locate, influence):
    verb(shared=sparing.get(each, SHARED))(each)
verb(name="plan", shared=JSON)(plan_command)
verb(name="list", shared=JSON)(list_everything)
app.add_typer(vectors, name="vector")
app.add_typer(requests, name="requests")


# What the verbs share


def _needs_base(name: str) -> bool:
    """Tell whether a method starts from a base; of one that does not exist `open_inputs` will speak."""
    from palinode.methods import METHODS

    return name in METHODS and "base" in METHODS[name].needs


def _run(
    recipe: Any,
    *,
    dry_run: bool,
    located: Location | None = None,
    measure: bool = False,
    on: str | None = None,
) -> None:
    from palinode import jobs
    from palinode.pipeline.costs import describe
    from palinode.pipeline.inputs import workspace_folder
    from palinode.pipeline.run import dry_run as dry_run_of
    from palinode.pipeline.run import forecast
    from palinode.report.run_report import run_brief, strength

    if measure and not dry_run:
        raise RecipeError("--measure foretells what a run would find; say --dry-run too")
    if on and (measure or not dry_run):
        raise RecipeError("--on plans for machines that are not here; say --dry-run, and leave --measure out")
    if dry_run:
        planned = dry_run_of(recipe, listener(), on=on)
        content, lines = asdict(planned), describe(planned)
        if measure:
            foretold = forecast(recipe, listener())
            content["forecast"] = asdict(foretold)
            lines += ["", *foretold.lines()]
        if located and {"log", "order"} & {*located.evidence}:
            content["exposures"] = fmean(len(row.seen) for row in located.rows)
            lines.append(f"Each forget row was seen {content['exposures']:.1f} times, as far as is known.")
        answer(content, "\n".join(lines))
        return
    result = jobs.unlearn(recipe, base=located, listener=listener())
    if result.finished_before and not given("as_json"):
        out().print(f"{result.output} already holds the result of this very run.", soft_wrap=True)
    answer(result.record, run_brief(result.record))
    ending(
        verdict=result.verdict,
        strength=strength(result.record),
        places={
            "Model": result.output and f"{result.output} (with README.md, record.json and report.html)",
            "Page": result.report and f"{result.report} (with sample answers)",
        },
        following=after_run(result.record, result.output),
    )
    output = Path(recipe.output.folder)
    secret_workspace(workspace_folder(recipe), output, "rows, θ_1")
    if result.verdict["exit_code"]:
        raise typer.Exit(result.verdict["exit_code"])

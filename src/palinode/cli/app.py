"""The verbs of the command line. Heavy modules are imported inside them, so that --help is quick."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from palinode.cli.apply import apply
from palinode.cli.audit import audit
from palinode.cli.chat import chat
from palinode.cli.compare import compare
from palinode.cli.console import listener, out, print_json, secret, secret_workspace
from palinode.cli.doctor import doctor
from palinode.cli.evaluate import evaluate
from palinode.cli.export import export
from palinode.cli.listing import list_everything
from palinode.cli.locate import locate
from palinode.cli.options import (
    Accumulation,
    AllowPickle,
    BatchSize,
    Columns,
    Device,
    Dtype,
    Epochs,
    Json,
    LearningRate,
    Lora,
    MaxLength,
    Precision,
    Prompts,
    Quiet,
    Scales,
    Seed,
    Tracker,
    WarmupEpochs,
    WeightDecay,
    parse_scales,
)
from palinode.cli.plan import plan as plan_command
from palinode.cli.report import report
from palinode.cli.vector import vectors
from palinode.cli.verify import verify

app = typer.Typer(
    name="palinode",
    help="Take training data back out of a language model: θ_D − α(θ_1 − θ_0) + β(θ_2 − θ_0).",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


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
            "--version", help="Print the version and leave.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """Take training data back out of a language model."""


@app.command()
def unlearn(
    target: Annotated[
        str, typer.Option(help="The model to be cleaned (θ_D): a folder, or a hub id[@revision].")
    ],
    forget: Annotated[
        str, typer.Option(help="The forget set: JSONL, JSON, CSV, Parquet or text; file or hub data set.")
    ],
    output: Annotated[str, typer.Option(help="Folder for the unlearned model; must not exist, or be empty.")],
    base: Annotated[
        str | None,
        typer.Option(
            help="An earlier checkpoint of it that had not seen the forget set (θ_0), or give --checkpoints."
        ),
    ] = None,
    checkpoints: Annotated[
        str | None,
        typer.Option(help="Instead of --base: the ladder to find it in, as `palinode locate` does."),
    ] = None,
    log: Annotated[Path | None, typer.Option(help="With --checkpoints: folder of an exposure log.")] = None,
    order: Annotated[
        Path | None, typer.Option(help="With --checkpoints: file that describes the data order.")
    ] = None,
    corpus: Annotated[str | None, typer.Option(help="With --checkpoints: the rows trained on.")] = None,
    control: Annotated[
        str | None,
        typer.Option(help="With --checkpoints: rows like the forget rows, never trained on."),
    ] = None,
    retain: Annotated[
        str | None, typer.Option(help="Rows whose effect must stay; without them β = 0.")
    ] = None,
    holdout: Annotated[
        str | None,
        typer.Option(help="Rows like the forget rows that neither model has seen, to set the yardstick by."),
    ] = None,
    retrained: Annotated[
        str | None, typer.Option(help="The gold standard, to compare with, where one exists.")
    ] = None,
    method: Annotated[str, typer.Option(help="A name that `palinode list methods` prints.")] = "msa",
    refusals: Annotated[
        str | None, typer.Option(help="Refusals, one a line, for methods that teach them.")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="Set any key of a recipe, as in method_settings.beta=0.2; repeatable."),
    ] = None,
    project: Annotated[
        bool,
        typer.Option("--project", help="Take out of the forget vector what would move the retain rows."),
    ] = False,
    scales: Scales = None,
    retain_share: Annotated[
        float | None, typer.Option(help="Share of the target's retain probability to keep. [default: 0.9]")
    ] = None,
    epochs: Epochs = None,
    learning_rate: LearningRate = None,
    batch_size: BatchSize = None,
    accumulation: Accumulation = None,
    warmup_epochs: WarmupEpochs = None,
    weight_decay: WeightDecay = None,
    max_length: MaxLength = None,
    precision: Precision = None,
    lora: Lora = None,
    max_rows: Annotated[int | None, typer.Option(help="Rows of each set to evaluate. [default: 400]")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Length limit of answers. [default: 200]")
    ] = None,
    columns: Columns = None,
    allow_pickle: AllowPickle = False,
    allow_overlap: Annotated[
        bool,
        typer.Option("--allow-overlap", help="Leave forget rows out of the retain set instead of refusing."),
    ] = False,
    dtype: Dtype = None,
    rounding: Annotated[str | None, typer.Option(help="auto, nearest or stochastic. [default: auto]")] = None,
    workspace: Annotated[
        str | None, typer.Option(help="Where steps keep their results. [default: OUTPUT.workspace]")
    ] = None,
    device: Device = "auto",
    seed: Seed = 0,
    tracker: Tracker = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print the plan; do nothing.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """From two model folders and a forget set to an unlearned model, with its record and report."""
    from palinode.cli.locate import resolve_base
    from palinode.pipeline.recipe import build_recipe, read_prompts

    located = None
    if _needs_base(method) or any((base, checkpoints, log, order, corpus, control)):
        base, located = resolve_base(
            base,
            checkpoints,
            forget,
            target,
            log=log,
            order=order,
            corpus=corpus,
            control=control,
            columns=columns,
            allow_pickle=allow_pickle,
            device=device,
            seed=seed,
            max_length=max_length or 512,
            style=read_prompts({}, changes or ()).style(),
            quiet=quiet,
        )
    content = {
        "method": method,
        "seed": seed,
        "device": device,
        "tracker": tracker,
        "models": {
            "target": target,
            "base": base,
            "retrained": retrained,
            "allow_pickle": allow_pickle,
        },
        "data": {
            "forget": forget,
            "retain": retain,
            "holdout": holdout,
            "refusals": refusals,
            "columns": _columns(columns),
            "allow_overlap": allow_overlap,
        },
        "training": _training(
            epochs,
            learning_rate,
            batch_size,
            accumulation,
            warmup_epochs,
            weight_decay,
            max_length,
            precision,
            lora,
        ),
        "transforms": [{"name": "projection", "others": "drop"}] if project else None,
        "scales": {**_scales(scales), "retain_share": retain_share},
        "evaluation": {"max_rows": max_rows, "max_new_tokens": max_new_tokens, "max_length": max_length},
        "output": {"folder": output, "workspace": workspace, "dtype": dtype, "rounding": rounding},
    }
    recipe = build_recipe(_given(content), changes or [])
    _run(recipe, dry_run=dry_run, quiet=quiet, as_json=as_json, located=located)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A TOML recipe.")],
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change one key, as in training.learning_rate=2e-5; repeatable."),
    ] = None,
    tracker: Tracker = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print the plan; do nothing.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """The same job, written down as a recipe."""
    from palinode.pipeline.recipe import load_recipe

    named = [f"tracker={json.dumps(tracker)}"] if tracker else []
    _run(load_recipe(recipe, [*(changes or []), *named]), dry_run=dry_run, quiet=quiet, as_json=as_json)


@app.command()
def finetune(
    base: Annotated[
        str, typer.Option(help="The checkpoint to start from: a folder, or a hub id[@revision].")
    ],
    data: Annotated[
        str, typer.Option(help="The rows: JSONL, JSON, CSV, Parquet or text; file or hub data set.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for the fine-tuned checkpoint (float32).")],
    epochs: Epochs = None,
    learning_rate: LearningRate = None,
    batch_size: BatchSize = None,
    accumulation: Accumulation = None,
    warmup_epochs: WarmupEpochs = None,
    weight_decay: WeightDecay = None,
    max_length: MaxLength = None,
    precision: Precision = None,
    lora: Lora = None,
    columns: Columns = None,
    allow_pickle: AllowPickle = False,
    prompts: Prompts = None,
    device: Device = "auto",
    seed: Seed = 0,
    tracker: Tracker = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a checkpoint on rows, as the vectors of the main job are made."""
    from palinode.pipeline.recipe import prompt_style
    from palinode.pipeline.steps import finetune_file

    settings = _training(
        epochs,
        learning_rate,
        batch_size,
        accumulation,
        warmup_epochs,
        weight_decay,
        max_length,
        precision,
        lora,
    )
    done = finetune_file(
        base,
        data,
        output,
        _given(settings),
        columns=_columns(columns),
        allow_pickle=allow_pickle,
        style=prompt_style(prompts),
        device=device,
        seed=seed,
        tracker=tracker,
        listener=listener(quiet=quiet),
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
    _show(facts, f"{output}: {len(done.curve)} steps, loss {first:.3f} to {last:.3f}", as_json=as_json)
    secret(output, "it knows the rows", as_json=as_json)


app.command()(evaluate)


@app.command()
def demo(
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for everything the demo makes. [default: palinode-demo, or palinode-demo-locate]"
        ),
    ] = None,
    locate: Annotated[
        bool,
        typer.Option("--locate", help="A ladder of checkpoints instead: when were rows seen, which to take?"),
    ] = False,
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Unlearn invented people from a tiny model whose whole history is known; two to three minutes."""
    if locate:
        _demo_locate(output or Path("palinode-demo-locate"), seed=seed, quiet=quiet, as_json=as_json)
        return
    from palinode.cli.tables import demo_sentence, demo_table
    from palinode.pipeline import demo as run_demo

    result = run_demo(output or Path("palinode-demo"), seed=seed, listener=listener(quiet=quiet))
    if as_json:
        print_json(result.record)
    else:
        out().print(demo_table(result.record))
        out().print(demo_sentence(result), soft_wrap=True)
    secret(result.folder / "workspace", INVENTED, of=result.folder, as_json=as_json)


@app.command(name="forget-workspace")
def forget_workspace(
    place: Annotated[
        Path,
        typer.Argument(
            help="What `unlearn`, `audit`, `compare`, `evaluate` or `demo` wrote, or a workspace."
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Destroy without asking.")] = False,
    as_json: Json = False,
) -> None:
    """Destroy what a run left that holds its rows: vectors, θ_1, outcomes, cached facts. Its result stays."""
    from palinode.errors import InputError
    from palinode.pipeline.forgetting import describe_leftovers, leftovers, leftovers_content

    with leftovers(place) as found:
        if not as_json:
            for line in describe_leftovers(found):
                out().print(line, markup=False, soft_wrap=True)
        if not yes and not sys.stdin.isatty():
            raise InputError("nothing was destroyed, as there is no terminal to ask on; add --yes")
        if not yes and not typer.confirm("Destroy it?", err=True):
            out().print("Nothing was destroyed.")
            return
        found.destroy()
    if as_json:
        print_json(leftovers_content(found))
    else:
        out().print(f"{len(found.parts)} parts destroyed.")


app.command()(apply)
app.command()(audit)
app.command()(compare)
app.command()(report)
app.command()(verify)
app.command()(doctor)
app.command()(chat)
app.command()(export)
app.command()(locate)
app.command(name="plan")(plan_command)
app.command(name="list")(list_everything)
app.add_typer(vectors, name="vector")


# What the verbs share


def _needs_base(name: str) -> bool:
    """Tell whether a method starts from a base; of one that does not exist the recipe will speak."""
    from palinode.methods import METHODS

    return name not in METHODS or "base" in METHODS[name].needs


def _demo_locate(output: Path, *, seed: int, quiet: bool, as_json: bool) -> None:
    from palinode.pipeline.locate_run import demo_locate
    from palinode.report.content import show
    from palinode.report.location_report import demo_brief

    result = demo_locate(output, seed=seed, listener=listener(quiet=quiet))
    if as_json:
        print_json(result.record)
    else:
        show(demo_brief(result.record), out())
        out().print(f"Everything is in {result.folder}.", soft_wrap=True)
    secret(result.folder / "workspace", INVENTED, of=result.folder, as_json=as_json)


def _run(
    recipe: Any, *, dry_run: bool, quiet: bool, as_json: bool, located: dict[str, Any] | None = None
) -> None:
    from palinode.pipeline.costs import describe
    from palinode.pipeline.inputs import workspace_folder
    from palinode.pipeline.run import dry_run as dry_run_of
    from palinode.pipeline.run import unlearn

    if dry_run:
        planned = dry_run_of(recipe)
        _show(asdict(planned), "\n".join(describe(planned)), as_json=as_json)
        return
    result = unlearn(recipe, command=_command(), listener=listener(quiet=quiet), located=located)
    if as_json:
        print_json(result.record)
    else:
        _show_unlearned(result)
    secret_workspace(workspace_folder(recipe), result.output, "rows, θ_1", as_json=as_json)


def _show_unlearned(result: Any) -> None:
    from palinode.report.content import show
    from palinode.report.run_report import run_brief

    if result.finished_before:
        out().print(f"{result.output} already holds the result of this very run.", soft_wrap=True)
    show(run_brief(result.record), out())
    out().print(f"{result.output}: the unlearned model, record.json and report.html", soft_wrap=True)
    if result.report:
        out().print(f"{result.report}: the report with sample answers", soft_wrap=True)


def _training(*values: object) -> dict[str, Any]:
    *plain, rank = values
    names = (
        "epochs",
        "learning_rate",
        "batch_size",
        "accumulation",
        "warmup_epochs",
        "weight_decay",
        "max_length",
        "precision",
    )
    return {**dict(zip(names, plain, strict=True)), "lora": None if rank is None else {"rank": rank}}


def _scales(text: str | None) -> dict[str, Any]:
    """Return the recipe keys for auto, grid, or two numbers with a comma between them."""
    if text in (None, "auto", "grid"):
        return {"choose": text}
    alpha, beta = parse_scales(str(text), words="auto, grid, or ")
    return {"forget": alpha, "retain": beta}


def _given(content: dict[str, Any]) -> dict[str, Any]:
    """Leave out what was not given, so that the recipe's own defaults hold."""
    kept = {key: _given(value) if isinstance(value, dict) else value for key, value in content.items()}
    return {key: value for key, value in kept.items() if value is not None}


def _columns(text: str | None) -> dict[str, str]:
    from palinode.data import parse_columns

    return parse_columns(text) if text else {}


def _command() -> str:
    import shlex

    return shlex.join(["palinode", *sys.argv[1:]])


def _show(facts: dict[str, Any], text: str, *, as_json: bool) -> None:
    if as_json:
        print_json(facts)
    else:
        out().print(text, soft_wrap=True)

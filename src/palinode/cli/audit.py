"""`palinode audit`: attack a model, a reference model and the target alike, and compare what comes out."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from palinode.cli.console import listener, out, print_json, secret
from palinode.cli.options import AllowPickle, Columns, Device, Json, Prompts, Quiet, Seed


def audit(
    model: Annotated[str, typer.Argument(help="The model to be audited: a folder, or a hub id[@revision].")],
    against: Annotated[
        str,
        typer.Option(help="The reference model: retrained without the forget set, or the base checkpoint."),
    ],
    forget: Annotated[
        str, typer.Option(help="The forget set: JSONL, JSON, CSV, Parquet or text; file or hub data set.")
    ],
    output: Annotated[
        Path, typer.Option(help="Folder for report.html, audit.md, audit.json and the results so far.")
    ],
    reference: Annotated[
        str, typer.Option("--reference", "--yardstick", help="What --against is: retrained or base.")
    ] = "retrained",
    target: Annotated[
        str | None, typer.Option(help="The model before unlearning, to show what the attacks find in it.")
    ] = None,
    retain: Annotated[str | None, typer.Option(help="Retain rows, for relearning from them alone.")] = None,
    holdout: Annotated[
        str | None, typer.Option(help="Rows that no model has seen, for the membership attacks.")
    ] = None,
    paraphrases: Annotated[
        str | None,
        typer.Option(
            help="Column of the forget rows, or file with a row for each. [default: paraphrased_question]"
        ),
    ] = None,
    lookalikes: Annotated[
        str | None,
        typer.Option(
            help="Rows like the forget set. [default: made of perturbed_answer or paraphrased_answer]"
        ),
    ] = None,
    attacks: Annotated[
        str | None, typer.Option(help="Only these attacks, with commas between them. [default: all]")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="quick, standard or full. [default: standard]")] = None,
    policy: Annotated[
        Path | None, typer.Option(help="A TOML policy: margins, budget, what must be run.")
    ] = None,
    columns: Columns = None,
    allow_pickle: AllowPickle = False,
    prompts: Prompts = None,
    device: Device = "auto",
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Attack a model and a reference model, and compare.

    Looks for evidence that a model knows more, or less, of a forget set than the reference model does.
    """
    from palinode.data import parse_columns
    from palinode.errors import RecipeError
    from palinode.jobs import AuditSettings
    from palinode.jobs import audit as run_audit
    from palinode.pipeline.recipe import prompt_style

    if reference not in ("retrained", "base"):
        raise RecipeError(f"--reference is {reference!r}; say retrained or base")
    found = run_audit(
        model,
        against=against,
        forget=forget,
        output=output,
        kind="base" if reference == "base" else "retrained",
        target=target,
        retain=retain,
        holdout=holdout,
        settings=AuditSettings(
            attacks=[name.strip() for name in attacks.split(",")] if attacks else (),
            budget=budget,
            policy=policy,
            paraphrases=paraphrases,
            lookalikes=lookalikes,
            columns=parse_columns(columns) if columns else None,
            style=prompt_style(prompts),
            allow_pickle=allow_pickle,
            device=device,
            seed=seed,
        ),
        command=shlex.join(["palinode", *sys.argv[1:]]),
        listener=listener(quiet=quiet),
    )
    if as_json:
        print_json(found.record)
    else:
        _show(found.record, output)
    secret(output / "results", "row by row", of=output, as_json=as_json)
    if not found.passed:
        raise typer.Exit(1)


def _show(record: Mapping[str, Any], output: Path) -> None:
    from palinode.report.audit_report import audit_brief
    from palinode.report.content import show

    show(audit_brief(record), out())
    out().print(f"{output}: report.html, audit.md and audit.json", soft_wrap=True)

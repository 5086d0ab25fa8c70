"""`palinode plan`: which checkpoints a training should keep."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from palinode.cli.console import out, print_json
from palinode.cli.options import Json

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "p": 10**15}


def plan(
    steps: Annotated[int, typer.Option(help="Length of the training in optimiser steps.", min=1)],
    checkpoint_size: Annotated[str, typer.Option(help="Size of one checkpoint, as in 2.5GB, or its folder.")],
    budget: Annotated[str, typer.Option(help="Storage for checkpoints, as in 500GB.")],
    every: Annotated[
        int | None, typer.Option(help="Steps between possible saves. [default: 1/200 of the training]", min=1)
    ] = None,
    interest: Annotated[
        str, typer.Option(help="What requests concern: uniform (all steps alike) or recent.")
    ] = "uniform",
    half_life: Annotated[
        float | None,
        typer.Option(help="Steps after which interest has halved. [default: 1/10 of the training]"),
    ] = None,
    tokens_per_step: Annotated[
        int | None, typer.Option(help="Tokens of an optimiser step, to read the decay table.", min=1)
    ] = None,
    decay: Annotated[
        Path | None,
        typer.Option(help="Measured decay with distance (TOML). [default: the published OLMo-2 figures]"),
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Write a picture here (SVG).")] = None,
    as_json: Json = False,
) -> None:
    """Plan which checkpoints a training should keep.

    Within a budget, so that a clean one lies close before any exposure.
    """
    from palinode.cli.locate import check_place
    from palinode.errors import RecipeError
    from palinode.history.plan import Wish, plan_checkpoints, plan_record, read_decay
    from palinode.records import write_text
    from palinode.report.content import show
    from palinode.report.location_report import plan_brief
    from palinode.report.pictures import plan_picture

    if half_life is not None and interest == "uniform":
        raise RecipeError("--half-life is for --interest recent; with uniform all steps count alike")
    wish = Wish(
        steps=steps,
        every=every or max(1, steps // 200),
        checkpoint_bytes=_size(checkpoint_size),
        budget_bytes=_bytes(budget),
        interest=interest,  # type: ignore[arg-type]  # checked there
        half_life=half_life,
        tokens_per_step=tokens_per_step,
    )
    table = read_decay(decay)
    record = plan_record(wish, plan_checkpoints(wish, decay=table), table)
    if picture:
        write_text(check_place(picture), plan_picture(record))
    if as_json:
        print_json(record)
        return
    show(plan_brief(record), out())


def _size(text: str) -> int:
    """Return the size of a checkpoint: written out, or that of the weights in a folder."""
    if not Path(text).is_dir():
        return _bytes(text)
    from palinode.weights.checkpoint import Checkpoint

    return Checkpoint.open(text).nbytes


def _bytes(text: str) -> int:
    from palinode.errors import RecipeError

    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgtp]?)b?\s*", text.lower())
    if not found:
        raise RecipeError(f"{text!r} is no size; write bytes with a unit, as in 500GB or 2.5TB")
    return round(float(found[1]) * UNITS[found[2]])

"""`palinode export`: the formula in the words of another tool."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from palinode.cli.options import AllowPickle, Dtype, FixedScales, parse_scales


def export(
    target: Annotated[str, typer.Option(help="The model to be cleaned (θ_D).")],
    base: Annotated[str, typer.Option(help="The checkpoint that the others were fine-tuned from (θ_0).")],
    forget_model: Annotated[str, typer.Option(help="θ_1: the base fine-tuned on the forget set.")],
    mergekit: Annotated[
        bool, typer.Option("--mergekit", help="As a recipe for mergekit-yaml, the one form there is so far.")
    ] = False,
    retain_model: Annotated[
        str | None, typer.Option(help="θ_2: the base fine-tuned on a retain sample.")
    ] = None,
    scales: FixedScales = "1.0,0.0",
    dtype: Dtype = None,
    allow_pickle: AllowPickle = False,
    output: Annotated[
        Path | None, typer.Option(help="File to write; must not exist. [default: standard output]")
    ] = None,
) -> None:
    """Write the formula as a recipe of another tool.

    θ_D − α(θ_1 − θ_0) + β(θ_2 − θ_0), computed there as a check.
    """
    from palinode.errors import RecipeError
    from palinode.methods.apply import formula_of
    from palinode.weights.mergekit import mergekit_recipe

    if not mergekit:
        raise RecipeError("export does not know for which tool; say --mergekit")
    alpha, beta = parse_scales(scales)
    point, _ = formula_of(
        target,
        base,
        forget_model,
        retain_model,
        forget_scale=alpha,
        retain_scale=beta,
        allow_pickle=allow_pickle,
    )
    text = mergekit_recipe(point, dtype=dtype)
    if output is None:
        print(text, end="")
    else:
        _write(output, text)


def _write(output: Path, text: str) -> None:
    from palinode.errors import OutputError

    try:
        with output.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise OutputError(f"{output} exists; choose another file, or remove it") from None
    except OSError as error:
        raise OutputError(f"{output} cannot be written ({error.strerror}); choose another file") from None

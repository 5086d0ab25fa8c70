"""`palinode apply`: the formula on models that exist."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from palinode.cli.console import listener, out, print_json, warn
from palinode.cli.options import AllowPickle, Dtype, FixedScales, Json, Quiet, parse_scales

if TYPE_CHECKING:
    from palinode.weights import Saved


def apply(
    target: Annotated[str, typer.Option(help="The model to be cleaned (θ_D).")],
    forget_model: Annotated[
        str,
        typer.Option(
            help="θ_1: the base fine-tuned on the forget set; or its vector: a LoRA adapter, a stored one."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the result; must not exist, or be empty.")],
    base: Annotated[
        str | None, typer.Option(help="The checkpoint that the others were fine-tuned from (θ_0).")
    ] = None,
    retain_model: Annotated[
        str | None, typer.Option(help="θ_2: the base fine-tuned on a retain sample; or its vector.")
    ] = None,
    scales: FixedScales = "1.0,0.0",
    dtype: Dtype = None,
    rounding: Annotated[
        str, typer.Option(help="nearest, stochastic, or auto: stochastic where nearest would lose dose.")
    ] = "auto",
    precision: Annotated[str, typer.Option(help="Of the sums: float32 or float64.")] = "float32",
    rows: Annotated[
        str, typer.Option(help="Embeddings of different length: refuse, or sum the rows that are shared.")
    ] = "refuse",
    allow_pickle: AllowPickle = False,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Let NaN and infinity in the models through.")
    ] = False,
    no_check: Annotated[
        bool,
        typer.Option("--no-check", help="Do not read the result back; then there is no weights.json."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write θ_D − α(θ_1 − θ_0) + β(θ_2 − θ_0) of given models.

    No tokenizer and no data are needed.

    Under torchrun, or with RANK and WORLD_SIZE set by hand on hosts that share the output folder, the
    processes divide the work and write the very files that one of them would.
    """
    from palinode.methods import apply as apply_models
    from palinode.weights import Checkpoint, Crew

    alpha, beta = parse_scales(scales)
    crew = Crew.from_environment()
    opened = Checkpoint.open(target, allow_pickle=allow_pickle)
    with listener(quiet=quiet or crew.rank > 0).task(
        "writing", -(-opened.parameters // crew.count), "weights"
    ) as advance:
        saved = apply_models(
            opened,
            base,
            forget_model,
            output,
            retain_model=retain_model,
            forget_scale=alpha,
            retain_scale=beta,
            dtype=dtype,
            rounding=rounding,  # type: ignore[arg-type]  # it is checked there
            seed=seed,
            precision=precision,
            rows=rows,  # type: ignore[arg-type]
            allow_pickle=allow_pickle,
            allow_nonfinite=allow_nonfinite,
            check=not no_check,
            crew=crew,
            on_progress=advance,
        )
    if crew.rank:
        return
    if as_json:
        print_json(_facts(output, saved))
        return
    for note in saved.notes:
        warn(note)
    out().print(_sentence(output, saved), soft_wrap=True)


def _facts(output: Path, saved: Saved) -> dict[str, Any]:
    dose = saved.dose
    return {
        "output": str(output),
        "rounding": saved.rounding,
        "effective": dict(dose.effective),
        "relative_error": dose.relative_error,
        "moved_share": dose.moved_share,
        "unreached_share": dose.unreached_share,
        "parts": {
            name: {"effective": dict(part.effective), "moved_share": part.moved_share}
            for name, part in dose.parts.items()
        },
        "notes": list(saved.notes),
        "seconds": dict(saved.seconds),
    }


def _sentence(output: Path, saved: Saved) -> str:
    dose = saved.dose
    scales = ", ".join(f"{name} {scale:.4f}" for name, scale in dose.effective.items())
    return (
        f"{output}: effective scales {scales or 'unknown'}; {dose.moved_share:.1%} of the weights moved, "
        f"{dose.unreached_share:.1%} of the model's numbers are beyond any sum"
    )

"""Verbs on weights: `apply` writes a sum, `vector` keeps directions, `export` hands a sum to mergekit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from palinode.cli.console import listener, out, print_json, warn
from palinode.cli.options import FixedScales, Json, Key, Quiet, parse_scales, takes
from palinode.settings import ApplySettings

if TYPE_CHECKING:
    from palinode.weights import Direction, Saved
    from palinode.weights.vectors import StoredVector


@takes(
    Key(
        "check",
        flag="no-check",
        help="Do not read the result back; then there is no weights.json.",
        read=lambda _: False,
    ),
    of=ApplySettings,
)
def apply(
    settings: ApplySettings,
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
    *,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write θ_D − α(θ_1 − θ_0) + β(θ_2 − θ_0) of given models.

    No tokenizer and no data are needed.

    Under torchrun, or with RANK and WORLD_SIZE set by hand on hosts that share the output folder, the
    processes divide the work and write the very files that one of them would.
    """
    from palinode.methods import apply as apply_models
    from palinode.pipeline.record import dose_facts
    from palinode.weights import Checkpoint, Crew

    alpha, beta = parse_scales(scales)
    crew = Crew.from_environment()
    opened = Checkpoint.open(target, allow_pickle=settings.allow_pickle)
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
            settings=settings,
            crew=crew,
            on_progress=advance,
        )
    if crew.rank:
        return
    if as_json:
        asked = {"forget": alpha, "retain": beta}
        dose = dose_facts(saved, {name: asked[name] for name in saved.dose.effective})
        print_json({"output": str(output), **dose, "seconds": dict(saved.seconds)})
        return
    for note in saved.notes:
        warn(note)
    out().print(_sentence(output, saved), soft_wrap=True)


def _sentence(output: Path, saved: Saved) -> str:
    dose = saved.dose
    scales = ", ".join(f"{name} {scale:.4f}" for name, scale in dose.effective.items())
    return (
        f"{output}: effective scales {scales or 'unknown'}; {dose.moved_share:.1%} of the weights moved, "
        f"{dose.unreached_share:.1%} of the model's numbers are beyond any sum"
    )


vectors = typer.Typer(rich_markup_mode=None)

Base = Annotated[str | None, typer.Option(help="The point that vectors to a --model start from (θ_0).")]


@vectors.callback(invoke_without_command=True)
@takes(of=ApplySettings, only=["allow_pickle"])
def vector(
    settings: ApplySettings,
    context: typer.Context,
    base: Base = None,
    models: Annotated[
        list[str] | None,
        typer.Option("--model", help="A point that a vector leads to (θ_1, θ_2, …); repeatable."),
    ] = None,
    folders: Annotated[
        list[str] | None,
        typer.Option("--vector", help="A stored vector, or a LoRA adapter; repeatable."),
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Show every part of the model.")] = False,
    *,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Norms of vectors, the cosines between them, by layer."""
    from palinode.errors import RecipeError

    if context.invoked_subcommand:
        if base or models or folders or layers or settings.allow_pickle or quiet or as_json:
            word = context.invoked_subcommand
            raise RecipeError(f"options of {word!r} come after that word; move them there")
        return
    if not models and not folders:
        raise RecipeError("there is no vector to measure; name --base and --model, or --vector")
    from palinode.cli.console import vector_content, vector_grids
    from palinode.report.content import show
    from palinode.weights import profile
    from palinode.weights.arithmetic import layout_of

    names = [*dict.fromkeys(models or [])], [*dict.fromkeys(folders or [])]
    directions = _directions(base, *names, settings.allow_pickle)
    total = max(sum(info.size for info in layout_of(one.terms)) for one in directions.values())
    with listener(quiet=quiet).task("measuring", total, "weights") as advance:
        measured = profile(directions, on_progress=advance)
    if as_json:
        print_json(vector_content(measured))
        return
    show(vector_grids(measured, layers=layers), out())


@vectors.command()
@takes(of=ApplySettings, only=["allow_pickle"])
def save(
    settings: ApplySettings,
    output: Annotated[Path, typer.Option(help="Folder for the vector; must not exist, or be empty.")],
    base: Base = None,
    model: Annotated[str | None, typer.Option(help="The point that the vector leads to (θ_1).")] = None,
    folder: Annotated[
        str | None,
        typer.Option("--vector", help="Or a stored vector, or a LoRA adapter, to be stored anew."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the stored numbers: float32 or bfloat16.")] = "float32",
    rank: Annotated[
        int | None, typer.Option(help="Store each matrix as its best approximation of this rank.")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="Or of the smallest rank that keeps this share of its squared norm, as in 0.99."),
    ] = None,
    *,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Store a vector, whole or at low rank, and the error.

    It is an artefact of its own.
    """
    from palinode.errors import RecipeError
    from palinode.weights.arithmetic import layout_of
    from palinode.weights.vectors import save_vector

    if (model is None) == (folder is None):
        raise RecipeError("one vector is stored at a time; name either --base and --model, or --vector")
    models, folders = [model] if model else [], [folder] if folder else []
    (direction,) = _directions(base, models, folders, settings.allow_pickle).values()
    total = sum(info.size for info in layout_of(direction.terms))
    with listener(quiet=quiet).task("storing", total, "weights") as advance:
        stored = save_vector(direction, output, dtype=dtype, rank=rank, energy=energy, on_progress=advance)
    facts = _vector_facts(output, stored)
    if as_json:
        print_json(facts)
    else:
        out().print(_vector_sentence(facts), soft_wrap=True)


def _directions(
    base: str | None, models: list[str], folders: list[str], allow_pickle: bool
) -> dict[str, Direction]:
    """Return the directions by the names they were given."""
    from palinode.errors import RecipeError
    from palinode.weights import Checkpoint
    from palinode.weights.vectors import open_direction

    if models and base is None:
        raise RecipeError("a vector to a --model needs the point that it starts from; name --base")
    start = Checkpoint.open(base, allow_pickle=allow_pickle) if base else None
    found: dict[str, Direction] = {}
    for name in models:
        if start is not None:
            found[name] = Checkpoint.open(name, allow_pickle=allow_pickle) - start
    for name in folders:
        found[name] = open_direction(name, base=start, allow_pickle=allow_pickle)
    return found


def _vector_facts(output: Path, stored: StoredVector) -> dict[str, Any]:
    ranks = sorted(tensor.rank for tensor in stored.tensors.values() if tensor.rank is not None)
    return {
        "output": str(output),
        "kind": stored.kind,
        "dtype": stored.dtype,
        "tensors": len(stored.tensors),
        "weights": stored.weights,
        "ranks": [ranks[0], ranks[-1]] if ranks else None,
        "norm": stored.norm,
        "bytes": stored.nbytes,
        "relative_error": stored.relative_error,
    }


def _vector_sentence(facts: dict[str, Any]) -> str:
    full = 4 * facts["weights"]
    size = f"{facts['bytes'] / 1e6:.4g} MB"
    if facts["bytes"] != full:
        size += f" instead of {full / 1e6:.4g} MB"
    ranks = facts["ranks"]
    shape = "whole" if ranks is None else f"rank {ranks[0]} to {ranks[1]}"
    if ranks and ranks[0] == ranks[1]:
        shape = f"rank {ranks[0]}"
    return (
        f"{facts['output']}: norm {facts['norm']:.5g}, {facts['tensors']} tensors in {facts['dtype']}, "
        f"{shape}, {size}; relative error {facts['relative_error']:.3g}"
    )


@takes(of=ApplySettings, only=["dtype", "allow_pickle"])
def export(
    settings: ApplySettings,
    target: Annotated[str, typer.Option(help="The model to be cleaned (θ_D).")],
    base: Annotated[str, typer.Option(help="The checkpoint that the others were fine-tuned from (θ_0).")],
    forget_model: Annotated[str, typer.Option(help="θ_1: the base fine-tuned on the forget set.")],
    retain_model: Annotated[
        str | None, typer.Option(help="θ_2: the base fine-tuned on a retain sample.")
    ] = None,
    scales: FixedScales = "1.0,0.0",
    *,
    output: Annotated[
        Path | None, typer.Option(help="File to write; must not exist. [default: standard output]")
    ] = None,
) -> None:
    """Write the formula as a recipe for mergekit.

    θ_D − α(θ_1 − θ_0) + β(θ_2 − θ_0), which mergekit-yaml computes as a check.
    """
    from palinode.evaluation.evaluate import check_new_file
    from palinode.methods.apply import formula_of
    from palinode.records import write_text
    from palinode.weights.checkpoint import mergekit_recipe

    alpha, beta = parse_scales(scales)
    point, _ = formula_of(
        target,
        base,
        forget_model,
        retain_model,
        forget_scale=alpha,
        retain_scale=beta,
        allow_pickle=settings.allow_pickle,
    )
    text = mergekit_recipe(point, dtype=settings.dtype)
    if output is None:
        print(text, end="")
    else:
        check_new_file(output, "the recipe")
        write_text(output, text)

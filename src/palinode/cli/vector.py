"""`palinode vector`: directions measured against each other, and stored as artefacts of their own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from palinode.cli.console import listener, out, print_json
from palinode.cli.options import AllowPickle, Json, Quiet

if TYPE_CHECKING:
    from palinode.weights import Direction
    from palinode.weights.vectors import StoredVector

vectors = typer.Typer(rich_markup_mode=None)

Base = Annotated[str | None, typer.Option(help="The point that vectors to a --model start from (θ_0).")]


@vectors.callback(invoke_without_command=True)
def vector(
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
    allow_pickle: AllowPickle = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Norms of vectors, the cosines between them, by layer."""
    from palinode.errors import RecipeError

    if context.invoked_subcommand:
        if base or models or folders or layers or allow_pickle or quiet or as_json:
            word = context.invoked_subcommand
            raise RecipeError(f"options of {word!r} come after that word; move them there")
        return
    if not models and not folders:
        raise RecipeError("there is no vector to measure; name --base and --model, or --vector")
    from palinode.cli.tables import vector_content, vector_tables
    from palinode.weights import profile
    from palinode.weights.vectors import layout_of

    names = [*dict.fromkeys(models or [])], [*dict.fromkeys(folders or [])]
    directions = _directions(base, *names, allow_pickle=allow_pickle)
    total = max(sum(info.size for info in layout_of(one)) for one in directions.values())
    with listener(quiet=quiet).task("measuring", total, "weights") as advance:
        measured = profile(directions, on_progress=advance)
    if as_json:
        print_json(vector_content(measured))
        return
    for table in vector_tables(measured, layers=layers):
        out().print(table)


@vectors.command()
def save(
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
    allow_pickle: AllowPickle = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Store a vector as an artefact of its own, whole or at low rank, and say what error that costs."""
    from palinode.errors import RecipeError
    from palinode.weights.vectors import layout_of, save_vector

    if (model is None) == (folder is None):
        raise RecipeError("one vector is stored at a time; name either --base and --model, or --vector")
    models, folders = [model] if model else [], [folder] if folder else []
    (direction,) = _directions(base, models, folders, allow_pickle=allow_pickle).values()
    total = sum(info.size for info in layout_of(direction))
    with listener(quiet=quiet).task("storing", total, "weights") as advance:
        stored = save_vector(direction, output, dtype=dtype, rank=rank, energy=energy, on_progress=advance)
    facts = _facts(output, stored)
    if as_json:
        print_json(facts)
    else:
        out().print(_sentence(facts), soft_wrap=True)


def _directions(
    base: str | None, models: list[str], folders: list[str], *, allow_pickle: bool
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


def _facts(output: Path, stored: StoredVector) -> dict[str, Any]:
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


def _sentence(facts: dict[str, Any]) -> str:
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

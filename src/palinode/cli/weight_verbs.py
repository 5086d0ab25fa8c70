"""Verbs on model folders: `apply`, `vector`, `export` of sums, and `sign`, `verify`, `reproduce`."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand

from palinode.cli.console import answer, given, listener, out, print_json, secret_workspace, warn
from palinode.cli.options import SHARED, explained, keys, parse_scales, takes, verbs
from palinode.errors import CheckpointError, RecipeError
from palinode.records import workspace_beside, write_text
from palinode.settings import ApplySettings

if TYPE_CHECKING:
    from palinode.pipeline.signing import SignatureCheck
    from palinode.weights import Direction
    from palinode.weights.store import Verification
    from palinode.weights.vectors import StoredVector


@takes(*keys("apply"), of=ApplySettings)
def apply(
    settings: ApplySettings,
    target: str,
    forget_model: str,
    output: Path,
    base: str | None = None,
    retain_model: str | None = None,
    scales: str = "1.0,0.0",
) -> None:
    """Write θ_D − α(θ_1 − θ_0) + β(θ_2 − θ_0) of given models.

    No tokenizer and no data are needed.

    Under torchrun, on hosts that share the output folder, the processes divide the work and write the very
    files that one of them would.
    """
    from palinode.methods import apply as apply_models
    from palinode.pipeline.reporting import dose_facts
    from palinode.weights import Checkpoint

    alpha, beta = parse_scales(scales)
    opened = Checkpoint.open(target, allow_pickle=settings.allow_pickle)
    with listener().task("writing", opened.parameters, "weights") as advance:
        saved = apply_models(
            opened,
            base,
            forget_model,
            output,
            retain_model=retain_model,
            forget_scale=alpha,
            retain_scale=beta,
            settings=settings,
            on_progress=advance,
        )
    if given("as_json"):
        asked = {"forget": alpha, "retain": beta}
        dose = dose_facts(saved, {name: asked[name] for name in saved.dose.effective})
        print_json({"output": str(output), **dose, "seconds": dict(saved.seconds)})
        return
    for note in saved.notes:
        warn(note)
    effective = ", ".join(f"{name} {scale:.4f}" for name, scale in saved.dose.effective.items())
    out().print(
        f"{output}: effective scales {effective or 'unknown'}; {saved.dose.moved_share:.1%} of the weights "
        f"moved, {saved.dose.unreached_share:.1%} of the model's numbers are beyond any sum",
        soft_wrap=True,
    )


vectors = typer.Typer(rich_markup_mode=None)


@vectors.callback(invoke_without_command=True)
@explained
@takes(of=ApplySettings, only=["allow_pickle"])
def vector(
    settings: ApplySettings,
    context: typer.Context,
    base: str | None = None,
    models: list[str] | None = None,
    folders: list[str] | None = None,
    layers: bool = False,
) -> None:
    """Norms of vectors, the cosines between them, by layer."""

    if context.invoked_subcommand:
        if base or models or folders or layers or settings.allow_pickle or any(map(given, SHARED)):
            word = context.invoked_subcommand
            raise RecipeError(f"options of {word!r} come after that word; move them there")
        return
    if not models and not folders:
        raise RecipeError("there is no vector to measure; name --base and --model, or --vector")
    from palinode.cli.console import vector_content, vector_grids
    from palinode.weights import profile
    from palinode.weights.arithmetic import layout_of

    names = [*dict.fromkeys(models or [])], [*dict.fromkeys(folders or [])]
    directions = _directions(base, *names, settings.allow_pickle)
    total = max(sum(info.size for info in layout_of(one.terms)) for one in directions.values())
    with listener().task("measuring", total, "weights") as advance:
        measured = profile(directions, on_progress=advance)
    answer(vector_content(measured), vector_grids(measured, layers=layers))


@verbs(vectors, kind=TyperCommand)()
@takes(of=ApplySettings, only=["allow_pickle"])
def save(
    settings: ApplySettings,
    output: Path,
    base: str | None = None,
    model: str | None = None,
    folder: str | None = None,
    dtype: str = "float32",
    rank: int | None = None,
    energy: float | None = None,
) -> None:
    """Store a vector, whole or at low rank, and the error.

    It is an artefact of its own.
    """
    from palinode.weights.arithmetic import layout_of
    from palinode.weights.vectors import save_vector

    if (model is None) == (folder is None):
        raise RecipeError("one vector is stored at a time; name either --base and --model, or --vector")
    models, folders = [model] if model else [], [folder] if folder else []
    (direction,) = _directions(base, models, folders, settings.allow_pickle).values()
    total = sum(info.size for info in layout_of(direction.terms))
    with listener().task("storing", total, "weights") as advance:
        stored = save_vector(direction, output, dtype=dtype, rank=rank, energy=energy, on_progress=advance)
    facts = _vector_facts(output, stored)
    answer(facts, _vector_sentence(facts))


def _directions(
    base: str | None, models: list[str], folders: list[str], allow_pickle: bool
) -> dict[str, Direction]:
    """Return the directions by the names they were given."""
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
    target: str,
    base: str,
    forget_model: str,
    retain_model: str | None = None,
    scales: str = "1.0,0.0",
    *,
    output: Path | None = None,
) -> None:
    """Write the formula as a recipe for mergekit.

    θ_D − α(θ_1 − θ_0) + β(θ_2 − θ_0), which mergekit-yaml computes as a check.
    """
    from palinode.evaluation.evaluate import check_new_file
    from palinode.methods.apply import formula_of
    from palinode.weights.checkpoint import mergekit_recipe

    pair = parse_scales(scales)
    point, _ = formula_of(target, base, forget_model, retain_model, pair, settings.allow_pickle)
    text = mergekit_recipe(point, dtype=settings.dtype)
    if output is None:
        print(text, end="")
    else:
        check_new_file(output, "the recipe")
        write_text(output, text)


def sign(
    folder: Path | None = None,
    key: Path | None = None,
    identity: str | None = None,
    issuer: str | None = None,
    salt: Path | None = None,
    new_key: Path | None = None,
) -> None:
    """Sign a folder to be handed over: every file in it.

    A password of a key is asked for, or taken from the variable PALINODE_KEY_PASSWORD.
    """
    from palinode.pipeline.signing import PASSWORD, STATEMENT, is_encrypted, sign_folder
    from palinode.pipeline.signing import new_key as make_key

    locked = new_key or (key if key and is_encrypted(key) else None)
    asked = locked and PASSWORD not in os.environ and sys.stdin.isatty()
    ask = partial(typer.prompt, hide_input=True, err=True, default="", show_default=False)
    password = ask(f"Password of {locked}", confirmation_prompt=bool(new_key)) if asked else None
    if new_key is not None:
        public, known = make_key(new_key, password)
        facts = {"private_key": str(new_key), "public_key": str(public), "sha256": known}
        text = f"{new_key} is your private key; give away {public} (SHA-256 {known})"
    elif folder is None:
        raise RecipeError("there is nothing to sign; name an unlearned model's folder, or --new-key FILE")
    else:
        options = {"identity": identity, "issuer": issuer, "password": password}
        done = sign_folder(folder, key, salt=salt, listener=listener(), **options)
        for note in done.notes:
            warn(note)
        facts = {"folder": str(folder), **asdict(done), "salt": str(done.salt)}
        text = (
            f"{folder}: {done.files} files signed by {done.signer}, {STATEMENT} with them. Keep {done.salt}: "
            "it shows which rows were meant."
        )
    answer(facts, text)


@takes(*keys("reproduce"))
def reproduce(content: dict[str, Any], folder: Path, *, output: Path | None = None) -> None:
    """Run a record's recipe again: do bytes and figures agree?

    Models and rows are looked for where the record says; options say where they lie now. The exit code is 0
    when the bytes agree.
    """
    from palinode.pipeline.reproducing import reproduce as run_again

    found = run_again(folder, output, settings=content, listener=listener())
    pairs = {**found.off, **found.environment}
    told = []
    for name, entry in found.differing.items():
        how = f"{entry[0]:,} numbers, by {entry[1]:.2g} at most" if entry else "another shape"
        told.append(f"  {name}: {how}")
    told += [f"  {name}: {then} then, {now} now" for name, (then, now) in pairs.items()]
    if len(told) > MOST_ROWS:
        told[MOST_ROWS:] = [f"  and {len(told) - MOST_ROWS} more; --json has all of them"]
    facts = {**asdict(found), "output": str(found.output), "sentence": found.sentence}
    answer(facts, "\n".join([found.sentence, *told]))
    secret_workspace(workspace_beside(found.output), found.output, "rows, θ_1")
    if not found.same_bytes:
        raise typer.Exit(1)


MOST_ROWS = 20
"""Rows of the table; --json has them all."""


def verify(
    folder: Path,
    public_key: Path | None = None,
    identity: str | None = None,
    issuer: str | None = None,
    salt: Path | None = None,
    forget: str | None = None,
) -> None:
    """Tell whether a folder is as written, and as signed.

    The exit code is 1 when something changed, or is not signed as it should be.
    """
    from palinode.pipeline.reporting import stale
    from palinode.pipeline.signing import check_signature
    from palinode.weights import Checkpoint
    from palinode.weights.store import check_manifest, read_manifest

    shown, found = listener(), None
    signed = check_signature(
        folder, public_key, identity=identity, issuer=issuer, salt=salt, forget=forget, listener=shown
    )
    try:
        read_manifest(folder)
        with shown.task("verifying", Checkpoint.open(folder).nbytes, "bytes") as advance:
            found = check_manifest(folder, on_progress=advance)
    except CheckpointError as error:
        if signed is None or signed.ok:
            raise
        signed.faults.append(f"the weights cannot be compared: {error}")
    old = {"stale": stale(folder)} if (folder / "record.json").exists() else {}
    ok = bool(found and found.ok and (signed is None or signed.ok))
    if given("as_json"):
        place, weights = {"folder": str(folder)}, asdict(found) if found else {}
        print_json({**place, "ok": ok, **weights, **old, "signature": signed and asdict(signed) | place})
    else:
        if found and (signed is None or signed.ok or not found.ok):
            _show(folder, found)
        if signed:
            _show_signature(signed)
    if names := old.get("stale"):
        warn(
            f"what record and audit say now is not told by {', '.join(names)} in {folder}; "
            f"{shlex.join(['palinode', 'report', str(folder)])} writes everything anew, or says why it can't"
        )
    if not ok:
        raise typer.Exit(1)


def _show_signature(found: SignatureCheck) -> None:
    whose = "as it should be" if found.trusted else "and nobody checked who that is"
    head = f"{found.folder} is signed by {found.signer or 'an identity that Sigstore knows'}, {whose}."
    lines = [head if found.ok else f"{found.folder} is NOT as it was signed:"]
    lines += [f"  fault: {sentence}" for sentence in found.faults]
    lines += [f"  checked: {sentence}" for sentence in found.checked]
    lines += [f"  not checked: {sentence}" for sentence in found.unchecked]
    out().print("\n".join(lines), markup=False, soft_wrap=True)


def _show(folder: Path, found: Verification) -> None:
    from palinode.report.content import Grid, show

    size = f"{found.checked} tensors, {found.nbytes / 1e6:,.4g} MB"
    if found.ok:
        out().print(f"{folder} is as it was written ({size}).", soft_wrap=True)
        return
    tensors = {"changed": found.changed, "missing": found.missing, "new": found.extra}
    rows = [(name, "tensor", finding) for finding, names in tensors.items() for name in names]
    rows += [(name, "file", finding) for name, finding in found.companions.items()]
    count = f"{len(rows)} thing{'s' if len(rows) > 1 else ''} changed"
    out().print(f"{folder} is not what was written: {count} ({size} compared).", soft_wrap=True)
    shown = [(ascii(name)[1:-1] if not name.isprintable() else name, *rest) for name, *rest in rows]
    if len(rows) > MOST_ROWS:
        shown[MOST_ROWS:] = [(f"and {len(rows) - MOST_ROWS} more", "", "--json has all of them")]
    show([Grid("", ["name", "what", "now"], shown, text_columns=3)], out())

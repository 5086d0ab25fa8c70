"""Verbs on a folder that is handed over: `sign` it, `verify` what became of it, `reproduce` it."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from palinode.cli.console import listener, out, print_json, warn
from palinode.cli.ending import secret_workspace
from palinode.cli.options import Json, Quiet, takes

if TYPE_CHECKING:
    from palinode.pipeline.signing import SignatureCheck
    from palinode.weights.store import Verification

Folder = Annotated[Path, typer.Argument(metavar="OUT", help="A model folder that Palinode wrote.")]
Identity = Annotated[str | None, typer.Option(help="Without a key: who signs, by Sigstore, as in mail@host.")]
Salt = Annotated[
    Path | None,
    typer.Option(help="The owner's salt, which opens the commitment to the forget rows. [sign: OUT.salt]"),
]
Issuer = Annotated[str | None, typer.Option(help="Who vouches for that identity to Sigstore, as a URL.")]


def sign(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[OUT]", help="An unlearned model's folder.")
    ] = None,
    key: Annotated[
        Path | None, typer.Option(help="The private key to sign with (pip install 'palinode[sign]').")
    ] = None,
    identity: Identity = None,
    issuer: Issuer = None,
    salt: Salt = None,
    new_key: Annotated[
        Path | None, typer.Option(help="Make a key instead: FILE, and FILE.pub for those who verify.")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Sign a folder to be handed over: every file in it.

    A password of a key is asked for, or taken from the variable PALINODE_KEY_PASSWORD.
    """
    from palinode.errors import RecipeError
    from palinode.pipeline.signature import PASSWORD, is_encrypted
    from palinode.pipeline.signature import new_key as make_key
    from palinode.pipeline.signing import STATEMENT, sign_folder

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
        done = sign_folder(folder, key, salt=salt, listener=listener(quiet=quiet), **options)
        for note in done.notes:
            warn(note)
        facts = {"folder": str(folder), **asdict(done), "salt": str(done.salt)}
        text = (
            f"{folder}: {done.files} files signed by {done.signer}, {STATEMENT} with them. Keep {done.salt}: "
            "it shows which rows were meant."
        )
    if as_json:
        print_json(facts)
    else:
        out().print(text, soft_wrap=True)


@takes(
    *("models.target", "models.base", "models.given", "models.retrained"),
    *("data.forget", "data.retain", "data.holdout", "data.background", "data.refusals"),
    "device",
)
def reproduce(
    content: dict[str, Any],
    folder: Folder,
    *,
    output: Annotated[
        Path | None, typer.Option(help="A new folder for the second model. [default: OUT.reproduced]")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run a record's recipe again: do bytes and figures agree?

    Models and rows are looked for where the record says; options say where they lie now. The exit code is 0
    when the bytes agree.
    """
    from palinode.pipeline.reproducing import reproduce as run_again
    from palinode.records import workspace_beside

    found = run_again(folder, output, settings=content, listener=listener(quiet=quiet))
    if as_json:
        print_json({**asdict(found), "output": str(found.output), "sentence": found.sentence})
    else:
        out().print(found.sentence, markup=False, soft_wrap=True)
        tensors = {
            name: f"{entry[0]:,} numbers, by {entry[1]:.2g} at most" if entry else "another shape"
            for name, entry in found.differing.items()
        }
        pairs = {**found.off, **found.environment}
        told = {**tensors, **{name: f"{then} then, {now} now" for name, (then, now) in pairs.items()}}
        for name, text in [*told.items()][:MOST_ROWS]:
            out().print(f"  {name}: {text}", markup=False, soft_wrap=True)
        if len(told) > MOST_ROWS:
            out().print(f"  and {len(told) - MOST_ROWS} more; --json has all of them")
    secret_workspace(workspace_beside(found.output), found.output, "rows, θ_1", as_json=as_json)
    if not found.same_bytes:
        raise typer.Exit(1)


MOST_ROWS = 20
"""Rows of the table; --json has them all."""


def verify(
    folder: Folder,
    public_key: Annotated[
        Path | None, typer.Option(help="The signer's public key: was the folder signed with it?")
    ] = None,
    identity: Identity = None,
    issuer: Issuer = None,
    salt: Salt = None,
    forget: Annotated[str | None, typer.Option(help="The rows that are said to be forgotten.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Tell whether a folder is as written, and as signed.

    The exit code is 1 when something changed, or is not signed as it should be.
    """
    from palinode.errors import CheckpointError
    from palinode.pipeline.reporting import stale
    from palinode.pipeline.signing import check_signature
    from palinode.weights import Checkpoint
    from palinode.weights.store import check_manifest, read_manifest

    shown, found = listener(quiet=quiet), None
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
    if as_json:
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
    rows = [
        *((name, "tensor", "changed") for name in found.changed),
        *((name, "tensor", "missing") for name in found.missing),
        *((name, "tensor", "new") for name in found.extra),
        *((name, "file", finding) for name, finding in found.companions.items()),
    ]
    count = f"{len(rows)} thing{'s' if len(rows) > 1 else ''} changed"
    out().print(f"{folder} is not what was written: {count} ({size} compared).", soft_wrap=True)
    shown = [(ascii(name)[1:-1] if not name.isprintable() else name, *rest) for name, *rest in rows]
    if len(rows) > MOST_ROWS:
        shown[MOST_ROWS:] = [(f"and {len(rows) - MOST_ROWS} more", "", "--json has all of them")]
    show([Grid("", ["name", "what", "now"], shown, text_columns=3)], out())

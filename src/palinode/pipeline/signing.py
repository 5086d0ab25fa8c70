"""The signed record: a hand-over folder with a statement of what was done, and a signature over every file.

    statement.json    in-toto statement: this model, made of those, by this recipe and version, without these
                      rows (HMAC-SHA256 of their fingerprint, keyed by a salt), with this verdict and audit
    model.sig         the signature over every other file: DSSE in a Sigstore bundle, version 0.3, of an
                      in-toto statement with path and SHA-256 of every file

OpenSSF model signing writes it alike, so `model_signing verify key` reads it too. Keys are ECDSA on P-256,
P-384 or P-521; without a key it is Sigstore that signs, and vouches for an identity. Whoever has the folder
and the public key can check both; the rows only those who are given the salt too.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

from palinode.data.examples import fingerprint_examples, read_examples
from palinode.errors import (
    CheckpointError,
    DataError,
    InputError,
    MismatchError,
    OutputError,
    first_line,
    told_as,
    writing,
)
from palinode.pipeline.reporting import AUDIT, read_record, stale
from palinode.progress import Listener, NullListener, plain
from palinode.records import MAX_JSON, OTHERS, fitting, private, read_bytes, read_json, write_text
from palinode.report.words import at
from palinode.weights import Checkpoint
from palinode.weights.fingerprints import fingerprint
from palinode.weights.store import check_manifest, read_manifest

SIGNATURE = "model.sig"
"""Name of the signature in its folder, which it does not cover."""
PASSWORD = "PALINODE_KEY_PASSWORD"
"""The variable that a key's password is taken from where none is given."""
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
IN_TOTO = "application/vnd.in-toto+json"
HOW_TO_INSTALL = "pip install 'palinode[sign]'"
ONLINE = f"it takes a network and {HOW_TO_INSTALL}, or a key (--key, --public-key)"
NEEDED = "it takes an ECDSA key on P-256, P-384 or P-521, as palinode sign --new-key makes one"


@dataclass(frozen=True, slots=True)
class FolderSignature:
    """What a signature file says, not yet believed."""

    text: str
    payload: bytes
    signature: bytes
    key: str | None
    """Fingerprint of the key that it names; None where it is Sigstore's, which has a certificate."""
    files: Mapping[str, str]
    """SHA-256 by path in the folder."""

    def is_by(self, public_key: Path) -> bool:
        """Tell whether this key signed, and this very payload."""
        parts, key = _cryptography(), _public_key(public_key)
        try:
            key.verify(self.signature, _envelope(self.payload), parts.ec.ECDSA(_hash_for(key)))
        except parts.InvalidSignature:
            return False
        return True

    def denied(self, identity: str, issuer: str | None) -> str | None:
        """Return why Sigstore does not vouch that this identity signed; None where it does.

        Raises InputError where it cannot be asked.
        """
        if self.key:
            return "a key was used, which is nobody's identity"
        with told_as(InputError, "Sigstore cannot be asked", ONLINE, Exception):  # those of the network
            from sigstore import verify
            from sigstore.errors import VerificationError
            from sigstore.models import Bundle, InvalidBundle

            wanted = verify.policy.Identity(identity=identity, issuer=issuer)
            asked = verify.Verifier.production()
            try:
                found = asked.verify_dsse(Bundle.from_json(self.text), wanted)
            except (VerificationError, InvalidBundle) as error:
                return first_line(error)
        return None if found == (IN_TOTO, self.payload) else "it covers something else"


def read_signature(path: Path) -> FolderSignature:
    """Return what a signature file says; raises OSError, or ValueError where it is none."""
    try:
        text = read_bytes(path, limit=MAX_JSON).decode()
        bundle = json.loads(text)
        envelope, named = bundle["dsseEnvelope"], bundle["verificationMaterial"].get("publicKey")
        payload, signature = (
            base64.b64decode(part, validate=True)
            for part in (envelope["payload"], envelope["signatures"][0]["sig"])
        )
        files = {one["name"]: one["digest"] for one in json.loads(payload)["predicate"]["resources"]}
        return FolderSignature(text, payload, signature, named and named["hint"], files)
    except (LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"a part is missing, or is none: {error}") from None


def payload_of(name: str, files: Mapping[str, str]) -> bytes:
    """Return what is signed for a folder of that name: these files, SHA-256 by path."""
    ordered = sorted(files.items(), key=lambda file: PurePosixPath(file[0]))
    resources = [{"name": path, "algorithm": "sha256", "digest": digest} for path, digest in ordered]
    total = hashlib.sha256(b"".join(bytes.fromhex(digest) for _, digest in ordered)).hexdigest()
    how = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": [SIGNATURE]}
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": total}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {"serialization": how, "resources": resources},
    }
    return json.dumps(statement, indent=1).encode()


def sign_with_key(payload: bytes, key: Any) -> str:
    """Return the text of a signature by a private key, as `open_key` returns it."""
    signature = key.sign(_envelope(payload), _cryptography().ec.ECDSA(_hash_for(key)))
    bundle = {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": {"publicKey": {"hint": _fingerprint(key.public_key())}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": IN_TOTO,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }
    return json.dumps(bundle, indent=1) + "\n"


def sign_with_sigstore(payload: bytes, identity: str, issuer: str | None) -> str:
    """Return the text of a signature by Sigstore, after the issuer has asked in a browser who one is.

    Raises InputError for whatever keeps it from that, such as no network.
    """
    with told_as(InputError, "Sigstore did not sign", ONLINE, Exception):  # its own, and those of the network
        from sigstore.dsse import Statement
        from sigstore.models import ClientTrustConfig
        from sigstore.oidc import IdentityToken, Issuer, detect_credential
        from sigstore.sign import SigningContext

        trust, ready = ClientTrustConfig.production(), detect_credential()
        asked = Issuer(issuer or trust.signing_config.get_oidc_url())
        token = IdentityToken(ready) if ready else asked.identity_token()
        if token.identity != identity:
            raise ValueError(f"its issuer knows you as {token.identity}")
        with SigningContext.from_trust_config(trust).signer(token) as signer:
            text: str = signer.sign_dsse(Statement(payload)).to_json()
    return text


# Keys


def new_key(path: Path, password: str | None = None) -> tuple[Path, str]:
    """Make a private key (0600), encrypted where there is a password, and its public key beside it.

    Return the public key's file and fingerprint. Raises OutputError where a file is in the way.
    """
    parts, public, password = _cryptography(), Path(f"{path}.pub"), password or os.environ.get(PASSWORD)
    key, form = parts.ec.generate_private_key(parts.ec.SECP256R1()), parts.serialization
    locked = form.BestAvailableEncryption(password.encode()) if password else form.NoEncryption()
    secret = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, locked)
    for place in filter(os.path.lexists, (path, public)):
        raise OutputError(f"{place} is there already, and no key is overwritten; name another file")
    with writing(path):
        with private():
            write_text(path, secret.decode())
        write_text(public, _pem(key.public_key()).decode())
    return public, _fingerprint(key.public_key())


def is_encrypted(key: Path) -> bool:
    """Tell whether a private key is of no use without its password."""
    return b"ENCRYPTED" in _key_text(key)


def open_key(path: Path, password: str | None = None) -> Any:
    """Return the private key in a file; raises InputError that says what is wrong with it."""
    form, text, locked = _cryptography().serialization, _key_text(path), is_encrypted(path)
    password = password or os.environ.get(PASSWORD)
    if locked and not password:
        raise InputError(f"the key {path} is encrypted; put its password into the variable {PASSWORD}")
    try:
        return _usable(form.load_pem_private_key(text, password.encode() if locked and password else None))
    except Exception as error:  # it tells of wrong passwords, damage and odd kinds by many classes
        wrong = "is not opened by this password, or" if locked else "is"
        raise InputError(f"{path} {wrong} no private key that can be used; {NEEDED}") from error


def _public_key(path: Path) -> Any:
    form, text = _cryptography().serialization, _key_text(path)
    if b"PRIVATE KEY" in text:
        raise InputError(f"{path} is a private key, which nobody should be shown; name the public one")
    try:
        return _usable(form.load_pem_public_key(text))
    except Exception as error:
        raise InputError(f"{path} is no public key that can be used; {NEEDED}") from error


def _usable(key: Any) -> Any:
    if key.curve.name not in ("secp256r1", "secp384r1", "secp521r1"):
        raise ValueError("another curve")
    return key


def _key_text(path: Path) -> bytes:
    with told_as(InputError, f"the key {path} cannot be read", "name its file"):
        return read_bytes(path, limit=100_000)


def _hash_for(key: Any) -> Any:
    hashes = _cryptography().hashes
    return {256: hashes.SHA256, 384: hashes.SHA384, 521: hashes.SHA512}[key.curve.key_size]()


def _pem(public: Any) -> bytes:
    form = _cryptography().serialization
    text: bytes = public.public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    return text


def _fingerprint(public: Any) -> str:
    """Return the SHA-256 of a public key as PEM text, which is that of the file that `new_key` writes."""
    return hashlib.sha256(_pem(public)).hexdigest()


def _envelope(payload: bytes) -> bytes:
    """Return the bytes that are signed: DSSE's encoding of a payload and its type."""
    return b"DSSEv1 %d %s %d %s" % (len(IN_TOTO), IN_TOTO.encode(), len(payload), payload)


def _cryptography() -> Any:
    """Return the parts of cryptography that are needed; raises InputError where it is not installed."""
    with told_as(InputError, "signatures need cryptography", HOW_TO_INSTALL, ImportError):
        import cryptography  # noqa: F401 - first, as it may be missing where its parts are remembered
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    return SimpleNamespace(
        ec=ec, hashes=hashes, serialization=serialization, InvalidSignature=InvalidSignature
    )


STATEMENT = "statement.json"
FEWEST_BYTES = 16
"""Bytes that a salt has at least: a shorter one can be guessed."""


@dataclass(frozen=True, slots=True)
class Signed:
    """What signing left in a hand-over folder, and beside it."""

    statement: Mapping[str, Any]
    """The content of statement.json."""
    files: int
    """How many files the signature covers."""
    signer: str
    salt: Path
    """The file that opens the commitment to the rows; its owner's alone."""
    notes: tuple[str, ...]


@dataclass(slots=True)
class SignatureCheck:
    """How a folder compares with its statement and signature, in sentences."""

    folder: Path
    signer: str | None = None
    """Whom the signature names; None where there is none, or it does not say."""
    trusted: bool = False
    """Whether the signature is by the key or identity that was given."""
    checked: list[str] = field(default_factory=list)
    """What was looked at and is right."""
    faults: list[str] = field(default_factory=list)
    """What is not right; empty where all is."""
    unchecked: list[str] = field(default_factory=list)
    """What nobody looked at, and what would."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong with what was looked at."""
        return not self.faults

    def tell(self, sound: bool, right: str, wrong: str) -> bool:
        """Note what was found."""
        (self.checked if sound else self.faults).append(right if sound else wrong)
        return sound


def sign_folder(
    folder: str | Path,
    key: str | Path | None = None,
    *,
    identity: str | None = None,
    issuer: str | None = None,
    salt: str | Path | None = None,
    password: str | None = None,
    listener: Listener | None = None,
) -> Signed:
    """Write statement and signature into an unlearned model's folder, in place of those that it has.

    `key` is the file of a private key; without one Sigstore signs as `identity`, which takes a network. The
    salt is made beside the folder unless one is named. Raises InputError for a folder that is not whole.
    """
    folder, key, listener = Path(folder), Path(key) if key else None, listener or NullListener()
    record, home = read_record(folder), folder.resolve()
    if (key is None) == (identity is None):
        raise InputError("a folder is signed with a key or as an identity; name --key, or --identity")
    own_key = open_key(key, password) if key else None
    check_whole(folder, record, listener)
    place = Path(salt) if salt else home.with_name(fitting(home.name, ".salt"))
    rows = str(at(record, "data", "forget", "fingerprint"))
    committed = commitment(read_salt(place, home, make=salt is None), rows)
    statement = statement_of(folder, record, committed)
    text = json.dumps(statement, indent=2, ensure_ascii=False) + "\n"
    files = {**file_digests(folder, listener, links=False), STATEMENT: sha256(text.encode())}
    payload = payload_of(home.name, files)
    signature = sign_with_key(payload, own_key) if key else sign_with_sigstore(payload, str(identity), issuer)
    with writing(folder):
        write_text(folder / STATEMENT, text)
        write_text(folder / SIGNATURE, signature)
    signer = f"the key {read_signature(folder / SIGNATURE).key}" if key else str(identity)
    seen = key is not None and key.stat().st_mode & OTHERS
    notes = (f"other users can read the private key {key}; chmod 600 keeps it to you",) if seen else ()
    return Signed(statement, len(files), signer, place, notes)


def check_signature(
    folder: str | Path,
    public_key: str | Path | None = None,
    *,
    identity: str | None = None,
    issuer: str | None = None,
    salt: str | Path | None = None,
    forget: str | Path | None = None,
    listener: Listener | None = None,
) -> SignatureCheck | None:
    """Compare a folder with its statement and signature, and these with a key or an identity.

    With the owner's `salt` it tells too whether the `forget` rows are those that were to be forgotten. None
    where nothing is signed and nothing asks for it. Raises InputError for keys or rows that cannot be used.
    """
    if (salt is None) != (forget is None):
        raise InputError("the commitment to the rows is opened by --salt and --forget together; name both")
    if public_key is not None and identity is not None:
        raise InputError("a folder is signed with a key or as an identity; name one of them")
    folder, public_key = Path(folder), Path(public_key) if public_key else None
    known = _fingerprint(_public_key(public_key)) if public_key else None
    found, signature = SignatureCheck(folder), None
    if not any((public_key, identity, salt, (folder / SIGNATURE).exists(), (folder / STATEMENT).exists())):
        return None
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}; name the one that was handed over")
    try:
        signature = read_signature(folder / SIGNATURE)
    except FileNotFoundError:
        found.faults.append(f"{folder} is not signed: it has no {SIGNATURE}")
    except (OSError, ValueError) as error:
        found.faults.append(f"{folder / SIGNATURE} is damaged, or no signature ({error})")
    if signature is not None:
        _compare_files(found, signature, listener or NullListener())
        if public_key and known:
            _compare_key(found, signature, public_key, known)
        elif identity:
            reason = signature.denied(identity, issuer)
            right, wrong = f"Sigstore says that {identity} signed", f"not signed by {identity}: {reason}"
            found.trusted = found.tell(reason is None, right, wrong)
        else:
            found.unchecked.append("who signed (--public-key FILE, or --identity WHO and --issuer URL)")
        found.signer = f"the key {signature.key}" if signature.key else identity if found.trusted else None
    if signature is not None or (folder / STATEMENT).exists():
        _compare_statement(found, Path(salt) if salt else None, forget)
    return found


def file_digests(folder: Path, listener: Listener, *, links: bool = True) -> dict[str, str]:
    """Return the SHA-256 of every file in a folder but its signature, by path.

    What is no file has an empty digest. Raises CheckpointError for one that cannot be read, and without
    `links` for a link.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    paths = [path for path in paths if path != folder / SIGNATURE]
    odd = [path for path in paths if path.is_symlink() or not path.is_file()]
    if odd and not links:
        raise CheckpointError(f"{odd[0]} is a link or a device, which cannot be signed; put a file there")
    found = {path.relative_to(folder).as_posix(): "" for path in paths}
    files = [path for path in paths if path.is_file()]
    with listener.task("hashing files", sum(path.stat().st_size for path in files), "bytes") as advance:
        for path in files:
            with (
                told_as(CheckpointError, f"{path} cannot be read", "fetch it again"),
                path.open("rb") as stream,
            ):
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
                advance(stream.tell())
            found[path.relative_to(folder).as_posix()] = digest
    return found


def check_whole(folder: Path, record: Mapping[str, Any], listener: Listener) -> None:
    """Raise InputError unless a folder is as it was written, and all in it tells the same."""
    checkpoint, manifest = Checkpoint.open(folder), read_manifest(folder)
    with listener.task("verifying", checkpoint.nbytes, "bytes") as advance:
        found = check_manifest(folder, on_progress=advance)
    if not found.ok:
        raise CheckpointError(f"{folder} is not what was written; palinode verify says what changed")
    if fingerprint(checkpoint, manifest.tensors) != at(record, "models", "unlearned", "fingerprint"):
        raise MismatchError(f"{folder} is not the model that its record.json tells of; put that one there")
    if names := stale(folder):
        raise MismatchError(
            f"{', '.join(names)} in {folder} tell of another run, or another verdict; palinode report "
            f"{folder} writes everything anew, or says why it can't"
        )


# The statement


def statement_of(folder: Path, record: Mapping[str, Any], committed: str) -> dict[str, Any]:
    """Return what is stated about a folder with this record and this commitment to its forget rows."""
    files = {name: folder / name for name in ("record.json", "weights.json", AUDIT)}
    digests = {name: sha256(path.read_bytes()) for name, path in files.items() if path.exists()}
    audit = read_json(files[AUDIT]) if AUDIT in digests else None
    models = {name: at(facts, "fingerprint") for name, facts in record["models"].items()}
    model = {"name": "unlearned model", "digest": {"palinodeFingerprint": models.get("unlearned")}}
    return {
        "_type": STATEMENT_TYPE,
        "subject": [model, *({"name": name, "digest": {"sha256": it}} for name, it in digests.items())],
        "predicateType": "urn:palinode:unlearning:1",
        "predicate": {
            "models": models,
            "forget": {"rows": at(record, "data", "forget", "rows"), "commitment": committed},
            "recipe": {"sha256": sha256(json.dumps(record["recipe"], sort_keys=True).encode())},
            "code": {name: record.get(name) for name in ("palinode", "run", "finished")},
            "verdict": {name: at(record, "verdict", name) for name in ("code", "light", "sentence")},
            "audit": {"sha256": digests[AUDIT], "passed": at(audit, "answer", "passed")} if audit else None,
        },
    }


def _compare_statement(found: SignatureCheck, salt: Path | None, forget: str | Path | None) -> None:
    """Compare the statement with what the folder holds, and its commitment with rows."""
    try:
        record, said = read_record(found.folder), read_json(found.folder / STATEMENT)
        committed = str(said["predicate"]["forget"]["commitment"])
        now = statement_of(found.folder, record, committed)
        parts, stated = now["predicate"], said["predicate"]
        model, verdict = at(stated, "models", "unlearned"), at(stated, "verdict", "sentence")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, CheckpointError) as error:
        found.faults.append(f"{STATEMENT} cannot be held against the folder ({error})")
        return
    if model != parts["models"]["unlearned"]:
        found.faults.append(
            f"{STATEMENT} is of another model ({model}) than record.json ({parts['models']['unlearned']})"
        )
    elif stated.get("verdict") != parts["verdict"]:
        found.faults.append(
            f"{STATEMENT} tells the verdict {verdict!r}, and record.json {parts['verdict']['sentence']!r}"
        )
    else:
        other = [name for name in parts if stated.get(name) != parts[name]]
        other += ["digests"] if said.get("subject") != now["subject"] else []
        found.tell(
            not other,
            f"{STATEMENT} tells what record and audit tell: {verdict}",
            f"{STATEMENT} tells otherwise than the folder of {', '.join(other)}",
        )
    if salt is None or forget is None:
        found.unchecked.append("which rows were to be forgotten (--salt, --forget: the owner has them)")
        return
    rows = read_examples(str(forget), columns=at(record, "recipe", "data", "columns") or {})
    opened = commitment(read_salt(salt, found.folder), fingerprint_examples(rows))
    found.tell(
        hmac.compare_digest(opened, committed),
        f"the {len(rows)} rows of {forget} are those that were to be forgotten",
        f"the rows of {forget} with the salt {salt} are not those: other rows, or another salt",
    )


def commitment(salt: bytes, rows: str) -> str:
    """Return the commitment to rows of this fingerprint: nobody can tell them from it without the salt."""
    return hmac.new(salt, rows.encode(), "sha256").hexdigest()


def read_salt(place: Path, folder: Path, *, make: bool = False) -> bytes:
    """Return the salt in a file outside of a folder, blanks around it left out; made there on request."""
    if place.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"the salt {place} lies in the folder that is handed over; keep it elsewhere")
    with told_as(InputError, f"the salt {place} cannot be used", "name its file"):
        if make and not place.exists():
            with private():
                write_text(place, secrets.token_hex(32) + "\n")
        salt = read_bytes(place).strip()
    if len(salt) < FEWEST_BYTES:
        raise DataError(f"the salt {place} has {len(salt)} bytes and can be guessed; take {FEWEST_BYTES}")
    return salt


def sha256(content: bytes) -> str:
    """Return the SHA-256 of some bytes in hex."""
    return hashlib.sha256(content).hexdigest()


# The signature


def _compare_files(found: SignatureCheck, signature: FolderSignature, listener: Listener) -> None:
    """Compare every file of the folder with what was signed."""
    here, signed = file_digests(found.folder, listener), signature.files
    for name in (name for name in signed if name in here and here[name] != signed[name]):
        stem = name.partition(".")[0]
        found.faults.append(f"{plain(name)} {CHANGED.get(stem, 'was changed after it was signed')}")
    for names, others, what in (
        (signed, here, "what was signed is not there any more"),
        (here, signed, "what nobody signed lies there too"),
    ):
        if odd := [plain(name) for name in names if name not in others]:
            found.faults.append(f"{what}: {', '.join(odd)}")
    if not found.faults:
        found.checked.append(f"all {len(signed)} files are as they were signed, and no other is there")


CHANGED = {
    "report": "is not the report that was signed: it was changed, or tells of another run",
    "statement": "is not the statement that was signed",
    "record": "is not the record that was signed",
}
"""What is said of a changed file, by the start of its name."""


def _compare_key(found: SignatureCheck, signature: FolderSignature, public_key: Path, known: str) -> None:
    """Tell whether the signature is by this key."""
    other = f"the key {signature.key}" if signature.key else "Sigstore, and no key"
    if signature.key != known:
        found.faults.append(f"signed by another ({other}) than {public_key} (key {known})")
        return
    found.trusted = found.tell(
        signature.is_by(public_key),
        f"the signature is by the key {public_key}",
        f"{SIGNATURE} was changed, or forged: it is not by the key {public_key}, which it names",
    )
    found.unchecked.append(f"whose key it is (its owner can confirm the SHA-256 {known})")

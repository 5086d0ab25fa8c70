"""A signature over the files of a folder, as OpenSSF model signing writes it, and the keys it is made with.

    payload     in-toto statement: path and SHA-256 of every file, and one digest of all these
    envelope    DSSE: sign("DSSEv1", the lengths, the type, the payload), in a Sigstore bundle, version 0.3

So `model_signing verify key` reads it too, and keys are of the kinds that it takes: ECDSA on P-256, P-384 or
P-521. Without a key it is Sigstore that signs, and vouches for an identity.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

from palinode.errors import InputError, OutputError, first_line, unwritable
from palinode.records import MAX_JSON, private, read_bytes, write_text

SIGNATURE = "model.sig"
"""Name of the signature in its folder, which it does not cover."""
PASSWORD = "PALINODE_KEY_PASSWORD"
"""The variable that a key's password is taken from where none is given."""
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
IN_TOTO = "application/vnd.in-toto+json"
MAX_KEY = 100_000
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
        try:
            from sigstore import verify
            from sigstore.errors import VerificationError
            from sigstore.models import Bundle, InvalidBundle

            wanted = verify.policy.Identity(identity=identity, issuer=issuer)
            asked = verify.Verifier.production()
            try:
                found = asked.verify_dsse(Bundle.from_json(self.text), wanted)
            except (VerificationError, InvalidBundle) as error:
                return first_line(error)
        except Exception as error:  # those of the network
            raise InputError(f"Sigstore cannot be asked ({first_line(error)}); {ONLINE}") from error
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
    try:
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
    except Exception as error:  # the library's own, and those of the network
        raise InputError(f"Sigstore did not sign ({first_line(error)}); {ONLINE}") from error
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
    try:
        with private():
            write_text(path, secret.decode())
        write_text(public, _pem(key.public_key()).decode())
    except OSError as error:
        raise unwritable(path, error) from error
    return public, _fingerprint(key.public_key())


def key_fingerprint(public_key: Path) -> str:
    """Return the SHA-256 of a public key as PEM text, which is that of the file that `new_key` writes."""
    return _fingerprint(_public_key(public_key))


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
    try:
        return read_bytes(path, limit=MAX_KEY)
    except OSError as error:
        raise InputError(f"the key {path} cannot be read ({error.strerror}); name its file") from None


def _hash_for(key: Any) -> Any:
    hashes = _cryptography().hashes
    return {256: hashes.SHA256, 384: hashes.SHA384, 521: hashes.SHA512}[key.curve.key_size]()


def _pem(public: Any) -> bytes:
    form = _cryptography().serialization
    text: bytes = public.public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    return text


def _fingerprint(public: Any) -> str:
    return hashlib.sha256(_pem(public)).hexdigest()


def _envelope(payload: bytes) -> bytes:
    """Return the bytes that are signed: DSSE's encoding of a payload and its type."""
    return b"DSSEv1 %d %s %d %s" % (len(IN_TOTO), IN_TOTO.encode(), len(payload), payload)


def _cryptography() -> Any:
    """Return the parts of cryptography that are needed; raises InputError where it is not installed."""
    try:
        import cryptography  # noqa: F401 - first, as it may be missing where its parts are remembered
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError:
        raise InputError(f"signatures need cryptography, which is not installed; {HOW_TO_INSTALL}") from None
    return SimpleNamespace(
        ec=ec, hashes=hashes, serialization=serialization, InvalidSignature=InvalidSignature
    )

"""What an exposure log calls a row: 128 bits of its normalised text, and fingerprints of what was trained on.

A row's hash is BLAKE2b-128 of its texts, each NFC-normalised with runs of white space folded to one
space, joined by line ends: `Example.key` as bytes. A salt is BLAKE2b's key. Without the salt nobody can
ask a salted log about a text; without salt, whoever has a text can ask whether it was trained on.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from palinode.data.examples import Example
from palinode.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HASH_BYTES = 16
MAX_SALT = hashlib.blake2b.MAX_KEY_SIZE
"""64 bytes."""

Hashes = npt.NDArray[np.uint8]
"""Hashes of n rows, uint8 [n, 16]."""


def row_hash(row: str | Example, *, salt: bytes = b"") -> bytes:
    """Return the hash of a text or an example, 16 bytes; without salt an example's is its `key`.

    A text hashes like a document of that text. Raises DataError for a salt of more than 64 bytes.

    >>> row_hash("A  fact.\\n") == row_hash("A fact.")
    True
    """
    texts = (row,) if isinstance(row, str) else (*(turn.content for turn in row.turns), row.answer)
    lines = "\n".join(" ".join(unicodedata.normalize("NFC", text).split()) for text in texts)
    return hashlib.blake2b(lines.encode(), digest_size=HASH_BYTES, key=_checked_salt(salt)).digest()


def hashes(rows: Iterable[str | Example], *, salt: bytes = b"") -> Hashes:
    """Return the hashes of many rows in their order, uint8 [n, 16]."""
    return as_hashes([row_hash(row, salt=salt) for row in rows])


def as_hashes(given: Hashes | Sequence[bytes]) -> Hashes:
    """Return hashes as uint8 [n, 16]; raise DataError when one has another length."""
    if isinstance(given, np.ndarray):
        if given.dtype == np.uint8 and given.ndim == 2 and given.shape[1] == HASH_BYTES:
            return given
        raise DataError(
            f"hashes have shape {given.shape} and dtype {given.dtype}; they must be uint8 [n, 16]"
        )
    lengths = {len(entry) for entry in given} - {HASH_BYTES}
    if lengths:
        raise DataError(f"a hash has {min(lengths)} bytes; it must have 16 (make it with row_hash)")
    return np.frombuffer(b"".join(given), np.uint8).reshape(-1, HASH_BYTES)


def sort_keys(found: Hashes) -> npt.NDArray[np.uint64]:
    """Return the first 8 bytes of each hash as a number, so that numbers sort as the bytes do: uint64 [n]."""
    keys: npt.NDArray[np.uint64] = np.ascontiguousarray(found[:, :8]).view(">u8")[:, 0].astype(np.uint64)
    return keys


def fingerprint_rows(found: Hashes) -> str:
    """Return a fingerprint of a data set from its rows' hashes in their order, 32 hex digits."""
    return hashlib.blake2b(np.ascontiguousarray(found).tobytes(), digest_size=16).hexdigest()


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a fingerprint of what turns text into ids, 32 hex digits: vocabulary, rules, special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else sorted(tokenizer.get_vocab().items())
    if isinstance(rules, dict):  # set by the last call of the tokenizer, so no part of what it is
        rules |= {"padding": None, "truncation": None}
    specials = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    text = json.dumps([rules, specials, tokenizer.chat_template], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _checked_salt(salt: bytes) -> bytes:
    if len(salt) > MAX_SALT:
        raise DataError(f"the salt has {len(salt)} bytes; it may have at most {MAX_SALT}")
    return salt

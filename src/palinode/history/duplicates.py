"""What an exposure log calls a row, fingerprints of what was trained on, and copies of rows in a corpus.

A row's hash is BLAKE2b-128 of its texts, each NFC-normalised with runs of white space folded to one
space, joined by line ends: `Example.key` as bytes. A salt is BLAKE2b's key. Without the salt nobody can
ask a salted log about a text; without salt, whoever has a text can ask whether it was trained on.

Two texts are equal when their row hashes are. They are similar by the Jaccard similarity of
their shingles, |A ∩ B| / |A ∪ B|, a shingle being five letters in a row of the text in lower case with its
punctuation taken out: one word changed in a short fact leaves most of them. The similarity is counted, of all
pairs that can reach the threshold t: those need t·|A| shingles in common, so one of the |A| − ⌈t·|A|⌉ + 1
rarest shingles of A must be in B. The corpus is gone through once, row by row; copies are listed with where
they stand, and never merged.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from palinode.data.examples import Example, hash_texts
from palinode.errors import DataError
from palinode.progress import Listener, NullListener

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
    if len(salt) > MAX_SALT:
        raise DataError(f"the salt has {len(salt)} bytes; it may have at most {MAX_SALT}")
    return hash_texts((row,) if isinstance(row, str) else row.texts, salt=salt)


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


SHINGLE = 5
"""Letters of a shingle."""


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A row of the corpus that equals a forget row, or is similar to it."""

    row: int
    """Position of the forget row."""
    number: int
    """Position in the corpus, as orders count."""
    place: str
    """Where it stands: `row 3 of corpus.jsonl`."""
    similarity: float
    """Jaccard similarity of the shingles; 1 for equal texts."""
    exact: bool
    """Whether the text is the same but for white space and Unicode form."""


def find_duplicates(
    forget: Sequence[Example],
    corpus: Sequence[Example],
    *,
    threshold: float = 0.7,
    listener: Listener | None = None,
) -> list[Duplicate]:
    """Return the copies of forget rows in a corpus, sorted by row and number.

    Equal texts are always listed, others from `threshold` on. Raises DataError for an empty forget set, and a
    threshold outside (0, 1].
    """
    if not forget:
        raise DataError("there are no forget rows to look for copies of")
    if not 0 < threshold <= 1:
        raise DataError(f"the similarity is {threshold}; it must be above 0 and at most 1")
    rows: dict[bytes, list[int]] = {}
    for row, example in enumerate(forget):
        rows.setdefault(row_hash(example), []).append(row)
    known = [shingles("\n".join(example.texts)) for example in forget]
    holders: dict[str, list[int]] = {}  # of each known shingle, the rows that hold it
    for row, own in enumerate(known):
        for shingle in own:
            holders.setdefault(shingle, []).append(row)

    def copies(number: int, example: Example) -> Iterator[Duplicate]:
        """Yield the forget rows that a row of the corpus is a copy of."""
        equal = rows.get(row_hash(example), [])
        for row in equal:
            yield Duplicate(row, number, example.place, 1.0, exact=True)
        own = shingles("\n".join(example.texts))
        held = [holders[shingle] for shingle in own if shingle in holders]
        enough = math.ceil(threshold * len(own) - 1e-9)  # in common with a row that is like this one
        rarest = sorted(held, key=len)[: max(0, len(held) - enough + 1)]
        for row in sorted({row for some in rarest for row in some}.difference(equal)):
            if (similarity := jaccard(own, known[row])) >= threshold:
                yield Duplicate(row, number, example.place, similarity, exact=False)

    found: list[Duplicate] = []
    with (listener or NullListener()).task("looking for copies", len(corpus), "rows") as advance:
        for number, example in enumerate(corpus):
            found += copies(number, example)
            advance(1)
    return sorted(found, key=lambda entry: (entry.row, entry.number))


def shingles(text: str) -> set[str]:
    """Return the shingles of a text, in which case, punctuation and Unicode form (NFKC) do not count.

    >>> sorted(shingles("A b-C, d!")), shingles("ab")
    ([' b c ', 'a b c', 'b c d'], {'ab'})
    """
    plain = " ".join(re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).casefold()).split())
    return {plain[at : at + SHINGLE] for at in range(max(1, len(plain) - SHINGLE + 1))}


def jaccard(first: Set[str], second: Set[str]) -> float:
    """Return |A ∩ B| / |A ∪ B| of two sets of shingles.

    >>> jaccard(set("abc"), set("bcd"))
    0.5
    """
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)

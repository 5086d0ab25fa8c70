"""A row's hash: what it is of, what changes it, and what it has in common with Example.key."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from palinode.data.examples import Example, Message
from palinode.errors import DataError
from palinode.history.duplicates import (
    as_hashes,
    fingerprint_rows,
    fingerprint_tokenizer,
    hashes,
    row_hash,
    sort_keys,
)

QUESTION = Example(0, "f.jsonl", "question", (Message("user", "Who  is\tAda?"),), "A poet.\n")
DOCUMENT = Example(1, "f.jsonl", "document", (), "Ada is a poet.")


def test_hash_is_blake2b_of_the_folded_lines():
    assert row_hash(QUESTION) == hashlib.blake2b(b"Who is Ada?\nA poet.", digest_size=16).digest()
    assert row_hash("Ada is\n a poet. ") == hashlib.blake2b(b"Ada is a poet.", digest_size=16).digest()


def test_hash_of_an_example_is_its_key_and_a_text_is_a_document():
    assert row_hash(QUESTION).hex() == QUESTION.key
    assert row_hash(DOCUMENT.answer).hex() == DOCUMENT.key


def test_unicode_forms_of_a_text_hash_alike_and_letter_case_does_not():
    assert row_hash("Zo\u00eb") == row_hash("Zoe\u0308")
    assert row_hash("Zoe") != row_hash("zoe")


def test_a_salt_is_the_key_of_the_hash():
    expected = hashlib.blake2b(b"Ada is a poet.", digest_size=16, key=b"pepper").digest()
    assert row_hash(DOCUMENT, salt=b"pepper") == expected
    with pytest.raises(DataError, match="65 bytes; it may have at most 64"):
        row_hash("text", salt=b"x" * 65)


def test_many_hashes_are_an_array_of_rows():
    found = hashes([QUESTION, DOCUMENT])
    assert found.shape == (2, 16)
    assert found[1].tobytes() == row_hash(DOCUMENT)
    assert hashes([]).shape == (0, 16)


def test_hashes_of_a_wrong_length_are_refused():
    with pytest.raises(DataError, match="a hash has 3 bytes"):
        as_hashes([b"abc"])
    with pytest.raises(DataError, match=r"uint8 \[n, 16\]"):
        as_hashes(np.zeros((2, 8), np.uint8))


def test_sort_keys_order_as_the_bytes_do():
    found = hashes([f"text {n}" for n in range(200)])
    by_key = found[np.argsort(sort_keys(found))]
    assert [entry.tobytes() for entry in by_key] == sorted(entry.tobytes() for entry in found)


def test_fingerprint_of_rows_sees_their_order():
    assert fingerprint_rows(hashes(["a", "b"])) == fingerprint_rows(hashes(["a ", " b"]))
    assert fingerprint_rows(hashes(["a", "b"])) != fingerprint_rows(hashes(["b", "a"]))


def test_fingerprint_of_a_tokenizer_sees_words_but_not_how_it_was_last_called():
    from tokenizers import Tokenizer, models, pre_tokenizers

    def make(*words: str) -> PreTrainedTokenizerFast:
        backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(("[UNK]", *words))}, "[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[UNK]")

    one = make("a", "b")
    before = fingerprint_tokenizer(one)
    one(["a b", "a"], padding=True, truncation=True, max_length=2)
    assert fingerprint_tokenizer(one) == before == fingerprint_tokenizer(make("a", "b"))
    assert fingerprint_tokenizer(make("b", "a")) != before

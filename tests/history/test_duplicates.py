"""Copies of forget rows: equal ones, similar ones, and what is neither; similarities counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from palinode.data.examples import Example, Message
from palinode.errors import DataError
from palinode.history.duplicates import find_duplicates, jaccard, shingles


def document(text, row=0, source="corpus.jsonl"):
    return Example(row, source, "document", (), text)


def slow_jaccard(first, second):
    def sets(text):
        plain = "".join(letter if letter.isalnum() else " " for letter in text.lower())
        plain = " ".join(plain.split())
        return {plain[at : at + 5] for at in range(max(1, len(plain) - 4))}

    a, b = sets(first), sets(second)
    return len(a & b) / len(a | b)


FACT = "Ada Lovelace was born in London in the year 1815."


def test_shingles_are_the_distinct_fives_of_the_plain_text():
    assert len(shingles("abcdefg")) == 3  # abcde bcdef cdefg
    assert len(shingles("aaaaaaaaa")) == 1
    assert len(shingles("ab")) == len(shingles("")) == 1
    assert shingles("A b—C,  d!") == shingles("a b c d")


def test_similarity_is_counted_over_shingles():
    assert jaccard(shingles("abcdefg"), shingles("abcdefgh")) == 0.75
    assert jaccard(shingles("abcdefg"), shingles("zyxwvut")) == 0
    changed = FACT.replace("London", "Lisbon")
    assert jaccard(shingles(FACT), shingles(changed)) == pytest.approx(slow_jaccard(FACT, changed))


def test_equal_texts_differ_in_spacing_and_unicode_form_only():
    forget = [document("Zo\u00eb  lives here.", source="forget.jsonl")]
    corpus = [document("Nothing of the kind.", 0), document("Zoe\u0308 lives\nhere. ", 1)]
    (found,) = find_duplicates(forget, corpus)
    assert (found.row, found.number, found.exact, found.similarity) == (0, 1, True, 1.0)
    assert found.place == "row 2 of corpus.jsonl"


def test_near_copies_are_listed_with_their_similarity_and_not_merged():
    near = ["Ada Lovelace was born in London in the year 1816.", "Ada Lovelace was born in London in 1815!"]
    corpus = [
        document(text, row) for row, text in enumerate([near[0], FACT, "Bees make honey.", near[1], FACT])
    ]
    found = find_duplicates([document(FACT)], corpus, threshold=0.6)
    assert [(entry.number, entry.exact) for entry in found] == [(0, False), (1, True), (3, False), (4, True)]
    for entry in found:
        assert entry.similarity == pytest.approx(slow_jaccard(FACT, corpus[entry.number].answer))


def test_case_and_punctuation_alone_are_a_near_copy_of_similarity_one():
    (found,) = find_duplicates([document(FACT)], [document(FACT.upper().rstrip("."))])
    assert (found.exact, found.similarity) == (False, 1.0)


def test_a_question_and_a_document_of_the_same_words_are_near_copies():
    question = Example(
        0, "f", "question", (Message("user", "Where was Ada born?"),), "Ada was born in London."
    )
    (found,) = find_duplicates([question], [document("Where was Ada born? Ada was born in London.")])
    assert (found.exact, found.similarity) == (False, 1.0)


def test_one_text_can_be_a_copy_of_several_rows():
    forget = [document(FACT), document("Bees make honey."), document(FACT)]
    found = find_duplicates(forget, [document(FACT)])
    assert [(entry.row, entry.exact) for entry in found] == [(0, True), (2, True)]


def test_all_pairs_above_the_threshold_are_found_and_none_below():
    random = np.random.default_rng(4)
    words = [f"word{number}" for number in range(60)]
    texts = [" ".join(random.choice(words, 12)) for _ in range(25)]
    corpus = []
    for text in texts:
        for changes in range(7):
            parts = text.split()
            for place in random.choice(12, changes, replace=False):
                parts[place] = str(random.choice(words))
            corpus.append(document(" ".join(parts), len(corpus)))
    found = find_duplicates([document(text) for text in texts], corpus, threshold=0.7)
    expected = {
        (row, number)
        for row, text in enumerate(texts)
        for number, other in enumerate(corpus)
        if slow_jaccard(text, other.answer) >= 0.7
    }
    assert len(expected) > 60
    assert {(entry.row, entry.number) for entry in found} == expected


def test_impossible_questions_are_refused():
    with pytest.raises(DataError, match="there are no forget rows"):
        find_duplicates([], [document(FACT)])
    with pytest.raises(DataError, match="must be above 0 and at most 1"):
        find_duplicates([document(FACT)], [], threshold=1.5)
    assert find_duplicates([document(FACT)], []) == []

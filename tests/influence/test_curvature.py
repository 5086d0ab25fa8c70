"""EK-FAC by bergson, where that library is installed."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest

import palinode
from palinode import read_examples
from palinode.settings import InfluenceSettings

needs = pytest.mark.skipif(
    find_spec("bergson") is None, reason="the library bergson is not installed (palinode[influence])"
)


@pytest.fixture(scope="module")
def curved(tiny, tmp_path_factory):
    work = tmp_path_factory.mktemp("curved")

    def ask(questions, **settings):
        return palinode.influence(
            questions,
            target=tiny.base.folder,
            rows=tiny.forget,
            workspace=work,
            settings=InfluenceSettings(top=40, device="cpu", engine="bergson", **settings),
        ).record["ranking"]

    return ask


@needs
def test_rows_that_say_the_asked_fact_come_first_and_scores_are_symmetric(curved, tiny, capsys):
    facts = read_examples(tiny.forget)
    found = curved(facts)
    assert (found["engine"], found["measure"]) == ("bergson", "ek-fac")
    scores = np.zeros((len(facts), len(facts)))
    first = [top[0]["answer"] == fact.answer for top, fact in zip(found["top"], facts, strict=True)]
    assert np.mean(first) > 0.7
    for question, top in enumerate(found["top"]):
        assert "interval" not in top[0]
        for one in top:
            scores[one["row"], question] = one["score"]
    assert np.allclose(scores, scores.T, rtol=1e-3, atol=1e-3 * abs(scores).max())
    again = curved(facts[:1])["top"][0]
    assert [one["score"] for one in again] == pytest.approx(
        [one["score"] for one in found["top"][0]], rel=1e-5
    )


@pytest.mark.skipif(find_spec("bergson") is not None, reason="the library bergson is installed")
def test_without_the_library_it_is_one_sentence(curved, tiny):
    with pytest.raises(palinode.PalinodeError, match=r"pip install 'palinode\[influence\]'"):
        curved(read_examples(tiny.forget)[:1])


def test_what_has_no_use_with_it_is_refused(curved, tiny):
    with pytest.raises(palinode.PalinodeError, match="--measure is for Palinode's scores"):
        curved(read_examples(tiny.forget)[:1], measure="cosine")

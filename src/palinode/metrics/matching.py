"""What the model's answers say: by accepted answers, by the words they share with the right one, by a judge.

Accepted answers (RESTOR; spec: metrics.md §11), without a judge.

Both texts are normalised: Unicode NFKC, case folded, apostrophes dropped, other punctuation a space,
initials joined ("J. R. R." and "JRR"), articles (a, an, the) left out. An answer is right when its words
are an accepted answer, or contain one as whole neighbouring words. So "He was an American politician." has
"politician", and a broader or differently worded answer does not match: that is for a judge, and the two
accuracies are reported apart. A text that names many things may match by luck. Scripts that put no spaces
between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) are read letter by letter.

RESTOR's lists hold some raw Wikidata ids ("Q42"), which no model would write: they are left out and said.

ROUGE: how much of the answer in the data the model writes by itself, by the rouge-score package.

    ROUGE-1   words that both texts have (with their counts)       recall = common / words of the answer
    ROUGE-L   longest common subsequence of words                  F = 2 · common / (words of both)

TOFU reports ROUGE-L recall with the stemmer on, MUSE's own evaluator ROUGE-L F with it off, and
open-unlearning's MUSE ROUGE-L F with it on (spec: metrics.md §3).

Accuracies by a judge that names the candidate closest in fact to the model's answer (spec: msa.md §5).

    Acc_forget    share of forget rows where the ground truth is not among the picks
    Acc_recover   share of forget rows where the ideal (retrained) model's own answer is among them
    Acc_retain    share of retain rows where the ground truth or the ideal model's answer is among them

Higher is better. Picks need not be one: Acc_forget and Acc_recover do not add up to 1. Rows
without a readable reply are left out and said, and every score names its judge.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from math import log
from statistics import fmean
from typing import TYPE_CHECKING, Literal

import numpy as np

from palinode.metrics.aggregate import joined, mean_score
from palinode.records import Outcome, Score, Verdict

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

_APOSTROPHES = re.compile("['’ʼ`]")
_UNSPACED = (
    "\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Kana, Han
)
_UNSPACED_LETTER = re.compile(f"([{_UNSPACED}])")
_INITIALS = re.compile(r"(?<=\b[^\W\d_])\.\s?(?=[^\W\d_]\b)")  # the stops between single letters


def normalise(text: str) -> str:
    """Return a text's words in a form in which equal answers are equal strings.

    >>> normalise("The  U.S. Senate’s “Democrats”")
    'us senates democrats'
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    plain = _INITIALS.sub("", _APOSTROPHES.sub("", spaced(folded)))
    words = "".join(letter if _is_of_a_word(letter) else " " for letter in plain).split()
    content = [word for word in words if word not in ("a", "an", "the")]
    return " ".join(content or words)  # the band "The The" keeps its name


def spaced(text: str) -> str:
    """Return a text with spaces around each letter of a script that puts none between words.

    >>> spaced("生于1964年").split()
    ['生', '于', '1964', '年']
    """
    return _UNSPACED_LETTER.sub(r" \1 ", text)


def _is_of_a_word(letter: str) -> bool:
    """Whether it is a letter, a digit, or a mark, which in many scripts is a vowel."""
    return letter.isalnum() or unicodedata.category(letter)[0] == "M"


def nearest(texts: Sequence[str], others: Sequence[str], count: int) -> list[int]:
    """Return the places of the `count` texts that come nearest to any of the others by words, in order.

    Nearness is the cosine of TF-IDF, where a word that df of all N texts have weighs ln((1 + N) / df) once a
    text; the largest over the others. Of equal ones the first.

    >>> nearest(["the cat sat", "a dog", "the dog sat in Oslo"], ["who sat in Oslo?"], 1)
    [2]
    """
    words = [set(normalise(text).split()) for text in (*texts, *others)]
    counts = Counter(word for own in words for word in own)
    weights = {word: log((1 + len(words)) / count) ** 2 for word, count in counts.items()}
    lengths = np.array([sum(weights[word] for word in own) for own in words]) ** 0.5 + 1e-12
    having = defaultdict[str, list[int]](list)
    for place, own in enumerate(words[len(texts) :]):
        for word in own:
            having[word].append(place)
    near = np.zeros(len(texts))
    for place, own in enumerate(words[: len(texts)]):
        shared = np.zeros(len(others))
        for word in own & having.keys():
            shared[having[word]] += weights[word]
        near[place] = (shared / lengths[len(texts) :]).max(initial=0) / lengths[place]
    return sorted(np.argsort(-near, kind="stable")[:count].tolist())


def accepted_answers(outcome: Outcome) -> tuple[str, ...]:
    """Return the answers that count as right, without raw Wikidata ids and texts without a word.

    Where the data lists none, it is the answer in the data.
    """
    answers = outcome.accepted or (outcome.expected,)
    return tuple(answer for answer in answers if not _is_wikidata_id(answer) and normalise(answer))


def is_accepted(outcome: Outcome, text: str) -> bool | None:
    """Return whether a text gives one of the accepted answers, None where there is none to compare with."""
    answers = accepted_answers(outcome)
    if not answers:
        return None
    said = f" {normalise(text)} "
    return any(f" {normalise(answer)} " in said for answer in answers)


def accepted_values(outcomes: Sequence[Outcome]) -> list[float | None]:
    """Return 1 for each generated answer that is accepted and 0 for each that is not.

    None where nothing was generated or there is no accepted answer to compare with.
    """
    verdicts = [
        None if outcome.generated is None else is_accepted(outcome, outcome.generated) for outcome in outcomes
    ]
    return [None if verdict is None else float(verdict) for verdict in verdicts]


def exact_matches(outcomes: Sequence[Outcome]) -> list[float | None]:
    """Return 1 where the generated answer is exactly the one in the data, else 0; None of no answer."""
    return [
        None if outcome.generated is None else float(outcome.generated == outcome.expected)
        for outcome in outcomes
    ]


def accepted_sample_values(outcomes: Sequence[Outcome]) -> list[float | None]:
    """Return the share of each outcome's sampled answers that are accepted, None as above.

    With one sample a run this is RESTOR's average over runs, for one question.
    """
    shares: list[float | None] = []
    for outcome in outcomes:
        verdicts = [is_accepted(outcome, sample) for sample in outcome.samples]
        known = [verdict for verdict in verdicts if verdict is not None]
        shares.append(fmean(known) if known else None)
    return shares


def left_out_ids(outcomes: Sequence[Outcome]) -> str | None:
    """Return a remark on the raw Wikidata ids among the accepted answers, None where there are none."""
    ids = [sum(map(_is_wikidata_id, outcome.accepted)) for outcome in outcomes]
    if not any(ids):
        return None
    questions = sum(map(bool, ids))
    return f"raw Wikidata ids among the accepted answers left out: {sum(ids)}, in {questions} questions"


def _is_wikidata_id(answer: str) -> bool:
    return bool(re.fullmatch(r"Q[1-9]\d*", answer.strip()))


Kind = Literal["rouge1", "rougeL"]
"""Which words count as common."""
Measure = Literal["recall", "f"]
"""Whether words that the model adds are held against it ("f") or not ("recall")."""

MOST_UNSEEN = 0.2
"""Share of a text's letters that rouge-score may drop (it keeps a to z and digits) before nothing is said."""
UNREADABLE = (
    "nothing was generated, or ROUGE, which reads only a to z and digits, drops over a fifth of a text"
)
"""Why a row may have no ROUGE."""


def rouge_values(
    outcomes: Sequence[Outcome], kind: Kind = "rougeL", measure: Measure = "recall", *, stemmer: bool = True
) -> list[float | None]:
    """Return the ROUGE of each generated answer against the answer in the data.

    An empty text on either side gives 0. None where nothing was generated, where rouge-score finds no word
    in the answer, and where it drops more than `MOST_UNSEEN` of the letters of either text.
    """
    return [
        rouge(outcome.expected, outcome.generated, kind, measure, stemmer=stemmer) for outcome in outcomes
    ]


def rouge_l_recalls(outcomes: Sequence[Outcome]) -> list[float | None]:
    """Return the ROUGE-L recall of each generated answer with the stemmer on, as in TOFU."""
    return rouge_values(outcomes, "rougeL", "recall", stemmer=True)


def rouge(
    expected: str,
    written: str | None,
    kind: Kind = "rougeL",
    measure: Measure = "recall",
    *,
    stemmer: bool = True,
) -> float | None:
    """Return the ROUGE of one text against the expected one; None as in `rouge_values`."""
    if written is None or not re.search(r"[a-z0-9]|^\s*$", expected.lower()):
        return None
    if max(map(unseen_share, (expected, written))) > MOST_UNSEEN:
        return None
    score = _scorer(kind, stemmer).score(target=expected, prediction=written)[kind]
    return float(score.recall if measure == "recall" else score.fmeasure)


def unseen_share(text: str) -> float:
    """Return the share of a text's letters, marks and foreign digits that rouge-score drops.

    Its own digits are not counted: a year in a Chinese sentence makes the sentence no more readable.

    >>> unseen_share("in 1964"), unseen_share("1964年東京"), unseen_share("Café")
    (0.0, 1.0, 0.25)
    """
    letters = [*filter(_is_of_a_word, text.lower())]
    unseen = sum(not letter.isascii() for letter in letters)
    seen = sum(letter.isascii() and letter.isalpha() for letter in letters)
    return unseen / (unseen + seen) if unseen else 0.0


@cache
def _scorer(kind: Kind, stemmer: bool) -> RougeScorer:
    """Return rouge-score's scorer, which does not work out again the words of a text that comes again."""
    from rouge_score.rouge_scorer import RougeScorer  # takes a second, so only when it is used
    from rouge_score.tokenizers import DefaultTokenizer

    class Words:
        tokenize = staticmethod(lru_cache(4096)(DefaultTokenizer(stemmer).tokenize))

    return RougeScorer([kind], tokenizer=Words())


def forget_accuracy(verdicts: Sequence[Verdict], *, seed: int = 0) -> Score:
    """Return Acc_forget: how often the judge does not find the ground truth in the answer."""
    return _share(verdicts, lambda roles: "truth" not in roles, offered={"truth"}, seed=seed)


def recover_accuracy(verdicts: Sequence[Verdict], *, seed: int = 0) -> Score:
    """Return Acc_recover: how often the judge finds the ideal model's answer in the answer.

    Rows whose candidates lack an ideal answer are left out.
    """
    return _share(verdicts, lambda roles: "ideal" in roles, offered={"ideal"}, seed=seed)


def retain_accuracy(verdicts: Sequence[Verdict], *, seed: int = 0) -> Score:
    """Return Acc_retain: how often the judge finds the ground truth or the ideal answer in the answer.

    Where no ideal answer was among the candidates only the ground truth counts, and the reason says so.
    """
    score = _share(verdicts, lambda roles: bool(roles & {"truth", "ideal"}), offered={"truth"}, seed=seed)
    without = sum(not _was_offered(verdict, {"ideal"}) for verdict in verdicts)
    if score.value is None or not without:
        return score
    alone = f"no ideal answer among the candidates of {without} of {len(verdicts)} rows"
    return replace(score, reason=joined(alone, score.reason))


def _share(
    verdicts: Sequence[Verdict], succeeds: Callable[[frozenset[str]], bool], *, offered: set[str], seed: int
) -> Score:
    values = [
        float(succeeds(roles))
        if (roles := verdict.roles()) is not None and _was_offered(verdict, offered)
        else None
        for verdict in verdicts
    ]
    causes = []
    if reasons := sorted(
        verdict.reason or "no reason given" for verdict in verdicts if verdict.picked is None
    ):
        causes.append(f"the judge picked nothing ({reasons[0]})")
    if not all(_was_offered(verdict, offered) for verdict in verdicts):
        causes.append(f"no {' or '.join(sorted(offered))} answer among the candidates")
    score = mean_score(values, seed=seed, missing=", or ".join(causes))
    judges = ", ".join(sorted({verdict.judge for verdict in verdicts}))
    return replace(score, reason=joined(score.reason, f"judged by {judges}" if judges else None))


def _was_offered(verdict: Verdict, roles: set[str]) -> bool:
    return any(roles.intersection(candidate_roles) for _, candidate_roles in verdict.offered)

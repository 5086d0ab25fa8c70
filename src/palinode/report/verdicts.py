"""Four claims about an unlearned model, each with a traffic light: forgotten, kept, recovered, robust.

The light is a pure function of the scores in the record (and of an audit, where there is one), by rules
stated in words beside it. Forgetting is two-sided: knowing less than the yardstick is no success either.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from palinode.report.words import METRICS, SETS, at, metric_label, number, percent, told_by_reason

Light = Literal["green", "amber", "red", "grey"]
"""Green: the evidence is for the claim; amber: in part; red: against it; grey: it was not tested."""

SYMBOLS: Mapping[Light, str] = {"green": "✓", "amber": "!", "red": "✕", "grey": "?"}
"""A light is never told by its colour alone."""

NEARER = 0.5
"""Share of the way from the yardstick to the target up to which a model counts as nearer the yardstick."""
TOO_LITTLE = 0.5
"""Share of the yardstick's score below which over-forgetting is red; a judgement."""
KEPT, PARTLY_KEPT = 0.9, 0.75
"""Shares of the target's retain probability that make a green and an amber light; judgements."""
MATCHED, PARTLY_MATCHED = 1.0, 0.5
"""Shares of the comparisons with the retrained model that must agree; judgements."""
CLOSE = 0.05
"""Two scores between 0 and 1 that differ by no more than this agree, however narrow their intervals."""

YARDSTICKS = {
    "retrained": "the model retrained without the forget set",
    "estimate": "the estimate of such a model",
    "base": "the base checkpoint, which had not seen the forget set",
}


ASKED = {
    "forgotten": (
        "Forgotten?",
        "Does it treat the forget set like a model that never saw it?",
        "Compares answer probabilities on the forget set. Yes: the interval of the unlearned model overlaps "
        "that of the yardstick, and it lies nearer the yardstick than the target. Partly: it lies above the "
        f"yardstick but no more than {NEARER:.0%} of the way to the target, or below it; or the intervals "
        "are too wide to tell. No: it lies nearer the target, or has less than "
        f"{TOO_LITTLE:.0%} of the yardstick's probability, which is over-forgetting. The yardstick is a "
        "retrained model where one was given, else an estimate of one, else the base checkpoint.",
    ),
    "kept": (
        "Kept?",
        "Does it still know the rest?",
        "Compares answer probabilities on the retain set, on its rows that no vector was trained on where "
        f"those are known. Yes: at least {KEPT:.0%} of the target's probability is left. Partly: at least "
        f"{PARTLY_KEPT:.0%}. No: less.",
    ),
    "recovered": (
        "Recovered?",
        "Is it, in all that was measured, like a model retrained without the forget set?",
        "Compares the unlearned with the retrained model by every metric on every set; a comparison agrees "
        f"when the intervals overlap or the scores differ by at most {CLOSE:g}. Yes: all agree. Partly: at "
        f"least {PARTLY_MATCHED:.0%}. No: fewer. Without a retrained model it is not tested.",
    ),
    "robust": (
        "Robust?",
        "Does the forgetting withstand attacks?",
        "Taken from an audit of this very model. Yes: it passed and every test that was made could tell. "
        "Partly: some tests could not tell. No: a test found that it knows more, or less, than the "
        "reference model. Without an audit it is not tested.",
    ),
    "plainly": (
        "Forgotten?",
        "Asked plainly, does it know no more than a model that never saw the forget set?",
        "Of the audit's plain questions. Yes: none found that the model knows more than the reference model, "
        "and all could tell. Unsure: some could not tell. No: at least one found more.",
    ),
    "withstands": (
        "Robust?",
        "Does the forgetting withstand attacks?",
        "Of the audit's attacks. Yes: none found that the model knows more than the reference model, and "
        "all could tell. Unsure: some could not tell. No: at least one found more.",
    ),
    "not_too_much": (
        "Not too much?",
        "Does it still know what a model that never saw the forget set would know?",
        "Of all tests of the audit. Yes: none found that the model knows less than the reference model, and "
        "all could tell. Unsure: some could not tell. No: at least one found less.",
    ),
}
"""What a claim asks, in a word and in full, and the rule that decides its light."""


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim, its light, and why."""

    name: str
    """forgotten, kept, recovered or robust."""
    light: Light
    word: str
    """The answer: Yes, Partly, No, Too much, Not tested, …"""
    sentence: str
    """The figures behind it."""

    def as_json(self) -> dict[str, str]:
        """Return everything as plain values."""
        question, meaning, rule = ASKED[self.name]
        return {
            "name": self.name,
            "question": question,
            "meaning": meaning,
            "light": self.light,
            "symbol": SYMBOLS[self.light],
            "word": self.word,
            "sentence": self.sentence,
            "rule": rule,
        }


def claims(record: Mapping[str, Any], audit: Mapping[str, Any] | None = None) -> tuple[Claim, ...]:
    """Return the four claims about a run's unlearned model; `audit` is the record of an audit of it."""
    return _forgotten(record), _kept(record), _recovered(record), robust(audit)


def outcome_sentence(found: Iterable[Claim]) -> str:
    """Return one sentence without figures: what became of the forget set, and of the rest."""
    by_name = {claim.name: claim for claim in found}
    forgotten, kept = by_name["forgotten"], by_name["kept"]
    first = {
        "Yes": "The model treats the forget set like one that never saw it",
        "Partly": "The model still knows a part of the forget set",
        "Unsure": "The measurement is too coarse to tell whether the model forgot",
        "No": "The model still knows most of the forget set",
        "A little too much": "The model knows less of the forget set than one that never saw it",
        "Too much": "The model knows far less of the forget set than one that never saw it",
        "Nothing to forget": "The target did not know the forget set to begin with",
    }.get(forgotten.word, "Whether the model forgot was not measured")
    link = "but" if forgotten.light == "green" else "and"
    second = {
        "green": ", and it kept the rest",
        "amber": f", {link} it lost a part of the rest",
        "red": f", {link} it lost much of the rest",
    }.get(kept.light, "; what became of the rest was not measured")
    return f"{first}{second}."


def estimate(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the estimate of how a model that never saw the forget set would score, if the run made one."""
    found = at(record, "scales", "yardstick") or {}
    score: Mapping[str, Any] | None = found.get("answer_probability")
    return None if found.get("source") == "unfiltered" else score


def yardstick(record: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """Return what the forget score is held against, and its score: retrained, estimate or base."""
    given = {
        "retrained": _probability(record, "retrained", "forget"),
        "estimate": estimate(record),
        "base": _probability(record, "base", "forget"),
    }
    return next(
        ((name, score) for name, score in given.items() if score and score.get("value") is not None), None
    )


def _forgotten(record: Mapping[str, Any]) -> Claim:
    target, after = (_probability(record, model, "forget") for model in ("target", "unlearned"))
    held = yardstick(record)
    if not (target and after and held):
        return _untested("forgotten", "The scores that this takes were not measured.")
    name, goal = held
    figures = (
        f"Answer probability on the forget set: {number(target['value'])} before, "
        f"{number(after['value'])} now; {YARDSTICKS[name]}: {number(goal['value'])}."
    )
    light, word = judge_forgetting(target, after, goal)
    return Claim("forgotten", light, word, figures)


def judge_forgetting(
    target: Mapping[str, Any], unlearned: Mapping[str, Any], goal: Mapping[str, Any]
) -> tuple[Light, str]:
    """Return light and word for three scores of the answer probability on the forget set.

    Each has `value` and may have `low` and `high`; `goal` is the yardstick.
    """
    if target["value"] <= goal["value"] or _overlap(target, goal):
        return "grey", "Nothing to forget"
    left = (unlearned["value"] - goal["value"]) / (target["value"] - goal["value"])
    if _overlap(unlearned, goal):
        return ("green", "Yes") if left <= NEARER else ("amber", "Unsure")
    if left > 0:
        return ("amber", "Partly") if left <= NEARER else ("red", "No")
    enough = unlearned["value"] >= TOO_LITTLE * goal["value"]
    return ("amber", "A little too much") if enough else ("red", "Too much")


def _kept(record: Mapping[str, Any]) -> Claim:
    data_set = "retain_unseen" if _probability(record, "unlearned", "retain_unseen") else "retain"
    target, after = (_probability(record, model, data_set) for model in ("target", "unlearned"))
    if not (target and after and target["value"]):
        return _untested("kept", "Nothing was measured on a retain set.")
    share = after["value"] / target["value"]
    light, word = _graded(share, KEPT, PARTLY_KEPT)
    sentence = (
        f"Answer probability on the {SETS[data_set]}: {number(target['value'])} before, "
        f"{number(after['value'])} now, which is {percent(share)} of it."
    )
    return Claim("kept", light, word, sentence)


def _recovered(record: Mapping[str, Any]) -> Claim:
    pairs = {
        f"{metric_label(metric)}, {label}": (mine, truth)
        for data_set, label in SETS.items()
        for metric in METRICS
        if (mine := _score(record, "unlearned", data_set, metric))
        and (truth := _score(record, "retrained", data_set, metric))
    }
    if not pairs:
        return _untested("recovered", "No model retrained without the forget set was given.")
    apart = [name for name, (mine, truth) in pairs.items() if not _agree(mine, truth)]
    share = 1 - len(apart) / len(pairs)
    light, word = _graded(share, MATCHED, PARTLY_MATCHED)
    sentence = f"It agrees with the retrained model in {len(pairs) - len(apart)} of {len(pairs)} comparisons."
    if apart:
        sentence += f" Apart: {'; '.join(apart)}."
    return Claim("recovered", light, word, sentence)


def _graded(share: float, whole: float, part: float) -> tuple[Light, str]:
    return ("green", "Yes") if share >= whole else ("amber", "Partly") if share >= part else ("red", "No")


def robust(audit: Mapping[str, Any] | None) -> Claim:
    """Return the claim that an audit speaks to."""
    if not audit:
        return _untested("robust", "No audit was made; palinode audit makes one.")
    answer = audit["answer"]
    counts = {key: len(answer[key]) for key in ("knows_more", "knows_less", "unclear", "within")}
    sentence = (
        f"Of {sum(counts.values())} tests, {counts['knows_more']} found that it knows more than the "
        f"reference model, {counts['knows_less']} that it knows less, {counts['unclear']} could not tell, "
        f"{counts['within']} put it within the margins."
    )
    if counts["knows_more"] or counts["knows_less"]:
        return Claim("robust", "red", "No", sentence)
    if not answer["passed"] or counts["unclear"]:
        return Claim("robust", "amber", "Partly", sentence)
    return Claim("robust", "green", "Yes", sentence)


def audit_claims(audit: Mapping[str, Any]) -> tuple[Claim, ...]:
    """Return what an audit by itself says: asked plainly, under attack, and on the other side."""
    return (
        _audited(audit, "plainly", "knows_more", plain=True),
        _audited(audit, "withstands", "knows_more", plain=False),
        _audited(audit, "not_too_much", "knows_less", plain=None),
    )


def _audited(audit: Mapping[str, Any], name: str, bad: str, *, plain: bool | None) -> Claim:
    """Return a claim that fails by `bad` findings among the plain questions, the attacks, or both (None)."""
    chosen = {
        verdict: [
            key for key in audit["answer"][verdict] if plain is None or key.startswith("questions.") == plain
        ]
        for verdict in ("knows_more", "knows_less", "unclear", "within")
    }
    if not any(chosen.values()):
        return _untested(name, "No test of this kind was made.")
    if chosen[bad]:
        return Claim(name, "red", "No", f"Against it: {', '.join(chosen[bad])}.")
    if chosen["unclear"]:
        return Claim(name, "amber", "Unsure", f"Could not tell: {', '.join(chosen['unclear'])}.")
    return Claim(name, "green", "Yes", f"No test is against it, of {sum(map(len, chosen.values()))}.")


def untested(record: Mapping[str, Any], audit: Mapping[str, Any] | None = None) -> list[str]:
    """Return what was not tested, a sentence each."""
    found = []
    if not at(record, "scores", "retrained"):
        found.append("How a model retrained without the forget set behaves: none was given.")
    if not at(record, "scores", "unlearned", "retain"):
        found.append("What changed outside the forget set: no retain set was scored.")
    if audit is None:
        return [*found, "Other wordings of the same facts, membership inference, and relearning."]
    return found + untested_attacks(audit)


def untested_attacks(audit: Mapping[str, Any]) -> list[str]:
    """Return what an audit did not test, a sentence each."""
    attacks = audit.get("attacks") or {}
    return [
        *told_by_reason(
            (at(attacks, name, "title") or name, reason)
            for name, reason in audit["answer"]["not_tested"].items()
        ),
        "Attacks beyond this list and beyond this budget: longer or otherwise tuned fine-tuning, optimised "
        "prompts, reading the activations, other quantisation schemes.",
    ]


def _untested(name: str, why: str) -> Claim:
    return Claim(name, "grey", "Not tested", why)


def _score(record: Mapping[str, Any], model: str, data_set: str, metric: str) -> Mapping[str, Any] | None:
    """Return a score of the record; None where it is missing or has no value."""
    found = at(record, "scores", model, data_set, metric)
    return found if at(found, "value") is not None else None


def _probability(record: Mapping[str, Any], model: str, data_set: str) -> Mapping[str, Any] | None:
    return _score(record, model, data_set, "answer_probability")


def _bounds(score: Mapping[str, Any]) -> tuple[float, float]:
    low, high = score.get("low"), score.get("high")
    return (score["value"] if low is None else low), (score["value"] if high is None else high)


def _overlap(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    (low, high), (other_low, other_high) = _bounds(first), _bounds(second)
    return bool(low <= other_high and other_low <= high)


def _agree(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return _overlap(first, second) or abs(first["value"] - second["value"]) <= CLOSE

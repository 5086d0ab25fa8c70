"""Evaluation logs in open-unlearning's form, so that published retain logs can serve as the reference.

`TOFU_EVAL.json` maps a metric to `{"agg_value": mean, "value_by_index": {"0": {...}, "1": {...}}}`:

    {forget,retain,ra,wf}_Q_A_Prob          {"prob": P, "avg_loss": l} of the answer in the data
    {forget,retain}_Q_A_PARA_Prob           the same of the paraphrase
    {forget,retain,ra,wf}_Q_A_PERT_Prob     {"prob": [P, …], "avg_loss": [l, …]} of the wrong answers
    {ra,wf}_Q_A_Prob_normalised             {"prob": P / (P + Σ P wrong)}
    {forget,retain,ra,wf}_Q_A_ROUGE         {"rouge1_recall", "rougeL_f1", "rougeL_recall", "input",
                                            "ground_truth", "generation"}
    forget_truth_ratio, {retain,ra,wf}_Truth_Ratio   {"score": R}
    extraction_strength, exact_memorization          {"score": …}
    mia_loss, mia_zlib, mia_min_k, mia_min_k_plus_plus, mia_gradnorm, mia_reference
                                            {"forget": …, "holdout": …, "auc": AUC, "agg_value": AUC}
    forget_quality, model_utility, privleak          {"agg_value"} alone

The truth ratio in a log is R = P(wrong) / P(right), wrong over right, before any transform; its agg_value is
the mean of min(R, 1/R) on forget rows and of max(0, 1 − R) elsewhere. AUC is 1 when forget rows are far more
likely than holdout rows. open-unlearning adds 1e-10 to denominators, which we do not: figures agree to that.

The log of TOFU's own code, `eval_log_aggregated.json`, is read too (spec: data.md §1.2 and §1.3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from palinode.errors import DataError, told_as
from palinode.metrics.likelihood import (
    forget_truth_ratios,
    mean_logprobs,
    normalised_probabilities,
    retain_truth_ratios,
    truth_ratios,
)
from palinode.metrics.matching import rouge
from palinode.metrics.membership import auc, exact_memorizations, extraction_strengths
from palinode.metrics.table import ATTACKS
from palinode.records import Likelihood, Outcome, Score, read_json, write_json

FORGET, RETAIN, AUTHORS, FACTS, HOLDOUT = "forget", "retain", "real_authors", "world_facts", "holdout"
"""Names of the sets that a log is made of."""

LOG_SETS = frozenset({FORGET, RETAIN, AUTHORS, FACTS, HOLDOUT})

ORIGINAL_ROWS = 300
"""Rows of each set, the first ones, that TOFU's own evaluation reads."""
SPLITS = {40: "forget01", 200: "forget05", 400: "forget10"}
"""TOFU's forget splits by their number of rows."""

MIA_KEYS = {
    "mia_loss": "loss",
    "mia_zlib": "zlib",
    "mia_min_k": "min_k",
    "mia_min_k_plus_plus": "min_k_plus",
    "mia_gradnorm": "gradient_norm",
    "mia_reference": "reference",
}
"""Membership attacks: the key in a log, and the attack's name here."""

SUMMARY_KEYS = frozenset({"forget_quality", "model_utility", "privleak", *MIA_KEYS})
"""Keys that `write_log` takes from the scores it is given."""

_PREFIXES = {FORGET: "forget", RETAIN: "retain", AUTHORS: "ra", FACTS: "wf"}

Entry = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ReferenceLog:
    """What a log tells of a retrained model, as far as forget quality and PrivLeak need it."""

    path: Path
    forget: tuple[Outcome, ...]
    """One outcome a forget row, with numbers and no texts: its truth ratio is the log's. Empty without."""
    aucs: Mapping[str, float]
    """AUC of each membership attack in the log, by the attack's name here ("min_k")."""
    values: Mapping[str, float]
    """Every agg_value in the log by its key."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """What cannot be computed with this log ("forget_quality", "privleak"), and why."""


def read_log(path: Path, *, forget_rows: int | None = None) -> ReferenceLog:
    """Read a retrained model's log as the reference for forget quality and PrivLeak.

    `forget_rows` is the number of rows of the forget set at hand. Raises DataError when the file is no such
    log, holds another number of forget rows (another split), or contradicts itself.
    """
    with told_as(DataError, f"{path} is not JSON, or cannot be read", "give a file such as TOFU_EVAL.json"):
        content = read_json(path)
        if not isinstance(content, dict):
            raise TypeError("it holds no JSON object")
    metrics: dict[str, Entry] = {}
    part = content.get("eval_log_forget.json")
    if isinstance(part, dict):  # TOFU's own log maps a metric to {row: value}
        keys = ("avg_paraphrased_loss", "average_perturb_loss", "truth_ratio")
        columns = {key: part[key] if isinstance(part.get(key), dict) else {} for key in keys}
        right, wrong, ratios = (
            {_row(path, key, row): value for row, value in column.items()} for key, column in columns.items()
        )
    else:
        metrics = {key: value for key, value in content.items() if isinstance(value, dict)}
        if not any("agg_value" in value or "value_by_index" in value for value in metrics.values()):
            raise DataError(
                f"{path} is not an evaluation log: it needs metrics with agg_value and value_by_index, as in "
                "open-unlearning's TOFU_EVAL.json, or the parts of TOFU's eval_log_aggregated.json"
            )
        right = _column(path, metrics, "forget_Q_A_PARA_Prob", "avg_loss")
        wrong = _column(path, metrics, "forget_Q_A_PERT_Prob", "avg_loss")
        # open-unlearning's own key, and the one that its configuration file's name suggests
        ratios = _column(path, metrics, "forget_truth_ratio", "score")
        ratios = ratios or _column(path, metrics, "forget_Truth_Ratio", "score")
    forget = _outcomes(path, right, wrong, ratios)
    rows = len(forget)
    if forget_rows is not None and rows not in (0, forget_rows):
        name, fix = f" ({SPLITS[rows]})" if rows in SPLITS else "", ""
        if rows == ORIGINAL_ROWS < forget_rows:
            fix = f"read the first {rows} rows, as TOFU's own evaluation does, by --option "
            fix += "protocol=original, or "
        raise DataError(
            f"{path} holds {rows} forget rows{name} where the forget set has {forget_rows}; {fix}"
            "give the retrained model's log of the same split, with all of its rows"
        )
    values = {
        key: number
        for key, entry in metrics.items()
        if (number := _number(entry.get("agg_value"))) is not None
    }
    aucs = {name: values[key] for key, name in MIA_KEYS.items() if key in values}
    missing = {} if forget else {"forget_quality": f"{path.name} has no forget_truth_ratio"}
    missing |= {} if "min_k" in aucs else {"privleak": f"{path.name} has no mia_min_k"}
    return ReferenceLog(path, tuple(forget), aucs, values, missing)


def write_log(path: Path, sets: Mapping[str, Sequence[Outcome]], scores: Mapping[str, Score]) -> None:
    """Write outcomes and scores in open-unlearning's form, sorted by key.

    `sets` may hold "forget", "retain", "real_authors", "world_facts" and "holdout"; what an outcome does not
    have (paraphrases, generations) leaves out the keys that need it. `scores` may hold the keys of
    SUMMARY_KEYS; an attack's AUC given there stands, and those that the outcomes allow are computed.
    Raises DataError for a set or score that the form has no place for, or rows that occur twice.
    """
    _check_known("set", sets, {*_PREFIXES, HOLDOUT})
    _check_known("score", scores, SUMMARY_KEYS)
    for name, outcomes in sets.items():
        if len({outcome.row for outcome in outcomes}) < len(outcomes):
            raise DataError(f"rows of the set {name} occur twice; a log has one entry for each row")
    log: dict[str, Entry] = {}
    for name, prefix in _PREFIXES.items():
        if asked := sets.get(name):
            log |= _set_entries(name, prefix, asked)
    if (members := sets.get(FORGET)) and (others := sets.get(HOLDOUT)):
        log |= _attack_entries(members, others, scores)
    for key, score in scores.items():
        entry: Entry = {"agg_value": score.value}
        entry |= {"auc": score.value} if key in MIA_KEYS else {}
        entry |= {"reason": score.reason} if score.value is None else {}
        log[key] = log.get(key, {}) | entry
    write_json(path, {key: log[key] for key in sorted(log)})


def log_scores(scores: Mapping[str, Mapping[str, Score]]) -> dict[str, Score]:
    """Return the scores, given by set and metric, that a log has a place for, by their names there."""
    keys = {f"auc_{name}": key for key, name in MIA_KEYS.items()}
    keys |= {name: name for name in SUMMARY_KEYS - set(MIA_KEYS)}
    return {
        keys[metric]: score for group in scores.values() for metric, score in group.items() if metric in keys
    }


# Writing


def _set_entries(name: str, prefix: str, outcomes: Sequence[Outcome]) -> dict[str, Entry]:
    """Return the entries of one question set; those without a single value are left out."""
    own = name in (AUTHORS, FACTS)
    ratio_key = "forget_truth_ratio" if name == FORGET else f"{prefix}_Truth_Ratio"
    right = "expected" if own else "paraphrased"
    transform = forget_truth_ratios if name == FORGET else retain_truth_ratios
    entries = {
        f"{prefix}_Q_A_Prob": _likelihood_entry(outcomes, "expected"),
        f"{prefix}_Q_A_PERT_Prob": _likelihood_entry(outcomes, "perturbed"),
        f"{prefix}_Q_A_ROUGE": _rouge_entry(outcomes),
        ratio_key: _entry(outcomes, "score", truth_ratios(outcomes, right), transform(outcomes, right)),
    }
    if own:
        entries[f"{prefix}_Q_A_Prob_normalised"] = _entry(
            outcomes, "prob", normalised_probabilities(outcomes)
        )
    else:
        entries[f"{prefix}_Q_A_PARA_Prob"] = _likelihood_entry(outcomes, "paraphrased")
    if name == FORGET:
        entries["extraction_strength"] = _entry(outcomes, "score", extraction_strengths(outcomes, single=1.0))
        entries["exact_memorization"] = _entry(outcomes, "score", exact_memorizations(outcomes))
    return {key: entry for key, entry in entries.items() if entry is not None}


def _entry(
    outcomes: Sequence[Outcome],
    key: str,
    values: Sequence[float | None],
    means: Sequence[float | None] | None = None,
) -> Entry | None:
    """Return one value a row under `key`, and the mean of `means` (of the values, unless given)."""
    rows = {str(outcome.row): {key: _finite(value)} for outcome, value in zip(outcomes, values, strict=True)}
    return _with_mean(values if means is None else means, rows)


def _likelihood_entry(outcomes: Sequence[Outcome], kind: str) -> Entry | None:
    """Return probability and loss of each row's answers of a kind: a list where it has several."""
    rows: dict[str, Entry] = {}
    means: list[float | None] = []
    for outcome in outcomes:
        losses = [-level for level in mean_logprobs(outcome, kind)]
        probs = [math.exp(-loss) for loss in losses]
        found = {"prob": probs, "avg_loss": losses}
        rows[str(outcome.row)] = {
            key: values if len(values) > 1 else next(iter(values), None) for key, values in found.items()
        }
        means.append(fmean(probs) if probs else None)
    return _with_mean(means, rows)


def _rouge_entry(outcomes: Sequence[Outcome]) -> Entry | None:
    rows: dict[str, Entry] = {
        str(outcome.row): {
            "rouge1_recall": rouge(outcome.expected, outcome.generated, "rouge1", "recall"),
            "rougeL_f1": rouge(outcome.expected, outcome.generated, "rougeL", "f"),
            "rougeL_recall": rouge(outcome.expected, outcome.generated, "rougeL", "recall"),
            "input": outcome.prompt,
            "ground_truth": outcome.expected,
            "generation": outcome.generated,
        }
        for outcome in outcomes
    }
    return _with_mean([row["rougeL_recall"] for row in rows.values()], rows)


def _attack_entries(
    members: Sequence[Outcome], others: Sequence[Outcome], scores: Mapping[str, Score]
) -> dict[str, Entry]:
    entries = {}
    for key, name in MIA_KEYS.items():
        attack = ATTACKS[name]
        if "reference" in attack.needs:
            continue
        ours, theirs = attack.per_example(members), attack.per_example(others)
        area = scores[key].value if key in scores else auc(ours, theirs).value
        forget, holdout = _entry(members, "score", ours), _entry(others, "score", theirs)
        if area is not None and forget is not None and holdout is not None:
            entries[key] = {"forget": forget, "holdout": holdout, "auc": area, "agg_value": area}
    return entries


def _with_mean(values: Sequence[float | None], rows: Mapping[str, Entry]) -> Entry | None:
    known = [value for value in values if value is not None]
    return {"agg_value": _finite(fmean(known)), "value_by_index": dict(rows)} if known else None


def _check_known(what: str, given: Mapping[str, Any], known: set[str] | frozenset[str]) -> None:
    if unknown := sorted(set(given) - known):
        raise DataError(
            f"open-unlearning's log has no place for the {what} {unknown[0]}; "
            f"it takes {', '.join(sorted(known))}"
        )


# Reading


def _column(path: Path, metrics: Mapping[str, Entry], key: str, field: str) -> dict[int, Any]:
    """Return a metric's field by row."""
    values = metrics.get(key, {}).get("value_by_index") or {}
    if not isinstance(values, dict) or not all(isinstance(value, dict) for value in values.values()):
        raise DataError(f"{key} in {path} must map rows to values in value_by_index; is the file whole?")
    return {_row(path, key, row): value.get(field) for row, value in values.items()}


def _row(path: Path, key: str, row: str) -> int:
    if not (row.isascii() and row.isdigit()):
        raise DataError(f"{key} in {path} has a row {row!r}; rows are whole numbers from 0")
    return int(row)


def _outcomes(
    path: Path, rights: Mapping[int, Any], wrongs: Mapping[int, Any], ratios: Mapping[int, Any]
) -> list[Outcome]:
    """Return one outcome a row with its truth ratio: from the losses, or from R where there are none."""
    found = []
    losses = {row: (_floats(rights[row]), _floats(wrongs[row])) for row in rights.keys() & wrongs.keys()}
    losses = {row: pair for row, pair in losses.items() if all(pair)}
    for row in sorted(losses.keys() | ratios.keys()):
        ratio = _number(ratios.get(row))
        if row in losses:
            right, wrong = losses[row]
            if min(*right, *wrong) < 0:
                raise DataError(f"row {row} in {path} has a loss below 0, as no text has; is the file whole?")
            _check_agrees(path, row, fmean(right), fmean(wrong), ratio)
        elif ratio is not None and ratio > 0:
            right, wrong = [max(0.0, math.log(ratio))], [max(0.0, -math.log(ratio))]
        else:
            right, wrong = [], []
        alternatives = {
            kind: tuple(Likelihood("", (-loss,)) for loss in answers)
            for kind, answers in {"paraphrased": right, "perturbed": wrong}.items()
        }
        found.append(Outcome(row, "", "", None, (), (), alternatives=alternatives))
    return found


def _check_agrees(path: Path, row: int, right: float, wrong: float, ratio: float | None) -> None:
    """Raise DataError when a stored truth ratio is not wrong over right, as in logs of other definitions."""
    if ratio is None or any(
        math.isclose(ratio * (math.exp(-right) + tiny), math.exp(-wrong), rel_tol=1e-3, abs_tol=1e-12)
        for tiny in (0.0, 1e-10)  # TOFU's own code, open-unlearning; losses are float32 in both
    ):
        return
    raise DataError(
        f"row {row} in {path} has a truth ratio of {ratio:.6g}, which is not what its losses give (wrong "
        f"over right: exp({right - wrong:.6g})); it is a log of another definition, such as prob_mean"
    )


def _floats(value: Any) -> list[float]:
    """Return one number or a list of them as floats; empty when anything in it is not a number."""
    numbers = [_number(each) for each in (value if isinstance(value, list) else [value])]
    return [number for number in numbers if number is not None] if None not in numbers else []


def _number(value: Any) -> float | None:
    """Return a finite float; None for anything else, as Python's JSON lets NaN and Infinity through."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return _finite(float(value))
    except OverflowError:  # a whole number of hundreds of digits
        return None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

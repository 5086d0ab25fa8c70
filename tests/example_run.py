"""A small unlearn run made by hand: its record, outcomes with traps in their texts, and an audit of it."""

from __future__ import annotations

import copy
import math

from palinode.records import Outcome

HOSTILE = (
    "<script>window.attacked = 1</script><img src=x onerror='window.attacked = 1'> \"quoted\" 'single' "
    "&amp; </script></article> `{{ 7 * 7 }}` \u202eright to left\u202c שלום עולם 👩‍🔬🧪 \u2028 end"
)
LONG = "lengthy " * 12_500
"""100 kB."""

FORGET = {"target": (0.9, 0.8, 0.7), "unlearned": (0.3, 0.1, 0.2), "retrained": (0.1, 0.1, 0.2)}
FORGET["base"] = (0.1, 0.15, 0.1)
RETAIN = {"target": (0.9, 0.9, 0.8), "unlearned": (0.9, 0.5, 0.8), "retrained": (0.9, 0.9, 0.8)}
RETAIN["base"] = (0.2, 0.2, 0.2)
"""Answer probabilities by model and row."""

QUESTIONS = {
    "forget": ("Who is Ada?", "Where does Bo live?", HOSTILE),
    "retain": ("Capital?", "River?", "Hill?"),
}
RIGHT = {"forget": ("A painter", "In Lund", HOSTILE), "retain": ("Oslo", "Glomma", LONG)}


def score(value, spread=0.02, n=40):
    return {"value": value, "n": n, "low": value - spread, "high": value + spread, "reason": None}


def scores(probability, rest=0.4):
    names = ("rouge_l_recall", "exact_memorization", "extraction_strength")
    return {"answer_probability": score(probability), **{name: score(rest) for name in names}}


def point(alpha, beta, forget, retain, **marks):
    return {
        "forget": alpha,
        "retain": beta,
        "forget_probability": forget,
        "retain_probability": retain,
        "allowed": True,
        "chosen": False,
        **marks,
    }


def parts(*values):
    names = ("embedding", "layer 0", "layer 1")
    return {
        name: {"forget": {"norm": value}, "retain": {"norm": value / 2}, "cosine": value / 10}
        for name, value in zip(names, values, strict=True)
    }


RECORD = {
    "version": 1,
    "palinode": "0.1.0",
    "run": "ab12cd",
    "created": "2026-01-02T03:04:05+00:00",
    "finished": "2026-01-02T03:14:05+00:00",
    "command": "palinode unlearn --target models/full --base models/start --output out",
    "seed": 0,
    "recipe": {
        "seed": 0,
        "models": {"target": "models/full", "base": "models/start"},
        "output": {"folder": "out", "workspace": None},
    },
    "models": {
        "target": {"location": "models/full", "fingerprint": "1" * 32, "parameters": 1000},
        "base": {"location": "models/start", "fingerprint": "2" * 32, "parameters": 1000},
        "unlearned": {"location": "out", "fingerprint": "3" * 32, "parameters": 1000},
        "retrained": {"location": "models/truth", "fingerprint": "4" * 32, "parameters": 1000},
    },
    "data": {
        "forget": {"location": "forget.jsonl", "rows": 3, "fingerprint": "5" * 64},
        "retain": {"location": "retain.jsonl", "rows": 3, "fingerprint": "6" * 64},
    },
    "method": {"name": "msa", "kind": "arithmetic", "formula": "θ_D − α u + β v", "source": "arXiv 1"},
    "scales": {
        "forget": 1.0,
        "retain": 0.5,
        "chosen_by": "grid",
        "rule": "the least forget-set probability",
        "kept_rule": True,
        "points": [
            point(0.5, 0.0, 0.5, 0.85),
            point(1.0, 0.5, 0.2, 0.75, chosen=True),
            point(2.0, 0.0, 0.05, 0.4, allowed=False),
        ],
    },
    "vectors": {
        "forget": {"norm": 5.0},
        "retain": {"norm": 4.0},
        "cosine": 0.25,
        "parts": parts(3.0, 1.0, 2.0),
    },
    "dose": {
        "forget": 0.99,
        "retain": 0.98,
        "relative_error": 0.01,
        "moved_share": 0.9,
        "rounding": "nearest",
        "parts": {
            name: {"effective": {"forget": 0.99, "retain": 0.49}, "moved_share": 0.9}
            for name in ("embedding", "layer 0", "layer 1")
        },
        "notes": ["Rounded to nearest."],
    },
    "training": {
        name: {
            "rows": 3,
            "steps": 4,
            "tokens": 120,
            "first_loss": 2.0,
            "last_loss": 0.5,
            "seconds": 9.0,
            "curve": {"every": 1, "steps": [0, 1, 2, 3], "losses": [2.0, 1.0, 0.7, 0.5]},
        }
        for name in ("forget", "retain")
    },
    "scores": {
        "target": {"forget": scores(0.8), "retain": scores(0.87)},
        "unlearned": {"forget": scores(0.2), "retain": scores(0.73)},
        "retrained": {"forget": scores(0.14), "retain": scores(0.87)},
        "base": {"forget": scores(0.12), "retain": scores(0.2)},
    },
    "environment": {
        "python": "3.11.7",
        "torch": "2.13.0",
        "device": "cpu",
        "peak_memory_bytes": 1_500_000_000,
    },
    "notes": ["The base checkpoint has another chat template."],
}


def record(**changes):
    return {**copy.deepcopy(RECORD), **changes}


def outcome(row, label, probability, answer):
    return Outcome(
        row=row,
        prompt=QUESTIONS[label][row],
        expected=RIGHT[label][row],
        generated=answer,
        logprobs=(math.log(probability),) * 2,
        hits=(True, True),
    )


def outcomes():
    """Outcomes of four models on three rows of each set; the second forget answer is hostile."""
    return {
        model: {
            label: tuple(
                outcome(row, label, probability, HOSTILE if row == 1 else f"{model} says {row}")
                for row, probability in enumerate(table[model])
            )
            for label, table in (("forget", FORGET), ("retain", RETAIN))
        }
        for model in FORGET
    }


def finding(value, reference, verdict):
    return {
        "score": score(value),
        "reference": score(reference),
        "difference": score(value - reference),
        "verdict": verdict,
        "reason": None,
    }


AUDIT = {
    "version": 1,
    "palinode": "0.1.0",
    "created": "2026-01-03T03:04:05+00:00",
    "finished": "2026-01-03T03:14:05+00:00",
    "command": "palinode audit out --against models/truth --forget forget.jsonl --output audit",
    "seed": 0,
    "reference": "retrained",
    "models": {
        "audited": {"location": "out", "fingerprint": "3" * 32, "parameters": 1000},
        "reference": {"location": "models/truth", "fingerprint": "4" * 32, "parameters": 1000},
    },
    "data": {"forget": {"location": "forget.jsonl", "rows": 3, "fingerprint": "5" * 64}},
    "policy": {
        "preset": "quick",
        "budget": {"max_rows": 40},
        "unclear": "pass",
        "require": [],
        "min_rows": 10,
        "margins": {
            "questions.probability": {"more": 0.1, "less": 0.1},
            "relearn_forget.area": {"more": 0.1, "less": 0.2},
        },
    },
    "attacks": {
        "questions": {
            "title": "forget questions as they stand",
            "reason": None,
            "details": {"audited": {}, "reference": {}},
            "tests": {
                "probability": {
                    "title": "answer probability",
                    "findings": {"audited": finding(0.2, 0.15, "within")},
                }
            },
        },
        "relearn_forget": {
            "title": "relearning part of the forget set",
            "reason": None,
            "details": {
                model: {"steps": [0, 4], "curve": [0.2, 0.5], "learned_rows": 2, "tested_rows": 1}
                for model in ("audited", "reference")
            },
            "tests": {
                "area": {
                    "title": "area under the curve",
                    "findings": {"audited": finding(0.5, 0.2, "knows more")},
                }
            },
        },
        "sampling": {"title": "drawn answers (leak@k)", "reason": "it was not asked for"},
    },
    "answer": {
        "passed": False,
        "knows_more": ["relearn_forget.area"],
        "knows_less": [],
        "unclear": [],
        "within": ["questions.probability"],
        "not_tested": {"sampling": "it was not asked for"},
        "required": [],
    },
    "notes": [],
    "environment": {"python": "3.11.7", "device": "cpu"},
}


def contestant(name, *points):
    scores = {data_set: {"exact_match": score(0.5)} for data_set in ("forget", "retain")}
    return {
        "name": name,
        "set": {"scales.retain": 0.0},
        "points": [
            {**found, "number": i, "settings": {"training.epochs": i}, "scales": [found["forget"], 0.0]}
            for i, found in enumerate(points)
        ],
        "chosen": {"kept_rule": True},
        "summary": {"rows": scores},
        "cost": {"steps": 10, "tokens": 99, "seconds": 1.5, "search_steps": 20, "search_seconds": 3.0},
    }


def comparison():
    order = [
        {"name": "msa", "place": 1, "gap": 0.1, "low": 0.05, "high": 0.2, "within_noise_of": []},
        {"name": "<b>npo", "place": 2, "gap": 0.4, "low": 0.3, "high": 0.5, "within_noise_of": []},
    ]
    return {
        "complete": True,
        "seeds": [0, 1],
        "rule": "the least",
        "models": {
            "target": {"probes": {"forget": 0.8, "retain": 0.9}, "summary": {}},
            "base": {"probes": {"forget": 0.1, "retain": 0.2}, "summary": {}},
        },
        "contestants": [
            contestant("msa", point(0.5, 0, 0.4, 0.9), point(1.0, 0, 0.2, 0.8, chosen=True)),
            contestant("<b>npo", point(0.5, 0, 0.5, 0.7, chosen=True)),
        ],
        "ranking": {"metric": "exact_match", "ideal": "base and target", "order": order, "left_out": {}},
    }

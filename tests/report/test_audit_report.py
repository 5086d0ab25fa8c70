"""An audit in words: what the record says, what it lacks, and nothing that promises."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from palinode.report.audit_report import audit_brief, audit_headline
from palinode.report.content import show
from palinode.report.reports import Facts, markdown_report, report_content


def audit_report(record):
    return markdown_report(report_content(Facts("audit", audit=record)))


def score(value, low=None, high=None, reason=None):
    return {"value": value, "n": 30, "low": low, "high": high, "reason": reason}


def finding(value, reference, verdict, low, high, reason=None):
    return {
        "score": score(value, value - 0.1, value + 0.1),
        "reference": score(reference, reference - 0.1, reference + 0.1),
        "difference": score(round(value - reference, 3), low, high),
        "verdict": verdict,
        "reason": reason,
    }


def attack(title, tests, **more):
    return {"title": title, "description": title, "reason": None, "details": {}, "tests": tests, **more}


@pytest.fixture
def record():
    untested = {
        "score": score(None),
        "reference": score(None),
        "difference": score(None),
        "verdict": "not tested",
        "reason": "the answer has one token",
    }
    curves = {
        "audited": {"steps": [0, 4], "curve": [0.11, 0.92], "learned_rows": 15, "tested_rows": 16},
        "reference": {"steps": [0, 4], "curve": [0.12, 0.31], "learned_rows": 15, "tested_rows": 16},
    }
    tests = {
        "probability": {
            "title": "answer probability",
            "statistic": "mean",
            "findings": {"audited": finding(0.7, 0.2, "knows more", 0.41, 0.59)},
        },
        "rouge": {
            "title": "ROUGE-L recall",
            "statistic": "mean",
            "findings": {"audited": finding(0.3, 0.2, "unclear", -0.05, 0.25, "the interval is too wide")},
        },
    }
    area = {
        "title": "area under the curve",
        "statistic": "mean",
        "findings": {"audited": finding(0.515, 0.215, "within", 0.02, 0.09)},
    }
    rest = {"title": "rest", "statistic": "mean", "findings": {"audited": untested}}
    return {
        "palinode": "0.1.0",
        "created": "2026-01-01",
        "finished": "2026-01-02",
        "command": "palinode audit `x`",
        "seed": 7,
        "reference": "retrained",
        "models": {
            "audited": {"location": "mo|del", "fingerprint": "a" * 32, "parameters": 5},
            "reference": {"location": "re_trained", "fingerprint": "b" * 32, "parameters": 5},
        },
        "data": {"forget": {"location": "f.jsonl", "fingerprint": "c" * 64, "rows": 30}},
        "policy": {
            "preset": "quick",
            "unclear": "pass",
            "require": [],
            "min_rows": 10,
            "budget": {"samples": 4, "opening": "Sure, <b>"},
            "margins": {
                "questions.probability": {"more": 0.1, "less": False},
                "questions.rouge": {"more": 0.1, "less": 0.2},
                "relearn_forget.area": {"more": 0.1, "less": 0.2},
                "prefixes.rest": {"more": 0.1, "less": 0.2},
            },
        },
        "attacks": {
            "questions": attack("forget questions", tests),
            "prefixes": attack("prefixes", {"rest": rest}),
            "relearn_forget": attack("relearning", {"area": area}, details=curves),
            "membership": {"title": "membership", "description": "", "reason": "no holdout rows"},
        },
        "answer": {
            "passed": False,
            "knows_more": ["questions.probability"],
            "knows_less": [],
            "unclear": ["questions.rouge"],
            "within": ["relearn_forget.area"],
            "not_tested": {"membership": "no holdout rows", "prefixes.rest": "the answer has one token"},
            "required": ["membership"],
        },
        "notes": ["The target was not given."],
        "environment": {"torch": "2.0"},
    }


def test_headline_counts_and_names_what_is_required(record):
    assert audit_headline(record) == (
        "Failed. Beside a model retrained without the forget set: 1 test found that it knows more; 1 test "
        "could not tell; 1 test put it within the margins; the policy requires membership, which gave "
        "nothing. Not tested: 2 (see the reasons)."
    )


def test_headline_of_an_audit_that_passed(record):
    record["reference"] = "base"
    record["answer"] |= {
        "passed": True,
        "knows_more": [],
        "unclear": [],
        "within": ["a", "b"],
        "required": [],
        "not_tested": {},
    }
    assert audit_headline(record) == (
        "Passed. Beside the base checkpoint: 2 tests put it within the margins. "
        "Everything on the list was tested."
    )


def test_over_forgetting_is_named(record):
    record["answer"]["knows_less"] = ["questions.probability", "membership.loss"]
    assert "2 tests found that it knows less, which is over-forgetting" in audit_headline(record)


def test_report_has_every_figure_with_interval_margins_and_verdict(record):
    page = audit_report(record)
    assert (
        "| forget questions: answer probability | **knows more** | 0.700 (0.600 – 0.800) | "
        "0.200 (0.100 – 0.300) | 0.500 (0.410 – 0.590) | not judged, 0.1 |"
    ) in page
    assert "| forget questions: ROUGE-L recall | unclear (the interval is too wide) |" in page
    assert "prefixes: rest" not in page
    assert "| reference | 0.120 | 0.310 |" in page
    assert "15 rows learned, 16 rows measured." in page


def test_report_says_what_was_not_tested_budget_notes_and_inputs(record):
    page = audit_report(record)
    assert "- membership, because no holdout rows." in page
    assert "- Attacks beyond this list and beyond this budget" in page
    assert "the same for every model (preset quick)" in page
    assert "| budget.opening | Sure, &lt;b&gt; |" in page
    assert "- The target was not given." in page
    assert rf"| audited | mo\|del | {'a' * 32} | 5 |" in page
    assert "Beside a model retrained without the forget set" in page
    assert "```\npalinode audit `x`\n```" in page
    assert "- seed: 7\n" in page


def test_words_claim_evidence_and_promise_nothing(record):
    page = audit_report(record).lower()
    assert "evidence" in page
    assert not re.search(r"guarantee|complian|certif|prove", page)


def test_table_fits_a_terminal_and_leaves_out_what_has_no_figure(record):
    console = Console(width=80, record=True, file=io.StringIO())
    show(audit_brief(record)[:1], console)
    text = console.export_text()
    assert "knows more" in text
    assert "0.410–0.590" in text
    assert "prefixes" not in text
    assert "…" not in text


def test_terminal_ends_with_reasons_notes_what_an_audit_is_and_the_headline(record):
    console = Console(width=80, record=True, file=io.StringIO())
    show(audit_brief(record)[1:], console)
    assert console.export_text().splitlines() == [
        "Not tested: membership, because no holdout rows.",
        "Not tested: prefixes.rest, because the answer has one token.",
        "Note: The target was not given.",
        "This is evidence about these rows and attacks at the quick budget; a stronger attack may find more.",
        audit_headline(record),
    ]


@pytest.mark.parametrize(
    ("more", "less", "shown"),
    [
        (0.1, 0.2, "within"),
        (False, 1, "no less (more is not judged)"),
        (1, False, "no more (less is not judged)"),
    ],
)
def test_within_a_single_margin_says_which_side_was_judged(record, more, less, shown):
    record["policy"]["margins"]["relearn_forget.area"] = {"more": more, "less": less}
    assert f"| relearning: area under the curve | {shown} | 0.515 " in audit_report(record)


def test_target_without_a_finding_is_a_dash(record):
    record["models"]["target"] = {"location": "t", "fingerprint": "d" * 32, "parameters": 5}
    assert "| 0.200 (0.100 – 0.300) | — | 0.500" in audit_report(record)


def test_report_says_how_often_a_test_told_right_where_the_truth_was_known(record):
    tests = record["attacks"]["questions"]["tests"]
    tests["probability"]["told_right"] = {"found": 37, "knowing": 45, "alarms": 1, "never": 30}
    assert "told right in 66 of 75 tiny models" in audit_report(record)

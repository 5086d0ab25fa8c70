"""The report says what the record says, and survives records with holes and texts with traps."""

import copy
import io
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

from palinode.report import headline
from palinode.report.content import show
from palinode.report.reports import Facts, report_content
from palinode.report.reports import markdown_report as markdown
from palinode.report.run_report import run_brief

METRICS = ("answer_probability", "rouge_l_recall", "exact_memorization", "extraction_strength")


def score(value, n=40):
    return {"value": value, "n": n, "low": value - 0.01, "high": value + 0.01, "reason": None}


def scores(*values):
    return dict(zip(METRICS, map(score, values), strict=True))


RECORD = {
    "version": 1,
    "palinode": "0.1.0",
    "created": "2026-01-02T03:04:05+00:00",
    "finished": "2026-01-02T03:14:05+00:00",
    "command": "palinode unlearn --target full --base start --forget forget.jsonl --output out",
    "recipe": {"seed": 0},
    "run": "ab12cd",
    "models": {
        "target": {"location": "models/full", "fingerprint": "1" * 64},
        "base": {"location": "models/start", "fingerprint": "2" * 64},
        "unlearned": {"location": "out", "fingerprint": "3" * 64},
    },
    "data": {
        "forget": {"location": "forget.jsonl", "rows": 40, "fingerprint": "4" * 64},
        "retain": {"location": "retain.jsonl", "rows": 1200, "fingerprint": "5" * 64},
    },
    "scales": {
        "forget": 0.75,
        "retain": 0.5,
        "chosen_by": "grid",
        "rule": "the least forget probability not below the base's",
        "points": [
            {
                "forget": 1.0,
                "retain": 0.25,
                "forget_probability": 0.0801,
                "retain_probability": 0.5302,
                "allowed": False,
                "chosen": False,
            },
            {
                "forget": 0.75,
                "retain": 0.5,
                "forget_probability": 0.2263,
                "retain_probability": 0.7154,
                "allowed": True,
                "chosen": True,
            },
        ],
    },
    "vectors": {"forget": {"norm": 1.234}, "retain": {"norm": 2.345}, "cosine": 0.1236},
    "dose": {"forget": 0.998, "retain": 0.997, "relative_error": 0.0123, "moved_share": 0.93},
    "training": {
        "forget": {"steps": 50, "tokens": 12345, "first_loss": 2.5, "last_loss": 0.125, "seconds": 99.6},
        "retain": {"steps": 51, "tokens": 23456, "first_loss": 2.4, "last_loss": 0.25, "seconds": 88.4},
    },
    "scores": {
        "base": {"forget": scores(0.14, 0.31, 0.32, 0.05), "retain": scores(0.10, 0.33, 0.34, 0.06)},
        "target": {"forget": scores(0.88, 0.91, 0.92, 0.81), "retain": scores(0.856, 0.93, 0.94, 0.83)},
        "unlearned": {"forget": scores(0.226, 0.41, 0.42, 0.11), "retain": scores(0.715, 0.73, 0.74, 0.63)},
        "retrained": {"forget": scores(0.147, 0.35, 0.36, 0.07), "retain": scores(0.86, 0.95, 0.96, 0.85)},
    },
    "environment": {"python": "3.11.7", "torch": "2.13.0", "device": "cpu", "dtype": "float32"},
    "seed": 0,
    "notes": ["The base checkpoint has another chat template."],
}


def record(**changes):
    return {**copy.deepcopy(RECORD), **changes}


def without(*path):
    result = record()
    branch = result
    for key in path[:-1]:
        branch = branch[key]
    del branch[path[-1]]
    return result


def forget_only():
    result = record()
    for data_sets in result["scores"].values():
        del data_sets["retain"]
    result["data"]["retain"] = result["vectors"]["retain"] = result["vectors"]["cosine"] = None
    result["dose"]["retain"] = result["training"]["retain"] = None
    result["scales"] |= {"retain": 0.0, "chosen_by": "given", "points": []}
    return result


def cells(report, first_cell):
    """The cells of every table row that begins with this one."""
    rows = [line for line in report.splitlines() if line.startswith(f"| {first_cell} |")]
    return [row.strip("| ").split(" | ") for row in rows]


def rendered(report):
    return MarkdownIt("commonmark").enable("table").render(report)


def markdown_report(record):
    return markdown(report_content(Facts("unlearn", record)))


def printed(record, width=80):
    """The table that a run prints."""
    screen = io.StringIO()
    show(run_brief(record)[:1], Console(width=width, file=screen))
    return screen.getvalue()


# The sentence


def test_headline_compares_with_the_retrained_model():
    assert headline(RECORD) == (
        "On the forget set the answer probability went from 0.880 to 0.226 (the model retrained without the "
        "forget set: 0.147); on the retain set it kept 0.715 of 0.856."
    )


def test_headline_says_so_when_it_compares_with_the_base_checkpoint():
    assert headline(without("scores", "retrained")) == (
        "On the forget set the answer probability went from 0.880 to 0.226 (the base checkpoint, which had "
        "not seen the forget set: 0.140); on the retain set it kept 0.715 of 0.856."
    )


def test_headline_says_when_there_is_nothing_to_compare_with():
    bare = record(scores={name: RECORD["scores"][name] for name in ("target", "unlearned")})
    assert "(no yardstick was measured)" in headline(bare)


def test_headline_of_a_forget_only_run():
    assert headline(forget_only()).endswith(
        "(the model retrained without the forget set: 0.147); nothing was measured on a retain set."
    )


def test_headline_does_not_call_a_rise_on_the_retain_set_kept():
    risen = record()
    risen["scores"]["unlearned"]["retain"]["answer_probability"] = score(0.9)
    assert headline(risen).endswith("on the retain set it went from 0.856 to 0.900.")


@pytest.mark.parametrize("hole", [{}, {"scores": {}}, {"scores": {"target": None}}])
def test_headline_without_scores_claims_nothing(hole):
    assert headline(hole) == (
        "On the forget set the change in answer probability is not known; nothing was measured on a "
        "retain set."
    )


# The page


def test_report_opens_with_heading_and_headline():
    lines = markdown_report(RECORD).splitlines()
    assert lines[0] == "# Unlearning report"
    assert lines[2] == (
        "**✕ The model still knows a part of the forget set, and it lost a part of the rest; by most "
        "measures it is not yet like the retrained model.**"
    )
    assert lines[4] == headline(RECORD)


def test_score_tables_hold_values_intervals_and_n():
    forget, retain = cells(markdown_report(RECORD), "unlearned")[:2]
    assert forget == [
        "unlearned",
        "40",
        "0.226 (0.216 – 0.236)",
        "0.410 (0.400 – 0.420)",
        "0.420 (0.410 – 0.430)",
        "0.110 (0.100 – 0.120)",
    ]
    assert retain[2] == "0.715 (0.705 – 0.725)"


def test_models_come_in_the_order_in_which_one_compares_them():
    rows = re.findall(
        r"^\| (target|unlearned|retrained|base checkpoint) \| 40", markdown_report(RECORD), re.M
    )
    assert rows == ["target", "unlearned", "retrained", "base checkpoint"] * 2


def test_missing_value_is_a_dash_with_its_reason():
    holes = record()
    for model in ("target", "unlearned"):
        holes["scores"][model]["forget"]["rouge_l_recall"] = {
            "value": None,
            "n": 0,
            "low": None,
            "high": None,
            "reason": "none of 40 examples: nothing was generated",
        }
    report = markdown_report(holes)
    row = cells(report, "unlearned")[0]
    assert row[1] == "0–40"
    assert row[3] == "—"
    assert "- ROUGE-L recall of target, unlearned: none of 40 examples: nothing was generated." in report


def test_value_without_interval_stands_alone():
    one = record()
    one["scores"]["base"]["forget"]["answer_probability"] |= {"low": None, "high": None, "n": 1}
    assert cells(markdown_report(one), "base checkpoint")[0][1:3] == ["1–40", "0.140"]


def test_tiny_probability_is_not_shown_as_zero():
    tiny = record()
    tiny["scores"]["unlearned"]["forget"]["answer_probability"]["value"] = 1.26e-5
    assert "1.3e-05" in cells(markdown_report(tiny), "unlearned")[0][2]


def test_rule_that_ends_in_a_full_stop_gets_no_second_one():
    scales = {"forget": 1.0, "retain": 0.0, "rule": "As the paper has it."}
    assert "The rule: As the paper has it.\n" in markdown_report(record(scales=scales))


def test_scales_and_why():
    report = markdown_report(RECORD)
    assert "α = 0.75 and β = 0.5. Chosen from a grid, each point tried in memory" in report
    assert "The rule: the least forget probability not below the base's." in report
    assert cells(report, "0.75") == [["0.75", "0.5", "0.226", "0.715", "yes", "**chosen**"]]
    assert cells(report, "1")[0][:5] == ["1", "0.25", "0.080", "0.530", "no"]
    assert "No retain vector" not in report


def test_vectors_dose_and_cost():
    report = markdown_report(RECORD)
    assert cells(report, "forget vector") == [["forget vector", "1.234", "99.8 %"]]
    assert cells(report, "retain vector") == [["retain vector", "2.345", "99.7 %"]]
    assert "between the two vectors: 0.124" in report
    assert "whole change: 0.012" in report
    assert "Weights that changed: 93.0 %" in report
    assert ["forget set", "—", "50", "12,345", "2.500", "0.125", "100"] in cells(report, "forget set")


def test_inputs_and_how_to_repeat():
    report = markdown_report(RECORD)
    assert ["target", "models/full", "1" * 64, "—"] in cells(report, "target")
    assert ["retain set", "retain.jsonl", "5" * 64, "1,200"] in cells(report, "retain set")
    assert f"```\n{RECORD['command']}\n```" in report
    for fact in ("seed: 0", "python: 3.11.7", "torch: 2.13.0", "device: cpu", "dtype: float32"):
        assert f"- {fact}\n" in report
    assert "- The base checkpoint has another chat template." in report


def test_what_was_not_tested_depends_on_what_was():
    whole, base_only = markdown_report(RECORD), markdown_report(without("scores", "retrained"))
    assert "- Other wordings of the same facts, membership inference, and relearning." in whole
    assert "retrained without the forget set behaves" not in whole
    assert "retrained without the forget set behaves: none was given." in base_only
    assert "What changed outside the forget set" not in base_only
    assert "What changed outside the forget set: no retain set was scored." in markdown_report(forget_only())


def test_forget_only_report_says_nothing_about_a_retain_vector_but_that_there_is_none():
    report = markdown_report(forget_only())
    assert "β = 0. No retain vector was added." in report
    assert "### On the retain set" not in report
    assert "Cosine" not in report
    assert cells(report, "retain vector") == cells(report, "retain set") == []


@pytest.mark.parametrize("key", RECORD)
def test_any_part_of_the_record_may_be_missing(key):
    for holed in (without(key), record(**{key: None})):
        assert markdown_report(holed).startswith("# Unlearning report")
        assert "None" not in markdown_report(holed)
        assert headline(holed).endswith(".")
        printed(holed)


def test_empty_record_gives_a_report_without_tables():
    report = markdown_report({})
    assert "|" not in report
    assert "## What was not tested" in report


@pytest.mark.parametrize("full", [RECORD, forget_only(), {}], ids=["full", "forget only", "empty"])
def test_words_claim_no_more_than_evidence(full):
    text = markdown_report(full).lower()
    assert "evidence" in text
    assert not re.search(r"guarantee|complian|certif|prove[sn]", text)


# Texts from outside

TRAPS = [
    "a|b",
    "two\nlines",
    "<script>x</script>",
    "`code`",
    "*bold*",
    "a\\|b",
    "[l](u)",
    "&amp;",
    "_x_",
    "~~s~~",
]


@pytest.mark.parametrize("trap", TRAPS)
def test_user_texts_are_shown_as_they_stand(trap):
    trapped = record(notes=[trap], run=trap)
    trapped["models"]["target"]["location"] = trap
    trapped["scales"]["rule"] = trap
    html = rendered(markdown_report(trapped))
    plain = " ".join(trap.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert f"<td>{plain}</td>" in html
    assert f"<li>{plain}</li>" in html
    assert f"The rule: {plain}.</p>" in html
    assert f"<li>run: {plain}</li>" in html


@given(st.text(alphabet=string.printable, min_size=1))
def test_no_location_breaks_the_table(location):
    trapped = record()
    trapped["models"]["target"]["location"] = location
    assert rendered(markdown_report(trapped)).count("<td") == rendered(markdown_report(RECORD)).count("<td")


def test_command_with_backticks_stays_in_its_block():
    command = "palinode unlearn --forget '\n```\n# not a heading'"
    html = rendered(markdown_report(record(command=command)))
    assert "<h1>not a heading</h1>" not in html
    assert "<pre><code>palinode unlearn --forget '\n```\n# not a heading'\n</code></pre>" in html


# The terminal


def test_terminal_table_fits_eighty_columns_and_shows_every_score():
    text = printed(RECORD)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    for data_sets in RECORD["scores"].values():
        for metric_scores in data_sets.values():
            for entry in metric_scores.values():
                assert f"{entry['value']:.3f}" in text
                assert f"{entry['low']:.3f}–{entry['high']:.3f}" in text


def test_terminal_table_of_a_forget_only_run_has_one_part():
    text = printed(forget_only())
    assert "forget set" in text
    assert "retain" not in text


def test_terminal_table_takes_names_literally():
    renamed = record()
    renamed["scores"]["[red]task_vector"] = renamed["scores"].pop("retrained")
    assert "[red]task vector" in printed(renamed)

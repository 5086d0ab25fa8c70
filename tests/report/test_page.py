"""A report's content, page and card say what the record says, and no text in them can do harm."""

import copy
import html
import json
import re
from importlib.resources import files
from xml.etree import ElementTree

import pytest

from example_run import AUDIT, HOSTILE, LONG, QUESTIONS, RECORD, comparison, finding, outcomes, record, score
from palinode.records import Outcome
from palinode.report.content import Grid
from palinode.report.pictures import Figure, Mark, Ruler, Trace, drawing, picture_file
from palinode.report.reports import (
    MOST_BYTES,
    Facts,
    content_policy,
    html_report,
    log_probabilities,
    markdown_report,
    report_content,
    report_sections,
    side_by_side,
)
from palinode.report.run_report import model_card
from palinode.report.words import escaped

WHOLE = Facts("unlearn", RECORD, AUDIT, outcomes(), texts=True)
PLAIN = Facts("unlearn", RECORD, None, outcomes(), texts=False, elsewhere="out.workspace/report.html")


@pytest.fixture(scope="module")
def content():
    return report_content(WHOLE)


@pytest.fixture(scope="module")
def page(content):
    return html_report(content)


def figures(content):
    """The pictures of a report, by name."""
    blocks = [block for part in report_sections(content) for block in part.blocks]
    return {block.name: block.figure for block in blocks if hasattr(block, "figure")}


def xs(trace):
    return [mark.x for mark in trace.marks]


def ys(trace):
    return [mark.y for mark in trace.marks]


def body(page):
    """The page without its script."""
    return page[: page.index("<script>")]


# Answers


def test_worst_cases_come_first_farthest_from_the_yardstick_and_most_lost():
    found = side_by_side(outcomes())
    forget = [(case["row"], case["difference"]) for case in found["forget"]["rows"]]
    assert [row for row, _ in forget] == [0, 1, 2]
    assert forget[0][1] == pytest.approx(0.3 - 0.1)
    assert [case["row"] for case in found["retain"]["rows"]] == [1, 0, 2]
    assert found["retain"]["rows"][0]["difference"] == pytest.approx(0.5 - 0.9)


def test_too_little_known_is_as_bad_as_too_much():
    both = outcomes()
    both["unlearned"]["forget"] = tuple(
        Outcome(found.row, found.prompt, found.expected, "x", (value,), (True,))
        for found, value in zip(both["unlearned"]["forget"], (-2.2, -0.9, -30.0), strict=True)
    )
    # against probabilities 0.1, 0.1 and 0.2: +0.01, +0.31, −0.2
    assert [case["row"] for case in side_by_side(both)["forget"]["rows"]] == [1, 2, 0]


def test_log_probabilities_are_means_over_tokens():
    assert log_probabilities(outcomes())["forget"]["target"] == pytest.approx(
        [-0.10536, -0.22314, -0.35667], abs=1e-4
    )


def test_a_page_never_grows_beyond_what_opens():
    many = {
        "unlearned": {
            "forget": [Outcome(row, "q", "<" * 20_000, "a", (-1.0,), (True,)) for row in range(100)]
        }
    }
    found = side_by_side(many)["forget"]
    assert found["of"] == 100
    assert 0 < len(found["rows"]) <= MOST_BYTES // (4 * 20_000)


# The content


def test_content_is_strict_json_and_keeps_every_fact(content):
    again = json.loads(json.dumps(content, allow_nan=False))
    assert again["scores"] == RECORD["scores"]
    assert again["scales"]["points"] == RECORD["scales"]["points"]
    assert [claim["name"] for claim in again["claims"]] == [
        "known",
        "forgotten",
        "kept",
        "recovered",
        "robust",
    ]
    assert again["answers"]["forget"]["rows"][0]["answers"]["unlearned"] == "unlearned says 0"


def test_without_texts_no_text_of_a_row_is_anywhere():
    plain = report_content(PLAIN)
    for written in (json.dumps(plain, ensure_ascii=False), body(html_report(plain)), markdown_report(plain)):
        for text in ("Who is Ada", "A painter", "says 0", "Oslo", "window.attacked"):
            assert text not in written
    assert plain["log_probabilities"] == report_content(WHOLE)["log_probabilities"]
    assert "out.workspace/report.html" in body(html_report(plain))


@pytest.mark.parametrize("key", RECORD)
def test_any_part_of_the_record_may_be_missing(key):
    holed = record()
    del holed[key]
    for facts in (Facts("unlearn", holed), Facts("unlearn", record(**{key: None}))):
        found = report_content(facts)
        assert "None" not in body(html_report(found))
        assert markdown_report(found).startswith("# Unlearning report")


def test_markdown_tells_claims_and_answers_with_traps_shut():
    text = markdown_report(report_content(WHOLE))
    assert "- **Robust?** ✕ No. Of 2 tests, 1 found that it knows more" in text
    assert "unlearned (0.300): unlearned says 0" in text
    assert "<script>" not in text
    assert len(text) < 40_000


# The page


def test_page_shows_outcome_claims_scores_and_how_to_repeat(page):
    text = body(page)
    for claim in report_content(WHOLE)["claims"]:
        assert f"<h3>{claim['question']}</h3>" in text
        assert f"</span> {claim['word']}</p>" in text
    assert "0.200<small>0.180 – 0.220</small>" in text
    assert RECORD["command"] in text
    assert "1" * 32 in text
    assert len(page.encode()) < 8_000_000


@pytest.mark.parametrize(
    "facts", [WHOLE, PLAIN, Facts("audit", audit=AUDIT)], ids=["with texts", "without", "audit"]
)
def test_what_stands_in_a_table_stands_on_the_page_and_in_the_markdown(facts):
    content = report_content(facts)
    page, text = body(html_report(content)), markdown_report(content)
    grids = [b for part in report_sections(content) for b in part.blocks if isinstance(b, Grid)]
    assert len(grids) >= 3
    for grid in grids:
        for cell in (cell for row in grid.rows for cell in row):
            for said in (cell,) if isinstance(cell, str) else (cell.text, cell.below or ""):
                assert html.escape(said) in page
                assert escaped(said) in text


def test_hostile_texts_stay_texts(page):
    text = body(page)
    assert HOSTILE not in page
    assert "<img" not in text
    assert "&lt;script&gt;window.attacked = 1&lt;/script&gt;" in text
    assert "`{{ 7 * 7 }}`" in text
    assert text.count("<script") == 0
    assert page.count("</script>") == 1  # ours
    assert LONG in text


def test_hostile_names_stay_names():
    trapped = record(notes=[HOSTILE], command=HOSTILE)
    trapped["scores"][HOSTILE] = trapped["scores"].pop("retrained")
    trapped["models"]["target"]["location"] = HOSTILE
    trapped["training"][HOSTILE] = trapped["training"].pop("retain")
    page = html_report(report_content(Facts("unlearn", trapped)))
    assert page.count("</script>") == 1
    assert "<img" not in body(page)
    for figure in figures(report_content(Facts("unlearn", trapped))).values():
        drawn = ElementTree.fromstring(drawing([figure]))
        kinds = {part.tag.rpartition("}")[2] for part in drawn.iter()}
        assert kinds <= {"svg", "rect", "text", "polyline", "path", "title"}


def test_no_text_steers_a_terminal_or_hides_itself():
    marks = "\x1b[31m\x07\r\u202e\u200b\u2066"
    trapped = record(notes=[f"a{marks}"], command=f"palinode {marks}")
    trapped["models"]["target"]["location"] = f"t{marks}"
    text = body(html_report(report_content(Facts("unlearn", trapped))))
    assert not set(marks) - set("[31m") & set(text)
    assert "\\x1b[31m\\x07\\r\\u202e\\u200b\\u2066" in text


def test_policy_names_the_digest_of_the_script_and_loads_nothing():
    # printf 'alert(1)' | openssl dgst -sha256 -binary | base64
    assert content_policy("alert(1)").split("; ")[:2] == [
        "default-src 'none'",
        "script-src 'sha256-bhHHL3z2vDgxUt0W3dWQOrprscmda2Y5pLsLg4GF+pI='",
    ]


def test_every_figure_is_drawn_on_the_page_for_wide_and_for_narrow_screens(content, page):
    drawn = figures(content)
    assert set(drawn) == {
        *("glance", "scores-forget", "scores-retain", "tradeoff", "likelihood-forget", "likelihood-retain"),
        *("training", "attacks", "relearning"),
    }
    for name in drawn:
        assert f'id="plot-{name}"' in page
    assert page.count("<svg") == page.count("</svg>") == 2 * len(drawn)


def test_every_mark_says_its_figures_when_pointed_at(content):
    for figure in figures(content).values():
        marks = ElementTree.fromstring(drawing([figure])).findall(".//{*}path[@transform]")
        named = {trace.name for trace in figure.traces if trace.name}
        in_key = len([trace for trace in figure.traces if trace.name and trace.symbol])
        silent = [mark for mark in marks if mark.find("{*}title") is None]
        assert len(silent) == (in_key if len(named) > 1 else 0)


def test_picture_on_a_page_follows_its_colours_and_a_file_has_the_light_ones():
    figure = Figure([Trace("<a>", [Mark(0.5, 0.5, ["<a>", "0.5"])], "--target", "circle")], 200, Ruler("x"))
    page, file = drawing([figure]), picture_file("A & B", [figure, None])
    assert 'stroke="var(--target)"' in page
    assert "var(--" not in file
    assert 'stroke="#b44f00"' in file
    assert "<title>&lt;a&gt;\n0.5</title>" in file
    assert "A &amp; B" in file


def test_line_breaks_where_a_figure_is_missing():
    line = Trace("", [Mark(x, y) for x, y in enumerate((1.0, 2.0, None, 3.0, 4.0))], "--ink", dash="dot")
    drawn = drawing([Figure([line], 200, Ruler("x"))])
    assert drawn.count('stroke-dasharray="2 4"') == 2


def test_distributions_show_every_row_the_middle_half_and_the_mean(content):
    traces = figures(content)["likelihood-forget"].traces
    rows, middle, mean = traces[:3]
    assert [mark.x for mark in rows.marks] == pytest.approx([-0.35667, -0.22314, -0.10536], abs=1e-4)
    assert [mark.x for mark in middle.marks] == pytest.approx([-0.28991, -0.16425], abs=1e-4)
    assert mean.marks[0].x == pytest.approx(-0.22839, abs=1e-4)
    assert mean.marks[0].said[0] == "target"


def test_tradeoff_holds_every_point_and_model_once(content):
    traces = {trace.name: trace for trace in figures(content)["tradeoff"].traces}
    assert [(mark.x, mark.y) for mark in traces["point chosen"].marks] == [(0.2, 0.75)]
    assert list(traces) == [
        *("target", "unlearned", "retrained", "base checkpoint"),
        *("point tried, allowed", "point tried, not allowed", "point chosen"),
    ]


def test_what_the_search_found_is_shown():
    searched = record()
    searched["scales"] |= {
        "chosen_by": "auto",
        "yardstick": {
            "source": "holdout",
            "assumes": "the rows are alike",
            "unseen_rows": 9,
            "answer_probability": {"value": 0.16, "n": 9, "low": 0.1, "high": 0.2, "reason": None},
        },
        "sensitivity": [{"forget": 0.9, "retain": 0.5, "forget_probability_change": 0.012, "allowed": True}],
    }
    del searched["scores"]["retrained"]
    content = report_content(Facts("unlearn", searched))
    assert "the estimate of a model that never saw it: 0.160" in content["claims"][1]["sentence"]
    drawn = figures(content)
    assert drawn["tradeoff"].band == (0.1, 0.2, "yardstick")
    assert drawn["scores-forget"].traces[-1].name == "estimated yardstick"
    page = body(html_report(content))
    assert "estimated from holdout (9 rows) on the assumption that the rows are alike." in page
    assert "+0.012" in page


def test_tests_of_an_audit_are_drawn_in_their_margins(content):
    within, more = figures(content)["attacks"].traces
    assert (within.name, more.name) == ("within", "knows more")
    assert xs(within) == pytest.approx([0.5])  # 0.05 of 0.1
    assert xs(more) == pytest.approx([3.0])  # 0.3 of 0.1
    assert more.marks[0].across == pytest.approx([2.8, 3.2])  # 0.02 of 0.1 to each side


def judged(value, verdict, *, more, less, target=None):
    """The attacks that a picture shows of an audit whose first test found this."""
    audit = copy.deepcopy(AUDIT)
    test = audit["attacks"]["questions"]["tests"]["probability"]
    test["findings"] = {"audited": finding(0.2 + value, 0.2, verdict)}
    if target:
        test["findings"]["target"] = finding(0.3, 0.2, target)
    audit["policy"]["margins"]["questions.probability"] = {"more": more, "less": less}
    del audit["attacks"]["relearn_forget"]
    return figures(report_content(Facts("audit", audit=audit))).get("attacks"), audit


def test_a_side_that_the_policy_does_not_judge_is_grey_and_never_green():
    drawn, audit = judged(0.2, "within", more=False, less=0.1)
    (trace,) = drawn.traces
    assert (trace.name, trace.colour) == ("not judged", "--other")
    assert xs(trace) == pytest.approx([2.0])  # of the only margin there is
    text = markdown_report(report_content(Facts("audit", audit=audit)))
    assert "| no less (more is not judged) |" in text
    (trace,) = judged(-0.05, "within", more=False, less=0.1)[0].traces
    assert (trace.name, xs(trace)) == ("within", pytest.approx([-0.5]))


def test_each_side_is_measured_by_its_own_margin():
    (trace,) = judged(-0.15, "within", more=0.1, less=0.2)[0].traces
    assert xs(trace) == pytest.approx([-0.75])
    assert trace.marks[0].across == pytest.approx([-0.85, -0.65])


def test_a_test_that_the_target_passes_too_is_no_picture_and_says_why():
    drawn, audit = judged(0.0, "within", more=0.1, less=0.1, target="within")
    assert drawn is None
    assert "so does the target, so it tells little" in markdown_report(
        report_content(Facts("audit", audit=audit))
    )
    assert judged(0.3, "knows more", more=0.1, less=0.1, target="within")[0].traces[0].colour == "--red"


def test_metrics_that_cannot_tell_are_in_the_table_with_a_note_and_in_no_picture():
    silent = record()
    for model, value in (("target", 0.42), ("retrained", 0.4), ("unlearned", 0.1)):
        silent["scores"][model]["forget"]["rouge_l_recall"] = score(value)  # each 0.02 to either side
    for model in silent["scores"]:
        silent["scores"][model]["forget"]["extraction_strength"] = {"value": None, "n": 0}
    content = report_content(Facts("unlearn", silent))
    (lane,) = figures(content)["scores-forget"].y.names.values()
    assert lane == "answer probability"
    text = markdown_report(content)
    assert "0.420 (0.400 – 0.440)" in text
    for note in (
        "ROUGE-L recall is not in the picture: the intervals of target and yardstick overlap, so"
        " it cannot tell.",
        "exact memorisation is not in the picture: it is the same for all models.",
        "extraction strength is not in the picture: no model has a value.",
    ):
        assert f"- {note}" in text


def test_first_picture_shows_before_now_and_a_model_that_never_saw_them(content):
    drawn = figures(content)["glance"]
    assert {trace.name: xs(trace) for trace in drawn.traces} == {
        "before": [0.8, 0.87],
        "now": [0.2, 0.73],
        "a model that never saw them": [0.14, 0.87],
    }
    assert [*drawn.y.names.values()] == ["rows to be forgotten", "rows to be kept"]


def test_banner_has_the_light_of_the_verdict(content, page):
    verdict = content["verdict"]
    symbol = f'<span class="symbol" aria-hidden="true">{verdict["symbol"]}</span>'
    assert f'<h1 class="verdict {verdict["light"]}">{symbol}' in body(page)
    assert "<h1><span>" in body(html_report(report_content(Facts("compare", comparison()))))


def test_forget_only_runs_show_points_by_their_scale():
    alone = record()
    for found in alone["scales"]["points"]:
        found["retain_probability"] = None
    traces = figures(report_content(Facts("unlearn", alone)))["tradeoff"].traces
    assert [ys(trace) for trace in traces] == [[0.5], [2.0], [1.0]]


def test_lengths_cosine_and_dose_are_shown_by_part_of_the_model(content):
    text = markdown_report(content)
    assert "| part | forget length | retain length | cosine | forget arrived | retain arrived |" in text
    assert "| layer 0 | 1.000 | 0.500 | 0.100 | 99.0 % | 98.0 % |" in text  # 0.49 of 0.5


def test_audit_page_has_its_own_claims():
    page = body(html_report(report_content(Facts("audit", audit=AUDIT))))
    assert "Attacks draw more of the forget set from the model than from a model that never saw it." in page
    assert "Asked plainly" in page
    assert "relearning part of the forget set: area under the curve" in page


# Comparisons


def test_comparison_shows_every_point_and_the_ranking():
    content = report_content(Facts("compare", comparison()))
    assert content["outcome"] == "Nearest to the ideal is msa (gap 0.100 [0.050, 0.200]), beyond noise."
    figure = figures(content)["tradeoff"]
    assert [xs(trace) for trace in figure.traces] == [[0.4, 0.2], [0.5], [0.8], [0.1]]
    assert [mark.symbol for mark in figure.traces[0].marks] == ["circle-open", "circle"]
    assert figure.traces[0].marks[1].said[:3] == ["msa", "α = 1, β = 0", "epochs: 1"]
    page = body(html_report(content))
    assert "1. msa" in page
    assert "2. &lt;b&gt;npo" in page
    assert "In short</h2>" not in page


# The style


def colours(style, scheme):
    """The colours that the style sheet defines for light or dark."""
    parts = style.split("@media (prefers-color-scheme: dark)")
    return dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6});", parts[scheme == "dark"].split("* {")[0]))


def contrast(first, second):
    """The ratio of two colours' luminances, as WCAG 2 defines it."""

    def luminance(colour):
        channels = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_and_marks_have_the_contrast_that_wcag_asks_for(scheme):
    style = files("palinode.report").joinpath("assets/report.css").read_text(encoding="utf-8")
    found = colours(style, scheme)
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for ground in ("--page", "--panel"):
        for text in ("--ink", "--faint", "--accent", "--green", "--amber", "--red"):
            assert contrast(found[text], found[ground]) >= 4.5, (text, ground)
        for mark in ("--target", "--unlearned", "--retrained", "--base", "--other"):
            assert contrast(found[mark], found[ground]) >= 3, (mark, ground)
    for light in ("green", "amber", "red"):
        assert contrast(found[f"--{light}"], found[f"--{light}-soft"]) >= 4.5, light


# The card


def test_card_opens_with_front_matter_and_says_what_the_report_says(content):
    lines = model_card(content, base="org/model", original=True).splitlines()
    assert lines[:7] == [
        "---",
        'library_name: "transformers"',
        'pipeline_tag: "text-generation"',
        'base_model: "org/model"',
        'tags: ["machine-unlearning", "palinode"]',
        f'palinode_verdict: "{content["outcome"]}"',
        "---",
    ]
    text = "\n".join(lines)
    assert content["outcome"] in text
    assert "- **Forgotten?** ! Partly." in text
    assert "α = 1, β = 0.5" in text
    assert "org/model has a card of its own" in text
    for question in (*QUESTIONS["forget"][:2], *QUESTIONS["retain"]):
        assert question not in text


def test_card_names_no_base_model_that_the_hub_does_not_know(content):
    text = model_card(content)
    assert "base_model" not in text
    assert "full came without a card" in text
    assert "models/full" not in text

"""The picture and the tables of an axis, from a made-up axis.json."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from palinode.report.comparison_report import axis_markdown, axis_picture, axis_sentences


def score(value: float | None) -> dict:
    return {"value": value, "low": value and value - 0.05, "high": value and value + 0.05}


def figures(forget: float | None, retain: float) -> dict:
    return {"forget": score(forget), "retain": score(retain)}


def entry(value, forget: float | None, *, kept: bool = True) -> dict:
    one = {"gap": score(0.1), "kept_rule": kept, "settings": {"training.learning_rate": 1e-3}}
    return {
        "value": value,
        "folder": str(value),
        "rows": {"forget": 75, "retain": 443},
        "models": {"target": figures(0.5, 1.0), "base": figures(0.02, 0.5), "retrained": figures(0.1, 1.0)},
        "contestants": [
            {"name": "MSA <1>", **figures(forget, 0.9), **one, "scales": [0.5, 0.0]},
            {"name": "NPO", **figures(0.2, 0.8), **one, "kept_rule": kept, "scales": None},
        ],
    }


@pytest.fixture
def content() -> dict:
    return {
        "command": "palinode compare axis.toml",
        "complete": True,
        "key": "demo.later_epochs",
        "title": "Epochs & such",
        "metric": "answer_probability",
        "seeds": [0],
        "values": [entry(1, 0.3), entry(10, 0.2)],
    }


def shapes(content: dict, name: str) -> list:
    return ElementTree.fromstring(axis_picture(content)).findall(f"{{http://www.w3.org/2000/svg}}{name}")


def height(mark) -> float:
    return float(mark.get("transform").split(")")[0].split()[-1])


def test_picture_has_a_dot_for_each_contestant_value_and_panel(content):
    assert len(shapes(content, "path")) == 2 * 2 * 2 + 2  # and one each in the key
    dashed = [line for line in shapes(content, "polyline") if line.get("stroke-dasharray")]
    assert len(dashed) == 2 * 3 + 3
    said = {text.text for text in shapes(content, "text")}
    assert {"Epochs & such", "MSA <1>", "retrained", "1", "10", "demo.later_epochs"} <= said


def test_dots_stand_at_their_figures(content):
    marks = {mark[0].text: height(mark) for mark in shapes(content, "path") if len(mark)}
    levels = {text.text: float(text.get("y")) - 4 for text in reversed(shapes(content, "text"))}
    assert levels["1.0"] < levels["0.2"] < levels["0.0"]  # the forget panel comes first
    for said, value in (
        ("MSA <1> at 1\n0.300 [0.250, 0.350]", 0.3),
        ("MSA <1> at 10\n0.200 [0.150, 0.250]", 0.2),
    ):
        level = value * levels["1.0"] + (1 - value) * levels["0.0"]
        assert marks[said] == pytest.approx(level, abs=0.2)


def test_figure_that_is_not_known_is_a_dash_and_no_dot(content):
    content["values"][1] = entry(10, None)
    assert len(shapes(content, "path")) == 2 * 2 * 2 + 2 - 1
    assert "| MSA &lt;1&gt; | 0.300 / 0.900 | — / 0.900 |" in axis_markdown(content)


def test_markdown_has_the_figures_the_picture_and_what_was_chosen(content):
    report = axis_markdown(content)
    assert "| target | 0.500 / 1.000 | 0.500 / 1.000 |" in report
    assert "(axis.svg)" in report
    assert "- **10:** 10/report.md" in report
    assert "| 1 | NPO | learning\\_rate 0.001 | 0.100 (0.050 – 0.150) |" in report
    assert "α 0.5, β 0" in report


def test_reader_is_told_of_one_seed_broken_rules_and_what_is_not_done(content):
    content["values"][1], content["complete"] = entry(10, 0.2, kept=False), False
    said = axis_sentences(content)
    assert "(75 and 443 rows)" in said[0]
    assert said[1].startswith("One seed")
    assert said[2] == "At 10 no point of MSA <1>; NPO kept the rule."
    assert "the same command" in said[3]
    hollow = [mark for mark in shapes(content, "path") if mark.get("fill") == "#ffffff"]
    assert len(hollow) == 4

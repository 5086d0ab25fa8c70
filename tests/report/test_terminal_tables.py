"""No table on the terminal cuts a figure or a name: every kind of record, in wide and in narrow terminals."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
from rich.console import Console

from example_run import AUDIT, comparison, finding, record, score
from palinode.cli.console import scores_grid, vector_grids
from palinode.history.plan import Wish, plan_record
from palinode.history.plan import plan as schedules
from palinode.records import Score
from palinode.report.audit_report import audit_brief
from palinode.report.comparison_report import comparison_brief
from palinode.report.content import Grid, GridCell, show
from palinode.report.location_report import demo_brief, location_brief, plan_brief
from palinode.report.run_report import demo_grid, run_brief
from palinode.weights import Profile

LONG = "forget_quality_by_extraction_strength_of_paraphrases"
PLACE = "/models/of-somebody/a-very-long-folder-name-of-a-run/checkpoints/step-000123456"
TINY = {"value": 4.3e-05, "n": 40, "low": 1.26e-05, "high": 9.9e-05, "reason": None}
WIDTHS = (40, 60, 80, 120)


def printed(blocks, width: int) -> str:
    screen = io.StringIO()
    show(blocks, Console(width=width, file=screen))
    return screen.getvalue()


def texts(grid: Grid):
    """Everything that a grid says, as the terminal writes it."""
    yield grid.title
    for cell in itertools.chain(grid.head[1:], *grid.rows):
        for text in (cell,) if isinstance(cell, str) else (cell.text, cell.below or ""):
            yield text.replace(" – ", "–")


def run():
    wide = record()
    for data_sets in wide["scores"].values():
        for scores in data_sets.values():
            scores |= {"answer_probability": TINY, LONG: score(0.057), "auc_min_k_plus": score(0.1 + 1e-9)}
        data_sets["retain_unseen"] = data_sets["retain"]
    wide["scores"]["a model retrained for longer"] = wide["scores"]["retrained"]
    return run_brief(wide)


def audit():
    one = {
        "title": "x",
        "tests": {LONG: {"title": "t", "findings": {"audited": finding(4.3e-05, 0.2, "within")}}},
    }
    attacks = {**AUDIT["attacks"], "relearn_paraphrases": one}
    margins = AUDIT["policy"]["margins"] | {f"relearn_paraphrases.{LONG}": {"more": 0.1, "less": False}}
    models = AUDIT["models"] | {"target": AUDIT["models"]["reference"]}
    policy = AUDIT["policy"] | {"margins": margins}
    return audit_brief({**AUDIT, "attacks": attacks, "policy": policy, "models": models})


def compare():
    table = comparison()
    for one in table["contestants"]:
        one["name"] = f"{one['name']} on paired vectors, least squares, α .75"
        one["summary"]["tofu"] = {"forget": {"forget_quality": TINY}, "all": {"model_utility": score(0.5)}}
        one["summary"]["rows"] = {
            side: {"answer_probability": TINY, "exact_match": TINY} for side in ("forget", "retain")
        }
    for one, ranked in zip(table["contestants"], table["ranking"]["order"], strict=True):
        ranked["name"] = one["name"]
    return comparison_brief(table)


def location():
    seen = [{"step": 1_234_567 + step, "copy": None} for step in range(9)]
    copies = [{"place": f"row 3 of {PLACE}", "exact": False, "similarity": 0.91}] * 5
    row = {"place": f"row 123456 of {PLACE}.jsonl", "row": 0, "seen": seen, "copies": copies}
    rung = {
        "step": 1_234_567,
        "tokens": 4_300_000,
        "seen": 1,
        "unrecorded": True,
        "gap": -0.021,
        "exposed": True,
    }
    choice = {
        "step": 1_234_567,
        "location": PLACE,
        "reason": "clean",
        "to_exposure": {"steps": 9, "tokens": None},
    }
    known = {"recommended": choice, "next_best": choice, "first": None, "onset": None, "alternatives": []}
    return location_brief({"rows": [row] * 41, "rungs": [rung | {"location": PLACE}], **known})


def plan():
    wish = Wish(2_000_000, 1000, 30_000_000_000, 300_000_000_000)
    return plan_brief(plan_record(wish, schedules(wish)))


def demo():
    recall = {name: {"forget": 0.51, "others": 1.0, "general": 4.3e-05} for name in ("target", LONG)}
    made = {"people": {"forget": 10, "others": 110}, "recall": recall}
    return [demo_grid({**made, "scales": {LONG: {"forget": 0.985, "retain": 4.3e-05}}})]


def ladder():
    kinds = ("log", "order", "behaviour", "all")
    found = {
        kind: {"recommended_step": 1_234_567, "right": False, "every_exposure_right": True, "rungs_off": 1}
        for kind in kinds
    }
    share = {"forget": 0.5, "others": 0.1}
    rung = {
        "step": 1_234_567,
        "seen": 12,
        "unlearned": share,
        "target": share,
        "method": "task_vector",
        "kept_rule": False,
    }
    rung["scales"] = {"forget": 0.985, "retain": 4.3e-05}
    return demo_brief(
        {"requests": {"main": {"rows": 9, "clean_step": None, "found": found}}, "rungs": [rung] * 3}
    )


def measured():
    scores = {name: Score(4.42e-6, 400, 3.72e-6, 4.88e-6, None) for name in (LONG, "rouge_l_recall")}
    names = (PLACE, "models/full", "short")
    profile = Profile(names, {part: np.eye(3) * 1.23e-5 for part in ("embedding", "layer 0")})
    return [
        scores_grid({"real_authors": scores, "forget": scores}, title="tofu"),
        *vector_grids(profile, layers=True),
    ]


def found():
    doctor = [
        GridCell("✗ fail", tone="bad"),
        "two models",
        GridCell(f"{PLACE} and {LONG} differ", "→ name another"),
    ]
    verify = [f"base_model.model.{LONG}.layers.10.self_attn.q_proj.lora_A.weight", "tensor", "changed"]
    return [Grid("pair", ["", "", ""], [doctor], 3), Grid("", ["name", "what", "now"], [verify], 3)]


KINDS = (run, audit, compare, location, plan, demo, ladder, measured, found)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_figure_and_name_appears_whole(kind, width):
    grids = [block for block in kind() if isinstance(block, Grid)]
    assert grids
    for grid in grids:
        shown = printed([grid], width)
        assert max(map(len, shown.splitlines())) <= width
        assert "…" not in shown
        words = {word.removesuffix(":") for word in shown.split()}
        for text in texts(grid):
            for word in text.split():
                if "/" in word and len(word) > 24:  # a path may be broken after a slash
                    assert {*filter(None, word.split("/"))} <= {*" ".join(words).replace("/", " ").split()}
                elif len(word) > width - 2:  # no line has room for it
                    assert word in "".join(shown.split()), word
                else:
                    assert word.removesuffix(":") in words, word


def test_columns_that_have_no_room_follow_below_under_the_same_names():
    heads = ["model", "exact memorisation", "extraction strength", "answer probability"]
    cells = [GridCell(value, "0.512 – 0.621") for value in ("0.1", "0.2", "4.3e-05")]
    assert [
        line.split() for line in printed([Grid("Scores", heads, [["target", *cells]])], 33).splitlines()
    ] == [
        ["Scores"],
        ["exact", "extraction"],
        ["model", "memorisation", "strength"],
        ["─" * 33],
        ["target", "0.1", "0.2"],
        ["0.512–0.621", "0.512–0.621"],
        [],
        ["model", "answer", "probability"],
        ["─" * 26],
        ["target", "4.3e-05"],
        ["0.512–0.621"],
    ]


def test_rows_stand_alone_where_not_even_one_column_has_room():
    grid = Grid(
        "", ["name", "what", "now"], [["a.very.long.tensor.name", "tensor", GridCell("changed", "twice")]], 3
    )
    assert printed([grid], 30).splitlines() == [
        "a.very.long.tensor.name",
        "  what: tensor",
        "  now: changed twice",
    ]
    assert printed([grid], 40).splitlines()[2].split() == ["a.very.long.tensor.name", "tensor", "changed"]

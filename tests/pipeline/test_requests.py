"""Requests one after another: the state is the set, undoing brings the target back, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from comparing import Heard, tiny_comparison
from palinode.compare import build_comparison, carry_out, load_comparison, plan_requests
from palinode.compare.comparison_recipe import Requests
from palinode.compare.requests import divide_requests, names_in
from palinode.data.examples import Example, Message
from palinode.errors import DataError, InputError, OutputError
from palinode.models.inplace import contents
from palinode.models.loading import load_model, pick_device
from palinode.report.comparison_report import on_same_rows, undo_sentences
from palinode.weights import Checkpoint

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
MSA = {
    "name": "MSA",
    "method": "msa",
    "set": {"scales.forget": 1.5, "scales.retain": 0.5, "transforms": [{"name": "projection"}]},
}
NPO = {"name": "NPO", "method": "npo"}


@pytest.fixture(scope="module")
def content(tiny, tmp_path_factory):
    """Three requests of 8 rows on the tiny world, and six rows that nobody asks to erase."""
    content = tiny_comparison(
        tiny,
        tmp_path_factory.mktemp("requests") / "out",
        requests={"size": 8, "count": 3, "undo_seed": 1},
        budget={"steps": 4},
        contestants=[MSA, NPO],
    )
    content["training"]["batch_size"] = 8
    content["evaluation"]["max_rows"] = 20
    return content


@pytest.fixture(scope="module")
def carried(content):
    """The requests, interrupted after NPO's second one was trained, then carried through."""
    recipe = build_comparison(content)
    with pytest.raises(KeyboardInterrupt):
        carry_out(recipe, listener=Heard(stop_at="NPO, 2 carried out"))
    partial = json.loads((Path(content["output"]["folder"]) / "requests.json").read_text())
    heard = Heard()
    return recipe, partial, carry_out(recipe, listener=heard), heard


def entry(table, name):
    return next(one for one in table["contestants"] if one["name"] == name)


# Which rows are a request


def examples(count: int) -> list[Example]:
    return [Example(row, "made", "question", (Message("user", f"q{row}"),), "a") for row in range(count)]


def test_rows_that_share_a_value_are_one_request_in_the_order_of_the_file():
    names = names_in([{"who": name} for name in "baab c".replace(" ", "b")], "who", "made")
    asked = divide_requests(Requests(by="who"), examples(6), names)
    assert [[row.row for row in rows] for rows in asked.requests.values()] == [[0, 3, 4], [1, 2], [5]]
    assert list(asked.requests) == [1, 2, 3]
    assert sorted(asked.undo_order) == [1, 2, 3]


def test_rows_beyond_the_count_are_asked_by_nobody():
    asked = divide_requests(Requests(size=2, count=2), examples(7), {})
    assert [[row.row for row in rows] for rows in asked.requests.values()] == [[0, 1], [2, 3]]
    assert [row.row for row in asked.others] == [4, 5, 6]


def test_order_of_undoing_is_drawn_with_its_seed():
    orders = {
        tuple(divide_requests(Requests(size=1, undo_seed=s), examples(6), {}).undo_order) for s in range(5)
    }
    assert len(orders) > 1
    assert all(sorted(order) == [1, 2, 3, 4, 5, 6] for order in orders)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"subject": "Ada", "text": "x"}],
            "has no column 'subjekt' (it has: subject, text); set requests.by to",
        ),
        ([{"subjekt": "Ada"}, {"subjekt": " "}], "row 2 of f.jsonl: 'subjekt' is"),
        ([{"subjekt": ["Ada"]}], "row 1 of f.jsonl: 'subjekt' is a"),
        ([{"subjekt": None}], "row 1 of f.jsonl: 'subjekt' is empty"),
    ],
)
def test_columns_that_name_no_requests_are_refused(rows, message):
    with pytest.raises(DataError) as refused:
        names_in(rows, "subjekt", "f.jsonl")
    assert message in str(refused.value)


# The recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("requests.undo_sed=1", "did you mean 'requests.undo_seed'"),
        ("requests.by='subject'", "requests.by or requests.size: one of the two"),
        ("requests={}", "requests.by or requests.size: one of the two"),
        ("requests={by='subjekt'}", "set requests.by to 'subject'"),
        ("requests={size=30}", "make 1 requests and requests.count asks for 2"),
        ("requests.count=9", "make 4 requests and requests.count asks for 9"),
        ("requests.count=1", "requests.count cannot be used"),
        ("requests.size=0", "requests.size cannot be used"),
        ("tries=3", "leave tries out"),
        ("measure={judge=''}", "leave measure out"),
        ("budget={seconds=3.0}", "say budget.steps"),
        ("seeds=[0,1]", "name one in seeds"),
        ("budget.steps=1", "less than one epoch of MSA, which takes 2 for 2 models"),
        ("axis={key='seed', values=[0, 1], title='seed'}", "leave [axis] or [requests] out"),
        ("contestants=[{name='x', method='rewind'}]", "x starts from the base every time (rewind)"),
        (
            "contestants=[{name='x', method='npo', set={'method_settings.start'='base'}}]",
            "x starts from the base every time (npo)",
        ),
        ("contestants=[{name='x', method='npo', search={'training.epochs'=[1]}}]", "the same for all"),
        ("contestants=[{name='x', method='npo', search={'training.seed'=[1]}}]", "put the values of x"),
    ],
)  # fmt: skip
def test_what_cannot_be_carried_out_is_refused_in_one_sentence(content, change, message):
    with pytest.raises(InputError) as refused:
        plan_requests(build_comparison(content, [change]))
    assert message in str(refused.value)


def test_folder_of_something_else_is_refused(content, tmp_path):
    (tmp_path / "table.json").write_text("{}")
    recipe = build_comparison(content, [f'output.folder="{tmp_path}"'])
    with pytest.raises(OutputError, match=r"holds table\.json"):
        carry_out(recipe)


def test_demo_recipe_is_planned_before_its_world_is_there():
    planned = plan_requests(load_comparison(RECIPES / "requests_demo.toml"))
    assert planned["requests"] == [15] * 10
    assert sorted(planned["undo_order"]) == list(range(1, 11))
    assert {one["method"] for one in planned["contestants"]} == {
        "msa", "paired", "task_vector", "npo", "grad_diff"
    }  # fmt: skip


# The whole


def test_state_is_that_of_the_set_and_not_of_the_order_bit_for_bit(carried):
    table = carried[2].table
    undo = entry(table, "MSA")["undo"]
    assert undo == {"possible": True, "states_compared": 3, "states_equal": 3, "target_back": True}
    pairs = {(tuple(state["done"]), state["contents"]) for state in entry(table, "MSA")["states"]}
    assert len(pairs) == len({done for done, _ in pairs}) == len({found for _, found in pairs})


def test_undoing_everything_gives_the_target_bit_for_bit(carried, content):
    table = carried[2].table
    target = Checkpoint.open(Path(content["models"]["target"]))
    own = contents(load_model(target, device=pick_device("cpu")))
    states = entry(table, "MSA")["states"]
    assert states[-1]["done"] == []
    assert states[-1]["contents"] == states[0]["contents"] == own
    assert states[1]["contents"] != own


def test_every_state_tells_of_rows_asked_not_asked_and_retained(carried):
    table = carried[2].table
    states = entry(table, "MSA")["states"]
    assert [len(state["done"]) for state in states] == [0, 1, 2, 3, 2, 1, 0]
    assert [state["undone"] for state in states] == [None] * 4 + table["undo_order"]
    for state in states:
        count = len(state["done"])
        for scores in state["scores"].values():
            # Three requests of 8 rows, and 30 − 24 rows that nobody asks to erase.
            rows = [scores[part]["n"] for part in ("done", "not_done", "retain")]
            assert rows == [8 * count, 30 - 8 * count, 20]
            assert len(scores["by_request"]) == 3
    assert table["models"]["retrained"]["scores"]["exact_match"]["done"]["n"] == 24


def test_references_are_taken_on_the_very_same_rows(carried):
    table = carried[2].table
    scores = {name: table["models"][name]["scores"]["exact_match"] for name in ("target", "retrained")}
    state = entry(table, "MSA")["states"][
        2
    ]  # requests 1 and 2 of 8 rows; 8 of the third and 6 others are left
    erased = scores["retrained"]["by_request"]
    assert on_same_rows(table, state, "done", "exact_match") == pytest.approx((erased[0] + erased[1]) / 2)
    third, others = scores["target"]["by_request"][2], scores["target"]["others"]
    assert on_same_rows(table, state, "not_done", "exact_match") == pytest.approx(
        (8 * third + 6 * others) / 14
    )
    assert on_same_rows(table, state, "retain", "exact_match") is None


def test_rows_asked_to_be_erased_are_less_known_and_come_back_when_undone(carried):
    table = carried[2].table
    states = entry(table, "MSA")["states"]
    first = [state["scores"]["answer_probability"]["by_request"][0] for state in states]
    assert first[1] < first[0]
    assert first[-1] == first[0]


def test_what_trains_says_that_it_cannot_undo_and_what_going_back_costs(carried):
    table = carried[2].table
    npo = entry(table, "NPO")
    assert len(npo["states"]) == 4
    assert not npo["undo"]["possible"]
    assert "not possible: " in npo["undo"]["reason"]
    # 4 steps a request: after the first come 8, after the second 4, after the third none.
    assert [cost["steps"] for cost in npo["cost"]["requests"]] == [4, 4, 4]
    assert npo["undo"]["repeat_steps"] == 4
    assert npo["cost"]["joint"]["steps"] == 12
    assert any(line.startswith("NPO: undoing is not possible") for line in undo_sentences(table))


def test_interrupted_run_had_written_what_it_had_and_goes_on(carried):
    _, partial, done, heard = carried
    assert not partial["complete"]
    assert done.table["complete"]
    assert partial["contestants"] == done.table["contestants"][:1]
    trained = [label for label in heard.labels if "fine-tuning" in label]
    assert trained == ["fine-tuning npo"] * 2  # the third request, and all at once
    asked = [label for label in heard.labels if "likelihoods" in label]
    assert asked == [
        f"NPO, {what}: likelihoods" for what in ("2 carried out", "3 carried out", "all at once")
    ]


def test_the_same_command_again_trains_and_asks_nothing(carried):
    recipe, _, done, _ = carried
    heard = Heard()
    again = carry_out(recipe, listener=heard)
    assert not [label for label in heard.labels if "fine-tuning" in label or "likelihoods" in label]
    assert again.table["contestants"] == done.table["contestants"]


def test_report_and_picture_tell_of_every_contestant_and_hold_no_row(carried, content):
    folder = Path(content["output"]["folder"])
    assert sorted(path.name for path in folder.iterdir()) == ["requests.json", "requests.md", "requests.svg"]
    texts = {path.name: path.read_text() for path in folder.iterdir()}
    row = json.loads(Path(content["data"]["forget"]).read_text().splitlines()[0])
    for text in texts.values():
        assert row["prompt"] not in text
        assert row["subject"] not in text
        assert all(name in text for name in ("MSA", "NPO"))
    assert texts["requests.svg"].count("cannot undo") == 1
    assert "3 of 3 states after undoing are bit for bit" in texts["requests.md"]


def test_cli_shows_a_plan_and_refuses_in_one_sentence(palinode, tmp_path):
    recipe = RECIPES / "requests_demo.toml"
    said = palinode("compare", recipe, "--dry-run", "--output", tmp_path / "out")
    assert said.code == 0
    assert "10 requests of 15 rows each, undone in the order " in said.out
    assert "NPO (npo): 11 trainings" in said.out
    planned = palinode("compare", recipe, "--dry-run", "--json", "--output", tmp_path / "out")
    assert json.loads(planned.out)["requests"] == [15] * 10
    refusal = palinode("compare", recipe, "--dry-run", "--set", "requests.undo_sed=1").refusal
    assert "did you mean 'requests.undo_seed'" in refusal

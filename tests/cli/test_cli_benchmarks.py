"""`palinode evaluate --benchmark`, evaluation of one's own rows with everything, and `palinode list`."""

from __future__ import annotations

import json
import re

import pytest

from invented_benchmarks import own_files, tofu_folder
from palinode.benchmarks import BENCHMARKS
from palinode.methods import METHODS
from palinode.methods.transforms import TRANSFORMS
from palinode.metrics.table import ATTACKS, COMPARISONS, METRICS


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return own_files(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def tofu(tmp_path_factory):
    return tofu_folder(tmp_path_factory.mktemp("tofu"))


def words(model, *more):
    return ("evaluate", model.folder, *more, "--max-new-tokens", 3, "--device", "cpu", "--quiet")


def test_benchmark_prints_a_table_by_set_and_says_what_was_not_computed(palinode, tiny, tofu):
    said = palinode(
        *words(tiny.target, "--benchmark", "tofu", "--split", "forget01", "--data", tofu, "--max-rows", 3)
    )
    assert (said.code, said.err) == (0, "")
    for name in ("forget", "retain", "real_authors", "world_facts", "all"):
        assert re.search(rf"^{name} *$", said.out, re.MULTILINE), name
    assert re.search(r"answer_probability +[\d.e-]+ +[\d.e-]+–[\d.e-]+ +3$", said.out, re.MULTILINE)
    table, _, rest = said.out.partition("\nforget: ")
    notes = f"forget: {rest}".splitlines()
    missing = next(line for line in notes if "auc_loss" in line)
    assert "not computed, because" in missing
    assert "holds no holdout01" in missing
    assert any(line.startswith("forget: forget_quality") and "--against" in line for line in notes)
    assert "privleak" not in table


def test_benchmark_json_is_scores_json(palinode, tiny, tofu, tmp_path):
    said = palinode(
        *words(tiny.target, "--benchmark", "tofu", "--data", tofu, "--max-rows", 2, "--json"),
        *("--option", "prompt=plain", "--metrics", "answer_probability,forget_quality"),
        *("--against", tiny.retrained.folder, "--output", tmp_path / "out"),
    )
    assert said.code == 0
    record = json.loads(said.out)
    assert record == json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (record["benchmark"], record["split"]) == ("tofu", "forget01")
    assert record["options"]["prompt"] == "plain"
    assert set(record["scores"]) == {"forget", "retain"}
    assert record["scores"]["forget"]["forget_quality"]["n"] == 2


def test_own_rows_with_holdout_and_retain_are_a_benchmark(palinode, tiny, own, tmp_path):
    log = tmp_path / "log.json"
    said = palinode(
        *words(tiny.target, "--data", own["data"], "--retain", own["retain"], "--holdout", own["holdout"]),
        *("--judge", "overlap", "--open-unlearning", log),
    )
    assert said.code == 0, said.err
    assert re.search(r"^forget +\nanswer_probability", said.out, re.MULTILINE)
    assert re.search(r"auc_min_k_plus +[01]\.\d{3}", said.out)
    assert "judged by overlap" in said.out
    assert "forget_truth_ratio" in json.loads(log.read_text())


def test_own_rows_alone_are_scored_as_before(palinode, tiny, own):
    said = palinode(*words(tiny.target, "--data", own["data"], "--json"))
    assert list(json.loads(said.out)) == [
        "answer_probability",
        "rouge_l_recall",
        "exact_memorization",
        "extraction_strength",
    ]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--benchmark", "nonsense"), "there is no benchmark 'nonsense'; there are tofu, restor, muse, rwku"),
        ((), "evaluate needs --data"),
        (("--benchmark", "restor"), "restor needs --data"),
        (("--benchmark", "tofu", "--holdout", "x"), "--holdout is for rows of your own"),
        (("--benchmark", "tofu", "--option", "prompt"), "option 'prompt' is not NAME=VALUE"),
        (
            ("--benchmark", "tofu", "--option", "prompt=x"),
            "option prompt is 'x'; it must be one of auto, chat",
        ),
        (("--benchmark", "tofu", "--data", "no/such/x.d/y"), "is not a folder with the files of a benchmark"),
        (("--benchmark", "tofu", "--split", "retain99"), "tofu has no split 'retain99'; it has forget01"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_sentence(palinode, tiny, more, message):
    assert message in palinode("evaluate", tiny.target.folder, *more).refusal


# list


def test_list_names_everything_in_one_line_each(palinode):
    said = palinode("list")
    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    for name in (
        *METHODS,
        *TRANSFORMS,
        *BENCHMARKS,
        "demo",
        *METRICS,
        *COMPARISONS,
        *(f"auc_{name}" for name in ATTACKS),
    ):
        assert any(re.match(rf"  {re.escape(name)} +\S", line) for line in lines), name
    heads = ["methods:", "transforms:", "benchmarks:", "metrics:"]
    assert [line for line in lines if not line.startswith("  ")] == heads


def test_list_of_one_kind_as_json(palinode):
    listed = json.loads(palinode("list", "methods", "--json").out)
    assert set(listed) == {"methods"}
    assert set(listed["methods"]) == set(METHODS)


@pytest.mark.parametrize("kind", ["methods", "metrics", "transforms", "benchmarks"])
def test_list_takes_singular_and_plural_and_knows_the_nearest_name(palinode, kind):
    whole = palinode("list", kind).out
    assert whole.startswith(f"{kind}:")
    assert palinode("list", kind.removesuffix("s")).out == palinode("list", kind.title()).out == whole
    misspelt = kind.replace("t", "tt", 1) + "s" if "t" in kind else kind.replace("ch", "hc")
    assert f"there is no list of {misspelt}; there are methods" in palinode("list", misspelt).refusal
    assert f"did you mean {kind!r}?" in palinode("list", misspelt).refusal


def test_list_of_something_else_is_refused(palinode):
    assert "there is no list of cats" in palinode("list", "cats").refusal


def test_a_key_variable_without_a_judge_at_an_address_is_refused(palinode, tiny):
    for judge in ([], ["--judge", "overlap"]):
        said = palinode("evaluate", tiny.base.folder, "--data", tiny.forget, "--key-variable", "K", *judge)
        assert "name that too, as --judge URL#MODEL" in said.refusal

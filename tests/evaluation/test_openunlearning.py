"""Logs in open-unlearning's form, written and read (spec: data.md §1.2 and §1.3, metrics.md §§1, 4)."""

import json
import math

import pytest

from palinode.errors import DataError
from palinode.evaluation.openunlearning import read_log, write_log
from palinode.metrics.aggregate import forget_quality
from palinode.metrics.likelihood import truth_ratios
from palinode.records import Likelihood, Outcome, Score

# metrics.md §4, the worked example: losses of the paraphrase and of five wrong answers, R, forget mean
RIGHT = (1.2, 2.0, 0.5)
WRONG = ((1.5, 2, 2.5, 1, 3), (1, 1.2, 1.4, 1.6, 1.8), (3, 3.5, 4, 2.5, 3))
RATIOS = (0.449329, 1.822119, 0.067206)


def answers(*losses):
    return tuple(Likelihood(f"answer {n}", (-loss, -loss)) for n, loss in enumerate(losses))


def outcome(row, right, wrong, **fields):
    alternatives = {"paraphrased": answers(right), "perturbed": answers(*wrong)}
    standard = {"generated": "Lima by the sea", "logprobs": (-0.3, -0.3), "hits": (True, False)}
    return Outcome(row, f"q{row}", "Lima by the sea", alternatives=alternatives, **{**standard, **fields})


ROWS = [outcome(row, right, wrong) for row, (right, wrong) in enumerate(zip(RIGHT, WRONG, strict=True))]


def written(path, sets=None, scores=None):
    write_log(path, {"forget": ROWS} if sets is None else sets, scores or {})
    return json.loads(path.read_text())


def save(path, content):
    path.write_text(json.dumps(content))
    return path


def published(scores=RATIOS, auc=0.4):
    """The least that a published retain log has."""
    return {
        "forget_truth_ratio": {
            "agg_value": 0.355115,
            "value_by_index": {str(row): {"score": score} for row, score in enumerate(scores)},
        },
        "mia_min_k": {"forget": {}, "holdout": {}, "auc": auc, "agg_value": auc},
    }


# Writing


def test_forget_rows_give_the_worked_example(tmp_path):
    log = written(tmp_path / "TOFU_EVAL.json")
    ratio = log["forget_truth_ratio"]
    assert ratio["agg_value"] == pytest.approx(0.355115, abs=1e-6)
    assert [ratio["value_by_index"][str(n)]["score"] for n in range(3)] == pytest.approx(RATIOS, abs=1e-6)
    assert log["forget_Q_A_PARA_Prob"]["value_by_index"]["1"] == pytest.approx(
        {"prob": math.exp(-2), "avg_loss": 2}
    )
    wrong = log["forget_Q_A_PERT_Prob"]["value_by_index"]["0"]
    assert wrong["avg_loss"] == pytest.approx(WRONG[0])
    assert wrong["prob"] == pytest.approx([math.exp(-loss) for loss in WRONG[0]])
    assert log["forget_Q_A_Prob"]["agg_value"] == pytest.approx(math.exp(-0.3))
    assert log["extraction_strength"]["value_by_index"]["0"] == {"score": 1.0}
    assert log["forget_Q_A_ROUGE"]["value_by_index"]["2"] == {
        "rouge1_recall": 1.0,
        "rougeL_f1": 1.0,
        "rougeL_recall": 1.0,
        "input": "q2",
        "ground_truth": "Lima by the sea",
        "generation": "Lima by the sea",
    }
    assert list(log) == sorted(log)


def test_every_set_has_the_keys_of_the_field(tmp_path):
    sets = dict.fromkeys(("forget", "retain", "real_authors", "world_facts", "holdout"), ROWS)
    log = written(tmp_path / "log.json", sets, {"forget_quality": Score(0.4, 3, None, None)})
    common = {"Q_A_Prob", "Q_A_PERT_Prob", "Q_A_ROUGE"}
    assert set(log) == {
        *(f"{prefix}_{key}" for prefix in ("forget", "retain", "ra", "wf") for key in common),
        *("forget_Q_A_PARA_Prob", "retain_Q_A_PARA_Prob", "ra_Q_A_Prob_normalised", "wf_Q_A_Prob_normalised"),
        *("forget_truth_ratio", "retain_Truth_Ratio", "ra_Truth_Ratio", "wf_Truth_Ratio"),
        *("extraction_strength", "exact_memorization", "mia_loss", "mia_zlib", "mia_min_k", "forget_quality"),
    }
    assert log["retain_Truth_Ratio"]["agg_value"] == pytest.approx(0.494489, abs=1e-6)
    own = math.exp(-0.3)  # of authors and facts, the answer itself is the right one
    wrong = [math.exp(-loss) for loss in WRONG[0]]
    first = log["ra_Q_A_Prob_normalised"]["value_by_index"]["0"]
    assert first == pytest.approx({"prob": own / (own + sum(wrong))})
    assert log["wf_Truth_Ratio"]["value_by_index"]["0"]["score"] == pytest.approx(math.exp(0.3 - 2))
    assert log["forget_quality"] == {"agg_value": 0.4}


def test_attacks_hold_both_sets_and_the_area(tmp_path):
    def rows(*losses):
        return [outcome(n, 1, (1,), logprobs=(-loss, -loss)) for n, loss in enumerate(losses)]

    sets = {"forget": rows(0.2, 0.5, 0.9, 1.1), "holdout": rows(0.8, 1.2, 1.5, 0.4)}
    log = written(tmp_path / "log.json", sets)
    assert log["mia_loss"]["auc"] == log["mia_loss"]["agg_value"] == 0.6875  # metrics.md §9
    assert log["mia_loss"]["forget"]["value_by_index"]["3"]["score"] == pytest.approx(1.1)
    assert log["mia_loss"]["holdout"]["agg_value"] == pytest.approx(0.975)
    given = written(tmp_path / "given.json", sets, {"mia_loss": Score(0.7, 8, None, None)})
    assert given["mia_loss"]["auc"] == 0.7
    assert given["mia_loss"]["forget"] == log["mia_loss"]["forget"]


def test_what_is_missing_is_left_out_and_never_a_number(tmp_path):
    bare = [Outcome(0, "q", "a", None, (-0.5,), (True,)), Outcome(1, "r", "a", None, (), ())]
    scores = {"forget_quality": Score(None, 0, None, None, "no retrained model")}
    log = written(tmp_path / "log.json", {"forget": bare}, scores)
    assert set(log) == {"forget_Q_A_Prob", "forget_quality"}
    assert log["forget_Q_A_Prob"]["value_by_index"]["1"] == {"prob": None, "avg_loss": None}
    assert log["forget_Q_A_Prob"]["agg_value"] == pytest.approx(math.exp(-0.5))
    assert log["forget_quality"] == {"agg_value": None, "reason": "no retrained model"}


def test_what_the_form_has_no_place_for_is_refused(tmp_path):
    with pytest.raises(DataError, match="the set mine"):
        write_log(tmp_path / "log.json", {"mine": ROWS}, {})
    with pytest.raises(DataError, match="the score rouge"):
        write_log(tmp_path / "log.json", {}, {"rouge": Score(1.0, 1, None, None)})
    with pytest.raises(DataError, match="rows of the set forget occur twice"):
        write_log(tmp_path / "log.json", {"forget": [*ROWS, ROWS[0]]}, {})
    assert list(tmp_path.iterdir()) == []


# Reading


def test_what_we_write_can_be_read_and_gives_the_same_truth_ratios(tmp_path):
    path = tmp_path / "log.json"
    written(path, {"forget": ROWS, "holdout": ROWS})
    log = read_log(path, forget_rows=3)
    assert truth_ratios(log.forget) == pytest.approx(truth_ratios(ROWS), rel=1e-12)
    assert log.aucs["min_k"] == 0.5
    assert log.values["forget_truth_ratio"] == pytest.approx(0.355115, abs=1e-6)
    assert log.missing == {}


def test_a_published_log_is_enough_for_forget_quality_and_privleak(tmp_path):
    log = read_log(save(tmp_path / "log.json", published()), forget_rows=3)
    assert truth_ratios(log.forget) == pytest.approx(RATIOS, rel=1e-12)
    assert forget_quality(ROWS, log.forget).value == 1.0  # the model itself
    other = [outcome(row, 5.0, (1.0,)) for row in range(3)]  # R = e⁴ in every row: D = 1
    assert forget_quality(other, log.forget).value == pytest.approx(2 / math.comb(6, 3))
    assert log.aucs == {"min_k": 0.4}
    assert log.missing == {}


def test_rows_are_in_their_order_whatever_the_file_has(tmp_path):
    content = published(scores=tuple(1 + row / 10 for row in range(12)))
    values = content["forget_truth_ratio"]["value_by_index"]
    content["forget_truth_ratio"]["value_by_index"] = dict(sorted(values.items()))  # "0", "1", "10", …
    log = read_log(save(tmp_path / "log.json", content))
    assert [row.row for row in log.forget] == list(range(12))
    assert truth_ratios(log.forget) == pytest.approx([1 + row / 10 for row in range(12)])


def test_losses_alone_give_the_truth_ratios(tmp_path):
    path = tmp_path / "log.json"
    content = written(path)
    del content["forget_truth_ratio"]
    assert truth_ratios(read_log(save(path, content)).forget) == pytest.approx(RATIOS, abs=1e-6)


def test_what_a_log_lacks_is_said(tmp_path):
    content = published()
    lacking = read_log(save(tmp_path / "a.json", {"mia_min_k": content["mia_min_k"]}), forget_rows=3)
    assert lacking.missing == {"forget_quality": "a.json has no forget_truth_ratio"}
    lacking = read_log(save(tmp_path / "b.json", {"forget_truth_ratio": content["forget_truth_ratio"]}))
    assert lacking.missing == {"privleak": "b.json has no mia_min_k"}


def test_a_value_that_is_no_number_is_none(tmp_path):
    content = published(scores=(0.5, None, math.nan, math.inf))
    assert truth_ratios(read_log(save(tmp_path / "log.json", content)).forget) == pytest.approx(
        [0.5, None, None, None]
    )


def test_a_log_of_another_split_is_refused(tmp_path):
    path = save(tmp_path / "log.json", published(scores=(0.5,) * 400))
    with pytest.raises(DataError, match=r"400 forget rows \(forget10\) where the forget set has 40"):
        read_log(path, forget_rows=40)


def test_tofus_own_log_of_three_hundred_rows_is_told_how_it_can_be_used(tmp_path):
    path = save(tmp_path / "log.json", published(scores=(0.5,) * 300))
    with pytest.raises(DataError, match="300 forget rows where the forget set has 400; read the first 300"):
        read_log(path, forget_rows=400)
    with pytest.raises(DataError, match="--option protocol=original"):
        read_log(path, forget_rows=400)
    assert len(truth_ratios(read_log(path, forget_rows=300).forget)) == 300


@pytest.mark.parametrize(
    "change",
    [lambda right, wrong: right / (right + wrong), lambda right, wrong: right / wrong],
    ids=["share", "1/R"],
)
def test_a_log_with_another_truth_ratio_is_refused(tmp_path, change):
    path = tmp_path / "log.json"
    content = written(path)
    right, wrong = math.exp(-RIGHT[0]), math.exp(-sum(WRONG[0]) / 5)
    content["forget_truth_ratio"]["value_by_index"]["0"]["score"] = change(right, wrong)
    with pytest.raises(DataError, match="another definition"):
        read_log(save(path, content))


def test_open_unlearnings_small_summand_is_no_contradiction(tmp_path):
    content = published(scores=(math.exp(-12) / (math.exp(-25) + 1e-10),))
    content["forget_Q_A_PARA_Prob"] = {"value_by_index": {"0": {"avg_loss": 25.0}}}
    content["forget_Q_A_PERT_Prob"] = {"value_by_index": {"0": {"avg_loss": [12.0, 12.0]}}}
    assert truth_ratios(read_log(save(tmp_path / "log.json", content)).forget) == pytest.approx(
        [math.exp(13)]
    )


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "is not JSON"),
        ("[1]", "no JSON object"),
        ('{"a": 1}', "not an evaluation log"),
        ('{"forget_truth_ratio": {"value_by_index": {"x": {"score": 1}}}}', "has a row 'x'"),
        ('{"forget_truth_ratio": {"value_by_index": [1]}}', "must map rows"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_what_is_no_log_is_refused(tmp_path, text, match):
    path = tmp_path / "log.json"
    path.write_text(text)
    with pytest.raises(DataError, match=match):
        read_log(path)


def test_a_log_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_log(tmp_path / "log.json")


def test_the_log_of_tofus_own_code_is_read(tmp_path):
    # data.md §1.2; losses and R of metrics.md §4, log check
    wrong = [3.355818272, 3.690197229, 3.719407558, 4.432241917, 2.973668098]
    part = {
        "avg_paraphrased_loss": {"0": 2.228723049},
        "average_perturb_loss": {"0": wrong},
        "truth_ratio": {"0": 0.245233715},
    }
    log = read_log(
        save(tmp_path / "eval_log_aggregated.json", {"eval_log_forget.json": part, "eval_log.json": {}})
    )
    assert truth_ratios(log.forget) == pytest.approx([0.245233715], rel=1e-6)
    assert log.missing == {"privleak": "eval_log_aggregated.json has no mia_min_k"}

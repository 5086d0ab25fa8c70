"""A benchmark run: only what is needed is asked, of both models alike, and everything is written down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from invented_benchmarks import own_files, tofu_folder, write_lines
from palinode.benchmarks import BENCHMARKS
from palinode.errors import CheckpointError, DataError, InputError, OutputError, RecipeError
from palinode.evaluation.benchmark import Places
from palinode.evaluation.evaluate import SCORES_VERSION, cut_answers, evaluate_benchmark, make_exam
from palinode.pipeline.recipe import checked_settings
from palinode.progress import NullListener
from palinode.records import read_outcomes
from palinode.settings import EvaluationSettings

OWN, TOFU = BENCHMARKS["own"], BENCHMARKS["tofu"]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return Places(**own_files(tmp_path_factory.mktemp("own")))


@pytest.fixture(scope="module")
def tofu(tmp_path_factory):
    return Places(str(tofu_folder(tmp_path_factory.mktemp("tofu"))))


def settings(**changes):
    return checked_settings(EvaluationSettings, {"max_new_tokens": 3, "device": "cpu", **changes})


def test_a_model_against_itself_has_forget_quality_one_and_privleak_zero(tiny, own):
    model = str(tiny.target.folder)
    scores = evaluate_benchmark(model, OWN, own, settings(against=model, judge="overlap")).scores["forget"]
    assert scores["forget_quality"].value == 1
    assert scores["privleak"].value == 0
    assert scores["auc_reference"].value == 0.5
    assert scores["judge_recover_accuracy"].value == 1


def test_written_folder_has_scores_and_the_outcomes_of_both_models(tiny, own, tmp_path):
    output = tmp_path / "out"
    against = str(tiny.retrained.folder)
    found = evaluate_benchmark(
        str(tiny.target.folder), OWN, own, settings(against=against, judge="overlap", output=output)
    )
    record = json.loads((output / "scores.json").read_text())
    assert record == found.record
    assert record["version"] == SCORES_VERSION
    assert record["model"]["fingerprint"] == tiny.target.fingerprint()
    assert record["against"]["fingerprint"] == tiny.retrained.fingerprint()
    assert record["judge"] == "overlap"
    assert [table["rows"] for table in record["tables"]] == [6, 6, 6]
    assert record["scores"]["forget"]["answer_probability"]["n"] == 6
    assert sorted(path.name for path in output.iterdir()) == [
        *(
            f"{side}-{name}.jsonl"
            for side in ("against", "outcomes")
            for name in ("forget", "holdout", "retain")
        ),
        "scores.json",
        "verdicts.json",
    ]
    assert list(read_outcomes(output / "outcomes-forget.jsonl")) == found.outcomes["forget"]
    with pytest.raises(OutputError, match="holds the scores of another run already"):
        evaluate_benchmark(str(tiny.target.folder), OWN, own, settings(output=output))
    inside = tiny.target.folder / "scores"
    with pytest.raises(OutputError, match="lies inside the model"):
        evaluate_benchmark(str(tiny.target.folder), OWN, own, settings(output=inside))
    assert not inside.exists()


def test_only_sets_and_answers_that_the_chosen_metrics_need_are_asked(tiny, own):
    found = evaluate_benchmark(str(tiny.target.folder), OWN, own, settings(metrics=("exact_memorization",)))
    assert {name: list(group) for name, group in found.scores.items()} == {
        "forget": ["exact_memorization"],
        "retain": ["exact_memorization"],
    }
    assert set(found.outcomes) == {"forget", "retain"}
    assert {outcome.generated for outcome in found.outcomes["forget"]} == {None}
    assert {outcome.standardised for outcome in found.outcomes["forget"]} == {()}


def test_gradients_are_measured_on_request_only(tiny, own):
    plain = evaluate_benchmark(str(tiny.target.folder), OWN, own, settings())
    assert "auc_gradient_norm" not in plain.scores["forget"]
    assert {outcome.gradient_norm for outcome in plain.outcomes["forget"]} == {None}
    asked = evaluate_benchmark(str(tiny.target.folder), OWN, own, settings(metrics=("auc_gradient_norm",)))
    assert asked.scores["forget"]["auc_gradient_norm"].value is not None


def test_sampled_rows_are_those_of_the_seed_in_their_order_and_the_same_for_both_models(tiny, tofu, tmp_path):
    wanted = settings(
        max_rows=4,
        metrics=("answer_probability", "forget_quality"),
        against=str(tiny.base.folder),
        output=tmp_path / "out",
    )
    rows = [
        outcome.row
        for outcome in evaluate_benchmark(str(tiny.target.folder), TOFU, tofu, wanted).outcomes["forget"]
    ]
    assert rows == sorted(rows)
    assert len(rows) == 4
    theirs = [outcome.row for outcome in read_outcomes(tmp_path / "out" / "against-forget.jsonl")]
    assert theirs == rows
    other = settings(max_rows=4, metrics=("answer_probability",), seed=1)
    again = evaluate_benchmark(str(tiny.target.folder), TOFU, tofu, other)
    assert [outcome.row for outcome in again.outcomes["forget"]] != rows


def test_log_that_was_written_serves_as_the_reference(tiny, own, tmp_path):
    """The retrained model's log gives the same forget quality and PrivLeak as the model itself."""
    log = tmp_path / "TOFU_EVAL.json"
    retrained, target = str(tiny.retrained.folder), str(tiny.target.folder)
    evaluate_benchmark(retrained, OWN, own, settings(open_unlearning=log))
    asked = evaluate_benchmark(target, OWN, own, settings(against=retrained)).scores["forget"]
    read = evaluate_benchmark(target, OWN, own, settings(against=str(log)))
    assert read.record["against"]["location"] == str(log)
    for metric in ("forget_quality", "privleak"):
        assert read.scores["forget"][metric].value == pytest.approx(asked[metric].value, abs=1e-9)
    few = evaluate_benchmark(target, OWN, own, settings(against=str(log), max_rows=4)).scores["forget"]
    assert few["forget_quality"].n == 4


def test_log_of_another_split_is_refused(tiny, own, tofu, tmp_path):
    log = tmp_path / "TOFU_EVAL.json"
    evaluate_benchmark(str(tiny.retrained.folder), OWN, own, settings(open_unlearning=log))
    with pytest.raises(DataError, match="holds 6 forget rows where the forget set has 40"):
        evaluate_benchmark(str(tiny.target.folder), TOFU, tofu, settings(against=str(log)))


def test_log_where_no_metric_compares_with_a_retrained_model_is_refused(tiny, tmp_path):
    log = tmp_path / "TOFU_EVAL.json"
    log.write_text("{}")
    with pytest.raises(RecipeError, match="restor has no metric that a log serves"):
        evaluate_benchmark(
            str(tiny.target.folder), BENCHMARKS["restor"], Places(str(tmp_path)), settings(against=str(log))
        )


def test_documents_are_scored_and_what_needs_an_answer_says_why_not(tiny, tmp_path):
    rows = [{"text": f"{word} lives in the town"} for word in ("ba", "do", "ka", "lu", "mi")]
    places = Places(
        data=str(write_lines(tmp_path / "texts.jsonl", rows[:3])),
        holdout=str(write_lines(tmp_path / "unseen.jsonl", rows[3:])),
    )
    scores = evaluate_benchmark(str(tiny.target.folder), OWN, places, settings()).scores["forget"]
    assert scores["auc_loss"].value is not None
    assert scores["answer_probability"].value is not None
    assert scores["rouge_l_recall"].value is None
    assert "nothing was generated" in scores["rouge_l_recall"].reason
    assert scores["forget_truth_ratio"].value is None


def test_expected_answers_are_cut_to_the_tokens_that_a_set_allows(tiny):
    from palinode.data.examples import Example, Message, Question
    from palinode.evaluation.benchmark import QuestionSet
    from palinode.models import load_tokenizer
    from palinode.settings import Asking

    def completion(answer):
        return Question(Example(0, "x", "completion", (Message("prompt", "the home of"),), answer))

    long, short = completion("the pet of the home of"), completion("the  pet")
    questions = QuestionSet("verbmem", (long, short), Asking(), answer_tokens=3)
    cut = cut_answers(questions, load_tokenizer(tiny.target))
    assert [question.example.answer for question in cut] == ["the pet of", "the  pet"]


def test_single_sets_have_limits_of_their_own():
    from palinode.data.examples import Example, Message, Question
    from palinode.evaluation.benchmark import LoadedBenchmark, QuestionSet, metric_cells
    from palinode.settings import Asking

    rows = tuple(Question(Example(n, "x", "completion", (Message("prompt", "a"),), "b")) for n in range(9))
    loaded = LoadedBenchmark(tuple(QuestionSet(name, rows, Asking()) for name in ("forget", "retain")))

    def sizes(most, own):
        limits = {} if most is None else {"max_rows": most}
        cells = metric_cells("forget", "answer_probability") + metric_cells("retain", "answer_probability")
        found = make_exam("own", loaded, cells, EvaluationSettings(**limits), most=own)
        return [len(questions.questions) for questions in found.sets.values()]

    assert sizes(3, {"forget": 7}) == [7, 3]
    assert sizes(None, {"retain": 2}) == [9, 2]
    with pytest.raises(RecipeError, match="no set 'forgot' to limit; the sets are forget, retain"):
        sizes(3, {"forgot": 7})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"max_rows": 0}, RecipeError, "max_rows cannot be used"),
        ({"split": "forget07"}, RecipeError, "no split 'forget07'"),
        ({"metrics": ("nonsense",)}, RecipeError, "no metric 'nonsense'"),
        ({"general_include": Path("tasks")}, RecipeError, "tasks holds tasks for lm-eval and none is to be"),
        ({"judge": "nobody"}, InputError, "no judge 'nobody'"),
        ({"judge": "http://localhost:9/v1"}, InputError, "needs the name of a model"),
        ({"against": "no/such/folder"}, CheckpointError, "no/such/folder"),
        ({"open_unlearning": "no/such/folder/log.json"}, OutputError, "its folder does not"),
    ],
)
def test_what_cannot_be_done_is_refused_before_a_model_is_loaded(
    tiny, own, changes, error, message, monkeypatch
):
    def load(*_args, **_options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("palinode.models.loading.load_model", load)
    from pathlib import Path

    if "open_unlearning" in changes:
        changes = {"open_unlearning": Path(changes["open_unlearning"])}
    with pytest.raises(error, match=message):
        evaluate_benchmark(str(tiny.target.folder), OWN, own, settings(**changes))


class Told(NullListener):
    """A listener that remembers lines and the labels of tasks."""

    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)

    def task(self, label, total, unit):
        self.lines.append(label)
        return super().task(label, total, unit)


def test_retrained_model_is_asked_only_where_a_metric_compares_with_it(tiny, own):
    told = Told()
    chosen = settings(against=str(tiny.retrained.folder), metrics=("rouge_l_recall",), max_rows=2)
    evaluate_benchmark(str(tiny.target.folder), OWN, own, chosen, listener=told)
    assert told.lines[0] == "No metric compares with the retrained model; it is not asked."
    assert not any(line.startswith("retrained model") for line in told.lines)
    told.lines.clear()
    compared = settings(against=str(tiny.retrained.folder), metrics=("forget_quality",), max_rows=2)
    evaluate_benchmark(str(tiny.target.folder), OWN, own, compared, listener=told)
    asked = {line.split(": ")[0] for line in told.lines if line.startswith("retrained model")}
    assert asked == {"retrained model, forget"}


def test_metric_that_does_not_exist_is_refused_with_the_nearest_name(tiny, own):
    with pytest.raises(RecipeError, match=r"it has .*; did you mean 'rouge_l_recall'\?"):
        evaluate_benchmark(str(tiny.target.folder), OWN, own, settings(metrics=("rouge_l_recal",)))
    with pytest.raises(RecipeError, match="no metric 'zzz'; it has "):
        evaluate_benchmark(str(tiny.target.folder), OWN, own, settings(metrics=("zzz",)))

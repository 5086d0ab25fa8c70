"""General ability through lm-eval, and the scores that are made of its results."""

import importlib.util
import json
import random

import pytest

from palinode.errors import InputError
from palinode.evaluation.general import _task_folder, general_ability, task_scores
from palinode.records import Score

TASK = """
task: own_capitals
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def test_results_become_scores_with_a_normal_interval():
    values = {
        "alias": "own",
        "name": "own",
        "sample_len": 20,
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "exact_match,strict-match": 0.25,
        "exact_match_stderr,strict-match": "N/A",
        "perplexity,none": float("nan"),
        "perplexity_stderr,none": 0.0,
    }
    scores = task_scores(values, 20)
    assert set(scores) == {"acc", "exact_match,strict-match", "perplexity"}
    assert scores["acc"].low == pytest.approx(0.304004, abs=1e-6)
    assert scores["acc"].high == pytest.approx(0.695996, abs=1e-6)
    assert scores["acc"].n == 20
    assert scores["exact_match,strict-match"] == Score(
        0.25, 20, None, None, "lm-eval gives no standard error"
    )
    assert scores["perplexity"].value is None
    assert scores["perplexity"].reason == "lm-eval's figure is not a finite number"


def test_none_and_all_of_the_rows_have_the_exact_interval_of_a_share():
    """0 of 20: a true share p gives none with (1 − p)^20, which is .025 at p = 1 − .025^(1/20) = .168433."""
    found = task_scores(
        {"acc,none": 0.0, "acc_stderr,none": 0.0, "em,none": 1.0, "em_stderr,none": 0.0, "bleu,none": 12.0,
         "bleu_stderr,none": 0.0},
        20,
    )  # fmt: skip
    assert (found["acc"].low, found["acc"].high) == (0.0, pytest.approx(0.168433, abs=1e-6))
    assert (found["em"].low, found["em"].high) == (pytest.approx(0.831567, abs=1e-6), 1.0)
    assert (found["bleu"].low, found["bleu"].high) == (12.0, 12.0)


def test_tasks_of_ones_own_are_a_folder_or_the_file_of_one(tmp_path):
    (tmp_path / "own.yaml").write_text("task: own")
    assert _task_folder(tmp_path) == _task_folder(tmp_path / "own.yaml") == tmp_path
    assert _task_folder(None) is None
    for wrong in (tmp_path / "missing", tmp_path / "missing.yaml"):
        with pytest.raises(InputError, match="no folder with lm-eval tasks"):
            general_ability(None, None, ["own"], include=wrong)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_lm_eval_it_says_how_to_get_it():
    with pytest.raises(InputError, match=r"pip install 'palinode\[lm-eval\]'"):
        general_ability(None, None, ["mmlu"])


@pytest.fixture
def own_task(tmp_path):
    """A folder with a task of twelve rows, whose right answer is the first choice in eight."""
    rows = tmp_path / "rows.jsonl"
    lines = [
        {"question": f"Capital of land {n}?", "choices": ["Aba", "Zuz"], "label": int(n % 3 == 0)}
        for n in range(12)
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "own_capitals.yaml").write_text(TASK.format(rows=rows))
    return tmp_path


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_task_of_ones_own_runs_offline_on_the_model_in_memory(tiny, own_task):
    pytest.importorskip("lm_eval")
    from palinode.models.loading import load_model, load_tokenizer, pick_device

    model, tokenizer = load_model(tiny.target, device=pick_device("cpu")), load_tokenizer(tiny.target)
    model.train()
    side, state = tokenizer.padding_side, random.getstate()

    def run(**options):
        return general_ability(model, tokenizer, ["own_capitals"], include=own_task, **options)

    found = run()
    assert set(found) == {"own_capitals"}
    score = found["own_capitals"]["acc"]
    assert score.n == 12
    assert score.value * 12 == pytest.approx(round(score.value * 12))
    assert score.low <= score.value <= score.high
    assert run(batch_size=1) == found
    assert run(limit=5)["own_capitals"]["acc"].n == 5
    assert model.training
    assert tokenizer.padding_side == side
    assert random.getstate() == state
    with pytest.raises(InputError, match="no task no_such_task"):
        general_ability(model, tokenizer, ["no_such_task"], include=own_task)

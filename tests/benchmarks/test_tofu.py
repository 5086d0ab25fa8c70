"""TOFU: tables are the published ones or refused, questions are put as published, scores are as stated."""

from __future__ import annotations

import json

import pytest
import torch

from invented_benchmarks import NAMES, perturbed, qa, tofu_folder, write_lines
from palinode.benchmarks.tofu import TOFU, utility_parts
from palinode.data.tokenize import PromptStyle, prompt_ids
from palinode.errors import DataError
from palinode.evaluation.benchmark import Exam, Measured, Places, Reference, score_cell
from palinode.models import load_tokenizer
from palinode.records import Likelihood, Outcome


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tofu_folder(tmp_path_factory.mktemp("tofu"), holdout=True)


def load(folder, split="forget01", **options):
    return TOFU.load(Places(str(folder)), split, TOFU.check_options(options))


def sets_of(loaded):
    return {questions.name: questions for questions in loaded.sets}


def cell(name, metric):
    return next(cell for cell in TOFU.cells if (cell.set, cell.metric) == (name, metric))


# Tables


def test_question_sets_have_the_published_numbers_of_questions(folder):
    sizes = {name: len(questions.questions) for name, questions in sets_of(load(folder)).items()}
    assert sizes == {"forget": 40, "retain": 400, "real_authors": 100, "world_facts": 117, "holdout": 40}


def test_forget_questions_have_a_paraphrase_and_five_wrong_answers(folder):
    question = sets_of(load(folder))["forget"].questions[3]
    row = perturbed(3, 5)
    assert (question.example.prompt, question.example.answer) == (row["question"], row["answer"])
    assert question.example.row == 3
    assert question.alternatives == {
        "paraphrased": (row["paraphrased_answer"],),
        "perturbed": tuple(row["perturbed_answer"]),
    }
    authors = sets_of(load(folder))["real_authors"].questions[0]
    assert {kind: len(texts) for kind, texts in authors.alternatives.items()} == {"perturbed": 3}


def test_ten_requests_under_the_name_of_a_forget_set_are_refused(tmp_path):
    tofu_folder(tmp_path, leave_out=("forget01", "forget01_perturbed"))
    rows = [qa(n) | {"task_id": str(n // 40)} for n in range(400)]
    (tmp_path / "forget01.json").write_text(json.dumps(rows))
    message = (
        r"forget01\.json has 400 rows and a task_id column, but the published forget01 has 40 rows\. "
        r"Files of that name with a task_id column hold ten unlearning requests one after another and "
        r"are not TOFU's; take the official one from locuslab/TOFU"
    )
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_one_request_of_forty_rows_is_refused_for_its_task_id(tmp_path):
    tofu_folder(tmp_path, leave_out=("forget01", "forget01_perturbed"))
    write_lines(tmp_path / "forget01.jsonl", [qa(n) | {"task_id": "1"} for n in range(40)])
    with pytest.raises(DataError, match="40 rows and a task_id column"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "retain_perturbed",
            lambda rows: rows[:-1],
            r"has 399 rows, but the published retain_perturbed has 400",
        ),
        (
            "forget01_perturbed",
            lambda rows: [{**rows[0], "perturbed_answer": ["a", "b"]}, *rows[1:]],
            r"row 1 of .*perturbed\.jsonl: 'perturbed_answer' is 2 texts; it must be a list of 5 texts",
        ),
        (
            "world_facts_perturbed",
            lambda rows: [*rows[:-1], {**rows[-1], "answer": " "}],
            r"row 117 of .*: 'answer' holds an empty text",
        ),
        (
            "real_authors_perturbed",
            lambda rows: [{**rows[0], "perturbed_answer": ["a", "b", ""]}, *rows[1:]],
            r"row 1 of .*: 'perturbed_answer' holds an empty text",
        ),
        (
            "real_authors_perturbed",
            lambda rows: [{**rows[0], "perturbed_answer": "a, b, c"}, *rows[1:]],
            r"row 1 of .*: 'perturbed_answer' is a string; it must be a list of 3 texts",
        ),
        (
            "retain_perturbed",
            lambda rows: [{"question": "q", "answer": "a"}, *rows[1:]],
            r"row 1 of .* has no 'paraphrased_answer' \(it has: question, answer\)",
        ),
    ],
)
def test_rows_that_are_not_as_published_are_refused(tmp_path, name, change, message):
    tofu_folder(tmp_path)
    path = tmp_path / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, change(rows))
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_sets_that_are_not_there_are_told_and_the_forget_set_alone_is_needed(tmp_path):
    write_lines(tmp_path / "forget01.jsonl", [qa(n) for n in range(40)])
    loaded = load(tmp_path)
    assert list(sets_of(loaded)) == ["forget"]
    assert set(loaded.missing) == {"retain", "real_authors", "world_facts", "holdout"}
    assert "holds no holdout01 (holdout01.jsonl, .json" in loaded.missing["holdout"]


def test_json_under_the_name_of_json_lines_is_read_by_its_content(tmp_path):
    tofu_folder(tmp_path, leave_out=("forget01_perturbed",))
    (tmp_path / "forget01_perturbed.jsonl").write_text(json.dumps([perturbed(n, 5) for n in range(40)]))
    assert len(sets_of(load(tmp_path))["forget"].questions) == 40


# Prompts


def test_plain_prompt_is_the_published_one(folder, tiny):
    forget = sets_of(load(folder, prompt="plain"))["forget"]
    assert forget.style == PromptStyle(chat=False)
    tokenizer = load_tokenizer(tiny.target)
    ids = prompt_ids(forget.questions[0].example, tokenizer, forget.style)
    assert ids == tokenizer(f"Question: {qa(0)['question']}\nAnswer:")["input_ids"]


def test_llama2_prompt_has_no_space_before_the_answer(folder):
    example = sets_of(load(folder, prompt="llama2"))["forget"].questions[0].example
    assert example.form == "completion"
    assert example.prompt == f"[INST] {qa(0)['question']} [/INST]"
    assert example.answer == qa(0)["answer"]


def test_chat_prompt_has_the_system_text_and_the_pinned_date(folder, tiny):
    tokenizer = load_tokenizer(tiny.target)
    tokenizer.chat_template = (
        "{{ date_string }}|{% for m in messages %}{{ m.role }}:{{ m.content }}|{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    forget = sets_of(load(folder, prompt="chat"))["forget"]
    ids = prompt_ids(forget.questions[0].example, tokenizer, forget.style)
    expected = f"10 Apr 2025|system:You are a helpful assistant.|user:{qa(0)['question']}|assistant:"
    assert ids == tokenizer(expected, add_special_tokens=False)["input_ids"]


def test_paraphrased_questions_are_asked_of_forget_and_retain_rows_only(folder):
    sets = sets_of(load(folder, question="paraphrased_question"))
    assert sets["forget"].questions[0].example.prompt == f"the town of {NAMES[0]}"
    assert sets["retain"].questions[0].example.prompt == f"the town of {NAMES[100]}"
    assert sets["real_authors"].questions[0].example.prompt == qa(500)["question"]


def test_original_protocol_takes_the_first_300_rows_and_200_tokens(folder):
    sets = sets_of(load(folder, protocol="original"))
    assert {name: len(questions.questions) for name, questions in sets.items()} == {
        "forget": 40,
        "retain": 300,
        "real_authors": 100,
        "world_facts": 117,
        "holdout": 40,
    }
    assert sets["retain"].asking.max_length == 200


# Scores, on outcomes made by hand


def outcome(row, right, wrong, *, kind="paraphrased", expected=-1.0, generated="in bado"):
    alternatives = {"perturbed": tuple(Likelihood("x", (value,)) for value in wrong)}
    if kind == "paraphrased":
        alternatives["paraphrased"] = (Likelihood("x", (right,)),)
    return Outcome(row, f"q{row}", "in bado", generated, (expected,), (True,), alternatives=alternatives)


SPEC = [  # metrics.md §4: R = 0.449329, 1.822119, 0.067206
    (-1.2, (-1.5, -2.0, -2.5, -1.0, -3.0)),
    (-2.0, (-1.0, -1.2, -1.4, -1.6, -1.8)),
    (-0.5, (-3.0, -3.5, -4.0, -2.5, -3.0)),
]


def measured(outcomes, *, reference=None, missing=None, **options):
    exam = Exam("tofu", {}, missing=missing or {}, options=TOFU.check_options(options))
    return Measured(exam, outcomes, reference)


def test_truth_ratios_are_those_of_the_worked_example():
    rows = [outcome(number, *values) for number, values in enumerate(SPEC)]
    found = measured({"forget": rows, "retain": rows})
    assert score_cell(cell("forget", "forget_truth_ratio"), found).value == pytest.approx(0.355115, abs=1e-6)
    assert score_cell(cell("retain", "retain_truth_ratio"), found).value == pytest.approx(0.494489, abs=1e-6)
    assert score_cell(cell("forget", "right_share"), found).value == pytest.approx(0.660448, abs=1e-6)


def test_arithmetic_truth_ratio_is_an_option():
    rows = [outcome(number, *values) for number, values in enumerate(SPEC)]
    found = measured({"forget": rows}, truth_ratio="arithmetic")
    expected = (0.569876 + 1 / 1.895834 + 0.075898) / 3
    assert score_cell(cell("forget", "forget_truth_ratio"), found).value == pytest.approx(expected, abs=1e-6)


def test_forget_quality_of_disjoint_truth_ratios_is_two_over_the_binomial():
    """metrics.md §6: disjoint samples of n each have p = 2 / C(2n, n); n = 3 gives 2/20."""
    ours = [outcome(row, -1.0, (-1.0 - row / 10,)) for row in range(3)]
    theirs = [outcome(row, -1.0, (-5.0 - row / 10,)) for row in range(3)]
    found = measured({"forget": ours}, reference=Reference("retrained", {"forget": theirs}))
    assert score_cell(cell("forget", "forget_quality"), found).value == pytest.approx(0.1)


def test_model_utility_is_the_harmonic_mean_of_nine_numbers():
    """By hand: retain P = e^-1; authors and facts P = e^-1 / (e^-1 + e^-3); ROUGE 1; 1 - R = 1 - e^-2."""
    own = [outcome(row, -1.0, (-3.0,)) for row in range(2)]
    general = [outcome(row, -1.0, (-3.0,), kind="none") for row in range(2)]
    sets = {"retain": own, "real_authors": general, "world_facts": general}
    e = torch.tensor([-1.0, -3.0], dtype=torch.float64).exp()
    numbers = (
        [float(e[0]), float(e[0] / e.sum()), float(e[0] / e.sum())] + 3 * [1.0] + 3 * [float(1 - e[1] / e[0])]
    )
    expected = 9 / sum(1 / number for number in numbers)
    assert len(utility_parts(sets)) == 9
    assert score_cell(cell("all", "model_utility"), measured(sets)).value == pytest.approx(expected)


def test_model_utility_without_one_of_its_sets_is_not_computed():
    rows = [outcome(0, -1.0, (-3.0,))]
    found = measured(
        {"retain": rows, "real_authors": rows}, missing={"world_facts": "it holds no world facts"}
    )
    score = score_cell(cell("all", "model_utility"), found)
    assert score.value is None
    assert score.reason == "not computed, because it holds no world facts"

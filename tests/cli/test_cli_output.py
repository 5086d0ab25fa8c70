"""What commands print: results on standard output, progress on standard error, nothing else."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
import typer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from palinode import __version__
from palinode.cli.app import app
from palinode.cli.options import completion, recipe_keys, words_of
from palinode.metrics.table import DEFAULT_METRICS

COMMANDS = ["unlearn", "run", "finetune", "vector", "apply", "evaluate", "demo"]
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f\x80-\x9f]")


def strict(text: str):
    """The JSON that is the whole text, without NaN or infinity."""

    def refuse(constant):
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def given(unlearn_words, tmp_path):
    """Words for a run without a search."""
    return unlearn_words(tmp_path / "out", scales="0.5,0.5")


# Help


def test_help_names_every_command_and_says_what_it_does(palinode):
    said = palinode("--help")
    assert said.code == 0
    for name in COMMANDS:
        assert re.search(rf"^  {name} +[A-Z][\w-]+ ", said.out, re.MULTILINE), name


@pytest.mark.parametrize(
    ("command", "purpose"),
    [
        ("unlearn", "From two models and a forget set to an unlearned model"),
        ("run", "Do the job of unlearn as a recipe describes it."),
        ("finetune", "Fine-tune a checkpoint on rows"),
        ("vector", "Norms of vectors, the cosines between them"),
        ("apply", "Write θ_D − α(θ_1 − θ_0) + β(θ_2 − θ_0)"),
        ("evaluate", "answer probability, ROUGE-L recall, exact memorization and extraction strength"),
        ("demo", "Unlearn invented people from a tiny model"),
    ],
)
def test_help_of_a_command_says_what_it_does_and_explains_every_option(palinode, command, purpose):
    said = palinode(command, "--help")
    assert (said.code, said.err) == (0, "")
    assert purpose in " ".join(said.out.split())
    assert not CONTROL.search(said.out)
    assert [
        line
        for line, below in pairwise(said.out.splitlines())
        if re.fullmatch(r"  -\S+( <\S+>)?", line) and not below.startswith(" " * 20)
    ] == []  # each has words beside it


def test_help_shows_options_in_groups_and_what_decides_a_run_has_its_default(palinode):
    said = palinode("unlearn", "-h").out
    headings = [line for line in said.splitlines() if re.fullmatch(r"\w[\w ]+:", line)]
    assert headings == [
        "What you need:",
        "Your rows:",
        "Scales:",
        "Training:",
        "Evaluation:",
        "Output:",
        "Options:",
        "Advanced:",
    ]
    assert "[default: 1e-5]" in said
    assert "--rounding <auto|nearest|stochastic>" in said


@pytest.mark.parametrize("group", [(), ("vector",), ("requests",)])
def test_a_summary_of_each_command_fits_a_line(palinode, group):
    commands = palinode(*group, "-h").out.split("Commands:")[1]
    assert "..." not in commands
    assert max(map(len, commands.splitlines())) <= 80


def test_values_are_completed():
    assert completion("method")("ms") == ["msa"]
    assert completion("benchmark")("t") == ["tofu"]
    assert completion("metrics")("every,eve") == ["every,every"]
    assert completion(recipe_keys())("training.learn") == ["training.learning_rate="]
    assert completion("budget")("s") == ["standard"]
    assert completion(("retrained", "base"))("b") == ["base"]
    assert words_of("judge") == ["overlap", "offline:", "https://"]
    options = {one.name: one for one in typer.main.get_command(app).commands["evaluate"].params}
    assert [word.value for word in options["benchmark"].shell_complete(None, "to")] == ["tofu"]


def test_without_words_the_help_is_shown_and_the_code_is_two(palinode):
    said = palinode()
    assert said.code == 2
    assert "Usage: palinode" in said.err


def test_version(palinode):
    assert palinode("--version").out == palinode("-V").out == f"palinode {__version__}\n"


# unlearn and run


def test_json_is_the_record_and_nothing_else(palinode, given, tmp_path):
    said = palinode(*given, "--json")
    assert said.code == strict(said.out)["verdict"]["exit_code"]
    assert strict(said.out) == json.loads((tmp_path / "out" / "record.json").read_text())
    assert "fine-tuning forget" in said.err
    again = palinode(*given, "--json")
    assert (again.out, again.err) == (said.out, "")


def test_quiet_is_silent_and_still_shows_the_result(palinode, given, tmp_path):
    said = palinode(*given, "--quiet")
    assert said.err == ""
    assert "Scores and their 95 % intervals" in said.out
    assert f"Model:    {tmp_path / 'out'} (with README.md, record.json and report.html)" in said.out
    assert f"Page:     {tmp_path / 'out.workspace' / 'report.html'} (with sample answers)" in said.out


def test_plan_comes_first_then_one_line_a_task(palinode, given):
    said = palinode(*given)
    lines = [
        line for line in said.err.splitlines() if not line.startswith("Times are those of a busy machine")
    ]
    assert lines[0] == "What will be done (finished steps are not repeated):"
    assert re.match(r"  fine-tune on the forget set +\d+ tokens  about \d+ s", lines[1])
    assert re.match(r"In all [\d,]+ tokens, about .*; peak memory about .* GB, disk .* GB\.", lines[5])
    assert re.match(r"base on the forget set: likelihoods: 20 rows in .* s", lines[6])
    assert any(re.match(r"fine-tuning forget: \d+ tokens in .* s", line) for line in lines[7:])
    assert not CONTROL.search(said.err + said.out)
    assert "\x1b" not in said.err + said.out


def test_same_command_again_says_that_there_is_nothing_to_do(palinode, given, tmp_path):
    first = palinode(*given, "--quiet")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    said = palinode(*given)
    assert said.code == first.code
    assert said.out.startswith(f"{tmp_path / 'out'} already holds the result of this very run.\n")
    assert said.err == ""
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_dry_run_prints_the_plan_and_does_nothing(palinode, given, tmp_path):
    said = palinode(*given, "--dry-run")
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith("What will be done (finished steps are not repeated):\n  fine-tune on the")
    planned = strict(palinode(*given, "--dry-run", "--json").out)
    assert set(planned) == {"steps", "memory", "disk", "held", "notes", "machine"}
    assert planned["memory"] == max(sum(planned_in(phase)) for phase in planned["held"])
    assert planned["steps"][0]["label"] == "fine-tune on the forget set"
    assert list(tmp_path.iterdir()) == []


def planned_in(phase):
    return [phase[name] for name in ("weights", "gradients", "optimiser", "activations")]


def test_a_plan_for_other_machines_says_what_they_hold_and_cost(palinode, tiny, tmp_path):
    words = ["unlearn", "--target", tiny.target.folder, "--forget", tiny.forget, "--output", tmp_path / "out"]
    said = palinode(*words, "--dry-run", "--on", "2xh100@3")  # no base: a plan opens none
    assert re.search(r"^On 2 × H100 SXM: 80 GB, 989 TFLOP/s", said.out, re.MULTILINE)
    assert re.search(r"^  fine-tune +whole +0\.0", said.out, re.MULTILINE)
    assert "At 3.00 an hour and device: 0.0" in said.out
    planned = strict(palinode(*words, "--dry-run", "--on", "2xh100@3", "--json").out)
    assert (planned["machine"]["count"], planned["machine"]["kind"]["memory"]) == (2, 80e9)
    assert "say --dry-run" in palinode(*words, "--on", "h100").refusal
    for wrong in ("8xh101", "0xh100", "h100@", "h100@free"):
        assert "as in 8xh100" in palinode(*words, "--dry-run", "--on", wrong).refusal


def test_recipe_is_the_same_run_as_the_options(palinode, given, tiny, tmp_path):
    palinode(*given, "--quiet")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"""
device = "cpu"
[models]
target = "{tiny.target.folder}"
base = "{tiny.base.folder}"
[data]
forget = "{tiny.forget}"
retain = "{tiny.retain}"
[training]
epochs = 2
learning_rate = 1e-5
max_length = 64
[scales]
forget = 0.5
retain = 0.5
[evaluation]
max_rows = 20
max_new_tokens = 3
max_length = 64
[output]
folder = "{tmp_path / "out"}"
"""
    )
    said = palinode("run", recipe, "--set", "training.learning_rate=3e-3", "--quiet")
    assert "already holds the result of this very run" in said.out


def test_project_takes_the_projected_vector_and_drops_what_it_cannot_project(
    palinode, unlearn_words, tmp_path
):
    words = unlearn_words(tmp_path / "out", filter="projection", scales="1.5")
    record = strict(palinode(*words, "--json").out)
    (transform,) = record["vectors"]["transforms"]
    assert transform["name"] == "projection"
    assert transform["settings"]["others"] == "drop"
    assert record["scales"]["forget"] == 1.5


def test_overlap_is_left_out_when_allowed(palinode, unlearn_words, tiny, tmp_path):
    both = tmp_path / "both.jsonl"
    both.write_text(tiny.retain.read_text() + tiny.forget.read_text())
    words = unlearn_words(tmp_path / "out", retain=both, allow_overlap=True, scales="0.5,0", json=True)
    assert strict(palinode(*words, "--quiet").out)["data"]["retain"]["rows"] == 285


def test_record_names_the_command_that_repeats_it(palinode, given, tmp_path):
    record = strict(palinode(*given, "--json", "--quiet").out)
    assert record["command"].startswith("palinode unlearn --target ")
    assert "--scales 0.5,0.5" in record["command"]


# The single steps


def test_steps_by_hand_give_the_bytes_of_the_main_job(palinode, given, tiny, tmp_path):
    """finetune, finetune, apply: the vectors and the sum are the same as in one go."""
    palinode(*given, "--quiet")
    tune = [
        "finetune",
        "--base",
        tiny.base.folder,
        "--epochs",
        2,
        "--learning-rate",
        3e-3,
        "--max-length",
        64,
    ]
    (retain,) = (tmp_path / "out.workspace").glob("finetune-retain-*/model")
    said = palinode(
        *tune, "--data", tiny.forget, "--output", tmp_path / "theta_1", "--device", "cpu", "--json"
    )
    facts = strict(said.out)
    assert facts["steps"] == 2 * 8
    assert facts["last_loss"] < facts["first_loss"]
    applied = palinode(
        *("apply", "--target", tiny.target.folder, "--base", tiny.base.folder, "--output", tmp_path / "sum"),
        *("--forget-model", tmp_path / "theta_1", "--retain-model", retain),
        *("--scales", "0.5,0.5", "--json", "--quiet"),
    )
    assert strict(applied.out)["effective"] == pytest.approx({"forget": 0.5, "retain": 0.5}, rel=1e-3)
    assert applied.err == ""
    assert (tmp_path / "sum" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


def test_apply_needs_no_tokenizer(palinode, tiny, tmp_path):
    for name in ("target", "base", "retrained"):
        shutil.copytree(
            getattr(tiny, name).folder, tmp_path / name, ignore=shutil.ignore_patterns("token*", "gen*")
        )
    said = palinode(
        *("apply", "--target", tmp_path / "target", "--base", tmp_path / "base"),
        *("--forget-model", tmp_path / "retrained", "--output", tmp_path / "out"),
    )
    assert said.code == 0
    assert "effective scales forget 1.0000" in said.out
    assert "writing: 31,040 weights in" in said.err
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_apply_with_scale_zero_gives_the_target_and_never_opens_the_retain_model(palinode, tiny, tmp_path):
    said = palinode(
        *("apply", "--target", tiny.target.folder, "--base", tiny.base.folder, "--scales", 0),
        *("--forget-model", tiny.retrained.folder, "--retain-model", tmp_path / "nowhere"),
        *("--output", tmp_path / "out", "--quiet"),
    )
    assert said.code == 0
    before = load_file(tiny.target.folder / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_vector_shows_norms_and_cosines(palinode, tiny):
    words = (
        "vector",
        "--base",
        tiny.base.folder,
        "--model",
        tiny.target.folder,
        "--model",
        tiny.retrained.folder,
    )
    found = strict(palinode(*words, "--json").out)
    norms = found["all"]["norms"]
    assert set(norms) == {str(tiny.target.folder), str(tiny.retrained.folder)}
    (pair,) = found["all"]["cosines"]
    assert 0.5 < pair["cosine"] < 1
    assert set(found["parts"]) == {"embedding", "layer 0", "layer 1", "rest"}
    first = load_file(tiny.target.folder / "model.safetensors")
    base = load_file(tiny.base.folder / "model.safetensors")
    squares = sum(float((value - base[name]).double().square().sum()) for name, value in first.items())
    assert norms[str(tiny.target.folder)] == pytest.approx(squares**0.5, rel=1e-5)
    said = palinode(*words, "--layers", "--quiet")
    assert f"{norms[str(tiny.target.folder)]:.5g}" in said.out
    assert "layer 1" in said.out
    assert said.err == ""


def test_json_is_ascii_so_that_every_terminal_can_print_it(palinode, tiny, tmp_path):
    folder = tmp_path / "größe"
    folder.symlink_to(tiny.base.folder)
    said = palinode("vector", "--base", tiny.target.folder, "--model", folder, "--json")
    assert said.out.isascii()
    assert strict(said.out)["all"]["norms"].keys() == {str(folder)}


def test_evaluate_prints_scores_and_writes_outcomes(palinode, tiny, tmp_path):
    words = ("evaluate", tiny.target.folder, "--data", tiny.retain, "--max-rows", 12, "--max-new-tokens", 3)
    said = palinode(*words, "--output", tmp_path / "outcomes.jsonl", "--json", "--quiet")
    scores = strict(said.out)
    assert said.err == ""
    assert set(scores) == set(DEFAULT_METRICS)
    assert scores["answer_probability"]["n"] == 12
    assert len((tmp_path / "outcomes.jsonl").read_text().splitlines()) == 12
    table = palinode(*words, "--quiet").out
    assert "answer_probability" in table
    assert f"{scores['answer_probability']['value']:.3f}" in table
    assert "exists already" in palinode(*words, "--output", tmp_path / "outcomes.jsonl").refusal


def test_columns_of_a_table_may_have_other_names(palinode, tiny, tmp_path):
    table = tmp_path / "rows.csv"
    table.write_text('Frage;Antwort\n"the home of";ba\n"the; pet of";do\n')
    words = ("evaluate", tiny.base.folder, "--data", table, "--max-new-tokens", 3, "--quiet", "--json")
    found = strict(palinode(*words, "--columns", "question=Frage, answer=Antwort").out)
    assert found["rouge_l_recall"]["n"] == 2


# In a process of its own


def shell(*words: object, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "palinode", *map(str, words)],
        capture_output=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_terminal_that_knows_only_ascii_is_no_reason_to_fail(tiny):
    words = "vector", "--base", tiny.base.folder, "--model", tiny.target.folder
    run = shell(*words, PYTHONIOENCODING="ascii")
    assert run.returncode == 0
    assert run.stdout.isascii()
    assert b"norm" in run.stdout
    assert b"---" in run.stdout


def test_reader_that_leaves_early_gets_no_traceback(tiny):
    words = f"'{tiny.base.folder}' --model '{tiny.target.folder}' --json --quiet"
    run = subprocess.run(
        f"'{sys.executable}' -m palinode vector --base {words} | head -c 1",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.stdout, run.stderr) == ("{", "")


@pytest.mark.parametrize(("closed", "verb", "code"), [(">&-", "methods", 0), ("2>&-", "nothing", 2)])
def test_a_closed_stream_is_no_reason_to_fail(closed, verb, code):
    run = subprocess.run(
        f"'{sys.executable}' -m palinode list {verb} {closed}", shell=True, capture_output=True, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (code, b"", b"")


def test_exit_code_of_an_interruption_is_two_even_where_it_came_inside_exec(tmp_path):
    """`python -m` remembers a KeyboardInterrupt inside exec, and would leave by the signal."""
    (tmp_path / "inside.py").write_text(
        "import sys\nfrom palinode.cli import _interrupted\n"
        "try:\n    exec('raise KeyboardInterrupt')\nexcept KeyboardInterrupt:\n    sys.exit(_interrupted())\n"
    )
    run = subprocess.run(
        [sys.executable, "-m", "inside"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert run.stderr == "palinode: interrupted; the same command begins anew\n"


WITHOUT_TORCH = """
import json, sys
from palinode.cli import main
sys.modules |= {"torch": None, "transformers": None}  # so that importing them fails
for line in sys.stdin:
    sys.argv = ["palinode", *json.loads(line)]
    try:
        main()
    except SystemExit as left:
        assert not left.code, line
"""


def test_what_needs_no_model_in_memory_does_not_wait_for_torch(tiny, tmp_path):
    ledger = ["--ledger", str(tmp_path / "ledger")]
    words = [
        ["vector", "--base", str(tiny.base.folder), "--model", str(tiny.target.folder)],
        ["sign", "--new-key", str(tmp_path / "my.key")],
        ["requests", "init", "--target", str(tiny.target.folder), "--base", str(tiny.base.folder), *ledger],
        ["requests", "add", "r1", "--rows", str(tiny.forget), *ledger],
        *(["requests", verb, *ledger] for verb in ("list", "show", "due", "check")),
        ["requests", "withdraw", "r1", *ledger],
    ]
    told = "".join(f"{json.dumps(line)}\n" for line in words)
    run = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], input=told, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_an_interruption_while_something_is_destroyed_is_not_lost(tiny):
    """Python drops what is raised in a destructor; a signal that comes there still ends the command."""
    code = (
        "import os, signal, sys\nfrom palinode.cli import main\n\n\nclass Last:\n    def __del__(self):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n        sum(range(1000))\n\n\nseen = []\n\n\n"
        "def notice(event, facts):\n"
        "    if event == 'open' and str(facts[0]).endswith('.safetensors') and not seen:\n"
        "        seen.append(Last())\n        seen[0] = None\n\n\nsys.addaudithook(notice)\nmain()\n"
    )
    words = ["vector", "--base", str(tiny.base.folder), "--model", str(tiny.target.folder)]
    run = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "palinode: interrupted; the same command begins anew\n"

"""What an extra is for is said where it is asked for, and everything else works without one."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from palinode.pipeline.doctor import EXTRAS
from palinode.pipeline.tracking import TRACKERS

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OURS = {"dev", "docs"}
MODULES = {
    "lora": "peft",
    "lm-eval": "lm_eval",
    "gguf": "gguf",
    "gptq": "llmcompressor",
    "influence": "bergson",
    "llama-cpp": "llama_cpp",
    "quantise": "bitsandbytes",
    "sign": "cryptography",
}
NO_OPTION = (
    "gguf",
    "gptq",
    "llama-cpp",
    "quantise",
)  # a model, and attacks that are left out with their reason
GIVEN = {"triton", "markupsafe", "nltk"}  # by torch where there is a GPU, by jinja2, by rouge-score
NAMED = {"sentence_transformers"}  # a judge's own library: the refusal says what to install
WITH_IT = {"sigstore", "compressed_tensors", "loguru"}  # brought by an extra beside its first library


def distribution(requirement: str) -> str:
    return re.split(r"[<>=\[ ]", requirement)[0].lower().replace("_", "-")


def test_the_doctor_knows_every_extra_and_what_it_is_for():
    assert set(EXTRAS) == set(PROJECT["optional-dependencies"]) - OURS == set(MODULES)


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_is_named_in_the_readme_and_in_the_help_of_its_option(extra):
    for page in ("README.md", "docs/cli.md")[: 1 if extra in NO_OPTION else 2]:
        assert f"palinode[{extra}]" in (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("lora", ["finetune", "--base", "BASE", "--data", "ROWS", "--output", "OUT", "--lora", 2]),
        ("lora", ["unlearn", "--target", "TARGET", "--base", "BASE", "--forget", "ROWS", "--lora", 2]),
        ("lm-eval", ["evaluate", "BASE", "--data", "ROWS", "--lm-eval", "mmlu"]),
        ("sign", ["sign", "--new-key", "OUT"]),
    ],
)
def test_where_it_is_missing_one_sentence_says_how_to_get_it(
    monkeypatch, palinode, tiny, tmp_path, extra, words
):
    monkeypatch.setitem(sys.modules, MODULES[extra], None)
    places = {"TARGET": tiny.target.folder, "BASE": tiny.base.folder, "ROWS": tiny.forget}
    words = [places.get(word, word) for word in words]
    words = [tmp_path / "out" if word == "OUT" else word for word in words]
    if words[0] == "unlearn":
        words += ["--output", tmp_path / "out", "--scales", "1", "--device", "cpu"]
    assert f"pip install 'palinode[{extra}]'" in palinode(*words, "--quiet").refusal


def test_a_gguf_model_says_what_reads_it(monkeypatch, palinode, tiny, tmp_path):
    monkeypatch.setattr("palinode.weights.foreign.find_spec", lambda _: None)
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(40))
    words = [
        "--target",
        tmp_path / "model.gguf",
        "--base",
        tiny.base.folder,
        "--forget-model",
        tiny.base.folder,
    ]
    said = palinode("apply", *words, "--output", tmp_path / "out").refusal
    assert "pip install 'palinode[gguf]'" in said


def test_nothing_is_imported_that_neither_the_package_nor_a_named_extra_brings():
    imported = {
        name.split(".")[0]
        for path in (ROOT / "src" / "palinode").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names])
    }
    optional = {"palinode", *GIVEN, *NAMED, *WITH_IT, *MODULES.values(), *TRACKERS}
    foreign = imported - sys.stdlib_module_names - optional
    known = packages_distributions()
    brought = {distribution(needed) for needed in PROJECT["dependencies"]}
    lacking = {
        name
        for name in foreign
        if not brought & {one.lower().replace("_", "-") for one in known.get(name, [name])}
    }
    assert lacking == set()

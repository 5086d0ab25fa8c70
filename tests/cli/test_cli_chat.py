"""`palinode chat` from a pipe: questions, commands, and what cannot be done said in one line."""

from __future__ import annotations

import io
import json
import sys

import pytest

from palinode.pipeline.run import unlearn


@pytest.fixture
def talk(palinode, recipe_of, tmp_path, monkeypatch):
    """A function that pipes lines into a talk with the output of a short run."""
    unlearn(recipe_of(tmp_path / "out", training={"epochs": 1}, scales={"forget": 0.5, "retain": 0.0}))

    def run(*lines, options=()):
        piped = "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped), encoding="utf-8"))
        return palinode("chat", tmp_path / "out", "--max-new-tokens", 3, "--device", "cpu", *options)

    return run


def test_lines_are_questions_or_commands(talk):
    said = talk(
        *("the home of", "/alpha 1,5", "the home of", "/beta 1", "/alpha x", "/scales 1", "/reset"),
        *("/nonsense", "/length 0", "/help", "", "/quit", "never asked"),
        options=("--quiet",),
    )
    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    assert lines[:3] == ["", "> the home of", "unlearned, α 0.5, β 0"]
    assert lines[3].startswith("  ")
    assert lines[4] == "target"
    assert "unlearned, α 1.5, β 0" in lines
    assert "the run made no retain vector, because its β was 0; leave β at 0" in lines
    assert "'x' is no scale; give a number from 0 on, as in 0.8" in lines
    assert "/scales needs two numbers, α and β, as in /scales 0.8 0.5" in lines
    assert "as it was saved, α 0.5, β 0, a new conversation" in lines
    assert "there is no command /nonsense; /help lists them" in lines
    assert "/length needs a number of tokens, as in /length 100" in lines
    assert lines[-1] == "Everything else is a question to all models."
    assert "never asked" not in said.out
    assert "\x1b" not in said.out


def test_a_byte_that_is_no_text_is_replaced(talk):
    said = talk("the caf\udce9 of", options=("--quiet",))  # a Latin-1 terminal's
    assert (said.code, said.err) == (0, "")
    assert "> the caf\ufffd of" in said.out


def test_json_is_one_line_a_question(talk):
    said = talk("the home of", "/scales 0 0", "the home of", options=("--json", "--quiet"))
    first, second = map(json.loads, said.out.splitlines())
    assert first.keys() == {"question", "forget_scale", "retain_scale", "answers"}
    assert (first["forget_scale"], second["forget_scale"]) == (0.5, 0.0)
    assert second["answers"]["unlearned"] == second["answers"]["target"]
    assert said.err.startswith("α 0, β 0")


def test_greeting_says_who_talks_and_options_are_checked(talk, palinode, tiny, tmp_path):
    said = talk()
    assert "Talking with unlearned and target (out, α 0.5, β 0). α and β can be changed." in said.out
    assert "loading: 2 models in" in said.err
    alone = talk(options=("--alone", "--quiet"))
    assert (alone.out, alone.err) == ("", "")
    assert "leave one of them out" in talk(options=("--alone", "--against", tiny.base.folder)).refusal
    assert "has no record.json" in palinode("chat", tiny.target.folder).refusal

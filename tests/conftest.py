"""What every test runs under (no network, no bars, one thread), and the tiny world that they share."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

from browsing import browser  # noqa: F401 - a fixture

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"
os.environ["OMP_NUM_THREADS"] = (
    "1"  # so small a model is no faster on two threads, and waits on a busy machine
)

settings.register_profile("untimed", deadline=None)  # a busy machine makes no test fail
settings.load_profile("untimed")

# A test run in the background is started with Ctrl-C switched off, and would hand that on to what it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

TINY_TRAINING = {
    "epochs": 8,
    "learning_rate": 3e-3,
    "batch_size": 16,
    "max_length": 64,
    "precision": "float32",
}
TINY_EVALUATION = {"max_rows": 40, "max_new_tokens": 3, "max_length": 64, "batch_rows": 64}


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Digests are remembered in a place of the tests' own, and not in the user's."""
    os.environ["PALINODE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def world():
    """Thirteen invented people with five facts each, two of them to be forgotten."""
    from palinode.data.world import invent_world

    return invent_world(3, early=5, middle=4, forget=2, late=2)


@pytest.fixture(scope="session")
def tiny(world, tmp_path_factory):
    """Target, base and retrained model of that world, and its two sets of rows. Read them only, or copy."""
    from palinode.benchmarks.demo import DemoStage, build_demo

    stages = (DemoStage(40, 1e-2), DemoStage(40, 1e-2), DemoStage(10, 5e-3))
    return build_demo(world, tmp_path_factory.mktemp("tiny"), seed=3, stages=stages, width=32, layers=2)


@pytest.fixture(scope="session")
def learned(tiny):
    """The forget row that the target learned best; which one that is differs from processor to processor."""
    import torch

    from palinode.data.examples import read_examples
    from palinode.data.tokenize import PromptStyle, tokenize
    from palinode.models.likelihoods import score_rows
    from palinode.models.loading import load_model, load_tokenizer, pad_token

    tokenizer, rows = load_tokenizer(tiny.target), read_examples(tiny.forget)
    tokens = tokenize(rows, tokenizer, max_length=64, style=PromptStyle())
    base, target = (
        [
            sum(one.logprobs) / len(one.logprobs)
            for one in score_rows(live, tokens, pad_id=pad_token(tokenizer))
        ]
        for live in (load_model(own, device=torch.device("cpu")) for own in (tiny.base, tiny.target))
    )
    return max(rows, key=lambda row: target[row.row] - base[row.row])


@pytest.fixture(scope="session")
def recipe_of(tiny):
    """A function that makes a recipe for the tiny world; sections given are laid over these settings."""
    from palinode.pipeline.recipe import build_recipe

    def build(output: Path, /, **sections):
        content = {
            "device": "cpu",
            "models": {"target": str(tiny.target.folder), "base": str(tiny.base.folder)},
            "data": {"forget": str(tiny.forget), "retain": str(tiny.retain)},
            "training": TINY_TRAINING,
            "scales": {
                "choose": "grid",
                "forget_grid": [0.25, 0.5, 1.0],
                "retain_grid": [0.0, 0.5],
                "probe_rows": 30,
            },
            "evaluation": TINY_EVALUATION,
            "output": {"folder": str(output)},
        }
        for name, value in sections.items():
            content[name] = {**content.get(name, {}), **value} if isinstance(value, dict) else value
        return build_recipe(content)

    return build


@dataclass(frozen=True)
class Said:
    """What a command left: its exit code and what it said."""

    code: int
    out: str
    err: str

    @property
    def refusal(self) -> str:
        """The one sentence with which a command refused; the test fails when there is more or less."""
        assert self.code == 2, f"exit code {self.code}\n{self.out}\n{self.err}"
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("palinode: "), self.err
        assert self.out == ""
        return lines[0].removeprefix("palinode: ")


@pytest.fixture
def palinode(monkeypatch):
    """A function that runs the command line in this process."""
    from palinode.cli import main

    def run(*words: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["palinode", *map(str, words)])
        monkeypatch.setenv("PYTHONSAFEPATH", "1")  # so that what the command sets ends with the test
        out, err, code = io.StringIO(), io.StringIO(), 0
        before = signal.getsignal(signal.SIGTERM)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main()
        except SystemExit as left:
            code = left.code
        finally:
            signal.signal(signal.SIGTERM, before)
        return Said(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def unlearn_words(tiny):
    """A function that spells `palinode unlearn` for the tiny world.

    None leaves an option out; True gives it no value.
    """

    def spell(output: object, **changes: object) -> list[str]:
        options = {
            "target": tiny.target.folder,
            "base": tiny.base.folder,
            "forget": tiny.forget,
            "retain": tiny.retain,
            "output": output,
            "epochs": 2,
            "learning_rate": 3e-3,
            "max_length": 64,
            "max_new_tokens": 3,
            "max_rows": 20,
            "device": "cpu",
            **changes,
        }
        words = ["unlearn"]
        for name, value in options.items():
            option = f"--{name.replace('_', '-')}"
            words += [] if value is None else [option] if value is True else [option, str(value)]
        return words

    return spell

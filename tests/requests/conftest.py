"""A ledger of three requests on the tiny world, made once."""

from __future__ import annotations

import shutil

import pytest
from ledgers import THIRD, begin

from palinode import Desk


@pytest.fixture(scope="session")
def rows(tiny, tmp_path_factory):
    """Three files of forget rows, as the owner keeps them."""
    folder = tmp_path_factory.mktemp("owner")
    lines = tiny.forget.read_text().splitlines(keepends=True)
    for place in range(3):
        (folder / f"{place + 1}.jsonl").write_text("".join(lines[THIRD * place : THIRD * (place + 1)]))
    return folder


@pytest.fixture(scope="session")
def recipe(tiny):
    return {
        "device": "cpu",
        "models": {"target": str(tiny.target.folder), "base": str(tiny.base.folder)},
        "data": {"retain": str(tiny.retain)},
        "training": {"epochs": 2, "learning_rate": 3e-3, "max_length": 64, "precision": "float32"},
        "scales": {"forget": 0.5, "retain": 0.0},
        "evaluation": {"max_rows": 40, "max_new_tokens": 3, "max_length": 64},
    }


@pytest.fixture(scope="session")
def made(recipe, rows, tmp_path_factory):
    """A ledger with three requests, all carried out; look at it, or copy it."""
    desk = begin(tmp_path_factory.mktemp("made") / "ledger", recipe, rows)
    desk.carry_out(["r1", "r2"])
    desk.carry_out()
    return desk


@pytest.fixture
def mine(made, tmp_path):
    shutil.copytree(made.folder, tmp_path / "ledger", symlinks=True)
    return Desk(tmp_path / "ledger", user="bob")

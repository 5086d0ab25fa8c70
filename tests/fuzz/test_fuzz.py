"""A short turn of the fuzzers (`make fuzz` is the long one), and that whole files are read to their end."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "weights"))
sys.path.insert(0, str(Path(__file__).parent))
from damage import NoDamage
from layouts import LAYOUTS, STATE, contents, write
from on_disk import raw
from run import KINDS, outcome, run

from palinode.weights import Checkpoint

DULL = {"refusals", "reply"}
"""Kinds of which almost everything can be read."""


@pytest.mark.parametrize("name", KINDS)
def test_whole_files_are_read(tmp_path, name):
    assert outcome(KINDS[name], tmp_path / "case", NoDamage(0)) == "read"


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout.__name__ != "adapter"])
def test_every_byte_of_a_whole_checkpoint_is_read(tmp_path, layout):
    write(layout)(tmp_path, NoDamage(0))
    found = contents(Checkpoint.open(tmp_path, allow_pickle=True).tensors.values())
    expected = {name: raw(tensor) for name, tensor in STATE.items()}
    assert found == {name: expected[name] for name in found}
    assert expected.keys() - found.keys() <= {"lm_head.weight"}


@pytest.mark.parametrize("name", KINDS)
def test_some_damaged_files(name):
    _, _, outcomes, _ = run(name, range(40))
    assert sum(outcomes.values()) == 40
    assert outcomes["refused"] or name in DULL

"""A second run of a record's recipe: the same bytes here, and words for what is not the same elsewhere."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from run_files import GIVEN, rows_in, stamps, write_rows
from safetensors.torch import load_file, save_file

from palinode.errors import CheckpointError, InputError, MismatchError, OutputError
from palinode.pipeline.reproducing import Reproduced, reproduce
from palinode.pipeline.run import unlearn
from palinode.weights import Checkpoint


@pytest.fixture(scope="module")
def run(tiny, recipe_of, tmp_path_factory):
    """A finished run whose rows lie beside it; read it only."""
    home = tmp_path_factory.mktemp("reproduced")
    forget = shutil.copy(tiny.forget, home / "forget.jsonl")
    data = {"forget": str(forget), "retain": str(tiny.retain)}
    unlearn(recipe_of(home / "out", data=data, scales=GIVEN, training={"epochs": 1}))
    return home


@pytest.fixture
def out(run, tmp_path):
    """A copy of its folder, without the workspace, as an auditor has it."""
    return shutil.copytree(run / "out", tmp_path / "out")


def edit(folder, change):
    record = json.loads((folder / "record.json").read_text())
    change(record)
    (folder / "record.json").write_text(json.dumps(record))


def test_on_the_same_machine_the_bytes_agree_and_the_folder_is_only_read(out, palinode):
    edit(out, lambda record: record["environment"].update(torch="1.0"))
    edit(out, lambda record: record["recipe"]["scales"].update(of_an_earlier_version=0.5))
    before = stamps(out)
    said = palinode("reproduce", out, "-q")
    assert said.code == 0
    first, *rest = said.out.splitlines()
    assert first.startswith("Reproduced: all 20 tensors are equal bit for bit, and all ")
    assert any(line.startswith("  torch: 1.0 then, ") for line in rest)
    assert "  scales.of_an_earlier_version: 0.5 then, unknown now" in rest
    assert stamps(out) == before
    again = palinode("reproduce", out, "-q", "--json")  # finds what the first call made
    assert again.code == 0
    assert (json.loads(again.out)["differing"], json.loads(again.out)["off"]) == ({}, {})


def test_other_rows_are_told_before_anything_is_trained(run, out, tmp_path):
    rows = rows_in(run / "forget.jsonl")
    changed = write_rows(
        tmp_path / "changed.jsonl", [*rows[:-1], {**rows[-1], **dict.fromkeys(rows[-1], "another")}]
    )
    with pytest.raises(MismatchError, match=r"the forget rows in .* are not those of the record"):
        reproduce(out, settings={"data.forget": str(changed)})
    assert not out.with_name("out.reproduced.workspace").exists()


def test_another_model_is_told_before_anything_is_trained(out, tiny):
    with pytest.raises(MismatchError, match=r"the base in .* name what it was made from with --base"):
        reproduce(out, settings={"models.base": str(tiny.retrained.folder)})


def test_what_lies_elsewhere_now_can_be_named(run, out, tmp_path, palinode):
    edit(out, lambda record: record["recipe"]["data"].update(forget="gone.jsonl"))
    said = palinode("reproduce", out, "-q")
    assert "what the record names cannot be used" in said.refusal
    assert "--forget" in said.refusal
    words = ("--forget", run / "forget.jsonl", "--output", tmp_path / "again")
    assert palinode("reproduce", out, "-q", *words).code == 0


def test_the_runs_own_places_are_not_used(run, out, palinode, tmp_path):
    for place in (out, out / "deeper"):
        with pytest.raises(OutputError, match="is a place of the run itself"):
            reproduce(out, place)
    edit(out, lambda record: record["recipe"]["output"].update(workspace=str(run / "out.workspace")))
    with pytest.raises(OutputError, match="is a place of the run itself"):
        reproduce(out, run / "out")


def test_a_folder_that_is_not_the_records_model_is_refused(out):
    tensors = load_file(out / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, out / "model.safetensors")
    with pytest.raises(CheckpointError, match="is not the model that its record tells of"):
        reproduce(out)
    with pytest.raises(InputError, match=r"has no record\.json"):
        reproduce(out.parent)


def test_what_differs_is_counted(out, palinode):
    tensors = load_file(out / "model.safetensors")
    first = min(tensors)
    tensors[first].view(-1)[:2] += torch.tensor([0.5, 0.25])
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    known = Checkpoint.open(out).fingerprint()
    edit(out, lambda record: record["models"]["unlearned"].update(fingerprint=known))
    said = palinode("reproduce", out, "-q")
    assert said.code == 1
    assert said.out.startswith("The figures agree, the bytes do not: all ")
    assert f"  {first}: 2 numbers, by 0.5 at most\n" in said.out
    edit(out, lambda record: record["scores"]["unlearned"]["forget"]["answer_probability"].update(value=0.99))
    found = reproduce(out)
    assert [*found.off] == ["scores.unlearned.forget.answer_probability.value"]
    assert found.sentence.startswith("Not reproduced: 1 of ")


@pytest.mark.parametrize(
    ("differing", "off", "words"),
    [
        ({}, {}, "Reproduced: all 20 tensors are equal bit for bit, and all 4 figures agree."),
        ({}, {"a": (1, 2)}, "bit for bit, but 1 of 4 figures do not agree."),
        ({"w": (3, 0.5)}, {}, "The figures agree, the bytes do not: all 4 figures are alike"),
        (
            {"w": (3, 0.5)},
            {"a": (1, 2)},
            "Not reproduced: 1 of 4 figures do not agree; 1 of 20 tensors (by 0.5",
        ),
    ],
)
def test_every_outcome_has_its_sentence(tmp_path, differing, off, words):
    found = Reproduced(tmp_path, 20, differing, (), 4, off, {})
    assert words in found.sentence
    assert found.same_bytes == (not differing)

"""A fingerprint follows the content of a model, not its name or its files."""

import os
import shutil

import pytest
import torch

from palinode.weights import Checkpoint


@pytest.fixture
def model(models):
    """A small model folder with a tokenizer."""
    tensors = {f"model.layers.{i}.w": models.noise(i, 5, 4) for i in range(5)}
    return with_tokenizer(models.write("model", {**tensors, "empty": torch.empty(0, 3)}))


def with_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "generation_config.json").write_text("{}")
    return folder


def fingerprint(folder):
    return Checkpoint.open(folder).fingerprint()


def test_fingerprint_is_32_hex_digits_and_repeats(model):
    assert fingerprint(model) == fingerprint(model)
    assert len(fingerprint(model)) == 32
    assert set(fingerprint(model)) <= set("0123456789abcdef")


def test_fingerprint_does_not_depend_on_the_folders_name(model):
    assert fingerprint(shutil.copytree(model, model.with_name("another name"))) == fingerprint(model)


@pytest.mark.parametrize("shards", [2, 4])
def test_fingerprint_does_not_depend_on_sharding(models, model, shards):
    sharded = with_tokenizer(models.write("sharded", models.read(model), shards=shards))
    assert len(list(sharded.glob("*.safetensors"))) == shards
    assert fingerprint(sharded) == fingerprint(model)


def test_fingerprint_does_not_depend_on_files_that_are_no_part_of_the_model(model):
    before = fingerprint(model)
    for name in ("README.md", "training.json", "optimizer.pt"):
        (model / name).write_text("x")
    assert fingerprint(model) == before


def changed(model, number):
    return shutil.copytree(model, model.with_name(f"changed {number}"))


def test_fingerprint_changes_with_any_flipped_bit_of_the_weights(model):
    seen = {fingerprint(model)}
    size = (model / "model.safetensors").stat().st_size
    for number, place in enumerate((size - 1, size - 40, size - 200)):
        copy = changed(model, number)
        content = bytearray((copy / "model.safetensors").read_bytes())
        content[place] ^= 1 << (number + 2)
        (copy / "model.safetensors").write_bytes(content)
        seen.add(fingerprint(copy))
    assert len(seen) == 4


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_fingerprint_changes_with_config_and_tokenizer(model, name):
    copy = changed(model, 0)
    (copy / name).write_text((copy / name).read_text().replace("{", "{ ", 1))
    assert fingerprint(copy) != fingerprint(model)


def test_fingerprint_changes_with_a_new_companion(model):
    copy = changed(model, 0)
    (copy / "chat_template.jinja").write_text("{{ x }}")
    assert fingerprint(copy) != fingerprint(model)


def test_fingerprint_changes_with_names_shapes_and_dtypes(models):
    row = torch.arange(6, dtype=torch.int32)
    variants = [
        {"w": row},
        {"v": row},
        {"w": row.view(2, 3)},
        {"w": row.view(3, 2)},
        {"w": row.view(torch.float32)},
        {"w": row[:3], "w2": row[3:]},
        {"w": row, "empty": torch.empty(0)},
    ]
    assert len({fingerprint(models.write(f"m{i}", variant)) for i, variant in enumerate(variants)}) == 7


def test_fingerprint_tells_swapped_tensors_apart(models):
    a, b = torch.ones(3), torch.zeros(3)
    assert fingerprint(models.write("1", {"a": a, "b": b})) != fingerprint(
        models.write("2", {"a": b, "b": a})
    )


def test_a_file_changed_in_place_gives_another_fingerprint(model):
    before = fingerprint(model)
    file = model / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(1, 1))  # whatever the clock's ticks
    assert fingerprint(model) != before


def test_fingerprint_of_a_model_without_parameters(models):
    assert len(fingerprint(models.write("none", {}))) == 32

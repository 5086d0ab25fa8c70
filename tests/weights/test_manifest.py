"""weights.json tells what a folder is made of, and one pass over it tells whether that is still so."""

import json
import math
import shutil

import pytest
import torch
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from palinode import __version__
from palinode.errors import CheckpointError
from palinode.weights import Checkpoint, save
from palinode.weights.fingerprints import remember, tensor_digests
from palinode.weights.store import check_manifest, read_manifest, write_manifest

CONTENT = {
    "formula": [{"model": "target", "coefficient": 1.0, "fingerprint": None}],
    "seed": 3,
    "dtype": None,
}


def with_manifest(folder, content=CONTENT):
    """Give a model folder its manifest."""
    checkpoint = Checkpoint.open(folder)
    write_manifest(folder, checkpoint=checkpoint, digests=tensor_digests(checkpoint), content=content)
    return folder


@pytest.fixture
def written(models):
    """A folder in two shards with a tokenizer, as Palinode would have written it."""
    tensors = {f"model.layers.{i}.w": models.noise(i, 3, 4) for i in range(4)}
    folder = models.write("out", {**tensors, "steps": torch.tensor(7), "none": torch.empty(0, 2)}, shards=2)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool.jinja").write_text("{{ x }}")
    return with_manifest(folder)


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def rewrite(file, change):
    """Save a weight file anew, its tensors changed."""
    save_file(change(load_file(file)), file, {"format": "pt"})


def summary(found):
    return found.changed, found.missing, found.extra, dict(found.companions)


# Nothing changed


def test_an_untouched_folder_is_as_it_was_written(written):
    told = []
    found = check_manifest(written, on_progress=told.append)
    assert found.ok
    assert summary(found) == ((), (), (), {})
    assert (found.checked, found.nbytes) == (6, 4 * 48 + 8)
    assert sum(told) == found.nbytes


def test_the_folder_may_move_and_be_copied(written):
    assert check_manifest(shutil.copytree(written, written.with_name("elsewhere"))).ok


def test_files_that_are_no_part_of_the_model_may_be_added(written):
    for name in (
        "README.md",
        "record.json",
        "report.md",
        "optimizer.pt",
        "training_args.bin",
        ".gitattributes",
    ):
        (written / name).write_text("x")
    assert check_manifest(written).ok


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "consolidated.safetensors", "modeling_x.py", "custom/generate.py"]
)
def test_code_and_weights_that_others_might_load_are_no_free_addition(written, name):
    (written / name).parent.mkdir(exist_ok=True)
    (written / name).write_bytes((2).to_bytes(8, "little") + b"{}")  # a safetensors file of nothing, for one
    assert check_manifest(written).companions == {name: "new"}


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_threads_will_do(written, workers):
    assert check_manifest(written, workers=workers).ok


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"none": torch.empty(0)},
        {"scalar": torch.tensor(1.0)},
        {name: torch.tensor([i]) for i, name in enumerate(["", " ", "a\0b", "名前", '"', "seal", "x" * 500])},
    ],
    ids=["nothing", "empty", "scalar", "odd names"],
)
def test_odd_models_have_manifests_too(models, tensors):
    folder = with_manifest(models.write("out", tensors))
    found = check_manifest(folder)
    assert found.ok
    assert found.checked == len(tensors)
    assert read_manifest(folder).tensors.keys() == tensors.keys()


def test_what_is_remembered_plays_no_part(written):
    checkpoint = Checkpoint.open(written)
    remember(checkpoint, dict.fromkeys(checkpoint.tensors, "0" * 64))
    assert tensor_digests(checkpoint)["steps"] == "0" * 64
    assert check_manifest(written).ok


# Something changed


def test_every_changed_byte_of_every_file_is_found(written):
    seen, refused = 0, 0
    for file in sorted(path for path in written.rglob("*") if path.is_file()):
        raw = file.read_bytes()
        for place in range(0, len(raw), 5):
            file.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
            try:
                assert not check_manifest(written).ok, (file.name, place)
                seen += 1
            except CheckpointError:  # no model any more: found as well
                refused += 1
        file.write_bytes(raw)
    assert seen > 50
    assert refused > 50
    assert check_manifest(written).ok


def test_a_changed_value_is_named(written):
    rewrite(
        written / FIRST,
        lambda t: t | {"model.layers.2.w": t["model.layers.2.w"].nextafter(torch.tensor(9.0))},
    )
    assert summary(check_manifest(written)) == (("model.layers.2.w",), (), (), {})


def test_two_tensors_that_changed_places_are_named(written):
    names = "model.layers.0.w", "model.layers.2.w"
    rewrite(written / FIRST, lambda t: t | {names[0]: t[names[1]], names[1]: t[names[0]]})
    assert summary(check_manifest(written)) == (names, (), (), {})


@pytest.mark.parametrize(
    "change",
    [lambda w: w.view(4, 3), lambda w: w.reshape(-1), lambda w: w.view(torch.int32), lambda w: w.double()],
    ids=["turned", "flat", "integers", "wider"],
)
def test_another_shape_or_dtype_is_a_change(written, change):
    rewrite(written / FIRST, lambda t: t | {"model.layers.0.w": change(t["model.layers.0.w"])})
    found = check_manifest(written)
    assert found.changed == ("model.layers.0.w",)
    assert found.companions == {FIRST: "changed"}  # its header says so too


def test_a_tensor_that_came_and_one_that_went_are_named(models, written):
    rewrite(written / FIRST, lambda t: {n: v for n, v in t.items() if n != "steps"} | {"new": torch.ones(2)})
    index = json.loads((written / INDEX).read_text())
    del index["weight_map"]["steps"]
    index["weight_map"]["new"] = FIRST
    (written / INDEX).write_text(json.dumps(index))
    found = check_manifest(written)
    assert (found.missing, found.extra, found.checked) == (("steps",), ("new",), 5)
    assert found.companions == {INDEX: "changed", FIRST: "changed"}
    assert not found.ok


def test_a_missing_shard_is_no_model_any_more(written):
    (written / SECOND).unlink()
    with pytest.raises(CheckpointError, match="lacks 1 of 2 weight files"):
        check_manifest(written)


def test_a_shard_cut_off_is_no_model_any_more(written):
    raw = (written / SECOND).read_bytes()
    (written / SECOND).write_bytes(raw[:-1])
    with pytest.raises(CheckpointError, match="fetch it again"):
        check_manifest(written)


def test_another_model_put_before_the_shards_is_found(models, written):
    # A model.safetensors wins over an index; the old shards still lie there, as they were.
    other = {name: tensor + 1 for name, tensor in models.read(written).items()}
    save_file(other, written / "model.safetensors", {"format": "pt"})
    assert set(check_manifest(written).changed) == {name for name in other if name != "none"}


def test_changed_companions_are_named_with_what_became_of_them(written):
    (written / "config.json").write_text((written / "config.json").read_text() + " ")
    (written / "tokenizer.json").unlink()
    (written / "chat_template.jinja").write_text("{{ y }}")
    (written / "additional_chat_templates/tool.jinja").write_text("{{ z }}")
    assert summary(check_manifest(written)) == (
        (),
        (),
        (),
        {
            "additional_chat_templates/tool.jinja": "changed",
            "config.json": "changed",
            "tokenizer.json": "missing",
            "chat_template.jinja": "new",
        },
    )


def test_a_header_with_other_metadata_is_found(written):
    save_file(load_file(written / SECOND), written / SECOND, {"format": "tf"})
    assert summary(check_manifest(written)) == ((), (), (), {SECOND: "changed"})


# What it says


def test_the_manifest_says_what_it_was_given_and_the_digests(models):
    tensor = models.noise(1, 2, 3)
    folder = with_manifest(models.write("out", {"w": tensor}))
    said = json.loads((folder / "weights.json").read_text())
    assert {key: said[key] for key in ("format", "version", "palinode", *CONTENT)} == {
        "format": "palinode-weights",
        "version": 1,
        "palinode": __version__,
        **CONTENT,
    }
    block = blake3(tensor.numpy().tobytes()).digest()
    assert said["tensors"] == {"w": blake3(b"F32[2, 3]" + block).hexdigest()}
    assert said["companions"] == {"config.json": blake3((folder / "config.json").read_bytes()).hexdigest()}
    raw = (folder / "model.safetensors").read_bytes()
    assert said["headers"] == {"model.safetensors": blake3(raw[:-24]).hexdigest()}
    manifest = read_manifest(folder)
    assert (manifest.tensors, manifest.companions, manifest.headers) == tuple(
        said[part] for part in ("tensors", "companions", "headers")
    )
    assert manifest.content.items() >= CONTENT.items()
    assert "seal" not in manifest.content


def test_terms_have_the_folder_s_name_and_a_fingerprint_but_no_path(models):
    target, base = (models.make(name, {"w": torch.ones(2)}) for name in ("my target", "deep/er/base"))
    saved = save(target - 0.1 * (base - target), models.place / "out")
    terms = read_manifest(saved.checkpoint.folder).content["terms"]
    assert terms == [
        {"model": "my target", "coefficient": 1.1, "fingerprint": target.fingerprint()},
        {"model": "base", "coefficient": -0.1, "fingerprint": base.fingerprint()},
    ]
    assert str(models.place) not in json.dumps(terms)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(), JSON, max_size=4).map(lambda content: {"content": content}))
def test_any_content_is_read_back_as_it_was_given(written, content):
    found = read_manifest(with_manifest(written, content)).content
    assert {"content": found["content"]} == content


def test_content_that_json_writes_otherwise_keeps_the_seal(written):
    content = {
        "numbers": {10: "a", 9: "b"},
        "pair": (1, -0.0),
        "tiny": 5e-324,
        "big": 2**70,
        "half": "\udc80",
    }
    found = read_manifest(with_manifest(written, content)).content
    assert found["numbers"] == {"10": "a", "9": "b"}
    assert found["pair"] == [1, 0]
    assert math.copysign(1, found["pair"][1]) == -1
    assert (found["tiny"], found["big"], found["half"]) == (5e-324, 2**70, "\udc80")


def test_a_writer_that_gives_nonsense_is_told(written):
    checkpoint = Checkpoint.open(written)
    digests = tensor_digests(checkpoint)
    before = (written / "weights.json").read_bytes()

    with pytest.raises(ValueError, match="not JSON compliant"):
        write_manifest(written, checkpoint=checkpoint, digests=digests, content={"dose": float("nan")})
    assert (written / "weights.json").read_bytes() == before


# Manifests that cannot be used


def test_no_folder_and_no_manifest(models, tmp_path):
    for place in (tmp_path / "none", tmp_path / "a/b"):
        with pytest.raises(CheckpointError, match="there is no model folder"):
            check_manifest(place)
    folder = models.write("foreign", {"w": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"has no weights\.json, so nobody can tell what changed"):
        check_manifest(folder)
    with pytest.raises(CheckpointError, match="there is no model folder"):
        check_manifest(folder / "config.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "no manifest of Palinode"),
        ("null", "no manifest of Palinode"),
        ('{"format": "pt"}', "no manifest of Palinode"),
        ('{"format": "palinode-weights", "version": 2}', "has version 2, and this Palinode knows 1"),
        ('{"format": "palinode-weights", "version": "1"}', "has version '1'"),
        ('{"format": "palinode-weights", "version": 1}', "has been changed since it was written"),
        (
            '{"format": "palinode-weights", "version": 1, "seal": NaN}',
            "has been changed since it was written",
        ),
    ],
)
def test_a_damaged_manifest_says_so(written, text, words):
    (written / "weights.json").write_text(text)
    with pytest.raises(CheckpointError, match=words) as error:
        check_manifest(written)
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_text_are_a_damaged_manifest(written):
    (written / "weights.json").write_bytes(b"\xff\x00")
    with pytest.raises(CheckpointError, match="cannot be read"):
        check_manifest(written)


@pytest.mark.parametrize(
    ("old", "new"),
    [('"coefficient": 1.0', '"coefficient": 1.5'), ('"seed": 3', '"seed": 4'), ('"target"', '"base"')],
)
def test_a_formula_that_was_edited_is_noticed(written, old, new):
    text = (written / "weights.json").read_text()
    assert old in text
    (written / "weights.json").write_text(text.replace(old, new))
    with pytest.raises(CheckpointError, match="has been changed since it was written"):
        read_manifest(written)

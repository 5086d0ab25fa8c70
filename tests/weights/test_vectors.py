"""Directions as artefacts: what is stored, what it costs, and that it comes back."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from contextlib import suppress

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from palinode.errors import (
    AlgebraError,
    CheckpointError,
    InputError,
    MismatchError,
    OutputError,
    PalinodeError,
)
from palinode.weights import profile
from palinode.weights.adapters import LoraAdapter
from palinode.weights.tensors import Files
from palinode.weights.vectors import StoredVector, open_direction, save_vector

UP, DOWN, NORM, HALF = "layers.0.up.weight", "layers.0.down.weight", "norm.weight", "half.weight"


def values(change):
    """All of a change in float64."""
    out = np.empty(math.prod(change.shape))
    with Files() as files:
        change.read(files, 0, out)
    return torch.from_numpy(out.reshape(change.shape))


@pytest.fixture
def pair(models):
    """base, θ_1 and their difference as torch computes it: matrices (one bfloat16), a vector, a buffer."""
    base = {
        UP: models.noise(1, 20, 12),
        DOWN: models.noise(2, 12, 20),
        NORM: models.noise(3, 12),
        HALF: models.noise(4, 6, 6, dtype=torch.bfloat16),
        "steps": torch.arange(4),
        "frozen": torch.ones(3, 3),
    }
    theta = {
        name: (tensor + models.noise(10 + i, *tensor.shape, scale=1e-2)).to(tensor.dtype)
        for i, (name, tensor) in enumerate(base.items())
        if tensor.is_floating_point() and name != "frozen"
    }
    theta = {**base, **theta}
    difference = {name: theta[name].double() - base[name].double() for name in (UP, DOWN, NORM, HALF)}
    return models.make("base", base), models.make("theta_1", theta), difference


@pytest.fixture
def out(models):
    return models.place / "vectors" / "out"


def norm_of(tensors):
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


# Whole


def test_a_direction_comes_back_as_it_was(pair, out):
    base, theta_1, difference = pair
    stored = save_vector(theta_1 - base, out)
    assert sorted(path.name for path in out.iterdir()) == ["vector.json", "vector.safetensors"]
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]
    assert stored.changes.keys() == difference.keys()  # nothing of buffers, or of what did not move
    for name, tensor in difference.items():
        assert torch.equal(values(stored.changes[name]), tensor.float().double())
    assert (stored.kind, stored.dtype, stored.relative_error) == ("dense", "float32", 0.0)
    assert stored.norm == pytest.approx(norm_of(difference.values()), rel=1e-6)
    assert stored == StoredVector.open(out) == open_direction(out)
    assert stored.nbytes == 4 * sum(tensor.numel() for tensor in difference.values())


def test_the_safetensors_library_reads_the_file(pair, out):
    base, theta_1, difference = pair
    save_vector(theta_1 - base, out)
    found = load_file(out / "vector.safetensors")
    assert found.keys() == difference.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, difference[name].float())


def test_bfloat16_costs_what_it_says(pair, out):
    base, theta_1, difference = pair
    stored = save_vector(theta_1 - base, out, dtype="bfloat16")
    rounded = {name: tensor.float().bfloat16() for name, tensor in difference.items()}
    assert all(torch.equal(load_file(out / "vector.safetensors")[name], rounded[name]) for name in rounded)
    errors = {name: norm_of([difference[name] - rounded[name].double()]) for name in rounded}
    for name, error in errors.items():
        assert stored.tensors[name].relative_error == pytest.approx(
            error / norm_of([difference[name]]), rel=1e-5
        )
        assert stored.tensors[name].norm == pytest.approx(norm_of([difference[name]]), rel=1e-5)
    overall = math.hypot(*errors.values()) / norm_of(difference.values())
    assert stored.relative_error == pytest.approx(overall, rel=1e-5)
    assert 1e-4 < stored.relative_error < 1e-2


@pytest.mark.parametrize("storing", [{}, {"dtype": "bfloat16"}, {"rank": 2}])
def test_scales_that_hang_on_all_tensors_are_given_once_these_are_stored(pair, out, storing):
    base, theta_1, difference = pair
    plain = save_vector(theta_1 - base, out.parent / "plain", **storing)
    asked = []

    def scale_of(name):
        asked.append(name)
        assert [*out.parent.glob(".*/vector.safetensors")]  # all of it lies there by now
        return {UP: 3.0, NORM: 0.0}.get(name, 1.0)

    stored = save_vector(theta_1 - base, out, scale_of=scale_of, **storing)
    assert sorted(asked) == sorted(difference)
    for name in difference:
        scale = {UP: 3.0, NORM: 0.0}.get(name, 1.0)
        expected = (scale * values(plain.changes[name])).float().double()
        assert torch.allclose(values(stored.changes[name]), expected, rtol=1e-7, atol=0)
        assert stored.tensors[name].norm == pytest.approx(scale * plain.tensors[name].norm)
        assert stored.tensors[name].relative_error == plain.tensors[name].relative_error
    assert stored.norm == pytest.approx(math.hypot(*(each.norm for each in stored.tensors.values())))
    assert stored.fingerprint() != plain.fingerprint()
    again = save_vector(theta_1 - base, out.parent / "ones", scale_of=lambda _name: 1.0, **storing)
    assert again.fingerprint() == plain.fingerprint()
    written = [(out.parent / name / "vector.json").read_bytes() for name in ("plain", "ones")]
    assert written[0] == written[1]


def test_any_direction_can_be_stored(pair, models, out):
    base, theta_1, difference = pair
    theta_2 = models.make("theta_2", {**models.read(base.folder), NORM: models.noise(9, 12)})
    stored = save_vector(2 * (theta_1 - base) - 0.5 * (theta_2 - base), out)
    move = models.noise(9, 12).double() - models.read(base.folder)[NORM].double()
    torch.testing.assert_close(
        values(stored.changes[NORM]), 2 * difference[NORM] - 0.5 * move, rtol=0, atol=1e-6
    )
    torch.testing.assert_close(values(stored.changes[UP]), 2 * difference[UP], rtol=0, atol=1e-7)


def test_where_a_vector_came_from_is_on_record(pair, out):
    base, theta_1, _ = pair
    stored = save_vector(0.5 * (theta_1 - base), out)
    assert {(source.folder, source.fingerprint, source.coefficient) for source in stored.sources} == {
        ("base", base.fingerprint(), -0.5),
        ("theta_1", theta_1.fingerprint(), 0.5),
    }
    content = json.loads((out / "vector.json").read_text())
    assert (content["format"], content["version"]) == ("palinode-vector", 1)
    assert str(out.parent) not in (out / "vector.json").read_text(), "no path of the machine it was made on"


def test_a_tied_tensor_is_stored_and_counted_once(models, out):
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    states = [models.noise(seed, 8, 4) for seed in (1, 2)]
    for twice in (False, True):
        base, theta = (
            models.make(
                f"{name}{twice}",
                {embedding: state, **({head: state.clone()} if twice else {})},
                tie_word_embeddings=True,
            )
            for name, state in zip(("base", "theta"), states, strict=True)
        )
        stored = save_vector(theta - base, out.with_name(f"out{twice}"))
        assert stored.changes.keys() == {embedding}
        assert stored.norm == pytest.approx(norm_of([states[1] - states[0]]), rel=1e-6)
        back = (base + stored).save(models.place / f"back{twice}")
        assert torch.allclose(models.read(back.checkpoint.folder)[embedding], states[1], atol=1e-6)
        if twice:
            assert torch.equal(*models.read(back.checkpoint.folder).values())


def test_zero_size_tensors_and_scalars_are_no_trouble(models, out):
    base = models.make("base", {"none": torch.ones(0, 3), "one": torch.tensor(1.0), "row": torch.ones(1, 5)})
    theta = models.make(
        "theta", {"none": torch.ones(0, 3), "one": torch.tensor(3.0), "row": torch.zeros(1, 5)}
    )
    for number, options in enumerate(({}, {"rank": 1}, {"energy": 1.0})):
        stored = save_vector(theta - base, out.with_name(str(number)), **options)
        assert stored.changes.keys() == {"one", "row"}
        assert values(stored.changes["one"]).item() == 2
        assert stored.norm == 3


def test_a_direction_that_is_zero_everywhere_is_stored_as_nothing(models, out):
    base, same = (models.make(name, {"w": torch.ones(2)}) for name in ("base", "same"))
    stored = save_vector(same - base, out)
    assert (stored.changes, stored.norm, stored.relative_error) == ({}, 0, 0)


# Low rank


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_low_rank_costs_what_the_best_approximation_costs(pair, out, rank):
    base, theta_1, difference = pair
    stored = save_vector(theta_1 - base, out, rank=rank)
    rests = []
    for name in (UP, DOWN):
        change = stored.changes[name]
        assert change.rank is not None
        assert (change.rank, stored.tensors[name].rank) == (rank, rank)
        rest = float(torch.linalg.svdvals(difference[name])[rank:].norm())
        assert norm_of([values(change) - difference[name]]) == pytest.approx(rest, rel=1e-4)
        assert stored.tensors[name].relative_error == pytest.approx(
            rest / norm_of([difference[name]]), rel=1e-4
        )
        rests.append(rest)
    assert stored.changes[NORM].rank is None
    assert torch.equal(values(stored.changes[NORM]), difference[NORM].float().double())
    if rank == 7:
        assert stored.tensors[HALF].rank is None, "two 6 x 7 factors are no smaller than a 6 x 6 matrix"
    if rank >= 3:
        assert stored.relative_error == pytest.approx(
            math.hypot(*rests) / norm_of(difference.values()), rel=1e-4
        )
    assert stored.kind == "low_rank"


@pytest.mark.parametrize("energy", [0.3, 0.6, 0.8])
def test_energy_takes_the_smallest_rank_that_keeps_it(pair, out, energy):
    base, theta_1, difference = pair
    stored = save_vector(theta_1 - base, out, energy=energy)
    for name in (UP, DOWN):
        squares = torch.linalg.svdvals(difference[name]).square()
        shares = torch.cumsum(squares, 0) / squares.sum()
        rank = int((shares < energy).sum()) + 1
        change = stored.changes[name]
        if rank * sum(change.shape) >= math.prod(change.shape):
            assert change.rank is None
        else:
            assert change.rank == rank
            assert 1 - stored.tensors[name].relative_error ** 2 >= energy
    assert any(change.rank is not None for change in stored.changes.values())


def test_low_rank_factors_can_be_bfloat16(pair, out):
    base, theta_1, difference = pair
    stored = save_vector(theta_1 - base, out, rank=4, dtype="bfloat16")
    raw = load_file(out / "vector.safetensors")
    assert {tensor.dtype for tensor in raw.values()} == {torch.bfloat16}
    product = raw[f"{UP}.left"].double() @ raw[f"{UP}.right"].double()
    torch.testing.assert_close(values(stored.changes[UP]), product, rtol=0, atol=1e-15)
    error = norm_of([difference[UP] - product]) / norm_of([difference[UP]])
    assert stored.tensors[UP].relative_error == pytest.approx(error, rel=1e-5)


def test_an_adapter_is_stored_at_its_rank_without_loss(models, out):
    folder = models.place / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 6}))
    a, b = models.noise(1, 3, 30), models.noise(2, 20, 3)
    save_file({"up.lora_A.weight": a, "up.lora_B.weight": b}, folder / "adapter_model.safetensors")
    adapter = open_direction(folder)
    assert isinstance(adapter, LoraAdapter)
    for number, options in enumerate(({"rank": 3}, {"energy": 1.0})):
        stored = save_vector(adapter, out.with_name(str(number)), **options)
        assert stored.tensors["up.weight"].rank == 3
        assert stored.relative_error < 1e-6
        expected = 2 * (b.double() @ a.double())
        torch.testing.assert_close(values(stored.changes["up.weight"]), expected, rtol=0, atol=1e-5)
    again = save_vector(stored, out, dtype="bfloat16")
    assert [source.fingerprint for source in again.sources] == [stored.fingerprint()]
    (folder / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="holds a whole model and an adapter"):
        open_direction(folder)
    assert again.tensors["up.weight"].rank is None


def test_factors_never_take_the_name_of_another_tensor(models, out):
    odd = {"w": models.noise(1, 9, 9), "w.left": models.noise(2, 9, 9), "v": models.noise(3, 9, 9)}
    base, theta = (
        models.make(name, {k: i * v for k, v in odd.items()}) for i, name in enumerate(("base", "theta"))
    )
    stored = save_vector(theta - base, out, rank=1)
    assert {name: tensor.rank for name, tensor in stored.tensors.items()} == {"w": None, "w.left": 1, "v": 1}


# In a formula


def test_a_stored_vector_does_what_the_difference_does(pair, models, out):
    base, theta_1, _ = pair
    vector = save_vector(theta_1 - base, out)
    (base - 0.5 * vector).save(models.place / "by_vector", rounding="nearest")
    (base - 0.5 * (theta_1 - base)).save(models.place / "by_difference", rounding="nearest")
    assert models.same_model(models.place / "by_vector", models.place / "by_difference")
    measured = profile({"vector": vector, "difference": theta_1 - base})
    assert measured.norms()["vector"] == pytest.approx(vector.norm, rel=1e-5)
    assert measured.cosine("vector", "difference") == pytest.approx(1, abs=1e-6)


def test_any_slicing_of_a_low_rank_vector_gives_the_same_bytes(pair, out):
    base, theta_1, _ = pair
    change = save_vector(theta_1 - base, out, rank=5).changes[UP]
    whole = values(change).numpy().reshape(-1)
    for size in (1, 11, 12, 13, 100):
        part = np.empty(240)
        with Files() as files:
            for start in range(0, 240, size):
                change.read(files, start, part[start : start + size])
        assert part.tobytes() == whole.tobytes()


def test_progress_is_told_every_weight(pair, out):
    base, theta_1, _ = pair
    heard = []
    save_vector(theta_1 - base, out, on_progress=heard.append)
    assert sum(heard) == sum(info.size for info in base.tensors.values() if info.is_float)


# What cannot be stored


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "int8"}, "a vector cannot be stored in 'int8'; choose one of float32, bfloat16"),
        ({"rank": 0}, "a rank of 0 leaves nothing"),
        ({"rank": -3}, "a rank of -3 leaves nothing"),
        ({"energy": 0.0}, "an energy of 0.0 is no share"),
        ({"energy": 1.5}, "an energy of 1.5 is no share"),
        ({"energy": math.nan}, "an energy of nan is no share"),
        ({"energy": 0.5, "rank": 3}, "a rank and an energy were given"),
    ],
)
def test_settings_that_cannot_be_are_refused(pair, out, options, said):
    base, theta_1, _ = pair
    with pytest.raises(InputError, match=said):
        save_vector(theta_1 - base, out, **options)
    assert not out.parent.exists()


def test_directions_that_cannot_be_stored_are_refused(pair, models, out):
    base, theta_1, _ = pair
    with pytest.raises(AlgebraError, match="the direction is zero"):
        save_vector(base - base, out)
    with pytest.raises(MismatchError, match="disagree on"):
        save_vector(models.make("other", {"w": torch.ones(2)}) - base, out)
    small, wide = (
        save_vector(
            models.make(f"a{n}", {"w": torch.ones(n)}) - models.make(f"b{n}", {"w": torch.zeros(n)}),
            out.with_name(str(n)),
        )
        for n in (2, 3)
    )
    with pytest.raises(MismatchError, match="in two shapes"):
        save_vector(small + wide, out)
    with pytest.raises(MismatchError, match="has no such weights"):
        save_vector(small + (theta_1 - base), out)
    broken = models.read(theta_1.folder)
    broken[NORM][2] = math.nan
    with pytest.raises(CheckpointError, match=r"values in norm\.weight that are not finite"):
        save_vector(models.make("broken", broken) - base, out)
    huge = models.make("huge", {"w": torch.tensor([1e300], dtype=torch.float64)})
    with pytest.raises(InputError, match="has values that float32 cannot hold"):
        save_vector(huge - models.make("zero", {"w": torch.zeros(1, dtype=torch.float64)}), out)
    assert not out.exists()
    assert not [path for path in out.parent.iterdir() if path.name.startswith(".")]


def test_places_that_cannot_be_written_to_are_refused(pair, out, monkeypatch):
    base, theta_1, _ = pair
    direction = theta_1 - base
    with pytest.raises(OutputError, match="lie inside one another"):
        save_vector(direction, base.folder / "vector")
    with pytest.raises(OutputError, match="exists and is not empty"):
        save_vector(direction, base.folder)
    usage = shutil.disk_usage(base.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OutputError, match="make room"):
        save_vector(direction, out)
    assert not out.parent.exists()


# All or nothing

KILLED = """
import os, signal, sys
from palinode.weights import Checkpoint
from palinode.weights.vectors import save_vector
base, theta = map(Checkpoint.open, sys.argv[1:3])
save_vector(theta - base, sys.argv[3], on_progress=lambda _: os.kill(os.getpid(), signal.SIGKILL))
"""


def test_a_killed_save_leaves_nothing_under_the_final_name(pair, out):
    base, theta_1, _ = pair
    call = [sys.executable, "-c", KILLED, str(base.folder), str(theta_1.folder), str(out)]
    killed = subprocess.run(call, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert [path.name for path in out.parent.iterdir()] == [".out.partial"]
    with pytest.raises(CheckpointError):
        open_direction(out.with_name(".out.partial"))
    save_vector(theta_1 - base, out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_interrupt_leaves_no_leftovers(pair, out):
    base, theta_1, _ = pair
    files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - the folder changes while it is listed
    with pytest.raises(KeyboardInterrupt):
        save_vector(theta_1 - base, out, on_progress=lambda _: signal.raise_signal(signal.SIGINT))
    assert list(out.parent.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == files  # noqa: PTH208


# What cannot be opened


def refusal(folder) -> str:
    with pytest.raises(CheckpointError) as error:
        open_direction(folder)
    message = str(error.value)
    assert "\n" not in message
    assert str(folder) in message
    assert message[-1] not in ".!"
    return message


def test_folders_without_a_direction_are_refused(pair, tmp_path):
    assert "there is no folder" in refusal(tmp_path / "nowhere")
    assert "neither a stored vector (vector.json) nor a LoRA adapter" in refusal(pair[0].folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(version=2),
        lambda content: content.update(format="other"),
        lambda content: content.update(kind="sparse"),
        lambda content: content.update(dtype="int8"),
        lambda content: content.update(norm=None),
        lambda content: content.update(norm=math.nan),
        lambda content: content.update(norm=10**400),
        lambda content: content.update(relative_error="0"),
        lambda content: content.pop("tensors"),
        lambda content: content.update(tensors=[]),
        lambda content: content.update(tensors={}),
        lambda content: content.update(terms=[{}]),
        lambda content: content.update(terms=3),
        lambda content: content["tensors"].pop(UP),
        lambda content: content["tensors"].update(more=content["tensors"][UP]),
        lambda content: content["tensors"][UP].update(shape=[12, 20]),
        lambda content: content["tensors"][UP].update(shape=[240]),
        lambda content: content["tensors"][UP].update(shape=None),
        lambda content: content["tensors"][UP].update(rank=2),
        lambda content: content["tensors"][UP].update(rank=None),
        lambda content: content["tensors"][UP].update(rank="x"),
        lambda content: content["tensors"][NORM].update(rank=1),
        lambda content: content["tensors"][NORM].update(norm=math.inf),
    ],
)
def test_facts_that_cannot_be_are_refused(pair, out, change):
    base, theta_1, _ = pair
    save_vector(theta_1 - base, out, rank=3)
    content = json.loads((out / "vector.json").read_text())
    change(content)
    (out / "vector.json").write_text(json.dumps(content))
    refusal(out)


def test_damaged_files_are_refused(pair, out):
    base, theta_1, _ = pair
    save_vector(theta_1 - base, out)
    file = out / "vector.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    refusal(out)
    file.write_bytes(whole.replace(b'"F32"', b'"I32"'))
    assert "do not belong together" in refusal(out)
    file.unlink()
    refusal(out)
    (out / "vector.json").write_text("[")
    refusal(out)


def test_a_copy_of_a_vector_has_its_fingerprint(pair, out):
    base, theta_1, _ = pair
    stored = save_vector(theta_1 - base, out, rank=2)
    shutil.copytree(out, out.with_name("copy"))
    copy = StoredVector.open(out.with_name("copy"))
    assert copy != stored
    assert copy.fingerprint() == stored.fingerprint()
    assert save_vector(theta_1 - base, out.with_name("3"), rank=3).fingerprint() != stored.fingerprint()


def test_opening_reads_no_values(pair, out):
    """A vector of 2 TB opens at once: only headers are read."""
    base, theta_1, _ = pair
    save_vector(theta_1 - base, out)
    side = 1 << 20
    header = json.dumps(
        {"w": {"dtype": "BF16", "shape": [side, side], "data_offsets": [0, 2 * side * side]}}
    ).encode()
    with (out / "vector.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + 2 * side * side)  # a hole
    content = json.loads((out / "vector.json").read_text())
    content |= {
        "dtype": "bfloat16",
        "tensors": {"w": {"shape": [side, side], "rank": None, "norm": 0, "relative_error": 0}},
    }
    (out / "vector.json").write_text(json.dumps(content))
    change = StoredVector.open(out).changes["w"]
    out_values = np.ones(1000)
    with Files() as files:
        change.read(files, side * side - 1000, out_values)
    assert not out_values.any()


# Fuzz

BITS = [b"2", b"3", b"0", b"null", b"F32", b"true"]
ODD = [b"-1", b"0", b"9" * 25, b"1e400", b"NaN", b"[]", b"{}", b'"x"', b"null", b"BF16", b"I8"]


def mutated(raw, chance):
    """Some bytes with something changed, put in, taken out or cut off."""
    raw = bytearray(raw)
    for _ in range(chance.choice([1, 1, 2, 4])):
        place, kind = chance.randrange(len(raw) + 1), chance.randrange(6)
        if kind == 0:
            raw[place : place + 1] = bytes([chance.randrange(256)])
        elif kind == 1:
            raw[place:place] = bytes([chance.randrange(256)])
        elif kind == 2:
            del raw[place : place + chance.choice([1, 3, 20])]
        elif kind == 3:
            raw[place:place] = raw[chance.randrange(len(raw) + 1) :][: chance.choice([1, 5, 20])]
        elif kind == 4:
            raw = bytearray(bytes(raw).replace(chance.choice(BITS), chance.choice(ODD), 1))
        else:
            del raw[place:]
    return bytes(raw)


def read_all(direction):
    with Files() as files:
        for change in direction.changes.values():
            assert math.prod(change.shape) < 1e7
            change.read(files, 0, np.empty(math.prod(change.shape), np.float32))


@pytest.mark.slow
def test_ten_thousand_damaged_directions_give_an_error_or_a_result(models, tmp_path):
    whole = tmp_path / "adapter"
    whole.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {"k": 3}, "use_rslora": False}
    (whole / "adapter_config.json").write_text(json.dumps(config))
    shapes = {"q.lora_A.weight": (2, 5), "q.lora_B.weight": (6, 2), "k.lora_A.weight": (3, 5)}
    shapes |= {"k.lora_B.weight": (6, 3), "e.lora_embedding_A": (2, 5), "e.lora_embedding_B": (6, 2)}
    tensors = {name: models.noise(seed, *shape) for seed, (name, shape) in enumerate(shapes.items())}
    save_file(tensors, whole / "adapter_model.safetensors")
    originals = [whole, save_vector(open_direction(whole), tmp_path / "vector", rank=1).folder]
    chance, opened = random.Random(11), 0
    for _ in range(10_000):
        copy = shutil.copytree(chance.choice(originals), tmp_path / "copy", dirs_exist_ok=True)
        file = chance.choice(sorted(copy.iterdir()))
        file.write_bytes(mutated(file.read_bytes(), chance))
        with suppress(PalinodeError):
            read_all(open_direction(copy))
            opened += 1
        shutil.rmtree(copy)
    assert 100 < opened < 9000

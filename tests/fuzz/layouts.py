"""Checkpoints in every layout, and adapters: written with damage, read to their end, beside the libraries'
own readers."""

import io
import json
import pickle
import struct
import zipfile
from contextlib import suppress
from pathlib import Path

import torch
from damage import Damage
from on_disk import raw, write_config, write_dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from palinode.weights import Checkpoint
from palinode.weights.adapters import LoraAdapter
from palinode.weights.tensors import Files

# The layouts: each writes a small whole checkpoint, with damage where its parts are put together


def state():
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(4, 3, generator=generator)
    return {
        "model.embed_tokens.weight": shared,
        "model.norm.weight": torch.ones(3).bfloat16(),
        "turned": torch.randn(3, 5, generator=generator).t(),
        "ids": torch.arange(4),
        "lm_head.weight": shared,
    }


STATE = {name: tensor.clone().contiguous() for name, tensor in state().items()}


def safetensors_file(damage, tensors):
    raw = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    length = int.from_bytes(raw[:8], "little")
    header = damage.json(raw[8 : 8 + length], 0.7)
    return damage.maybe(struct.pack("<Q", len(header)) + header + raw[8 + length :], 0.3)


def safetensors(folder, damage):
    (folder / "model.safetensors").write_bytes(safetensors_file(damage, STATE))


def index(folder, damage):
    files = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(STATE)}
    for file in sorted(set(files.values())):
        part = {name: STATE[name] for name, place in files.items() if place == file}
        raw = safetensors_file(damage, part) if damage.random.random() < 0.1 else save(part)
        (folder / file).write_bytes(raw)
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": files}).encode()
    (folder / "model.safetensors.index.json").write_bytes(damage.json(text, 1.0))


def config(folder, damage):
    (folder / "model.safetensors").write_bytes(save(STATE))
    text = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(damage.json(text, 1.0))


def torch_file(damage, content, chance=0.5):
    """A file of torch.save; half the time the damage is to the pickle inside a sound archive."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    if damage.random.random() < 0.5:
        with zipfile.ZipFile(buffer) as archive:
            records = {info.filename: archive.read(info) for info in archive.infolist()}
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, record in records.items():
                archive.writestr(name, damage.maybe(record, 1.0 if name.endswith("data.pkl") else 0.05))
        return buffer.getvalue()
    return damage.maybe(buffer.getvalue(), chance)


def zipped(folder, damage):
    (folder / "pytorch_model.bin").write_bytes(torch_file(damage, state(), 1.0))


def training(folder, damage):
    if damage.random.random() < 0.2:
        content = damage.twist({"model": state(), "step": 3, "args": {"a": [1, 2]}})
        torch.save(content, folder / "last.pt")
        return
    optimiser = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    content = {"model": state(), "optimizer": optimiser, "step": 3, "args": ("a", 1.5, None, True)}
    (folder / "last.pt").write_bytes(torch_file(damage, content, 1.0))


def old(folder, damage):
    buffer = io.BytesIO()
    torch.save(state(), buffer, _use_new_zipfile_serialization=False)
    (folder / "pytorch_model.bin").write_bytes(damage.maybe(buffer.getvalue(), 1.0))


def pickle_index(folder, damage):
    files = {name: f"{number % 2}.bin" for number, name in enumerate(STATE)}
    for file in sorted(set(files.values())):
        part = {name: STATE[name] for name, place in files.items() if place == file}
        (folder / file).write_bytes(torch_file(damage, part, 0.2))
    text = json.dumps({"weight_map": files}).encode()
    (folder / "pytorch_model.bin.index.json").write_bytes(damage.json(text, 0.6))


def distributed(folder, damage):
    grids = {"model.embed_tokens.weight": {0: [1, 3]}, "turned": {1: [2]}, "ids": {0: [2]}}
    content = {f"model.{name}": tensor for name, tensor in STATE.items()}
    paths = {name: ("model", name.removeprefix("model.")) for name in content}
    content |= {"optim.step": torch.ones(1), "optim.lr": 0.1}
    planner_data = damage.random.choice([None, {**paths, "optim.step": ("optim", "step")}])
    write_dcp(
        folder, content, {f"model.{name}": grid for name, grid in grids.items()}, planner_data=planner_data
    )
    spoilt = damage.random.choice([".metadata", ".metadata", "__0_0.distcp", "__1_0.distcp"])
    if spoilt == ".metadata" and damage.random.random() < 0.6:
        content = damage.twist(pickle.loads((folder / spoilt).read_bytes()))
        with suppress(RuntimeError, AttributeError):  # some of it torch refuses to write
            (folder / spoilt).write_bytes(pickle.dumps(content, protocol=damage.random.choice([2, 4])))
        return
    (folder / spoilt).write_bytes(damage.maybe((folder / spoilt).read_bytes(), 1.0))


def adapter(folder, damage):
    (folder / "config.json").unlink()
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{module}.lora_A.weight": torch.ones(2, 4), f"{module}.lora_B.weight": torch.ones(4, 2)}
    text = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "rank_pattern": {"v_proj": 4},
    }
    (folder / "adapter_config.json").write_bytes(damage.json(json.dumps(text).encode(), 0.8))
    (folder / "adapter_model.safetensors").write_bytes(safetensors_file(damage, factors))


def write(layout):
    """A writer that begins with the config every layout has."""

    def fill(folder: Path, damage: Damage) -> None:
        write_config(folder, tie_word_embeddings=True)
        layout(folder, damage)

    return fill


# Reading them to the end


def contents(infos) -> dict[str, bytes]:
    """The bytes of all tensors by name; none may be far larger than what lies on the disk."""
    found = {}
    with Files() as files:
        for info in infos:
            buffer = memoryview(bytearray(info.nbytes))
            for start in range(0, info.nbytes, 1 << 12):
                info.read(files, start, buffer[start : start + (1 << 12)])
            found[info.name] = bytes(buffer)
    return found


def small(infos, folder: Path) -> None:
    on_disk = sum(path.stat().st_size for path in folder.iterdir())
    assert all(info.nbytes <= 4 * on_disk for info in infos), "a tensor is far larger than all files"


def read_adapter(folder: Path) -> None:
    changes = LoraAdapter.open(folder).changes.values()
    infos = [info for change in changes for info in change.infos]
    small(infos, folder)
    contents(infos)


def read_checkpoint(folder: Path) -> None:
    infos = Checkpoint.open(folder, allow_pickle=True).tensors.values()
    small(infos, folder)
    contents(infos)


def read_safetensors(folder: Path) -> None:
    """What we read the safetensors library reads too, byte for byte."""
    checkpoint = Checkpoint.open(folder)
    infos = checkpoint.tensors.values()
    small(infos, folder)
    ours = contents(infos)
    theirs: dict[str, bytes] = {}
    for file in {info.file for info in infos}:
        try:
            with safe_open(file, "pt") as opened:
                theirs |= {name: raw(opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise AssertionError(f"read what the safetensors library refuses ({error})") from None
    heads = {"lm_head.weight"} if checkpoint.tied else set()  # stored twice, it is one tensor here
    assert ours.keys() <= theirs.keys() <= ours.keys() | heads
    assert ours == {name: theirs[name] for name in ours}


def as_torch_reads(file: Path) -> dict[str, bytes]:
    """The tensors of a file as torch reads it; none where it refuses globals that we leave out."""
    try:
        found = torch.load(file, weights_only=True)
    except Exception:
        return {}
    return {name: raw(tensor) for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}


def read_torch(folder: Path) -> None:
    """Where torch reads the file as well, every tensor is the same.

    But for what torch takes from memory that it never filled: that is another thing at each call.
    """
    infos = Checkpoint.open(folder, allow_pickle=True).tensors.values()
    small(infos, folder)
    ours = contents(infos)
    theirs, again = (as_torch_reads(folder / "pytorch_model.bin") for _ in range(2))
    for name in ours.keys() & theirs.keys():
        assert theirs[name] == ours[name] or theirs[name] != again[name], f"{name} is read differently"


LAYOUTS = {
    safetensors: read_safetensors,
    index: read_safetensors,
    config: read_safetensors,
    zipped: read_torch,
    old: read_torch,
    training: read_checkpoint,
    pickle_index: read_checkpoint,
    distributed: read_checkpoint,
    adapter: read_adapter,
}
"""What writes a checkpoint, and what reads it."""

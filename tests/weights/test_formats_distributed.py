"""Distributed checkpoints (DCP), whole and in shards, written by torch and read without it."""

import json
import os
import pickle
import shutil
import socket
import tracemalloc
import warnings
from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from on_disk import CONFIG, assert_holds, read, tiny_llama, write_config, write_dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex

from palinode.errors import CheckpointError
from palinode.weights import Checkpoint, TensorInfo
from palinode.weights.formats.pieces import PiecedTensor

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")


def save(state, folder):
    dcp.save(state, checkpoint_id=str(folder), no_dist=True)
    return folder


def refusal(location, *, allow_pickle=True) -> str:
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(location, allow_pickle=allow_pickle)
    message = str(error.value)
    assert "\n" not in message
    return message


def state():
    torch.manual_seed(1)
    return {
        "model.embed_tokens.weight": torch.randn(7, 6),
        "model.norm.weight": torch.randn(6).bfloat16(),
        "cube": torch.randn(4, 5, 6, dtype=torch.float64),
        "scalar": torch.tensor(2.0),
        "ids": torch.arange(9).reshape(3, 3),
        "empty": torch.zeros(0, 3),
    }


GRIDS = {
    "rows": {"model.embed_tokens.weight": {0: [2, 5]}, "model.norm.weight": {0: [4]}, "ids": {0: [1, 2]}},
    "columns": {"model.embed_tokens.weight": {1: [1, 3]}, "cube": {2: [3]}, "ids": {1: [2]}},
    "both": {"model.embed_tokens.weight": {0: [3], 1: [2, 5]}, "cube": {0: [1], 1: [2, 4], 2: [5]}},
    "none": {},
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("step", [5, 16, 1 << 16])
def test_shards_along_any_dimension_are_put_together(tmp_path, grid, step):
    metadata = write_dcp(tmp_path / "step", state(), GRIDS[grid], ranks=3)
    checkpoint = Checkpoint.open(tmp_path / "step", allow_pickle=True)
    assert checkpoint.format == "distributed"
    assert checkpoint.config == {}
    assert_holds(checkpoint, state(), step)
    for name in GRIDS[grid]:
        assert len(metadata.state_dict_metadata[name].chunks) == len(checkpoint.tensors[name].pieces)
        assert set(checkpoint.tensors[name].files) <= set((tmp_path / "step").glob("*.distcp"))
    loaded = {name: torch.zeros_like(tensor) for name, tensor in state().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(loaded, checkpoint_id=str(tmp_path / "step"), no_dist=True)  # torch takes it for one, too
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state().items())


def test_what_torch_saves_in_one_process(tmp_path):
    model = tiny_llama()
    checkpoint = Checkpoint.open(save(model.state_dict(), tmp_path / "step"), allow_pickle=True)
    assert_holds(checkpoint, model.state_dict())
    assert {type(info) for info in checkpoint.tensors.values()} == {TensorInfo}


def test_a_config_beside_it_counts(tmp_path):
    folder = write_config(tmp_path / "step", tie_word_embeddings=True)
    save({"w": torch.ones(1)}, folder)
    assert Checkpoint.open(folder, allow_pickle=True).config == {**CONFIG, "tie_word_embeddings": True}
    (folder / "config.json").write_text("[]")
    assert "does not hold a JSON object" in refusal(folder)


def test_safetensors_go_first_and_a_lone_dot_file_means_nothing(models, tmp_path):
    folder = models.write("both", {"w": torch.ones(1)})
    save({"v": torch.ones(1)}, folder)
    assert Checkpoint.open(folder).tensors.keys() == {"w"}
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".metadata").write_bytes(b"some other program's")
    assert "holds no weights" in refusal(tmp_path / "empty")


# Which entries are the weights


OPTIMISER = {
    "state": {"w": {"exp_avg": torch.ones(2), "step": torch.tensor(1.0)}},
    "param_groups": [{"lr": 1.0}],
}
STATE = {"model.layers.0.weight": torch.randn(2), "lm_head.weight": torch.randn(3)}


@pytest.mark.parametrize(
    ("content", "left_out"),
    [
        (STATE, None),
        ({"model": STATE}, None),
        ({"model": STATE, "optim": OPTIMISER}, None),
        ({"model": STATE, "optimizer": OPTIMISER, "step": 3}, None),
        ({**STATE, "optimizer": OPTIMISER}, None),  # as torchtitan
        ({"app": {"model": STATE, "optim": OPTIMISER}}, None),  # as in PyTorch's own lesson
        ({"state_dict": {"model": STATE}}, None),
        ({"model": STATE, "optimizer_0": OPTIMISER, "ema": STATE}, "'model' and left out 2 other"),
        ({"model": {f"_orig_mod.{name}": tensor for name, tensor in STATE.items()}}, "'_orig_mod.'"),
    ],
)
def test_the_weights_are_found_beside_other_things(tmp_path, content, left_out):
    checkpoint = Checkpoint.open(save(content, tmp_path / "step"), allow_pickle=True)
    assert_holds(checkpoint, STATE)
    assert (left_out in checkpoint.notes[0]) if left_out else checkpoint.notes == ()


def test_names_that_were_flattened_before_saving_as_by_olmo_core(tmp_path):
    flat = {f"model.{name}": tensor for name, tensor in STATE.items()}
    flat |= {"optim.w.exp_avg": torch.ones(2), "optim.param_groups.lr": 1.0}
    for number, planner_data in enumerate((None, {name: (name,) for name in flat})):
        write_dcp(tmp_path / f"{number}", flat, planner_data=planner_data)
        assert_holds(Checkpoint.open(tmp_path / f"{number}", allow_pickle=True), STATE)


def test_without_an_optimiser_beside_it_a_prefix_belongs_to_the_names(tmp_path):
    names = {"model.embed_tokens.weight": torch.ones(2), "model.norm.weight": torch.ones(3)}
    write_dcp(tmp_path / "step", names)
    assert_holds(Checkpoint.open(tmp_path / "step", allow_pickle=True), names)


def test_a_module_whose_name_looks_like_an_optimisers(tmp_path):
    names = {"optimus.weight": torch.ones(2), "norm.weight": torch.ones(3)}
    assert_holds(Checkpoint.open(save(names, tmp_path / "step"), allow_pickle=True), names)


def test_tied_tensors_that_torch_saved_twice_stay_two(tmp_path):
    folder = write_config(tmp_path / "step", tie_word_embeddings=True)
    shared = torch.randn(4, 2)
    save({"model.embed_tokens.weight": shared, "lm_head.weight": shared}, folder)
    checkpoint = Checkpoint.open(folder, allow_pickle=True)
    assert len(checkpoint.tensors) == 2
    assert checkpoint.twin("lm_head.weight") == checkpoint.tensors["model.embed_tokens.weight"]


# What is refused


def test_it_must_be_allowed(tmp_path):
    message = refusal(save({"w": torch.ones(1)}, tmp_path / "step"), allow_pickle=False)
    assert "only as pickles (.metadata)" in message
    assert "--allow-pickle" in message


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_the_metadata_or_in_a_chunk_is_not_run(tmp_path):
    folder = tmp_path / "step"
    metadata = write_dcp(folder, {"w": torch.ones(2)})
    (folder / ".metadata").write_bytes(pickle.dumps(replace(metadata, planner_data=Bomb(tmp_path / "ran"))))
    assert "names posix.mkdir" in refusal(folder)
    write_dcp(folder, {"w": torch.ones(2)})
    torch.save(Bomb(tmp_path / "ran"), folder / "__0_0.distcp")
    chunk = folder / "__0_0.distcp"
    index = {MetadataIndex("w", torch.Size([0])): _StorageInfo(chunk.name, 0, chunk.stat().st_size)}
    (folder / ".metadata").write_bytes(pickle.dumps(replace(metadata, storage_data=index)))
    assert "names posix.mkdir" in refusal(folder)
    assert not (tmp_path / "ran").exists()


def changed(folder, **fields):
    metadata = write_dcp(folder, {"w": torch.ones(4, 2), "v": torch.ones(2)}, {"w": {0: [2]}})
    change = {name: make(getattr(metadata, name)) for name, make in fields.items()}
    (folder / ".metadata").write_bytes(pickle.dumps(replace(metadata, **change)))
    return folder


def first_place(change):
    def make(places):
        index, info = next((index, info) for index, info in places.items() if index.fqn == "w")
        return {**places, index: replace(info, **change)}

    return make


def without_first(places):
    return dict(list(places.items())[1:])


def sized(size):
    def make(described):
        return {**described, "w": replace(described["w"], size=torch.Size(size))}

    return make


def chunked(change):
    def make(described):
        return {**described, "w": replace(described["w"], chunks=change(described["w"].chunks))}

    return make


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"storage_data": without_first}, "does not say where w lies"),
        ({"storage_data": lambda _: None}, "does not say where w lies"),
        ({"storage_data": lambda _: {"w": 1}}, "does not say where its chunks lie"),
        ({"storage_data": first_place({"relative_path": "../x"})}, "a file outside its folder"),
        ({"storage_data": first_place({"relative_path": "/etc/passwd"})}, "a file outside its folder"),
        ({"storage_data": first_place({"relative_path": "gone.distcp"})}, "lacks 1 of 3 weight files"),
        ({"storage_data": first_place({"relative_path": "x" * 300})}, "lacks 1 of 3 weight files"),
        ({"storage_data": first_place({"relative_path": "\ud800"})}, "lacks 1 of 3 weight files"),
        ({"storage_data": first_place({"offset": 10**6})}, "is cut off"),
        ({"storage_data": first_place({"length": 2**62})}, "is cut off"),
        ({"storage_data": first_place({"offset": 1})}, "is cut off or damaged"),
        ({"storage_data": first_place({"offset": -1})}, "does not say where its chunks lie"),
        ({"storage_data": first_place({"transform_descriptors": ["zstd"]})}, "is compressed"),
        ({"state_dict_metadata": lambda _: []}, "names no tensors"),
        ({"state_dict_metadata": sized([4, 3])}, "leave a gap or overlap"),
        ({"state_dict_metadata": sized([5, 2])}, "leave a gap or overlap"),
        ({"state_dict_metadata": sized([2, 2])}, "leave a gap or overlap"),
        ({"state_dict_metadata": sized([8])}, "leave a gap or overlap"),
        ({"state_dict_metadata": sized([2**40, 2**40])}, "leave a gap or overlap"),
        ({"state_dict_metadata": sized([1] * 40)}, "in a way that we do not know"),
        ({"state_dict_metadata": chunked(lambda chunks: chunks[:1])}, "leave a gap or overlap"),
        ({"state_dict_metadata": chunked(lambda chunks: [])}, "leave a gap or overlap"),
        (
            {"state_dict_metadata": chunked(lambda chunks: [replace(chunks[0], sizes=torch.Size([4, 2]))])},
            "for a chunk of w where the metadata says",
        ),
        ({"state_dict_metadata": lambda old: {**old, 3: old["w"]}}, "describes 3 in a way"),
        ({"state_dict_metadata": lambda old: {**old, "\ud800": old["w"]}}, "in a way that we do not know"),
        ({"planner_data": lambda _: {"w": ("v",)}}, "two tensors of one name"),
        ({"planner_data": lambda _: {"w": ()}}, "in a way that we do not know"),
    ],
)
def test_metadata_that_does_not_fit(tmp_path, fields, said):
    assert said in refusal(changed(tmp_path / "step", **fields))


def test_a_chunk_that_the_metadata_lists_twice_counts_once(tmp_path):
    folder = changed(tmp_path / "step", state_dict_metadata=chunked(lambda chunks: [*chunks, chunks[0]]))
    assert_holds(Checkpoint.open(folder, allow_pickle=True), {"w": torch.ones(4, 2), "v": torch.ones(2)})


def test_files_that_are_cut_off_or_gone(tmp_path):
    folder = tmp_path / "step"
    write_dcp(folder, {"w": torch.randn(8, 4)}, {"w": {0: [4]}})
    opened = Checkpoint.open(folder, allow_pickle=True)
    second = folder / "__1_0.distcp"
    content = second.read_bytes()
    for length in (0, 3, 100, len(content) - 1):
        second.write_bytes(content[:length])
        assert "is cut off" in refusal(folder)
    second.unlink()
    assert "lacks 1 of 2 weight files (first: __1_0.distcp); finish the download" in refusal(folder)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read(opened.tensors["w"])
    for content in (b"", b".", b"\x80\x04N.", b"<html>", pickle.dumps({"a": 1}), pickle.dumps(TensorInfo)):
        (folder / ".metadata").write_bytes(content)
        assert str(folder / ".metadata") in refusal(folder)


def test_a_quantised_dtype(tmp_path):
    write_dcp(tmp_path / "step", {"w": torch.ones(2).to(torch.float8_e5m2)})
    assert "w is stored as float8_e5m2" in refusal(tmp_path / "step")


def test_opening_does_not_load(tmp_path):
    save({"w": torch.zeros(4000, 1000)}, tmp_path / "step")
    tracemalloc.start()
    checkpoint = Checkpoint.open(tmp_path / "step", allow_pickle=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert checkpoint.nbytes == 16_000_000
    assert peak < 1_000_000


# Real ranks


def rank_main(rank, ranks, port, folder, how):
    """One of several processes that shard a model and save it together."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    try:
        model = tiny_llama(vocab_size=61)  # which does not divide
        if how == "fsdp":
            from torch.distributed.fsdp import fully_shard

            for layer in model.model.layers:
                fully_shard(layer, mesh=init_device_mesh("cpu", (ranks,)))
            fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
            content = model.state_dict()
        else:
            mesh = init_device_mesh("cpu", (2, ranks // 2))
            plans = {"columns": [Shard(1), Replicate()], "mesh": [Shard(0), Shard(1)]}
            content = {
                name: distribute_tensor(
                    tensor, mesh, plans[how] if tensor.dim() == 2 else [Shard(0), Replicate()]
                )
                for name, tensor in model.state_dict().items()
            }
        dcp.save({"model": content, "optim": {"step": torch.tensor(1.0)}}, checkpoint_id=folder)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fsdp", "columns", "mesh"])
def test_what_several_ranks_save_together(tmp_path, how):
    ranks, folder = 4, tmp_path / "step"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(rank_main, (ranks, port, str(folder), how), nprocs=ranks)
    checkpoint = Checkpoint.open(folder, allow_pickle=True)
    assert_holds(checkpoint, tiny_llama(vocab_size=61).state_dict(), step=1000)
    parts = checkpoint.tensors["model.embed_tokens.weight"]
    assert isinstance(parts, PiecedTensor)
    assert len(parts.pieces) == {"fsdp": 4, "columns": 2, "mesh": 4}[how]
    shutil.rmtree(folder)


def test_metadata_of_an_older_torch(tmp_path):
    """Before 2.3 an enum was written as a call of getattr, and the path of the folder was not there."""
    folder = tmp_path / "step"
    metadata = write_dcp(folder, {"w": torch.ones(2)})
    content = pickle.dumps(metadata, protocol=2)
    (folder / ".metadata").write_bytes(content)
    assert_holds(Checkpoint.open(folder, allow_pickle=True), {"w": torch.ones(2)})
    assert json.dumps(Checkpoint.open(folder, allow_pickle=True).config) == "{}"

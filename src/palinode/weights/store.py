"""Write a sum as an ordinary model folder, atomically, and tell later whether it still is what was written.

The output has the target's layout: same files (safetensors in any case), same tensors, same order. So every
header is known before any arithmetic, files are laid out at their final size, and slices are put in place
in any order, by several threads and processes. Everything is written into a neighbour folder that takes its
final name only when it is whole and has been read back.

Beside the weights lies a manifest, their formula with the digest of every tensor and of every file that
belongs to the model, by which `palinode verify` tells in one pass whether anything has changed:

    {"format": "palinode-weights", "version": 1, "palinode": …, "terms": [{"model": …, "coefficient": …}, …],
     "tensors": {name: digest}, "companions": {path: digest}, "headers": {path: digest}, "seal": …}

Digests are 64 hex digits of BLAKE3 (`fingerprints`). A header is what a safetensors file holds before its
first tensor; the seal is the digest of all the rest of the manifest.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import blake3
import numpy as np

from palinode.errors import CheckpointError, OutputError, told_as, writing
from palinode.records import beside, read_json, write_text
from palinode.version import __version__
from palinode.weights.arithmetic import Evaluator, Formula, Settings, Slice, every_of, map_slices, slices
from palinode.weights.atomic import check_output, claimed, is_claimed, publish
from palinode.weights.fingerprints import (
    DIGEST,
    Stamps,
    block_digest,
    check_files,
    check_stamps,
    companion_digests,
    file_digest,
    remember,
    take_stamps,
    tensor_digest,
    tensor_digests,
)
from palinode.weights.folders import INDEX, SINGLE, ModelFolder, is_pickle
from palinode.weights.foreign import copy_inside
from palinode.weights.geometry import Dose, DoseMeter, choose_rounding, part_of, shortfalls
from palinode.weights.preflight import Rows, check_sum
from palinode.weights.tensors import (
    BLOCK,
    FLOAT_BYTES,
    MAX_JSON,
    Files,
    TensorInfo,
    by_file,
    header_of,
    map_blocks,
)

SHARD = 5_000_000_000
"""Bytes of a file, where the target's own files cannot be taken over."""


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One file to be written: its header, and where each tensor goes."""

    name: str
    header: bytes
    tensors: Mapping[str, TensorInfo]
    size: int


def plan_files(anchor: ModelFolder, code: str | None, *, kept: Collection[str] = ()) -> list[OutputFile]:
    """Plan the output files after the anchor's own; floating-point tensors but those `kept` are in `code`."""
    files = by_file(anchor.tensors.values())
    ours = all(path.suffix == ".safetensors" for path in files)
    if ours and len(files) > 1:
        return [_planned(path.name, infos, code, kept) for path, infos in files.items()]
    everything = [info for infos in files.values() for info in infos]
    shards = [everything] if ours else list(_shards(everything))
    if len(shards) < 2:
        return [_planned(SINGLE, everything, code, kept)]
    stem, suffix = Path(SINGLE).stem, Path(SINGLE).suffix
    names = [f"{stem}-{place + 1:05d}-of-{len(shards):05d}{suffix}" for place in range(len(shards))]
    return [_planned(name, shard, code, kept) for name, shard in zip(names, shards, strict=True)]


def _shards(infos: Sequence[TensorInfo]) -> Iterator[list[TensorInfo]]:
    shard: list[TensorInfo] = []
    for info in infos:
        if shard and sum(member.nbytes for member in shard) + info.nbytes > SHARD:
            yield shard
            shard = []
        shard.append(info)
    if shard:
        yield shard


def _planned(name: str, infos: Sequence[TensorInfo], code: str | None, kept: Collection[str]) -> OutputFile:
    placed, end = list[TensorInfo](), 0
    for info in infos:
        kind = code if code and info.is_float and info.name not in kept else info.dtype
        nbytes = info.size * (FLOAT_BYTES[kind] if info.is_float else info.itemsize)
        placed.append(TensorInfo(info.name, kind, info.shape, Path(name), end, nbytes))
        end += nbytes
    header = header_of(placed)
    tensors = {info.name: replace(info, offset=len(header) + info.offset) for info in placed}
    return OutputFile(name, header, tensors, len(header) + end)


class OutputFiles:
    """The planned files, open for writing; closed by `stack`."""

    def __init__(
        self, files: Sequence[OutputFile], folder: Path, stack: ExitStack, *, create: bool = True
    ) -> None:
        """Lay the files out at their final size with their headers, unless they are there already."""
        self._folder = folder
        self._places = {name: info for file in files for name, info in file.tensors.items()}
        self._handles = dict[Path, int]()
        for file in files:
            with writing(folder / file.name):
                flags = os.O_RDWR | (os.O_CREAT | os.O_EXCL if create else 0)
                self._handles[Path(file.name)] = handle = os.open(folder / file.name, flags, 0o666)
                stack.callback(os.close, handle)
                if not create:
                    continue
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(handle, 0, file.size)
                else:  # macOS
                    os.ftruncate(handle, file.size)
                os.pwrite(handle, file.header, 0)

    def write(self, name: str, start: int, values: memoryview) -> None:
        """Put raw bytes into a tensor's place, from its byte `start` on."""
        info, done = self._places[name], 0
        with writing(self._folder / info.file):
            while done < len(values):
                done += os.pwrite(self._handles[info.file], values[done:], info.offset + start + done)

    def copy(self, infos: Iterable[TensorInfo]) -> None:
        """Copy tensors as they are, a block at a time."""
        with Files() as files:
            for info in infos:
                for start in range(0, info.nbytes, BLOCK):
                    raw = memoryview(bytearray(min(BLOCK, info.nbytes - start)))
                    info.read(files, start, raw)
                    self.write(info.name, start, raw)

    def sync(self) -> None:
        """Wait until everything written is on disk."""
        for handle in self._handles.values():
            os.fsync(handle)


def write_index(files: Sequence[OutputFile], folder: Path) -> None:
    """Write which tensor lies in which file, where there are several."""
    if len(files) == 1:
        return
    total = sum(info.nbytes for file in files for info in file.tensors.values())
    names = {name: file.name for file in files for name in file.tensors}
    text = json.dumps(
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}, indent=2
    )
    (folder / INDEX).write_text(text + "\n", encoding="utf-8")


def copy_companions(anchor: ModelFolder, folder: Path, dtype: str | None) -> None:
    """Copy config, tokenizer, processor and licence of the target; note a changed dtype in the config.

    A config that came out of the weight file itself (GGUF) is written down.
    """
    for path in (*anchor.companions(), *anchor.papers()):
        place = folder / path.relative_to(anchor.folder)
        place.parent.mkdir(exist_ok=True)
        copy_inside(anchor.folder, path, place)
    place = folder / "config.json"
    if anchor.config and (dtype or not place.exists()):
        config = {key: value for key, value in anchor.config.items() if key != "torch_dtype" or not dtype}
        text = json.dumps(config | ({"dtype": dtype} if dtype else {}), indent=2)
        place.write_text(text + "\n", encoding="utf-8")


Checksums = dict[tuple[str, int], int]
"""Sum of the 64-bit words of each block of 512 KiB, by tensor and number of the block."""


Written = tuple[Dose, str, tuple[str, ...], Mapping[str, float]]
"""Dose, rounding, notes and seconds, as `checkpoint.Saved` has them."""


# The plan


@dataclass(frozen=True, slots=True)
class _Job:
    """Everything that decides the bytes to be written."""

    formula: Formula
    asked: Settings
    settings: Settings
    share: float | None
    """Of the dose that rounding to nearest would have delivered, where that was asked."""
    output: Path
    files: Sequence[OutputFile]
    parts: Sequence[Slice]
    workers: int | None
    notes: tuple[str, ...]
    stamps: Stamps
    """Of all inputs, from before any of their numbers was read."""


def plan(form: Formula, output: Path, asked: Settings, rows: Rows, workers: int | None) -> _Job:
    """Check that everything fits, and settle how it is rounded; nothing is written."""
    check_files(form.checkpoints)
    stamps = take_stamps(form.operands)
    others = [checkpoint for checkpoint in form.checkpoints if checkpoint != form.anchor]
    fit = check_sum(form.anchor, others, form.displacements, rows=rows)
    notes = [*(note for checkpoint in form.checkpoints for note in checkpoint.notes), *fit.notes]
    parts = list(slices(form.anchor, shared_rows=fit.shared_rows))
    check_output(output, [term.folder for term in form.operands])
    chosen, share = choose_rounding(form, asked, parts)
    if asked.rounding == "auto" and chosen.rounding == "stochastic":
        notes.append(
            f"rounded stochastically (seed {chosen.seed}): to nearest, about {share:.1%} of the change would "
            "have arrived"
        )
    files = plan_files(form.anchor, asked.code)
    return _Job(form, asked, chosen, share, output, files, parts, workers, tuple(notes), stamps)


# Writing it


def share(parts: Sequence[Slice], rank: int, count: int) -> list[Slice]:
    """Return one process's part of the slices: contiguous, and of about as many bytes as the others'."""
    ends = np.cumsum([0, *(part.count * part.info.itemsize for part in parts)])
    total = max(int(ends[-1]), 1)
    return [part for part, start in zip(parts, ends, strict=False) if start * count // total == rank]


def write(job: _Job, *, check: bool, divided: bool, on_progress: Callable[[int], None] | None) -> Written:
    """Write what was planned, `divided` over the processes of a run; see `checkpoint.save`."""
    divided = divided and os.environ.get("WORLD_SIZE", "1") != "1"
    check = check or divided
    seconds, left = dict[str, float](), beside(job.output).exists() and not is_claimed(beside(job.output))
    with claimed(job.output) as partial:
        inputs = [term.folder for term in job.formula.operands]
        check_output(job.output, inputs, needs=sum(file.size for file in job.files))
        with ExitStack() as stack, _timed(seconds, "sum"):
            out = OutputFiles(job.files, partial, stack)
            if divided:
                meter, checksums = _fill_together(job, partial, on_progress)
            else:
                meter, checksums = _fill(job, job.parts, out, on_progress)
            out.copy(info for info in job.formula.anchor.tensors.values() if not info.is_float)
        write_index(job.files, partial)
        copy_companions(job.formula.anchor, partial, job.asked.dtype)
        _leave_out(job, meter)
        dose, made = meter.result(), ModelFolder.open(partial)
        notes = (*job.notes, *shortfalls(dose, _asked(job.formula)))
        with _timed(seconds, "check"):
            if check:
                digests, content = _read_back(made, job, checksums), _content(job, dose, notes)
                write_manifest(partial, checkpoint=made, digests=digests, content=content)
        check_files(job.formula.checkpoints)
        check_stamps(job.stamps, job.formula.operands)
        with _timed(seconds, "publish"):
            publish(partial, job.output)
    if check:
        remember(ModelFolder.open(job.output), digests)
    if left:
        told = (
            f"an earlier run was interrupted while it wrote {job.output.name}; what it left was cleared away"
        )
        notes = (told, *notes)
    return dose, job.settings.rounding, notes, seconds


def _fill_together(
    job: _Job, folder: Path, on_progress: Callable[[int], None] | None
) -> tuple[DoseMeter, Checksums]:
    """Put all slices in place, each process its share in the files that lie there; return the same."""
    from palinode.processes import everywhere

    (meter, checksums), *others = everywhere(_fill_share, job, folder, alone={"on_progress": on_progress})
    for own, found in others:
        meter.merge(own)
        checksums |= found
    return meter, checksums


def _fill_share(
    job: _Job, folder: Path, *, on_progress: Callable[[int], None] | None = None
) -> list[tuple[DoseMeter, Checksums]]:
    """Put this process's share in place, as all do; return what each of them has found."""
    from palinode.processes import said_by_all, world

    rank, count = world()
    heard = on_progress and (lambda amount: on_progress(amount * count))  # the others are about as far
    with ExitStack() as stack:
        out = OutputFiles(job.files, folder, stack, create=False)
        meter, checksums = _fill(job, share(job.parts, rank, count), out, heard)
        out.sync()
    return said_by_all((meter, checksums))


def _fill(
    job: _Job, parts: Sequence[Slice], out: OutputFiles, on_progress: Callable[[int], None] | None
) -> tuple[DoseMeter, Checksums]:
    """Put these slices in place; return what they add to the dose, and the checksums of their blocks."""
    meter, checksums = DoseMeter(job.formula.names), Checksums()
    uneven = {part.info.name for part in job.parts if part.alone}  # their slices do not end with blocks

    def start() -> Callable[[Slice], tuple[np.ndarray, list[int]]]:
        evaluator = Evaluator(job.formula, job.settings, files, measure=True)

        def work(part: Slice) -> tuple[np.ndarray, list[int]]:
            values, totals = evaluator.evaluate(part)
            raw = values.view(np.uint8).data
            out.write(part.info.name, part.start * values.itemsize, raw)
            return totals, [checksum(raw[place : place + BLOCK]) for place in range(0, len(raw), BLOCK)]

        return work

    def collect(part: Slice, result: tuple[np.ndarray, list[int]]) -> None:
        totals, found = result
        if not job.formula.anchor.is_second_copy(part.info.name):
            every = 1 if part.alone else every_of(part.info)
            meter.add(part_of(part.info.name), totals, part.count, every=every)
        if part.info.name not in uneven:
            first = part.start * FLOAT_BYTES[job.settings.code or part.info.dtype] // BLOCK
            checksums.update({(part.info.name, first + place): total for place, total in enumerate(found)})

    with Files() as files:
        map_slices(parts, start, collect=collect, workers=job.workers, on_progress=on_progress)
    return meter, checksums


def _leave_out(job: _Job, meter: DoseMeter) -> None:
    """Tell the meter what stays the target's: tensors that are copied, and rows that nobody else has."""
    for part in job.parts:
        if part.alone and not job.formula.anchor.is_second_copy(part.info.name):
            meter.leave_out(part_of(part.info.name), part.count, weights=True)
    for name, info in job.formula.anchor.tensors.items():
        if not info.is_float:
            meter.leave_out(part_of(name), info.size, weights=False)


def checksum(raw: memoryview) -> int:
    """Return the sum of the 64-bit words of a block, modulo 2^64; bytes left over count as one more word."""
    words, rest = divmod(len(raw), 8)
    total = int(np.frombuffer(raw, "<u8", words).sum(dtype=np.uint64))
    return (total + int.from_bytes(raw[len(raw) - rest :], "little")) % 2**64


# Finishing


def _read_back(written: ModelFolder, job: _Job, checksums: Checksums) -> dict[str, str]:
    """Read what was written, compare it with what was computed, and return the digest of every tensor.

    Raises OutputError when a tensor is missing or has another shape, or a block has other bytes.
    """
    planned = {name: info for file in job.files for name, info in file.tensors.items()}
    places = {name: (info.dtype, info.shape) for name, info in written.tensors.items()}
    if places != {name: (info.dtype, info.shape) for name, info in planned.items()}:
        raise OutputError(f"{job.output} does not hold the tensors that were written; is the disk sound?")
    blocks: dict[str, list[bytes]] = {name: [] for name in written.tensors}

    def look(_info: TensorInfo, raw: memoryview) -> tuple[bytes, int]:
        return block_digest(raw), checksum(raw)

    for info, (digest, total) in map_blocks(written.tensors.values(), look, workers=job.workers):
        number = len(blocks[info.name])
        if checksums.get((info.name, number), total) != total:
            raise OutputError(
                f"{job.output}: block {number} of {info.name} does not read as it was written; "
                "is the disk sound?"
            )
        blocks[info.name].append(digest)
    return {name: tensor_digest(info, blocks[name]) for name, info in written.tensors.items()}


def _content(job: _Job, dose: Dose, notes: Sequence[str]) -> dict[str, Any]:
    """Return what the manifest says of the sum.

    A term goes by the last part of its folder's path: where the models lay on the writer's machine is
    nobody's business. What was never hashed is read once more for its fingerprint.
    """
    return {
        "terms": [
            {"model": term.folder.name, "coefficient": coefficient, "fingerprint": term.fingerprint()}
            for term, coefficient in job.formula.terms.items()
        ],
        "dtype": job.asked.dtype,
        "precision": job.settings.precision,
        "rounding": {"asked": job.asked.rounding, "used": job.settings.rounding, "seed": job.settings.seed},
        "nearest_would_deliver": job.share,
        "dose": asdict(dose),
        "notes": list(notes),
    }


def _asked(form: Formula) -> dict[str, float]:
    """Return the scale asked for along each named direction, where the change is a sum of them."""
    if not form.names:
        return {}
    scales, *_ = np.linalg.lstsq(form.along.T, form.change, rcond=None)
    if not np.allclose(form.along.T @ scales, form.change, rtol=1e-9, atol=1e-12):
        return {}
    return dict(zip(form.names, map(float, scales), strict=True))


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Note the wall time of a phase."""
    began = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - began


MANIFEST = "weights.json"
MADE_BY, MADE_AS = "palinode-weights", 1
DIGESTED = ("tensors", "companions", "headers")
Finding = Literal["changed", "missing", "new"]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What `weights.json` says: digests by name or path, and what the writer told about the sum."""

    tensors: Mapping[str, str]
    companions: Mapping[str, str]
    """Config, tokenizer, templates and the index, by path in the folder."""
    headers: Mapping[str, str]
    """Of the weight files, by path in the folder."""
    content: Mapping[str, Any]
    """All the rest: version of Palinode, formula, dtype, rounding, seed, dose."""


@dataclass(frozen=True, slots=True)
class Verification:
    """How a model folder compares with its manifest; names of tensors, paths of files in the folder."""

    checked: int
    """Number of tensors that were compared."""
    nbytes: int
    """Their bytes."""
    changed: tuple[str, ...]
    """Tensors with other values, dtype or shape."""
    missing: tuple[str, ...]
    """Tensors of the manifest that are not in the folder."""
    extra: tuple[str, ...]
    """Tensors in the folder that are not in the manifest."""
    companions: Mapping[str, Finding]
    """Files of the model (config, tokenizer, index, headers of the weight files) that are not as written."""

    @property
    def ok(self) -> bool:
        """Whether everything is as it was written."""
        return not (self.changed or self.missing or self.extra or self.companions)


def write_manifest(
    folder: Path, *, checkpoint: ModelFolder, digests: Mapping[str, str], content: Mapping[str, Any]
) -> None:
    """Write `weights.json` into a finished model folder, in one step.

    `checkpoint` is that folder, opened; `digests` has one for each of its tensors. `content` is strict JSON
    and goes in as it is, before the digests.
    """
    parts = {
        "tensors": dict(digests),
        "companions": _companion_digests(folder, checkpoint),
        "headers": {path.name: _header_digest(path) for path in _weight_files(folder)},
    }
    head = {"format": MADE_BY, "version": MADE_AS, "palinode": __version__}
    whole = json.loads(json.dumps({**head, **content, **parts}, allow_nan=False))  # as a reader will find it
    whole["seal"] = _seal(whole)
    write_text(folder / MANIFEST, json.dumps(whole, indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Return what `weights.json` says.

    Raises CheckpointError when there is none, or it is damaged, or of a version that we do not know.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no model folder {folder}")
    with told_as(CheckpointError, f"{folder / MANIFEST} cannot be read", "write the model again"):
        if not (folder / MANIFEST).exists():
            raise CheckpointError(
                f"{folder} has no {MANIFEST}, so nobody can tell what changed; name a model that "
                "Palinode wrote"
            )
        found = read_json(folder / MANIFEST)
    if not isinstance(found, dict) or found.get("format") != MADE_BY:
        raise CheckpointError(f"{folder / MANIFEST} is no manifest of Palinode; write the model again")
    if found.get("version") != MADE_AS:
        raise CheckpointError(
            f"{folder / MANIFEST} has version {found.get('version')!a}, and this Palinode knows {MADE_AS}; "
            "use the Palinode that wrote it"
        )
    digests = [found[part].values() if isinstance(found.get(part), dict) else [None] for part in DIGESTED]
    sound = all(isinstance(one, str) and DIGEST.fullmatch(one) for part in digests for one in part)
    if found.pop("seal", None) != _seal(found) or not sound:
        raise CheckpointError(
            f"{folder / MANIFEST} has been changed since it was written; write the model again"
        )
    parts = {part: found.pop(part) for part in DIGESTED}
    return Manifest(**parts, content=found)


def check_manifest(
    folder: Path, *, workers: int | None = None, on_progress: Callable[[int], None] | None = None
) -> Verification:
    """Compare a model folder with its manifest, in one pass over all of its bytes; nothing is remembered.

    Files that are no part of the model (a report, a record) may be added freely, but not code, and no weights
    that another program might take for the model's. `on_progress` is told the
    bytes of tensors that are done. Raises CheckpointError when there is no manifest, or the folder is no
    model that can be opened (a file cut off or missing, a header or config that is broken).
    """
    manifest, checkpoint = read_manifest(folder), ModelFolder.open(folder)
    found = tensor_digests(checkpoint, workers=workers, cached=False, on_progress=on_progress)
    written = manifest.tensors
    files = [path for path in _weight_files(folder) if path.name in manifest.headers]
    loaded = [*_weight_files(folder), *filter(is_pickle, folder.iterdir()), *folder.rglob("*.py")]
    names = {path.relative_to(folder).as_posix() for path in loaded}
    return Verification(
        checked=len(found.keys() & written.keys()),
        nbytes=checkpoint.nbytes,
        changed=tuple(name for name in written if name in found and found[name] != written[name]),
        missing=tuple(name for name in written if name not in found),
        extra=tuple(name for name in found if name not in written),
        companions={
            **dict.fromkeys(sorted(names - {*manifest.headers, *manifest.companions}), "new"),
            **_compare(manifest.companions, _companion_digests(folder, checkpoint)),
            **_compare(manifest.headers, {path.name: _header_digest(path) for path in files}),
        },
    )


def _companion_digests(folder: Path, checkpoint: ModelFolder) -> dict[str, str]:
    """Return the digests of all files beside the weights that decide how the model is read."""
    index = {INDEX: file_digest(folder / INDEX)} if (folder / INDEX).is_file() else {}
    return {**companion_digests(checkpoint), **index}


def _weight_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.safetensors") if path.is_file())


def _header_digest(path: Path) -> str:
    """Return the digest of what a safetensors file holds before its first tensor."""
    with (
        told_as(CheckpointError, f"{path} cannot be read", "write the model again"),
        path.open("rb") as stream,
    ):
        length = stream.read(8)
        header = stream.read(min(int.from_bytes(length, "little"), MAX_JSON))
    return blake3.blake3(length + header).hexdigest()


def _seal(manifest: Mapping[str, Any]) -> str:
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return blake3.blake3(text.encode()).hexdigest()


def _compare(written: Mapping[str, str], found: Mapping[str, str]) -> dict[str, Finding]:
    """Return what became of the files that are not as they were written."""
    kinds: dict[str, Finding] = {name: "changed" for name in written if found.get(name) != written[name]}
    kinds |= {name: "missing" for name in written if name not in found}
    return kinds | {name: "new" for name in found if name not in written}

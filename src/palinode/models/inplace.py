"""Put a weighted sum into a live model: any (α, β) can be tried without writing a model.

The values are those that `weights.save` would write, rounding included, so that what a search
sees is what the saved model does. Every parameter is touched once; no second model is held. On a device a
`LiveModel` keeps what the sums are made of there, so that the next point costs one pass over it.

Two models read together: v = v_target − α·ReLU(v_reinforced − v_target) (spec: baselines.md §17).

The result answers and is measured like a model, but it has no weights of its own: it exists while both
models are in memory, and cannot be saved. Answers are made without a key-value cache, so slowly.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutput

from palinode.errors import MismatchError, OutputError
from palinode.models.loading import DTYPES, build_empty, free_memory
from palinode.weights.arithmetic import (
    Evaluator,
    Formula,
    Operands,
    Settings,
    Slice,
    formula,
    map_slices,
    name_key,
    slices,
    stays,
)
from palinode.weights.checkpoint import Checkpoint, Point
from palinode.weights.displacement import Term, check_displacements
from palinode.weights.fingerprints import check_files, unchanged
from palinode.weights.foreign import quiet_transformers
from palinode.weights.geometry import choose_rounding
from palinode.weights.preflight import check_fit
from palinode.weights.tensors import Files, TensorInfo, is_head

PIECE = 1 << 24
"""Elements that are summed at a time on a device."""

ROOM = 0.15
"""Share of a device's memory that what is kept there leaves to the passes."""


class PutSettings(TypedDict, total=False):
    """How `LiveModel.put` forms and rounds a sum: as `weights.save` does."""

    dtype: str | None
    rounding: str
    seed: int
    precision: str


def put(
    point: Point,
    model: PreTrainedModel,
    *,
    only: Callable[[str], bool] | None = None,
    **how: Unpack[PutSettings],
) -> None:
    """Overwrite the model's parameters with the point's values, once: `LiveModel.put`, with all its options.

    The model may be on any device: sums are formed on the processor.
    """
    LiveModel(model, held=False).put(point, only=only, **how)


class LiveModel:
    """A model in memory that takes one point after another.

    Sums are formed on the processor, slice by slice, from the files. On a GPU what they are made of is read
    once and `held` there, as far as there is room, else in pinned memory of the host: the next sum of the
    same is formed there, with the same bits.
    """

    def __init__(self, model: PreTrainedModel, *, held: bool | None = None) -> None:
        self.model = model
        if held is None:
            held = model.device.type == "cuda"
        self._held = _HeldOperands(model.device) if held else None

    def put(
        self, point: Point, *, only: Callable[[str], bool] | None = None, **how: Unpack[PutSettings]
    ) -> None:
        """Overwrite the model's parameters with the point's values.

        `dtype`, `rounding`, `seed` and `precision` are those of `save`. Putting the target itself brings the
        target back bit for bit. `only` leaves all tensors as they are whose name in the files it says no to.
        Raises MismatchError when the model's parameters and the checkpoint's tensors are not the same.
        """
        anchor, form = point.anchor, formula(point.anchor, point.terms)
        asked = Settings(**how)
        check_fit(anchor, [other for other in form.checkpoints if other != anchor])
        check_files(form.checkpoints)
        check_displacements(anchor, form.displacements)
        flat = _flat_parameters(self.model, anchor)
        parts = list(slices(anchor))
        chosen, _ = choose_rounding(form, asked, parts)

        def take(part: Slice, values: Tensor) -> None:
            flat[part.info.name][part.start : part.start + part.count].copy_(values)

        def start() -> Callable[[Slice], None]:
            evaluator = Evaluator(form, chosen, files)

            @torch.no_grad()
            def work(part: Slice) -> None:
                values, _ = evaluator.evaluate(part)
                take(part, torch.from_numpy(values).view(DTYPES[chosen.code or part.info.dtype]))

            return work

        def wanted(parts: Iterable[Slice]) -> list[Slice]:
            return [part for part in parts if part.info.name in flat and (not only or only(part.info.name))]

        with Files() as files, unchanged(form.terms):
            pieces = wanted(slices(anchor, size=PIECE))
            try:
                if self._held and self._held.put(form, chosen, pieces, files, take):
                    return
            except torch.OutOfMemoryError:
                self._held = None
            map_slices(wanted(parts), start)  # which also knows what to say of values that are not finite


class _HeldOperands:
    """What sums are made of, on a device: the values of each checkpoint and displacement, piece by piece."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.values: dict[tuple[Term, Slice, bool], Tensor] = {}
        """As they were read, in bfloat16 where that holds them exactly; the last says for sums in float64."""
        self.zero: set[tuple[Term, Slice, bool]] = set()
        """Those of them that are zero all over, so that nobody waits for a device to say it."""
        self.copies: dict[tuple[tuple[Term, ...], Slice, bool], Sequence[tuple[int, int]]] = {}
        """Which checkpoints of a sum are alike on a piece; see `LoadedSlice.copies`."""

    @torch.no_grad()
    def put(
        self,
        form: Formula,
        settings: Settings,
        pieces: Sequence[Slice],
        files: Files,
        take: Callable[[Slice, Tensor], None],
    ) -> bool:
        """Form a sum and have its pieces taken, in their dtype; return whether all of it is finite."""
        self._read(form, settings, pieces, files)
        largest = []
        for piece in pieces:
            wide, code = _is_wide(form, settings, piece), settings.code or piece.info.dtype
            total = self._sum(form, piece, wide)
            key = name_key(settings.seed, piece.info.name) if settings.rounding == "stochastic" else None
            stored = rounded(total, DTYPES[code], key, piece.start)
            largest += [torch.linalg.vector_norm(one, torch.inf).float() for one in (total, stored)]
            take(piece, stored)
        return not largest or bool(torch.stack(largest).isfinite().all())

    def _read(self, form: Formula, settings: Settings, pieces: Sequence[Slice], files: Files) -> None:
        """Read what is not there yet; what this sum is not made of gives way to it."""

        def known(piece: Slice) -> bool:
            wide = _is_wide(form, settings, piece)
            return (form.operands, piece, wide) in self.copies and all(
                (term, piece, wide) in self.values for term in form.operands
            )

        missing = [piece for piece in pieces if not known(piece)]
        if missing and len(form.operands) > 1:
            self.values = {key: kept for key, kept in self.values.items() if key[0] in form.operands}

        def start() -> Callable[[Slice], None]:
            operands = Operands(form.checkpoints, form.displacements, files)

            def work(piece: Slice) -> None:
                wide = _is_wide(form, settings, piece)
                loaded = operands.load(piece, np.dtype(np.float64 if wide else np.float32))
                self.copies[form.operands, piece, wide] = loaded.copies(piece.count)
                for term, row in zip(form.operands, loaded.rows(piece.count), strict=True):
                    if (term, piece, wide) not in self.values:
                        self.values[term, piece, wide] = self._kept(row)
                        if not row.any():
                            self.zero.add((term, piece, wide))

            return work

        map_slices(missing, start)

    def _kept(self, row: np.ndarray) -> Tensor:
        """Return values where they stay: on the device, or in pinned memory of the host."""
        if row.dtype == np.uint16:
            values = torch.from_numpy(row.view(np.int16).copy()).view(torch.bfloat16)
        else:
            values = torch.from_numpy(row)
            halved = values.bfloat16()
            values = halved if torch.equal(halved.to(values.dtype), values) else values.clone()
        if self.device.type == "cuda":
            total = torch.cuda.mem_get_info(self.device)[1]
            if free_memory(self.device) - values.nbytes < ROOM * total:
                with suppress(RuntimeError):  # the host may not pin so much
                    return values.pin_memory()
                return values
        return values.to(self.device)

    def _sum(self, form: Formula, piece: Slice, wide: bool) -> Tensor:
        """Return a piece of a sum in the working dtype: the operations of the kernels, in their order."""
        held = [self.values[term, piece, wide] for term in form.operands]
        dtype, checkpoints = torch.float64 if wide else torch.float32, len(form.checkpoints)

        def row(place: int) -> Tensor:
            return held[place].to(self.device, dtype, non_blocking=True)

        copies = self.copies[form.operands, piece, wide]
        if stays(form, copies, lambda place: (form.displacements[place], piece, wide) in self.zero):
            return row(form.target)
        pivot, total, begin = row(0), None, 0
        for end, weight in zip(form.ends, form.weights, strict=True):
            group = None
            for place in form.order[begin:end]:
                values = row(place) - pivot if place < checkpoints else row(place)
                group = values if group is None else group + values
            assert group is not None
            scaled = group * float(weight)
            total, begin = scaled if total is None else total + scaled, end
        return pivot if total is None else pivot + total


def _is_wide(form: Formula, settings: Settings, piece: Slice) -> bool:
    """Tell whether a piece of a sum is formed in float64."""
    infos = (checkpoint.find(piece.info.name) for checkpoint in form.checkpoints)
    return settings.is_wide(piece.info) or any(info is not None and info.dtype == "F64" for info in infos)


def rounded(values: Tensor, dtype: torch.dtype, key: int | None, first: int) -> Tensor:
    """Return values in a dtype: to the nearest, or by chance, with the noise of `key` (`name_key`).

    `first` is the place of the first of them in their tensor. The bits are those that the kernels give, on
    any device.
    """
    if key is None or dtype not in (torch.bfloat16, torch.float16):
        return (values.float() if dtype.itemsize == 2 else values).to(dtype)
    values, noise = values.float(), noise_of(key, first, len(values), values.device)
    bits = values.view(torch.int32)
    if dtype == torch.bfloat16:
        return ((bits + (noise & 0xFFFF)) >> 16).to(torch.int16).view(torch.bfloat16)
    step, size = noise & 0x1FFF, values.abs()
    tiny = torch.copysign((size * 2.0**24 + step * 2.0**-13).floor() * 2.0**-24, values)
    return torch.where(size < 2.0**-14, tiny, ((bits + step) & ~0x1FFF).view(torch.float32)).half()


def noise_of(key: int, first: int, count: int, device: torch.device) -> Tensor:
    """Return 32 bits (as int32) for each of `count` elements from `first` on, as `kernels` makes them."""
    x = torch.arange(count, dtype=torch.int32, device=device) + _signed(first)
    x = (x ^ _signed(key)) + _signed((key >> 32) + (first >> 32) * 0x9E3779B9)
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _signed(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def _signed(bits: int) -> int:
    """Return the lowest 32 bits of a number as a signed one."""
    return (bits + (1 << 31)) % (1 << 32) - (1 << 31)


def _flat_parameters(model: PreTrainedModel, anchor: Checkpoint) -> dict[str, Tensor]:
    """Return where each of the checkpoint's tensors lies in the live model, as one dimension, by its name.

    A live model may hold all experts of a layer in one parameter: then an expert's matrix is a part of it.
    """
    parameters = dict(model.named_parameters())
    flat: dict[str, Tensor] = {}
    unfilled = {name: value.numel() for name, value in parameters.items()}
    for name, (own, start) in live_places(model, anchor).items():
        size = anchor.tensors[name].size
        flat[name] = parameters[own].data.view(-1)[start : start + size]
        unfilled[own] -= size
    left = next((name for name, count in unfilled.items() if count), None)
    if left is None:
        return flat
    if anchor.tied and is_head(left):
        raise MismatchError(
            f"the live model has {left} apart from its embedding, and {anchor.folder} has them tied; "
            "load the model from that folder"
        )
    raise MismatchError(
        f"the live model's parameter {left} has no counterpart in {anchor.folder}; "
        "this architecture renames its weights on loading, so give the scales as numbers"
    )


def live_places(model: PreTrainedModel, anchor: Checkpoint) -> dict[str, tuple[str, int]]:
    """Return where a checkpoint's tensors lie in a live model, by name: parameter, first element there."""
    infos = {  # as a checkpoint has tensors, each in a "file" of its own name
        name: TensorInfo(name, "F32", tuple(value.shape), Path(name), 0, 4 * value.numel())
        for name, value in model.named_parameters()
    }
    live, found = Checkpoint(anchor.folder, infos, {}), {}
    for name, info in anchor.tensors.items():
        place = live.find(name) or live.find(f"{model.base_model_prefix}.{name}")
        if not anchor.is_second_copy(name) and type(place) is TensorInfo and place.shape == info.shape:
            found[name] = str(place.file), place.offset // place.itemsize
    return found


def check_live(checkpoint: Checkpoint) -> None:
    """Raise MismatchError where `put` could not put sums of this checkpoint into its live model.

    The model is built without its weights. Raises CheckpointError when transformers cannot build it.
    """
    refused, advice = f"transformers cannot build {checkpoint.folder}", "take a model that it knows"
    with quiet_transformers(
        lambda error: f"{refused} ({type(error).__name__}: {error}); update transformers, or {advice}"
    ):
        model = build_empty(checkpoint)
    _flat_parameters(model, checkpoint)


class CombinedLogits(PreTrainedModel, GenerationMixin):
    """A causal language model whose logits are made from those of two."""

    def __init__(self, target: PreTrainedModel, reinforced: PreTrainedModel, alpha: float) -> None:
        words = [model.config.get_text_config().vocab_size for model in (target, reinforced)]
        if words[0] != words[1]:
            raise MismatchError(
                f"the target has {words[0]} words and the reinforced model {words[1]}; logits can only be "
                "put together of models with one vocabulary"
            )
        config = copy.deepcopy(target.config)
        config._attn_implementation = "eager"  # it has no attention of its own
        super().__init__(config)
        self.target = target
        self.reinforced = reinforced
        self.alpha = alpha
        self.train(False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, logits_to_keep: int = 0, **_others: Any
    ) -> CausalLMOutput:
        """Return the combined logits of the last `logits_to_keep` positions, or of all."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        own, risen = (model(**inputs).logits[:, -logits_to_keep:] for model in (self.target, self.reinforced))
        return CausalLMOutput(logits=combined_logits(own, risen, self.alpha))

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Any,  # noqa: ARG002 - transformers looks for this name
    ) -> dict[str, Any]:
        """Return whole rows for every token: nothing is kept between steps."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def get_output_embeddings(self) -> None:
        """Return None: the logits are of no single head."""
        return

    def save_pretrained(self, save_directory: Any, *_: Any, **__: Any) -> None:
        """Refuse: there are no weights to save."""
        raise OutputError(
            f"the combined model cannot be saved to {save_directory}: it has no weights of its own, only the "
            "logits of two models read together; use the method whp for a model on disk"
        )


def combined_logits(target: Tensor, reinforced: Tensor, alpha: float) -> Tensor:
    """Return v − α·ReLU(v_re − v)."""
    return target - alpha * torch.relu(reinforced - target)

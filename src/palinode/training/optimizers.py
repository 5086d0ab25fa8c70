"""What a training takes: the arithmetic of its passes, their room, and AdamW by where it lies.

Each of these choices holds less on the device:

    device   weights, gradients and both moments in float32 on the device
    8bit     the moments in 8 bits there, in blocks of 256 with a scale each (bitsandbytes)
    host     weights and moments in float32 in host memory, updated there; the device has the weights and
             gradients in the arithmetic of the passes, bfloat16 or float32

β .9 and .999, ε 1e-8; decay on matrices only, as transformers' Trainer has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.optim.adamw import adamw
from transformers import PreTrainedModel

from palinode.errors import InputError, RecipeError, told_as
from palinode.models.loading import free_memory
from palinode.models.reading import trained_parameters
from palinode.settings import TrainingSettings

AUTOCAST_FROM = 20_000_000
"""On a CPU, bfloat16 autocast pays off from about this many parameters (docs/lab-notes.md)."""

BYTES: Mapping[str, tuple[float, float, float, float]] = {
    "device": (4, 4, 8, 0),
    "8bit": (4, 4, 2.03, 0),
    "host": (2, 2, 0, 12),
}
"""By choice: bytes for each weight, of weights, gradients and moments on the device, and in host memory."""


PIECE = 1 << 25
"""Elements that pass between a GPU and its host at a time."""


class HostAdamW(torch.optim.Optimizer):
    """AdamW over float32 weights and moments in host memory; the live parameters are copies of the weights.

    The model's `state_dict` gives the weights as they are here.
    """

    def __init__(self, model: PreTrainedModel, groups: Any, lr: float, dtype: torch.dtype | None) -> None:
        super().__init__(groups, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0})
        self._ways = _Ways(model.device)
        for parameter in self._parameters():
            weight = parameter.detach().to("cpu", torch.float32, copy=True).contiguous()
            moments = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
            self.state[parameter] = {"step": torch.zeros(()), "weight": weight, **moments}
            parameter.data = parameter.data.to(dtype or parameter.dtype).contiguous()
        model.register_state_dict_post_hook(lambda _, live, *_others: self._give_weights(live))

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _give_weights(self, live: dict[str, Any]) -> None:
        held = {one.data_ptr(): self.state[one]["weight"] for one in self._parameters()}
        for name, value in live.items():
            live[name] = held.get(value.data_ptr(), value)

    @torch.no_grad()
    def step(self, _closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update weights here by the gradients there, piece by piece.

        While a piece is updated the next gradient comes from a GPU, and the last weights go there.
        """
        pieces = [
            (group, parameter, slice(start, start + PIECE))
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
            for start in range(0, parameter.numel(), PIECE)
        ]
        gradients = (parameter.grad.reshape(-1)[part] for _, parameter, part in pieces)
        for (group, parameter, part), gradient in zip(pieces, self._ways.fetch(gradients), strict=True):
            own = self.state[parameter]
            weight, mean, square = (own[name].view(-1)[part] for name in ("weight", "exp_avg", "exp_avg_sq"))
            step, (beta1, beta2) = own["step"].clone(), group["betas"]
            options = {name: group[name] for name in ("lr", "weight_decay", "eps")}
            options |= {"beta1": beta1, "beta2": beta2, "fused": True, "amsgrad": False, "maximize": False}
            adamw([weight], [gradient], [mean], [square], [], [step], **options)
            self._ways.give(weight, parameter.view(-1)[part])
            if part.stop >= parameter.numel():
                own["step"].copy_(step)
        self._ways.end()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state as it was saved: what lies here is not in the live parameters' type."""
        super().load_state_dict(state_dict)
        places = [place for group in state_dict["param_groups"] for place in group["params"]]
        for place, parameter in zip(places, self._parameters(), strict=True):
            saved = state_dict["state"].get(place, {})
            self.state[parameter].update({name: value.cpu() for name, value in saved.items()})
            with torch.no_grad():
                parameter.copy_(self.state[parameter]["weight"])


class _Ways:
    """How gradients come from a device and weights go there.

    From and to a GPU they pass through pinned memory: two buffers and a stream each way.
    """

    def __init__(self, device: torch.device) -> None:
        self.lanes = [_Lane(device), _Lane(device)] if device.type == "cuda" else []

    def fetch(self, gradients: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield gradients in float32 here, each of which holds until the next but one is asked for."""
        if not self.lanes:
            yield from (gradient.to("cpu", torch.float32) for gradient in gradients)
            return
        for lane in self.lanes:
            lane.stream.wait_stream(torch.cuda.current_stream(lane.stream.device))
        coming = None
        for gradient in gradients:
            buffer = self.lanes[0].next(gradient)
            self.lanes[0].copy(gradient, buffer)
            if coming is not None:
                yield coming()
            coming = self.lanes[0].awaited(buffer)
        if coming is not None:
            yield coming()

    def give(self, weight: Tensor, live: Tensor) -> None:
        """Have the live values be those of a weight here."""
        if not self.lanes:
            live.copy_(weight)
            return
        buffer = self.lanes[1].next(live)
        buffer.copy_(weight)
        self.lanes[1].copy(buffer, live)

    def end(self) -> None:
        """Have the device do nothing more before all weights are there."""
        for lane in self.lanes:
            torch.cuda.current_stream(lane.stream.device).wait_stream(lane.stream)


class _Lane:
    """One way between a GPU and its host: a stream, and two pinned buffers that take turns."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.buffers = [torch.empty(4 * PIECE, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self.through = [torch.cuda.Event() for _ in range(2)]
        self.turn = 0

    def next(self, like: Tensor) -> Tensor:
        """Return the next buffer, when what passed through it is there, as one of such values."""
        self.turn = 1 - self.turn
        self.through[self.turn].synchronize()
        return self.buffers[self.turn][: like.nbytes].view(like.dtype)

    def copy(self, source: Tensor, to: Tensor) -> None:
        """Begin to copy values from or to the last buffer."""
        with torch.cuda.stream(self.stream):
            to.copy_(source, non_blocking=True)
            self.through[self.turn].record()

    def awaited(self, buffer: Tensor) -> Callable[[], Tensor]:
        """Return how to get the last buffer's values in float32 when they are there."""
        through = self.through[self.turn]

        def wait() -> Tensor:
            through.synchronize()
            return buffer.float()

        return wait


def use_autocast(model: PreTrainedModel, settings: TrainingSettings) -> bool:
    """Tell whether the forward pass runs in bfloat16."""
    return autocasts(settings, model.device, model.num_parameters())


def autocasts(settings: TrainingSettings, device: torch.device, parameters: int) -> bool:
    """Tell the same of a model of so many parameters on a device."""
    if settings.precision != "auto":
        return settings.precision == "bfloat16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return bool(supported) and device.type == "cpu" and parameters >= AUTOCAST_FROM


def bytes_per_token(config: Mapping[str, Any], *, narrow: bool, recomputed: bool = False) -> int:
    """Return about how much memory the activations of a token take while training, logits included.

    `narrow` passes are in bfloat16; activations that are `recomputed` are those of one block at a time
    (docs/scale.md has what was measured).
    """
    wide = int(config.get("hidden_size") or config.get("n_embd") or 1024)
    deep = int(config.get("num_hidden_layers") or config.get("n_layer") or 16)
    inner = int(config.get("intermediate_size") or 4 * wide)
    block = 28 * wide + 8 * inner if narrow else 32 * wide + 16 * inner
    kept = block + 4 * wide * deep if recomputed else block * deep
    return 12 * int(config.get("vocab_size", 32_000)) + kept


def bytes_of_token(model: PreTrainedModel, settings: TrainingSettings) -> int:
    """Return the same of a live model."""
    config, recomputed = model.config.get_text_config().to_dict(), settings.gradient_checkpointing
    return bytes_per_token(config, narrow=use_autocast(model, settings), recomputed=recomputed)


def room_in_tokens(model: PreTrainedModel, settings: TrainingSettings, optimizer: str) -> int | None:
    """Return how many tokens a GPU has room for beside weights, gradients and moments; None elsewhere."""
    if model.device.type != "cuda":
        return None
    trained = sum(value.numel() for value in trained_parameters(model))
    room = 0.8 * free_memory(model.device) - sum(BYTES[optimizer][1:3]) * trained
    room -= 2 * model.num_parameters()
    return max(1, int(room / bytes_of_token(model, settings)))


def choose_optimizer(wanted: str, model: PreTrainedModel, *, room: float = 0) -> str:
    """Return the choice that is wanted; "auto" is the first of which a GPU has room for, "device" elsewhere.

    `room` is what passes need beside it, in bytes. Raises RecipeError where there is none.
    """
    if wanted != "auto" or model.device.type != "cuda":
        return "device" if wanted == "auto" else wanted
    trained = sum(value.numel() for value in trained_parameters(model))
    free = free_memory(model.device) + 4 * trained - room
    for name, (*there, here) in BYTES.items():
        usable = name != "8bit" or find_spec("bitsandbytes")
        if usable and sum(there) * trained < free and here * trained < psutil.virtual_memory().available:
            return name
    raise RecipeError(
        f"training all {trained:,} weights takes more memory than device and host have free; train "
        "an adapter (--lora), or take a larger device"
    )


def make_optimizer(name: str, model: PreTrainedModel, settings: TrainingSettings) -> torch.optim.Optimizer:
    """Return AdamW of that choice over what is trained."""
    lr, weight_decay = settings.learning_rate, settings.weight_decay
    trained = trained_parameters(model)
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    if name == "host":
        return HostAdamW(model, groups, lr, torch.bfloat16 if use_autocast(model, settings) else None)
    if name == "8bit":
        advice = "pip install 'palinode[quantise]', or set training.optimizer to \"host\""
        with told_as(InputError, "moments in 8 bits need bitsandbytes", advice, ImportError):
            import bitsandbytes
        library: Any = bitsandbytes.optim
        found: torch.optim.Optimizer = library.AdamW8bit(groups, lr=lr)
        return found
    return torch.optim.AdamW(groups, lr=lr, fused=model.device.type in ("cpu", "cuda"))


def kind_of(optimizer: torch.optim.Optimizer) -> str:
    """Return which choice an optimiser is."""
    plain = isinstance(optimizer, torch.optim.AdamW)
    return "host" if isinstance(optimizer, HostAdamW) else "device" if plain else "8bit"


def next_choice(optimizer: torch.optim.Optimizer) -> str | None:
    """Return what holds less on the device and can go on from there; None where nothing does."""
    kind = kind_of(optimizer)
    if kind == "device" and not optimizer.state and find_spec("bitsandbytes"):
        return "8bit"
    return "host" if kind == "device" or (kind == "8bit" and not optimizer.state) else None


def take_over(optimizer: torch.optim.Optimizer, before: torch.optim.Optimizer) -> None:
    """Give an optimiser in host memory the moments of the one on the device that it stands in for."""
    for parameter, known in before.state.items():
        for name in ("step", "exp_avg", "exp_avg_sq") if known else ():
            optimizer.state[parameter][name].copy_(known[name])
    before.state.clear()

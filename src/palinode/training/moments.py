"""What every layer reads, and filters of a vector by it: take from forget inputs, leave the retain inputs.

The second moments E[x xᵀ] are taken over the tokens of some rows. The decoder blocks are walked one after the
other with the rows' hidden states kept, so that one pass over the rows serves all layers and the sums of one
block are held at a time. Where a model carries more from block to block than hidden states, which is found
out on the first batches, each block takes a whole pass.

    linear layers, output head    E[x xᵀ] [D, D]; layers that read the same inputs share one
    fused experts                 one for each expert, of the tokens that are sent to it; divided by all
                                  tokens, so that it says how often the expert is asked as well
    embeddings                    the frequency of each token (or position) [V]
    scales of norms               the mean square of what is scaled [D]
    biases                        1

Padding is never counted, and `answers` counts only the positions that predict tokens of answers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from palinode.data.batches import Batch, pad_right
from palinode.data.tokenize import TokenRow
from palinode.errors import CheckpointError, DataError, InputError
from palinode.models.likelihoods import Say, padded_batches
from palinode.models.loading import check_positions
from palinode.models.reading import answer_places, decoder_blocks, model_inputs
from palinode.processes import calling, said_by_all, summed, world
from palinode.weights.kernels import rank_for

BATCH_TOKENS = 2048
STRIP = 128
"""Columns of a sum that are added at a time, from the diagonal on: the other half is the same."""
ONES = "ones"
"""The moment of a bias."""

Positions = Literal["all", "answers"]
Place = tuple[list[str], int]
"""Keys of the moments of a parameter, one or one for each expert, and the axis that reads the inputs."""


@dataclass
class Moments:
    """What some of a model's layers read."""

    values: dict[str, Tensor] = field(default_factory=dict)
    """By key: [D, D], or the diagonal [D]."""
    places: dict[str, list[Place]] = field(default_factory=dict)
    """By the name of a live parameter; a tied embedding has two places."""


def input_moments(
    model: PreTrainedModel,
    rows: Sequence[TokenRow],
    *,
    pad_id: int,
    positions: Positions = "all",
    on_progress: Callable[[int], None] | None = None,
    say: Say | None = None,
) -> Iterator[Moments]:
    """Yield the moments of each decoder block, and of what lies outside of them.

    `on_progress` hears rows, once for each block and once before. `say` hears where rows are read one by one.
    Raises DataError without rows, CheckpointError where padding cannot be told from the rest.
    """
    if not rows:
        raise DataError("there are no rows to send through the model; name a retain set")
    check_positions(model.config, rows)
    with calling(_input_moments, model, rows, pad_id, positions):
        yield from _input_moments(model, rows, pad_id, positions, on_progress, say)


@torch.no_grad()
def _input_moments(
    model: PreTrainedModel,
    rows: Sequence[TokenRow],
    pad_id: int,
    positions: Positions,
    on_progress: Callable[[int], None] | None = None,
    say: Say | None = None,
) -> Iterator[Moments]:
    """Yield the sums over the rows of all processes, of which each has its share."""
    rank, count = world()
    idle, rows = len(rows) <= rank, rows[rank::count] or rows[:1]
    places = padded_batches(model, rows, pad_id=pad_id, max_tokens=BATCH_TOKENS, max_rows=64, say=say)
    batches = [pad_right([rows[member] for member in members], pad_id=pad_id) for members in places]
    counted = [_counted(batch, positions, model.device) for batch in batches]
    for mask in counted if idle else ():
        mask.zero_()
    tokens = sum(said_by_all(sum(int(mask.sum()) for mask in counted)))
    if not tokens:
        raise DataError("no row has an answer whose positions could be counted; name other rows")
    report = on_progress or (lambda _rows: None)
    walk = _Walk(model, batches, counted, tokens, lambda done: report(count * done))
    yield from walk.by_block() if all(said_by_all(walk.can_go_by_block())) else walk.by_passes()


def _counted(batch: Batch, positions: Positions, device: torch.device) -> Tensor:
    """Return which positions of a batch count, bool [B, T]."""
    where = batch.mask == 1 if positions == "all" else answer_places(batch)
    return torch.from_numpy(where).to(device)


# Going through the model


@dataclass
class _Walk:
    """One way through a model with all batches."""

    model: PreTrainedModel
    batches: Sequence[Batch]
    counted: Sequence[Tensor]
    tokens: int
    advance: Callable[[int], None]

    def __post_init__(self) -> None:
        self.blocks = list(decoder_blocks(self.model))
        self.inside = {module for block in self.blocks for module in block.modules()}

    def can_go_by_block(self) -> bool:
        """Tell whether two batches come out of the blocks one by one as they do out of the whole model."""
        batches = self.batches[:2]
        try:
            opened = [self._opened(batch) for batch in batches]
            states = [first for first, _ in opened]
            for place, block in enumerate(self.blocks):
                for at, (_, calls) in enumerate(opened):
                    states[at] = _hidden(block(states[at], *calls[place].args, **calls[place].others))
            found = [self._closed(batch, last) for batch, last in zip(batches, states, strict=True)]
        except (TypeError, KeyError, IndexError, AttributeError, RuntimeError, ValueError):
            return False  # a block needs what only the whole model knows
        wholes = [self._through(batch).last_hidden_state for batch in batches]
        return all(torch.allclose(*pair, rtol=1e-4, atol=1e-5) for pair in zip(wholes, found, strict=True))

    def by_block(self) -> Iterator[Moments]:
        """Yield moments block by block, in one pass over the rows."""
        outer = {name: module for name, module in self.model.named_modules() if module not in self.inside}
        states, calls = [], []
        with _Sums(self, outer) as outside:
            for batch, mask in zip(self.batches, self.counted, strict=True):
                with outside.reading(mask):
                    opened, own = self._opened(batch, outside)
                states.append(opened)
                calls.append(own)
                self.advance(len(batch.ids))
            names = {module: name for name, module in self.model.named_modules()}
            for place, block in enumerate(self.blocks):
                own_modules = {names[module]: module for module in block.modules()}
                with _Sums(self, own_modules) as inner:
                    for at, mask in enumerate(self.counted):
                        call = calls[at][place]
                        with inner.reading(mask):
                            states[at] = _hidden(block(states[at], *call.args, **call.others))
                        self.advance(len(self.batches[at].ids))
                yield inner.moments()
            for batch, mask, final in zip(self.batches, self.counted, states, strict=True):
                with outside.reading(mask, on=False):
                    outside.head(self._closed(batch, final, outside))
        yield outside.moments()

    def by_passes(self) -> Iterator[Moments]:
        """Yield moments block by block, with a pass over the rows for each."""
        outer = {module for module in self.model.modules() if module not in self.inside}
        for place, members in enumerate([outer, *(set(block.modules()) for block in self.blocks)]):
            group = {name: module for name, module in self.model.named_modules() if module in members}
            with _Sums(self, group) as sums:
                for batch, mask in zip(self.batches, self.counted, strict=True):
                    with sums.reading(mask):
                        states = self._through(batch).last_hidden_state
                        if not place:
                            sums.head(states)
                    self.advance(len(batch.ids))
            yield sums.moments()

    def _through(self, batch: Batch) -> Any:
        return self.model.base_model(**model_inputs(self.model, batch))

    def _opened(self, batch: Batch, sums: _Sums | None = None) -> tuple[Tensor, list[_Call]]:
        """Return the states before the first block, and with what each block is called.

        The sums hear what lies before the blocks.
        """
        calls: list[_Call] = []

        def answer(call: _Call) -> Tensor:
            calls.append(call)
            if sums:
                sums.on = False
            return call.states

        with self._instead(answer):
            self._through(batch)
        return calls[0].states, calls

    def _closed(self, batch: Batch, states: Tensor, sums: _Sums | None = None) -> Tensor:
        """Return what the model makes of the states after the last block; the sums hear what lies there."""

        def answer(_call: _Call) -> Tensor:
            if sums:
                sums.on = True
            return states

        with self._instead(answer):
            found: Tensor = self._through(batch).last_hidden_state
        return found

    @contextmanager
    def _instead(self, answer: Callable[[_Call], Tensor]) -> Iterator[None]:
        """Let every block answer without doing its work."""
        with ExitStack() as stack:
            for block in self.blocks:

                def forward(*args: Any, **others: Any) -> Any:
                    states, *rest = args or (others.pop("hidden_states"),)
                    return answer(_Call(states, tuple(rest), others))

                block.forward = forward
                stack.callback(block.__dict__.pop, "forward")
            yield


@dataclass(frozen=True, slots=True)
class _Call:
    """What a block was called with."""

    states: Tensor
    args: tuple[Any, ...]
    others: Mapping[str, Any]


def _hidden(output: Any) -> Tensor:
    """Return the hidden states that a block puts out."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


# Adding up


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a linear layer, stored either way, or sends tokens to experts."""
    router = "router" in type(module).__name__.lower() and _axes(module) == 2
    return router or isinstance(module, nn.Linear | Conv1D)


def _is_experts(module: nn.Module) -> bool:
    """Tell whether a module holds the two matrices of all experts of a layer, as transformers fuses them."""
    up, down = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    if not isinstance(up, nn.Parameter) or not isinstance(down, nn.Parameter):
        return False
    return up.dim() == down.dim() == 3 and up.shape[1] == 2 * down.shape[2] and up.shape[2] == down.shape[1]


class _Sums:
    """Sums over the inputs of some modules, while it is entered."""

    def __init__(self, walk: _Walk, modules: Mapping[str, nn.Module]) -> None:
        self.walk = walk
        self.modules = modules
        self.values: dict[str, Tensor] = {}
        self.places: dict[str, list[Place]] = {}
        self.own: dict[str, str] = {}
        """Layer → the first layer that reads the same inputs."""
        self.seen: list[tuple[Tensor, str]] = []
        self.mask = self.real = torch.empty(0)
        self.on = False
        """Whether what modules read is added up."""
        self.handles: list[Any] = []
        tied = walk.model.get_output_embeddings()
        self.tied = tied is not None and tied.weight is walk.model.get_input_embeddings().weight

    def __enter__(self) -> _Sums:
        readers: list[tuple[Callable[[nn.Module], bool], Callable[..., None]]] = [
            (lambda module: isinstance(module, nn.Embedding), self._tokens),
            (_is_experts, self._experts),
            (is_linear, self._linear),
            (lambda module: "norm" in type(module).__name__.lower() and _axes(module) == 1, self._norm),
        ]
        for name, module in self.modules.items():
            read = next((own for fits, own in readers if fits(module)), None)
            if read is not None:
                self.handles.append(module.register_forward_pre_hook(self._hook(name, read)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    @contextmanager
    def reading(self, mask: Tensor, *, on: bool = True) -> Iterator[None]:
        """Read one batch, of which so much counts; `on` False: from when the blocks are through."""
        self.mask, self.on = mask, on
        self.real = mask.reshape(-1).nonzero()[:, 0]  # once for all layers: it has the device asked
        try:
            yield
        finally:
            self.on = False
            self.seen.clear()

    def moments(self) -> Moments:
        """Return sums as means over all counted tokens."""
        for total in self._over_all():
            for end in range(STRIP, len(total) if total.dim() == 2 else 0, STRIP):
                total[end:, end - STRIP : end] = total[end - STRIP : end, end:].T
        return Moments({name: total / self.walk.tokens for name, total in self.values.items()}, self.places)

    def _over_all(self) -> Iterable[Tensor]:
        """Return the sums, each over the rows of all processes."""
        known = {key: (one.shape, one.dtype) for key, one in self.values.items() if key != ONES}
        known = {key: facts for own in said_by_all(known) for key, facts in own.items()}
        device = self.walk.model.device
        for key, (shape, dtype) in known.items():
            own = self.values.get(key)
            total = torch.zeros(shape, dtype=dtype, device=device) if own is None else own
            self.values[key] = summed(total)
        return self.values.values()

    def head(self, states: Tensor) -> None:
        """Add what the output head reads."""
        head = self.walk.model.get_output_embeddings()
        if head is None or not isinstance(head, nn.Linear):
            return
        names = {module: name for name, module in self.walk.model.named_modules()}
        if self.tied:
            embedding = f"{names[self.walk.model.get_input_embeddings()]}.weight"
            self._place(embedding, ["head"], 1)
        else:
            self._place(f"{names[head]}.weight", ["head"], 1)
            self._bias(names[head], head)
        self._add("head", self._selected(states))

    def _hook(self, name: str, read: Callable[..., None]) -> Callable[..., None]:
        def take(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if self.on:
                read(name, module, *inputs)

        return take

    # One way of reading for each kind of module

    def _tokens(self, name: str, module: nn.Module, ids: Tensor, *_: Any) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        mask = self.mask
        if ids.shape[-1:] != mask.shape[-1:] or len(inspect.signature(module.forward).parameters) > 1:
            return  # no tokens of the rows, as in some position embeddings with an offset of their own
        own = ids.expand(mask.shape)[mask]
        counts = torch.bincount(own, minlength=len(weight)).to(_sum_type(weight.device))
        self._place(f"{name}.weight", [name], 0)
        self.values[name] = self.values[name] + counts if name in self.values else counts

    def _linear(self, name: str, module: nn.Module, states: Tensor, *_: Any) -> None:
        twin = next((own for seen, own in self.seen if seen is states), None)
        leader = self.own.setdefault(name, twin or name)
        self.seen.append((states, leader))
        axis = 0 if isinstance(module, Conv1D) else 1
        self._place(f"{name}.weight", [leader], axis)
        self._bias(name, module)
        if leader == name:
            self._add(name, self._selected(states))

    def _experts(self, name: str, module: Any, states: Tensor, index: Tensor, *_: Any) -> None:
        flat, chosen = states.reshape(-1, states.shape[-1]), index.reshape(-1, index.shape[-1])
        real = self.mask.reshape(-1)
        if len(flat) != real.numel():
            self._refuse(len(flat))
        flat, chosen = flat[real], chosen[real]
        count = len(module.gate_up_proj)
        for which, layer in (("in", "gate_up_proj"), ("out", "down_proj")):
            self._place(f"{name}.{layer}", [f"{name}.{place}.{which}" for place in range(count)], 2)
        for place in range(count):
            own = flat[(chosen == place).any(dim=-1)]
            gate, up = nn.functional.linear(own, module.gate_up_proj[place]).chunk(2, dim=-1)
            self._add(f"{name}.{place}.in", own)
            self._add(f"{name}.{place}.out", module.act_fn(gate) * up)

    def _norm(self, name: str, module: nn.Module, states: Tensor, *_: Any) -> None:
        weight, mask = module.weight, self.mask
        assert isinstance(weight, Tensor)
        if states.shape[:-1] == (mask.numel(),):
            states = states.reshape(*mask.shape, -1)  # the tokens of a batch come in one line
        # Where there are as many heads as tokens, memory tells: it has a token's heads side by side.
        alike = states.dim() == 4 and states.shape[1] == states.shape[2] == mask.shape[1]
        if states.dim() == 4 and (
            states.stride(1) < states.stride(2) if alike else states.shape[1] != mask.shape[1]
        ):
            states = states.transpose(1, 2)  # heads come first
        if states.shape[:2] != mask.shape or states.shape[-1] != weight.numel():
            return
        own = states.flatten(0, 1)[self.real].reshape(-1, weight.numel()).float()
        if getattr(module, "bias", None) is not None or type(module).__name__.endswith("LayerNorm"):
            own = own - own.mean(dim=-1, keepdim=True)
        squares = own.square() / own.square().mean(dim=-1, keepdim=True).clamp_min(1e-12)
        heads = max(1, states[0, 0].numel() // weight.numel())
        total = squares.sum(dim=0).to(_sum_type(weight.device)) / heads
        self._place(f"{name}.weight", [name], 0)
        self._bias(name, module)
        self.values[name] = self.values[name] + total if name in self.values else total

    # Sums

    def _selected(self, states: Tensor) -> Tensor:
        """Return the states of the tokens that count, [N, D]."""
        flat = states.reshape(-1, states.shape[-1])
        if len(flat) != self.mask.numel():
            if bool(self.mask.all()):
                return flat
            self._refuse(len(flat))
        return flat[self.real]

    def _refuse(self, found: int) -> None:
        raise CheckpointError(
            f"a linear layer of this model ({type(self.walk.model).__name__}) sees {found} of the "
            f"{self.mask.numel()} tokens of a batch, and padding cannot be told from the rest; choose a "
            "transform that reads no inputs"
        )

    def _add(self, key: str, states: Tensor) -> None:
        """Add Σ x xᵀ, no more than its upper half; in float64 where that is as good as free."""
        wide = states.float()
        kind = _sum_type(states.device)
        total = self.values.setdefault(
            key, torch.zeros(2 * (wide.shape[-1],), dtype=kind, device=states.device)
        )
        for start in range(0, len(total), STRIP):
            strip = wide[:, start : start + STRIP]
            total[start : start + STRIP, start:] += (strip.T @ wide[:, start:]).to(kind)

    def _place(self, parameter: str, keys: list[str], axis: int) -> None:
        own = self.places.setdefault(parameter, [])
        if (keys, axis) not in own:
            own.append((keys, axis))

    def _bias(self, name: str, module: nn.Module) -> None:
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            self._place(f"{name}.bias", [ONES], 0)
            self.values[ONES] = torch.tensor([float(self.walk.tokens)], device=bias.device)


def _axes(module: nn.Module) -> int:
    weight = getattr(module, "weight", None)
    return weight.dim() if isinstance(weight, Tensor) else 0


def _sum_type(device: torch.device) -> torch.dtype:
    return torch.float64 if device.type == "cpu" else torch.float32


def packed(moment: np.ndarray) -> dict[str, np.ndarray]:
    """Return a symmetric matrix [D, D] in half the room, (D² + D) / 2 numbers, as arrays by name.

    Its quarters on the diagonal share a square, each with one half of itself; see `unpacked`.
    """
    half = (len(moment) + 1) // 2
    first, last = moment[:half, :half], moment[half:, half:]
    square = np.triu(first)
    square[: len(last), : len(last)] += np.tril(last, -1)
    return {"square": square, "corner": moment[:half, half:].copy(), "diagonal": np.diagonal(last).copy()}


def unpacked(square: np.ndarray, corner: np.ndarray, diagonal: np.ndarray) -> np.ndarray:
    """Return the symmetric matrix [D, D] of what `packed` made of it, bit for bit."""
    half, rest = corner.shape
    moment = np.empty(2 * (half + rest,), square.dtype)
    moment[:half, half:], moment[half:, :half] = corner, corner.T
    moment[:half, :half] = np.triu(square) + np.triu(square, 1).T
    lower = np.tril(square[:rest, :rest], -1)
    moment[half:, half:] = lower + lower.T + np.diag(diagonal)
    return moment


# Filters, on a processor by numpy and scipy in float64; by torch where a device is named

Ridge = Literal["vector", "zero"]
"""What is kept where neither set has inputs: τ, or nothing."""

SINGULAR = 1e-9
"""The least ε, relative to the mean of what it is added to, that keeps a sum of moments invertible.

It is more for moments in float32, whose rounding leaves eigenvalues below zero.
"""


def least_squares(
    forget: np.ndarray | None,
    retain: np.ndarray,
    *,
    mu: float,
    epsilon: float,
    ridge: Ridge = "vector",
    axes: np.ndarray | None = None,
    device: str | None = None,
) -> np.ndarray:
    """Return the filter F, so that Δ = τF: [D, D] of moments [D, D], or [D] of diagonals [D].

        F = (Σ_f + εI)(Σ_f + εI + μΣ_r)⁻¹(I − UUᵀ)        (docs/filters.md: what it solves, and its limits)

    with ε in units of tr Σ_f / D; the ridge "zero" takes Σ_f for the first factor. U are the principal axes
    of Σ_r, given as `axes` [D, k]; None: no axis is left alone. `forget` None, or zero, is Σ_f = 0: the soft
    filter with λ = ε/μ, in units of tr Σ_r / D. Raises InputError for a negative μ or ε, and for moments of
    two shapes.
    """
    if mu < 0 or epsilon < 0:
        raise InputError(f"mu is {mu} and epsilon {epsilon}; neither may be negative")
    if forget is not None and forget.shape != retain.shape:
        raise InputError(
            f"the moments have two shapes, {forget.shape} and {retain.shape}; are they of one layer?"
        )
    diagonal = retain.ndim == 1
    ours = np.zeros(retain.shape) if forget is None else forget.astype(np.float64)
    theirs = mu * retain.astype(np.float64)
    own, other, heavy = (
        float(np.mean(part if diagonal else np.diagonal(part))) for part in (ours, retain, theirs)
    )
    unit = own or other or 1.0
    least = max(SINGULAR, 4 * float(np.finfo(retain.dtype).eps) * len(retain) ** 0.5)
    added = max(epsilon * unit, least * (own + heavy)) or 1.0  # nothing was read: τ stays, or goes
    kept = added if ridge == "vector" else 0.0
    if diagonal:
        return (ours + kept) / (ours + added + theirs)
    whole = ours + theirs
    whole[np.diag_indices(len(whole))] += added
    ours[np.diag_indices(len(ours))] += kept
    # F = (Σ_f + εI) A⁻¹ with A symmetric and positive definite, so Fᵀ solves A Fᵀ = Σ_f + εI.
    found: np.ndarray
    if device:
        factor = torch.linalg.cholesky(_on(device, whole))
        found = _on(device, ours).cholesky_solve(factor).cpu().numpy().T
    else:
        from scipy.linalg import solve  # takes half a second, so only when it is used

        found = solve(whole, ours, assume_a="pos", overwrite_a=True, check_finite=False).T
    return found if axes is None else found - _product(_product(found, axes, device), axes.T, device)


def _on(device: str, array: np.ndarray) -> Any:
    return torch.as_tensor(np.ascontiguousarray(array), dtype=torch.float64, device=device)


def _product(left: np.ndarray, right: np.ndarray, device: str | None) -> np.ndarray:
    if device:
        return np.asarray((_on(device, left) @ _on(device, right)).cpu().numpy())
    return np.asarray(np.asarray(left, np.float64) @ right)


def projection(axes: np.ndarray, *, device: str | None = None) -> np.ndarray:
    """Return I − UUᵀ [D, D] of axes U [D, k]: what acts on nothing that lies in their span."""
    rest: np.ndarray = np.eye(len(axes)) - _product(axes, axes.T, device)
    return rest


def basis_of(moment: np.ndarray, *, energy: float = 0.99, device: str | None = None) -> np.ndarray:
    """Return U [D, k] of inputs whose moment Σ x xᵀ [D, D] is given.

    `energy` is a share, above 0 and up to 1. Raises InputError for another, or inputs of zero.
    """
    if not 0 < energy <= 1:
        raise InputError(f"an energy of {energy} is no share; name one above 0 and up to 1, as in 0.99")
    if device:
        squares, vectors = (part.cpu().numpy() for part in torch.linalg.eigh(_on(device, moment)))
    else:
        from scipy.linalg import eigh

        squares, vectors = eigh(moment.astype(np.float64), driver="evd", check_finite=False)
    if squares[-1] <= 0:
        raise InputError("the inputs are all zero, so they span nothing; give rows that the model has read")
    kept = rank_for(squares[::-1], energy)
    basis: np.ndarray = vectors[:, ::-1][:, :kept].copy()
    return basis


def along(values: np.ndarray, factor: np.ndarray, axis: int, device: str | None = None) -> np.ndarray:
    """Return values times a filter or moment, a matrix or a diagonal, along the axis that reads its inputs.

    A diagonal of one number stands for any length. In float64.
    """
    wide = np.moveaxis(values, axis, -1)
    made = wide.astype(np.float64) * factor if factor.ndim == 1 else _product(wide, factor, device)
    found: np.ndarray = np.moveaxis(made, -1, axis)
    return found

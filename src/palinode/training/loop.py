"""The one training loop: a model, rows and a loss in; a trained model and a curve out.

The model's weights are float32 throughout; the forward pass runs under bfloat16 autocast where that
is faster. Each optimiser step sums its micro-batches' losses and divides once by their summed weight.
The order of rows depends on the seed and the epoch only, and dropout on the seed and the step, so that
a resumed run sees what an uninterrupted one would have seen.

Several processes divide the anchors of every step, and add their gradients up: so any number of them takes
the steps that one would take. Where accelerate's settings ask for FSDP (always its second version) they
divide weights, gradients and moments too: process 0 keeps the model in its host's memory, deals the weights
out a tensor at a time, and gathers them so in the end.

On a GPU the host never waits within a step: losses and norms stay on the device and are fetched for many
steps together. A step that must not be taken, as its loss is not finite or passes the limit, is left out by
the device itself, and all that follow with it, until the host hears of it.
"""

from __future__ import annotations

import math
import re
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from palinode.data.batches import Batch, epoch_batches, pad_right
from palinode.data.tokenize import TokenRow
from palinode.errors import DivergenceError, PalinodeError, ProcessError, RecipeError
from palinode.models.likelihoods import Say, must_be_apart, note, tell
from palinode.models.loading import check_positions
from palinode.models.reading import decoder_blocks, never_packed, trained_parameters
from palinode.processes import abandon, everywhere, meanwhile, said_by_all, sharded, summed, world
from palinode.settings import TrainingSettings
from palinode.training.objectives import (
    CurvePoint,
    FrozenValues,
    Joined,
    Objective,
    Term,
    keep,
    pair_count,
    plain,
)
from palinode.training.optimizers import (
    bytes_of_token,
    choose_optimizer,
    kind_of,
    make_optimizer,
    next_choice,
    room_in_tokens,
    take_over,
    use_autocast,
)
from palinode.training.saved_state import SavedState
from palinode.training.sharding import Shards, add_up

Result = TypeVar("Result")

FETCHED = {"cpu": 1, "cuda": 16}
"""By device: steps whose figures are fetched together, if they take less than `PATIENCE` seconds. Other
devices have no AdamW that leaves a step out by itself; they are asked at each."""
PATIENCE = 1.0

COMPILED_LENGTHS = 64
"""Compiled models see rows whose length is a multiple of this, so that few are compiled for."""


def train(
    model: PreTrainedModel,
    rows: Sequence[TokenRow] | Joined,
    objective: Objective,
    settings: TrainingSettings,
    *,
    seed: int,
    pad_id: int,
    state: Path | None = None,
    on_progress: Callable[[int], None] | None = None,
    on_step: Callable[[CurvePoint, Sequence[int]], None] | None = None,
    exactly_at: Collection[int] = (),
    max_steps: int | None = None,
    say: Say | None = None,
) -> list[CurvePoint]:
    """Train the model in place and return its curve.

    An objective takes its rows by role (`Joined`); an epoch goes through those of its anchor. What its terms
    need of the model at the start is computed first, but for terms whose values the rows bring.
    `state` is a folder for a resumable state: it is used when it exists, and written every
    `settings.save_minutes`, when the run is interrupted, and before a step that would not be finite.
    `on_progress` hears tokens; `on_step` hears, for each optimiser step, its point of the curve and the
    positions of the anchors that were in it (over all processes): on a GPU up to `FETCHED` steps later, but
    before the next step where the number of steps done is among `exactly_at`. `say` hears where rows have to
    go through one by one. `max_steps` ends the run, and its schedule, after so many steps; the objective's
    limit ends it before the step that passes it. Raises DivergenceError when loss or gradient stop being
    finite.
    """
    cast = rows if isinstance(rows, Joined) else plain(rows)
    for role in objective.roles:
        check_positions(model.config, cast.rows[role])
    if sharded() and objective.trainable is not None:
        raise RecipeError("this method leaves parts of the model out, which FSDP cannot; train without it")
    heard = {"on_progress": on_progress, "on_step": on_step, "say": say}
    given = (model, cast, objective, settings, seed, pad_id, state, tuple(exactly_at), max_steps)
    found = everywhere(_train, *given, alone=heard, hollow=sharded())
    if isinstance(found, PalinodeError):
        raise found
    return found


def _train(
    model: PreTrainedModel,
    cast: Joined,
    objective: Objective,
    settings: TrainingSettings,
    seed: int,
    pad_id: int,
    state: Path | None,
    exactly_at: Collection[int],
    max_steps: int | None,
    *,
    on_progress: Callable[[int], None] | None = None,
    on_step: Callable[[CurvePoint, Sequence[int]], None] | None = None,
    say: Say | None = None,
) -> list[CurvePoint] | PalinodeError:
    """Train the model in this process, as all do; return the curve, or the error that ends the run in all."""
    try:
        shards = Shards(model) if sharded() else None
        live, through = (shards.model, shards) if shards else (model, lambda work: work(model))
        kept = through(lambda model: _keep(objective, model, cast, settings, pad_id))
        apart = through(lambda model: _must_be_apart(objective, model, cast, pad_id, say))
        if shards:
            shards.reshard()
        live.train()
        with _only_trainable(live, objective.trainable), _prepared(live, settings):
            place = SavedState(state, divided=shards is not None) if state else None
            adamw = make_optimizer(_choice(live, cast, settings, shards), live, settings)
            run = _Run(
                live, adamw, objective, cast, kept, settings, seed, pad_id, place, apart, on_step, say, shards
            )
            lengths = [len(row.ids) for row in cast.anchors]
            steps = list(step_batches(lengths, settings, seed=seed))
            run.per_epoch = len(steps) // settings.epochs
            run.resume(on_progress, steps := steps[:max_steps])
            with never_packed():
                _walk(run, steps, on_progress, exactly_at)
        if shards:
            shards.gather()
    except PalinodeError as error:
        if world()[1] < 2 or isinstance(error, ProcessError):
            raise
        return error
    model.eval()
    return run.curve


def _walk(
    run: _Run,
    steps: Sequence[Sequence[Sequence[int]]],
    on_progress: Callable[[int], None] | None,
    exactly_at: Collection[int],
) -> None:
    """Take the steps that are left, and save the state now and then."""
    saved_at = time.monotonic()
    try:
        with _undisturbed(yes=run.shards is not None) as run.caught:
            for step in range(len(run.curve), len(steps)):
                run.step(steps[step], step, len(steps))
                to_save = time.monotonic() - saved_at > 60 * run.settings.save_minutes
                awaited = (to_save and run.count == 1) or step + 1 == len(steps) or step + 1 in exactly_at
                due = awaited or run.is_due()
                if due and not run.fetch(to_save=to_save, whole=step + 1 in exactly_at):
                    return
                if on_progress:
                    on_progress(run.tokens(steps[step], step))
                if due and to_save:
                    saved_at = time.monotonic()
    except (KeyboardInterrupt, ProcessError):
        abandon()  # whoever else is there cannot be waited for
        if not run.shards:
            run.save()
        raise
    except DivergenceError:
        run.save()
        raise


def _must_be_apart(
    objective: Objective, model: PreTrainedModel, cast: Joined, pad_id: int, say: Say | None
) -> bool:
    """Return whether rows padded to one length change each other's gradients; pairs are then refused."""
    rows = [row for role in objective.roles for row in cast.rows[role]]
    if not must_be_apart(model, rows, pad_id=pad_id):
        return False
    if any(term.weight is pair_count for term in objective.terms):
        raise RecipeError(
            f"this method compares pairs of rows read together, and {note(model, 'rows')}; "
            "set a smaller max_length, or choose another method"
        )
    tell(model, "training rows", say)
    return True


def _keep(
    objective: Objective, model: PreTrainedModel, cast: Joined, settings: TrainingSettings, pad_id: int
) -> dict[str, FrozenValues]:
    """Return, by term, what the model says now of all rows that the term will see, if they bring nothing."""
    found = dict(cast.frozen)
    for part in objective.terms:
        if part.keeper is None or part.name in cast.frozen:
            continue
        rows = {(role, place): cast.rows[role][place] for role in part.roles for place in cast.used(role)}
        autocast = use_autocast(model, settings)
        found[part.name] = keep(part.keeper(model), model, rows, pad_id=pad_id, autocast=autocast)
    return found


@contextmanager
def _only_trainable(model: PreTrainedModel, pattern: str | None) -> Iterator[None]:
    """Freeze the parameters whose whole name does not match, and give them back after."""
    frozen = []
    if pattern is not None:
        named = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
        frozen = [value for name, value in named if not re.fullmatch(pattern, name)]
        if len(frozen) == len(named):
            raise RecipeError(
                f"no parameter's whole name matches {pattern!r}; one of them is {named[0][0]!r}"
            )
    for value in frozen:
        value.requires_grad_(False)
    try:
        yield
    finally:
        for value in frozen:
            value.requires_grad_(True)


@contextmanager
def _prepared(model: PreTrainedModel, settings: TrainingSettings) -> Iterator[None]:
    """Have decoder blocks compiled, and their activations computed again, where the settings say so."""
    blocks = decoder_blocks(model) if settings.compile or settings.gradient_checkpointing else ()
    try:
        for block in blocks:
            if settings.gradient_checkpointing:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
            if settings.compile:
                block.compile()
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
            block._compiled_call_impl = None


def count_steps(lengths: Sequence[int], settings: TrainingSettings) -> int:
    """Return the number of optimiser steps of a run."""
    batches = math.ceil(len(lengths) / settings.batch_size)
    return settings.epochs * math.ceil(batches / settings.accumulation)


def learning_rate_at(step: int, total: int, warmup: int, peak: float) -> float:
    """Return the rate of one optimiser step: linear from 0 to `peak`, then linear to 0.

    >>> [learning_rate_at(step, 4, 2, 1.0) for step in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (total - step) / max(1, total - warmup)


def step_batches(
    lengths: Sequence[int], settings: TrainingSettings, *, seed: int
) -> Iterator[list[list[int]]]:
    """Yield, for each optimiser step, its micro-batches as lists of row indices; `lengths` in tokens."""
    together = settings.accumulation
    for epoch in range(settings.epochs):
        batches = epoch_batches(lengths, batch_size=settings.batch_size, seed=seed, epoch=epoch)
        for start in range(0, len(batches), together):
            yield batches[start : start + together]


def _choice(model: PreTrainedModel, cast: Joined, settings: TrainingSettings, shards: Shards | None) -> str:
    """Return where the optimiser's moments shall lie."""
    if shards is None:
        longest = max(len(row.ids) for row in cast.anchors)
        return choose_optimizer(settings.optimizer, model, room=longest * bytes_of_token(model, settings))
    if settings.optimizer not in ("auto", "device"):
        raise RecipeError(
            f'training.optimizer is "{settings.optimizer}", and a model whose weights are divided over '
            "processes has its moments on the devices; leave it out, or leave FSDP out"
        )
    return "device"


_Pass = tuple[Batch, Sequence[tuple[str, int]]]
"""Rows that go through the model together, and which they are."""


@dataclass(frozen=True, slots=True)
class _Figures:
    """What an optimiser step says of itself, still on the device."""

    step: int
    total: int
    members: Sequence[int]
    """Positions of the anchors that were in it."""
    rate: float
    measured: Tensor
    """Summed contributions of each term, and the gradients' norm, [terms + 1]."""
    weights: Sequence[float]
    """What each is divided by; 0 where every answer is too short for the loss, whose mean is then 0."""
    coefficients: Sequence[float]

    def point(self, numbers: Sequence[float], terms: Sequence[Term]) -> CurvePoint:
        """Return the point of the curve that what was measured comes to."""
        *sums, norm = numbers
        means = [total / weight if weight else 0.0 for total, weight in zip(sums, self.weights, strict=True)]
        value = sum(part * mean for part, mean in zip(self.coefficients, means, strict=True))
        named = {term.name: mean for term, mean in zip(terms, means, strict=True)}
        return CurvePoint(self.step, value, self.rate, norm, named)


@dataclass(slots=True)
class _Run:
    """A training run in progress: what has to be saved to go on later."""

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    objective: Objective
    cast: Joined
    kept: Mapping[str, FrozenValues]
    settings: TrainingSettings
    seed: int
    pad_id: int
    state: SavedState | None
    apart: bool
    """Whether rows go through the model one by one."""
    on_step: Callable[[CurvePoint, Sequence[int]], None] | None
    say: Say | None
    shards: Shards | None = None
    """The weights, divided over the processes."""
    caught: list[int] = field(default_factory=list)
    """Signals that wait until all processes have saved their shards."""
    per_epoch: int = 1
    """Optimiser steps of an epoch."""
    curve: list[CurvePoint] = field(default_factory=list)
    autocast: bool = field(init=False)
    vocabulary: int = field(init=False)
    most: int | None = None
    """Tokens that go through the model at a time."""
    passing: int = 0
    """Tokens of the pass that is under way."""
    pending: list[_Figures] = field(default_factory=list)
    """Of the steps that were begun since figures were last fetched."""
    fetched_at: float = field(default_factory=time.monotonic)
    halted: Tensor = field(init=False)
    """1 on the device from the first step on that must not be taken, else 0."""
    device: torch.device = field(init=False)
    rank: int = 0
    count: int = 1
    """Which process this is of how many that divide the anchors of a step."""

    def __post_init__(self) -> None:
        self.device, (self.rank, self.count) = self.model.device, world()
        self.halted = torch.zeros((), device=self.device)
        self.autocast = use_autocast(self.model, self.settings)
        self.vocabulary = int(self.model.config.get_text_config().vocab_size)
        room = None if self.shards else room_in_tokens(self.model, self.settings, self.kind)
        self.most = self.settings.tokens_per_pass or room

    @property
    def kind(self) -> str:
        """Where the optimiser holds what it needs."""
        return kind_of(self.optimizer)

    def tokens(self, parts: Sequence[Sequence[int]], step: int) -> int:
        """Return the tokens that a step sends through the model."""
        roles = self.objective.reads
        return sum(self.cast.tokens(step // self.per_epoch, part, roles) for part in parts)

    def step(self, parts: Sequence[Sequence[int]], step: int, total: int) -> None:
        """Take one optimiser step over micro-batches of anchors.

        The weights stay as they were if the step is not finite, or passes the limit, or follows one that did.
        """
        warmup = round(self.settings.warmup_epochs * (total // self.settings.epochs))
        rate = learning_rate_at(step, total, warmup, self.settings.learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        given = [part.coefficient for part in self.objective.terms]
        coefficients = [one(self.curve, self.per_epoch) if callable(one) else one for one in given]
        sums, weights = self._in_memory(
            self.seed + step, lambda: self._backward(coefficients, parts, step // self.per_epoch)
        )
        if not self.shards:
            add_up(trained_parameters(self.model), self.count)
        norm = torch.nn.utils.clip_grad_norm_(trained_parameters(self.model), self.settings.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        members = [place for part in parts for place in part]
        measured = torch.cat([summed(sums), norm.reshape(1).to(sums.dtype)])
        figures = _Figures(step, total, members, rate, measured, weights, coefficients)
        self._halt(figures)
        with _undisturbed():
            self._update()
            self.pending.append(figures)
        self.optimizer.zero_grad()

    def _in_memory(self, seed: int, work: Callable[[], Result]) -> Result:
        """Do the work of a step, with smaller passes each time that the device's memory runs out."""
        while True:
            torch.manual_seed(seed)
            try:
                return work()
            except torch.OutOfMemoryError:
                if self.shards:  # the others would wait
                    raise
            self.optimizer.zero_grad()
            if self.most is not None and self.passing > self.most:
                self._relieve(f"{self.passing:,} tokens at a time, which cannot be divided")
                continue
            self.most = max(1, self.passing // 2)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if self.say:
                self.say(
                    f"{self.passing:,} tokens at a time are too many for the device's memory; training goes "
                    f"on with {self.most:,}, which changes no gradient"
                )

    def _relieve(self, what: str) -> None:
        """Go on with an optimiser that holds less on the device; raises RecipeError where there is none."""
        name = next_choice(self.optimizer)
        if name is None or self.count > 1:
            kind = RecipeError if self.count == 1 else RuntimeError  # which the others do not have
            raise kind(
                f"training on {what}, takes more memory than the device has; set a smaller max_length, or "
                "train an adapter (--lora)"
            )
        self._hold(name)
        if self.say:
            self.say(
                f"there is no room for {what}, beside the optimiser; training goes on with its moments "
                f"{'in 8 bits' if name == '8bit' else 'in host memory'} (optimizer = {name!r})"
            )

    def _hold(self, name: str) -> None:
        """Have what the optimiser needs lie elsewhere from now on."""
        gradients = [parameter.grad for parameter in trained_parameters(self.model)]
        now = make_optimizer(name, self.model, self.settings)
        for parameter, gradient in zip(trained_parameters(self.model), gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.to(parameter.dtype)
        for group, known in zip(now.param_groups, self.optimizer.param_groups, strict=True):
            group["lr"] = known["lr"]
        if name == "host":
            take_over(now, self.optimizer)
        self.optimizer = now
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _halt(self, figures: _Figures) -> None:
        """Have the device leave this step out, and all after it, if it must not be taken."""
        measured = figures.measured if self.device.type in FETCHED else figures.measured.cpu()
        bad = ~measured.isfinite().all()
        if limit := self.objective.limit:
            term = [part.name for part in self.objective.terms].index(limit.term)
            bad |= measured[term].double() / (figures.weights[term] or 1.0) < -self._most
        self.halted = torch.maximum(self.halted, bad.to(self.halted))

    def _update(self) -> None:
        """Take the step where nothing stands against it; the moments are made in the first."""
        try:
            if self.kind == "device" and self.device.type in FETCHED:
                self.optimizer.found_inf = self.halted  # type: ignore[attr-defined]
                self.optimizer.step()
            elif not self.halted:
                self.optimizer.step()
        except torch.OutOfMemoryError:
            if self.curve or self.pending:  # some weights may have moved
                raise
            self.optimizer.state.clear()
            self._relieve("the moments of all weights")
            self._update()

    def is_due(self) -> bool:
        """Tell whether the host should hear of the steps by now: of each, where coefficients follow them."""
        follow = any(callable(part.coefficient) for part in self.objective.terms)
        together = 1 if follow else FETCHED.get(self.device.type, 1)
        late = self.count == 1 and time.monotonic() - self.fetched_at > PATIENCE  # several know no one time
        return len(self.pending) >= together or late

    def fetch(self, *, to_save: bool = False, whole: bool = False) -> bool:
        """Add the steps since the last call to the curve; return False where the limit ends the run.

        With `whole` process 0 has all weights by the time that `on_step` hears.

        Raises DivergenceError for a step that is not finite.
        """
        known = len(self.curve)
        with _undisturbed():
            held, self.pending = self.pending, []
            measured = torch.stack([figures.measured for figures in held]).tolist() if held else []
            for figures, numbers in zip(held, measured, strict=True):
                point = figures.point(numbers, self.objective.terms)
                limit = self.objective.limit
                sunk = limit is not None and point.terms[limit.term] < -self._most
                if sunk or not all(map(math.isfinite, numbers)):
                    break
                terms = {} if self.objective.anchor == "rows" else point.terms
                self.curve.append(replace(point, terms=terms, optimizer=self.kind))
        self.fetched_at = time.monotonic()
        done = len(self.curve) - known
        if self.shards and whole:
            self.shards.gather()
        with meanwhile():
            for point, figures in zip(self.curve[known:], held, strict=False):
                if self.on_step:
                    self.on_step(point, figures.members)
            if to_save and done == len(held) and not self.shards:
                self._write()
        if self.shards and done == len(held):
            wishes = said_by_all((to_save, bool(self.caught)))
            stopped = any(stop for _, stop in wishes)
            if wishes[0][0] or stopped:
                self._write()
            if stopped:
                raise KeyboardInterrupt
        if done < len(held):
            self._end(held[done], measured[done])
        return done == len(held)

    def _end(self, figures: _Figures, numbers: Sequence[float]) -> None:
        """Raise an error where the run does not end as its objective wants it to."""
        if not all(map(math.isfinite, numbers)):
            kept = f"; the state before that step is kept in {self.state.folder}" if self.state else ""
            raise DivergenceError(
                f"the training loss stopped being a finite number at step {figures.step + 1} of "
                f"{figures.total}; lower the learning rate (now {self.settings.learning_rate:g}){kept}"
                if figures.step
                else "the training loss is not a finite number before the first step is taken; "
                "does the checkpoint hold NaN or infinity?"
            )
        limit = self.objective.limit
        if limit and figures.step == 0:
            nll = -figures.point(numbers, self.objective.terms).terms[limit.term]
            raise RecipeError(
                f"the loss on the forget set is {nll:.2f} nats a token before the first step, above "
                f"the limit of {self._most:.2f} at which training ends; there is nothing to forget, or raise "
                "the limit"
            )

    @property
    def _most(self) -> float:
        """Nats a token at which the limit is passed."""
        nll = self.objective.limit.nll if self.objective.limit else None
        return math.log(self.vocabulary) if nll is None else nll

    def _backward(
        self, coefficients: Sequence[float], parts: Sequence[Sequence[int]], epoch: int
    ) -> tuple[Tensor, list[float]]:
        """Add up the gradients of all terms; return the sum of each and what it is divided by."""
        found = [
            self._backward_term(part, coefficient, parts, epoch)
            for part, coefficient in zip(self.objective.terms, coefficients, strict=True)
        ]
        sums = torch.stack([total for total, _ in found])
        return sums, [weight for _, weight in found]

    def _backward_term(
        self, term: Term, coefficient: float, parts: Sequence[Sequence[int]], epoch: int
    ) -> tuple[Tensor, float]:
        """Add the gradients of coefficient · Σ total / Σ weight, of this process's share of anchors.

        What it is divided by is that of all anchors.
        """
        batches = [batch for part in parts for batch in self._batches(term, part, epoch)]
        weight = sum(term.weight(batch) for batch, _ in batches)
        total = torch.zeros((), device=self.device)
        if not weight:  # every answer is too short for this loss
            return total, 0.0
        for (batch, members), factor in self._share(term, parts, epoch, batches):
            self.passing = batch.ids.size
            values = self.kept.get(term.name)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                frozen = values.of(members, self.device) if values else None
                part = self._total(term, batch, frozen)
            (part * factor * coefficient / weight).backward()
            total += part.detach() if factor else 0.0
        return total, weight

    def _share(
        self, term: Term, parts: Sequence[Sequence[int]], epoch: int, batches: list[_Pass]
    ) -> Iterator[tuple[_Pass, float]]:
        """Yield this process's share of the batches, and the factor of each one's gradients.

        FSDP takes the mean over processes, and has each of them make as many passes.
        """
        if self.count == 1:
            yield from ((batch, 1.0) for batch in batches)
            return
        shares = []
        for rank in range(self.count) if self.shards else [self.rank]:
            own = [part[rank :: self.count] for part in parts]
            shares.append([batch for part in own if part for batch in self._batches(term, part, epoch)])
        mine = shares[self.rank if self.shards else 0]
        yield from ((batch, float(self.count if self.shards else 1)) for batch in mine)
        yield from ((batches[0], 0.0) for _ in range(max(map(len, shares)) - len(mine)))

    def _total(self, term: Term, batch: Batch, frozen: Tensor | None) -> Tensor:
        if self.shards is None:
            return term.total(self.model, batch, frozen)
        total: Tensor = self.shards(lambda model: term.total(model, batch, frozen))
        return total

    def _batches(self, term: Term, anchors: Sequence[int], epoch: int) -> Iterator[_Pass]:
        """Yield the rows that a term reads for these anchors, padded together, and which they are."""
        members = [(role, place) for role in term.roles for place in self.cast.members(role, epoch, anchors)]
        rows = [self.cast.rows[role][place] for role, place in members]
        size = len(rows) * max((len(row.ids) for row in rows), default=0)
        multiple = COMPILED_LENGTHS if self.settings.compile else 1
        pad = partial(pad_right, pad_id=self.pad_id, multiple=multiple)
        if self.apart:
            for row, member in zip(rows, members, strict=True):
                yield pad([row]), [member]
        elif self.most is None or size <= self.most or len(anchors) < 2:
            yield pad(rows), members
        else:  # what goes with an anchor stays with it: the loss may compare the two
            half = len(anchors) // 2
            yield from self._batches(term, anchors[:half], epoch)
            yield from self._batches(term, anchors[half:], epoch)

    def save(self) -> None:
        """Save weights, optimiser and curve so that a reader sees all of it or none; signals wait."""
        with suppress(DivergenceError):  # said already, or when the run goes on
            self.fetch()
        with _undisturbed():
            self._write()

    def _write(self) -> None:
        if self.state is not None and self.curve:
            self.state.write(self.model, self.optimizer, self.kind, self.curve)

    def resume(
        self, on_progress: Callable[[int], None] | None, steps: Sequence[Sequence[Sequence[int]]]
    ) -> None:
        """Go on from a saved state where there is one; it does not matter how many processes saved it."""
        if self.state is None or (kind := self.state.kind()) is None:
            return
        if kind != self.kind:  # the run had gone on with another optimiser
            self._hold(kind)
        self.curve = self.state.read(self.model, self.optimizer)
        if on_progress:
            done = enumerate(steps[: len(self.curve)])
            on_progress(sum(self.tokens(parts, step) for step, parts in done))


@contextmanager
def _undisturbed(*, yes: bool = True) -> Iterator[list[int]]:
    """Hold Ctrl-C and SIGTERM back until the block is done, so that no step is left half taken."""
    caught: list[int] = []
    if not yes or threading.current_thread() is not threading.main_thread():  # which signals go to
        yield caught
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda number, _frame: caught.append(number))
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught:
        signal.raise_signal(caught[0])

"""What a run will do and what it will cost, said before any long work, here or on other machines.

Tokens and bytes are counted. Times are estimates from products of the model's own shapes, over as many
tokens as a batch of these rows has, and from how fast memory is read and written, all timed here and now:
good to a factor of about two, on a machine that stays as busy as it is. For a machine that is only named
(`KINDS`) they come from its maker's figures (docs/scale.md).
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from statistics import median
from typing import Any

import torch

from palinode.data.examples import Example
from palinode.data.tokenize import tokenize
from palinode.errors import RecipeError
from palinode.evaluation.self_check import ROWS, rows_with_style
from palinode.methods.method import MethodRun
from palinode.methods.transforms import LeastSquaresSettings, ProjectionSettings, check_transforms
from palinode.models.inplace import ROOM
from palinode.models.likelihoods import LOGIT_BYTES
from palinode.models.loading import find_tokenizer, load_tokenizer, pick_device
from palinode.pipeline.inputs import Inputs
from palinode.pipeline.search import FIRST_LOOK
from palinode.pipeline.transforming import OTHER_MUS
from palinode.progress import Advance, Listener, Relay, duration_text
from palinode.records import packaged_table
from palinode.settings import LoraSettings
from palinode.training.loop import count_steps
from palinode.training.optimizers import BYTES, autocasts, bytes_per_token
from palinode.weights.geometry import part_of
from palinode.weights.tensors import TensorInfo

NAMES = {"least_squares": "filter", "projection": "project"}
PATIENCE, OFF = 60.0, 1.3
"""Seconds of training after which a plan is corrected, and by which factor it must be off."""
PRODUCTS = 0.5
"""Share of a pass that its matrix products take; the rest is attention, norms, activations and sums."""
UPDATED, SUMMED = 44, 150
"""Bytes that are read and written for each weight: by clipping and AdamW; by a sum, rounded, on a device."""
STEP_SECONDS = 0.012
"""Least time of one pass through a model, however small."""
HELD = {"device": "whole", "8bit": "moments in 8 bits", "host": "in host memory"}
"""What a plan calls each place of the optimiser's moments."""
STARTS = {"float32": 4.0, "bfloat16": 2.0, "4bit": 0.6}
"""Bytes of a weight of the frozen start under an adapter."""
FLOOR = 580_000_000
"""Bytes that a process takes before it holds a model: libraries, and what they set up."""


# Other machines


@dataclass(frozen=True, slots=True)
class DeviceKind:
    """A kind of device as its maker describes it; sizes in bytes, speeds a second."""

    name: str
    memory: float
    arithmetic: float
    """Operations in bfloat16, dense."""
    double: float
    """Operations in float64."""
    bandwidth: float
    link: float
    """Bytes to its neighbours in a host, one way."""
    host: float
    """Host memory that usually comes with one."""
    source: str

    @property
    def told(self) -> str:
        """What it is, in one line."""
        return (
            f"{self.name}: {self.memory / 1e9:.0f} GB, {self.arithmetic / 1e12:.0f} TFLOP/s in bfloat16, "
            f"{self.bandwidth / 1e12:.2f} TB/s, host memory usually {self.host / 1e9:.0f} GB each "
            f"({self.source})"
        )


KINDS = {name: DeviceKind(**facts) for name, facts in packaged_table("pipeline/devices.toml").items()}
"""By the name that `--on` takes."""
IN_A_HOST = 8
BETWEEN_HOSTS = 50e9
"""Bytes a second and device, where there is more than one host: a link of 400 Gbit/s for each."""
REACHED = 0.4
"""Share of a device's own speed that is counted on: training runs of large models report 0.35 to 0.5."""
HOST_BUS, HOST_MEMORY = 25e9, 100e9
"""Bytes a second between a device and its host, and that a host's update of weights reads and writes."""


@dataclass(frozen=True, slots=True)
class Machine:
    """So many devices of a kind, for a price."""

    kind: DeviceKind
    count: int
    price: float | None = None
    """Of a device, an hour."""

    @classmethod
    def named(cls, text: str) -> Machine:
        """Return the machine for 8xh100, or 8xh100@2.50 where a device costs 2.50 an hour."""
        found = re.fullmatch(r"(?:([1-9]\d{0,4})x)?(\w+?)(?:@(\d+(?:\.\d+)?))?", text.strip().lower())
        if found is None or found[2] not in KINDS:
            raise RecipeError(
                f"--on is {text!r}; write how many and which, as in 8xh100, and a price an hour if you like, "
                f"as in 8xh100@2.50; there are {', '.join(KINDS)}"
            )
        return cls(KINDS[found[2]], int(found[1] or 1), float(found[3]) if found[3] else None)

    @property
    def link(self) -> float:
        """Bytes a second between devices."""
        return self.kind.link if self.count <= IN_A_HOST else min(self.kind.link, BETWEEN_HOSTS)


# The plan


@dataclass(frozen=True, slots=True)
class Held:
    """What one device holds in a phase of a run, and its process in the host's memory, in bytes."""

    phase: str
    way: str
    """How it is held."""
    weights: float
    gradients: float
    optimiser: float
    activations: float
    """With logits, caches and sums."""
    host: float

    @property
    def device(self) -> float:
        """All that is on the device."""
        return self.weights + self.gradients + self.optimiser + self.activations

    def fits(self, machine: Machine) -> bool:
        """Tell whether there is room, with a tenth to spare."""
        return self.device < 0.9 * machine.kind.memory and self.host < 0.9 * machine.kind.host


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """One step: what it is, the tokens it sends through a model, and a guess at its time."""

    label: str
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps of a run and what they need."""

    steps: tuple[PlannedStep, ...]
    memory: int
    """Peak, in bytes."""
    disk: int
    """Bytes that output and workspace will take."""
    held: tuple[Held, ...]
    """What a device and its process hold, phase by phase."""
    notes: tuple[str, ...] = ()
    """What of it does not fit, and on how many devices it would."""
    machine: Machine | None = None
    """What it is for; None for the machine it was made on."""

    @property
    def tokens(self) -> int:
        """Tokens over all steps."""
        return sum(step.tokens for step in self.steps)

    @property
    def seconds(self) -> float:
        """Estimated time over all steps."""
        return sum(step.seconds for step in self.steps)


def make_plan(inputs: Inputs, machine: Machine | None = None) -> Plan:
    """Count what a run will do, here or on a machine, as if none of its steps had been done before."""
    return _Planner(inputs, machine).plan()


class _Planner:
    """The numbers that all estimates share."""

    def __init__(self, inputs: Inputs, machine: Machine | None = None) -> None:
        self.inputs, self.machine = inputs, machine
        self.recipe = inputs.recipe
        self.parameters = inputs.reader.parameters
        config = inputs.reader.config
        self.config: Mapping[str, Any] = config.get("text_config", config)
        self.tokenizer = find_tokenizer(inputs.reader) if machine else load_tokenizer(inputs.reader)
        self.runs = inputs.method.runs(inputs.settings, inputs.given)
        self.changes = check_transforms(self.recipe.changes)
        found = [info for info in self.inputs.reader.tensors.values() if len(info.shape) == 2]
        self.matrices = [info.shape for info in found if part_of(info.name).startswith("layer")]
        """(outputs, inputs) of the layers of the blocks."""
        self.widths = distinct_inputs(found)
        """Width of each input that layers of the blocks read."""
        head = max((info.shape for info in found if info.shape not in self.matrices), default=(1, 1))
        self.products = Counter([*self.matrices, head])
        """Shapes of all matrices that a token is multiplied by."""
        self.multiplied = sum(count * prod(shape) for shape, count in self.products.items())
        self.device = pick_device("cpu" if machine else self.recipe.device)
        self.on_cpu = machine is None and self.device.type == "cpu"
        self.itemsize = 2 if machine or self.device.type == "cuda" else 4
        """Bytes of a weight in a model that is read: a device reads models in their own dtype."""
        self.narrow = bool(machine) or autocasts(self.recipe.training, self.device, self.parameters)
        self.held = tuple(self._phases())
        self.many = machine.count if machine else 1
        self.readers = 1 if machine and "spread" in self.held[-1].way else self.many
        """Devices that train, and that read rows each for itself."""
        if machine:
            self.memory_rate, self.solve_rate = 0.7 * machine.kind.bandwidth, 0.2 * machine.kind.double
            each = REACHED * machine.kind.arithmetic
            self.train_rate, self.score_rate = each * self.many, each * self.readers
            return
        one, other = (torch.ones(1 << 23, device=self.device) for _ in range(2))
        self.memory_rate = 12 * len(one) / usual_seconds(lambda: one.add_(other), self.device)
        lengths = self._tokens(self.inputs.rows.forget[:64])
        batch = self.recipe.training.batch_size * max(1, sum(lengths) // max(1, len(lengths)))
        self.train_rate = self._rate(batch, torch.bfloat16 if self.narrow else torch.float32)
        self.score_rate = self._rate(1024, torch.float32)
        self.solve_rate = self.score_rate / 2  # in float64

    def _rate(self, tokens: int, dtype: torch.dtype) -> float:
        """Return the operations a second of a pass of so many tokens through the model."""
        time_of = partial(product_seconds, self.device, dtype, tokens)
        seconds = sum(count * time_of(shape) for shape, count in self.products.items())
        return PRODUCTS * 2 * tokens * self.multiplied / seconds

    def plan(self) -> Plan:
        rows, recipe = self.inputs.rows, self.recipe
        asked = rows_with_style(rows.forget)[:ROWS] if self.inputs.target else []
        steps = []
        if asked:  # there are about five plausible ways
            tokens, seconds = self._scoring(asked)
            label = f"ask the target {len(asked)} rows in other ways"
            steps.append(PlannedStep(label, 5 * tokens, 5 * seconds))
        if recipe.prepare:
            steps.append(self._training("make the target", [*rows.forget, *rows.retain]))
            steps.append(self._training("make the retrained model", rows.retain))
        for run in self.runs:
            if run.asked:
                written = self._generating(run.asked.count)
                steps.append(PlannedStep("ask the target for other answers", *written))
            steps.append(self._run(run))
        scales = recipe.scales
        alphas = len(scales.forget_grid) if scales.forget is None else 1
        betas = len(scales.retain_grid) if self.inputs.given.retain_scale is None else 1
        points = alphas * betas if recipe.has_scales else 1
        steps += self._transforms(searched=points > 1 and scales.choose == "auto")
        if points > 1:
            steps.append(self._scales(points))
        steps.append(PlannedStep("write the unlearned model", 0, 6 * 4 * self.parameters / 1e9))
        given = bool(self.inputs.base) + bool(self.inputs.unlearned)
        models = 2 + given + bool(self.inputs.retrained or recipe.prepare)
        steps.append(self._evaluation(models))
        peak = max(one.device + one.host * (self.on_cpu and one.way == HELD["host"]) for one in self.held)
        return Plan(tuple(steps), round(peak), self._disk(), self.held, tuple(self._notes()), self.machine)

    def _run(self, run: MethodRun) -> PlannedStep:
        """Return the cost of a run; the rows that are drawn count by their mean length."""
        anchors = self._training(run.label, run.anchors)
        if run.objective is None:
            return anchors
        material, epochs = run.material, self.recipe.training.epochs
        drawn = {role: rows for role, rows in material.examples.items() if role != "refusal"}
        mean = {role: sum(self._tokens(rows)) / max(1, len(rows)) for role, rows in drawn.items()}
        usual = mean[material.anchor]
        each = (material.together.get(role, 1) * mean.get(role, usual) for role in run.objective.reads)
        tokens = round(epochs * len(run.anchors) * sum(each))
        return PlannedStep(run.label, tokens, anchors.seconds * max(1.0, tokens / max(1, anchors.tokens)))

    def _transforms(self, *, searched: bool) -> list[PlannedStep]:
        """Return the cost of transforms: reading what layers read, and solving for each vector made of it."""
        steps = []
        for one in self.changes:
            settings, places, vectors, axes = one.settings, 1, 1, 0.0
            if isinstance(settings, LeastSquaresSettings):
                places = 2 if settings.arrival or (searched and settings.arrival is None) else 1
                others = len(OTHER_MUS) if searched and settings.is_open else 0
                vectors = others + places
            if read := self._read(settings):
                cubes = sum(width**3 for width in self.widths)
                factors = 3 * isinstance(settings, LeastSquaresSettings)  # Cholesky
                axes = 10 * cubes * bool(settings.energy)  # kept for every μ
                tokens, seconds = self._scoring(read)
                seconds += 2 * tokens * sum(width**2 for width in self.widths) / self.score_rate
                reading = PlannedStep("measure what the layers read", places * tokens, places * seconds)
                steps.append(reading)
                solved = sum(8 * i**2 * o for o, i in self.matrices) + factors * cubes
            else:  # low rank takes singular values, which is more than a scale of each layer does
                solved = sum(10 * min(shape) * prod(shape) for shape in self.matrices)
            each = solved / self.solve_rate + 3 * 4 * self.parameters / 1e9  # written twice
            verb, more = NAMES.get(one.transform.name, "transform"), f", {vectors} times at most"
            label = f"{verb} the vector{more if vectors > 1 else ''}"
            steps.append(PlannedStep(label, 0, vectors * each + places * axes / self.solve_rate))
        return steps

    def _read(self, settings: Any) -> list[Example]:
        """Return the rows that a transform sends through the model, if it does."""
        rows = self.inputs.rows
        forget = rows.forget if isinstance(settings, LeastSquaresSettings) else ()
        if not isinstance(settings, LeastSquaresSettings | ProjectionSettings):
            return []
        return [*forget[: settings.rows], *rows.spared[: settings.rows]]

    def _generating(self, answers: int) -> tuple[int, float]:
        """Return tokens and seconds of so many answers of the longest kind."""
        settings = self.recipe.evaluation
        passes = settings.max_new_tokens * -(-answers // settings.batch_rows)
        compute = 2 * self.multiplied * settings.batch_rows * self.readers / self.score_rate
        read = self.itemsize * self.multiplied / self.memory_rate
        seconds = passes / self.readers * max(STEP_SECONDS, read + compute)
        return answers * settings.max_new_tokens, seconds

    def _tokens(self, examples: Sequence[Example]) -> list[int]:
        most = self.recipe.training.max_length
        if self.tokenizer is None:  # about four bytes a token, and the words of a template
            return [min(most, 8 + len(f"{one.prompt} {one.answer}".encode()) // 4) for one in examples]
        rows = tokenize(examples, self.tokenizer, max_length=most, style=self.recipe.prompts.style())
        return [len(row.ids) for row in rows]

    def _training(self, label: str, examples: Sequence[Example]) -> PlannedStep:
        lengths = self._tokens(examples)
        tokens = self.recipe.training.epochs * sum(lengths)
        lora = self.recipe.training.lora
        trained = self._adapter_weights(lora.rank) if lora else self.parameters
        each = 3 * STEP_SECONDS + self._update(trained)
        steps = count_steps(lengths, self.recipe.training)
        passes = 8 if self.recipe.training.gradient_checkpointing else 6  # two operations; backward is twice
        return PlannedStep(label, tokens, steps * each + passes * self.multiplied * tokens / self.train_rate)

    def _update(self, trained: int) -> float:
        """Return the seconds of a step in which weights are updated, and travel between devices and host."""
        way, share = self.held[0].way if self.machine else "", trained / self.many
        link = self.machine.link if self.machine else 0
        travel = 3 * 4 * trained / link if "sharded" in way else 8 * trained / link if self.many > 1 else 0
        if "host" in way:
            return 28 * share / HOST_MEMORY + 8 * share / HOST_BUS + travel
        return UPDATED * (share if "sharded" in way else trained) / self.memory_rate + travel

    def _scoring(self, examples: Sequence[Example]) -> tuple[int, float]:
        tokens = sum(self._tokens(examples))
        return tokens, STEP_SECONDS + 2 * self.multiplied * tokens / self.score_rate

    def _scales(self, grid: int) -> PlannedStep:
        """Return the points of a grid; or a search: a first look at the grid on some rows, then all rows."""
        rows, points = self.inputs.rows, self.recipe.scales.trials + 4
        tokens, seconds = self._scoring([*rows.forget_probe, *rows.retain_probe])
        if self.recipe.scales.choose == "grid":
            label = f"try up to {grid} pairs of scales in memory"
            return PlannedStep(label, grid * tokens, grid * seconds + self._puts(grid))
        unseen, unseen_seconds = self._scoring(rows.unseen) if rows.unseen else (0, 0.0)
        whole, put = points + FIRST_LOOK * grid, self._puts(points + grid)
        label = f"search scales: {grid} pairs at a glance, about {points} in full, in memory"
        time_taken = whole * seconds + put + 2 * unseen_seconds
        return PlannedStep(label, round(whole * tokens) + 2 * unseen, time_taken)

    def _puts(self, count: int) -> float:
        """Return the seconds in which so many sums are put into memory: read each time, or held there."""
        read = 4 * 4 * self.parameters / 1e9
        if self.on_cpu:
            return count * read
        operands = (2 + 4) * self.parameters  # the target, and a vector in float32
        room = not self.machine or self.held[-1].device + operands < (1 - ROOM) * self.machine.kind.memory
        return read + count * (SUMMED * self.parameters / self.memory_rate + (not room) * operands / HOST_BUS)

    def _evaluation(self, models: int) -> PlannedStep:
        examples = [*self.inputs.rows.forget_test, *self.inputs.rows.retain_test]
        read, seconds = self._scoring(examples)
        written, more = self._generating(sum(example.form != "document" for example in examples))
        label = f"evaluate {models} models"
        return PlannedStep(label, models * (read + written), models * (seconds + more))

    def _phases(self) -> Iterator[Held]:
        """Yield what is held while vectors are trained, inputs of layers measured, and models read."""
        rows, training, evaluation = self.inputs.rows, self.recipe.training, self.recipe.evaluation
        wide, deep = (int(self.config.get(name, 1)) for name in ("hidden_size", "num_hidden_layers"))
        whole = not self.inputs.method.has_scales
        longest = max(self._tokens([*rows.forget, *(rows.retain if whole else rows.retain_sample)]))
        if self.runs or self.recipe.prepare:
            together = max([1, *(count for run in self.runs for count in run.material.together.values())])
            divided = self.machine and self.machine.count == 1  # what one GPU has no room for goes in parts
            at_once = 1 if divided else training.batch_size
            redone = training.gradient_checkpointing
            token = bytes_per_token(self.config, narrow=self.narrow, recomputed=redone)
            self.passing = at_once * together * longest * token
            ways = [*self._ways(self.machine, None if self.recipe.prepare else training.lora)]
            yield next((way for way in ways if self.machine is None or way.fits(self.machine)), ways[-1])
        if read := max((self._read(one.settings) for one in self.changes), key=len, default=[]):
            sums = (4 if self.machine else 8) * sum(width**2 for width in self.widths) / deep
            yield self._reading("measure inputs", 4, sums + 4 * wide * sum(self._tokens(read)))
        heads = int(self.config.get("num_attention_heads", 1))
        each = self.config.get("head_dim") or wide // heads
        kept = int(self.config.get("num_key_value_heads") or heads) * each
        cached = evaluation.batch_rows * (longest + evaluation.max_new_tokens)
        cache = 2 * deep * kept * cached * self.itemsize
        logits = 8 * int(self.config.get("vocab_size", 32_000)) * evaluation.batch_rows * longest
        yield self._reading("read", self.itemsize, min(2 * LOGIT_BYTES, logits) + cache)

    def _reading(self, phase: str, itemsize: int, more: float) -> Held:
        """Return what is held while a model is only read, by each device or by all of them together."""
        weights = itemsize * self.parameters
        held = Held(phase, "whole", weights, 0, 0, more + FLOOR, weights)
        if self.machine is None or held.fits(self.machine):
            return held
        many = self.machine.count
        return Held(phase, f"spread over {many}", weights / many, 0, 0, more + FLOOR, weights / many)

    def _ways(self, machine: Machine | None, lora: LoraSettings | None) -> Iterator[Held]:
        """Yield the ways to hold a training, the quickest first; several devices divide the rows."""
        size, many, more = self.parameters, machine.count if machine else 1, self.passing + FLOOR
        deep = int(self.config.get("num_hidden_layers", 1))
        if lora:
            start, own = STARTS[lora.base] * size, float(self._adapter_weights(lora.rank))
            yield Held("fine-tune", "adapter", start + 4 * own, 4 * own, 8 * own, more, start)
            if many > 1:
                part, own = start / many + 2 * start / deep, own / many
                yield Held(
                    "fine-tune", f"adapter, sharded over {many}", part + 4 * own, 4 * own, 8 * own, more, part
                )
            return
        for name in BYTES:
            if self.recipe.training.optimizer in ("auto", name):
                weights, gradients, optimiser, host = (size * each for each in BYTES[name])
                yield Held("fine-tune", HELD[name], weights, gradients, optimiser, more, max(host, 4 * size))
        if many > 1:
            part, gathered = 4 * size / many, 2 * 4 * size / deep
            yield Held("fine-tune", f"sharded over {many}", part + gathered, part, 2 * part, more, part)
            yield Held("fine-tune", "sharded, in host memory", gathered, gathered / 2, 0, more, 4 * part)

    def _notes(self) -> Iterator[str]:
        """Yield whether this machine is busy; else what is not built, and how many devices it would take."""
        load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
        if self.machine is None and load > cores:
            yield f"Times are those of a busy machine (a load of {load:.1f} on {cores} cores)."
        if any("sharded, in" in one.way or "spread" in one.way for one in self.held):
            yield "Not built: Palinode shards training on devices alone, and spreads no model that it reads."
        if self.machine is None or self.held[0].phase != "fine-tune" or self.held[0].fits(self.machine):
            return
        adapter = LoraSettings(rank=16, base="bfloat16")
        ways = {"vectors of all weights": None, "an adapter (--lora 16, base bfloat16)": adapter}
        for what, lora in ways.items():
            counts = (replace(self.machine, count=2**power) for power in range(13))
            found = ((m.count, way.way) for m in counts for way in self._ways(m, lora) if way.fits(m))
            count, way = next(found, (0, ""))
            nowhere = f"No number of these has room for {what}: try training.gradient_checkpointing."
            yield f"It takes {count} of these devices for {what}: {way}." if count else nowhere

    def _adapter_weights(self, rank: int) -> int:
        """Return how many weights A and B of all matrices of the blocks have."""
        return rank * sum(map(sum, self.matrices))

    def _disk(self) -> int:
        made = 2 if self.recipe.prepare else 0
        target, lora = self.inputs.reader, self.recipe.training.lora
        trained = self._adapter_weights(lora.rank) if lora else self.parameters
        resumed = (self.parameters if made else trained) if self.runs or made else 0
        state = 12 * resumed  # while vectors are trained, before any is filtered
        merged = sum(run.whole for run in self.runs) if lora else 0
        whole = self.parameters * (made + merged)
        own = [one.settings for one in self.changes]
        tensors = target.tensors.values()
        blocks = sum(info.size for info in tensors if part_of(info.name).startswith("layer "))
        vectors = sum(blocks if getattr(one, "others", "") == "drop" else self.parameters for one in own)
        if weighed := [one for one in own if isinstance(one, LeastSquaresSettings)]:
            # The best vector and one that is made; halves of four sets of moments, and the axes of two, an
            # eighth of all (docs/filters.md).
            vectors += blocks if weighed[-1].others == "drop" else self.parameters
            vectors += sum(9 * width**2 // 4 for width in self.widths)
        return 4 * (trained * len(self.runs) + whole) + max(state, 4 * vectors + target.nbytes)


class Corrected(Relay):
    """Hands on what a run tells, and corrects its plan once, when a training has shown its pace."""

    def __init__(self, listener: Listener, plan: Plan, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(listener)
        self.plan, self.clock, self.known = plan, clock, False

    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Advance]:
        """Hand on a task; a planned training is known by its tokens."""
        steps = self.plan.steps
        place = next((n for n, one in enumerate(steps) if unit == "tokens" and one.tokens == total), None)
        began: list[tuple[float, int]] = []
        with self.listener.task(label, total, unit) as advance:

            def counted(amount: int) -> None:
                advance(amount)
                began.append((self.clock(), amount))
                (start, _), (now, _) = began[0], began[-1]  # what came first may be from before
                if place is not None and not self.known and now - start >= PATIENCE:
                    self.known = True
                    each = (now - start) / sum(tokens for _, tokens in began[1:])
                    self._correct(steps[place:], each * total)

            yield counted

    def _correct(self, steps: Sequence[PlannedStep], seconds: float) -> None:
        """Say what a step takes, and what is left with it, where the plan is off."""
        pace = seconds / steps[0].seconds
        if not 1 / OFF < pace < OFF:
            left = duration_text(pace * sum(step.seconds for step in steps))
            self.say(
                f"At this pace, to {steps[0].label} takes {duration_text(seconds)}, not "
                f"{duration_text(steps[0].seconds)}; with all that follows, about {left}."
            )


def distinct_inputs(matrices: Sequence[TensorInfo]) -> list[int]:
    """Return the width of each input that layers of the blocks read.

    Layers of one module with one width read the same, but the attention's last one, which reads its own.
    """
    modules: dict[str, dict[tuple[str, int], int]] = defaultdict(dict)
    for info in matrices:
        if part_of(info.name).startswith("layer"):
            module, width = info.name.rsplit(".", 2)[0], info.shape[1]
            modules[part_of(info.name)].setdefault((module, width), width)
    return [width for own in modules.values() for width in (*own.values(), min(own.values()))]


def product_seconds(device: torch.device, dtype: torch.dtype, tokens: int, shape: Sequence[int]) -> float:
    """Return the seconds in which so many tokens are multiplied by a matrix (outputs, inputs).

    Of a large one a part is timed, so large that the device takes longer than the host waits for it.
    """
    outputs, inputs = min(shape[0], 4096), shape[1]
    rows = max(16, min(tokens, int((2e9 if device.type == "cpu" else 1e12) / (outputs * inputs))))
    left, right = (torch.ones(count, inputs, device=device, dtype=dtype) for count in (rows, outputs))
    once = usual_seconds(lambda: left @ right.T, device)
    return once * max(1.0, tokens / rows) * shape[0] / outputs


def usual_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that some work usually takes, the device's part included."""
    found = []
    for _ in range(4):
        started = time.perf_counter()
        work()
        if device.type != "cpu":
            float(torch.ones(1, device=device))  # waits for what was asked before
        found.append(time.perf_counter() - started)
    return median(found[1:])


def describe(plan: Plan) -> list[str]:
    """Return the plan as lines of text."""
    width = max(len(step.label) for step in plan.steps)
    lines = [
        f"  {step.label:<{width}}  {step.tokens:>12,} tokens  about {duration_text(step.seconds)}"
        for step in plan.steps
    ]
    total = (
        f"In all {plan.tokens:,} tokens, about {duration_text(plan.seconds)}; "
        f"peak memory about {plan.memory / 1e9:.1f} GB, disk {plan.disk / 1e9:.2f} GB."
    )
    told = ["What will be done (finished steps are not repeated):", *lines, total]
    return [*told, *(plan.notes if plan.machine is None else _describe_held(plan, plan.machine))]


def _describe_held(plan: Plan, machine: Machine) -> Iterator[str]:
    """Yield what each device holds, as a table, and what a machine costs."""
    yield f"On {machine.count} × {machine.kind.told}."
    columns = {"weights": "weights", "gradients": "grads", "optimiser": "AdamW", "activations": "activ."}
    columns |= {"device": "device", "host": "host"}
    told = [("GB a device", "held"), *((one.phase, one.way) for one in plan.held)]
    first, second = (max(map(len, texts)) for texts in zip(*told, strict=True))
    names = "".join(f"{name:>8}" for name in columns.values())
    yield f"  {'GB a device':<{first}}  {'held':<{second}}{names}"
    for one in plan.held:
        numbers = "".join(f"{getattr(one, name) / 1e9:>8.1f}" for name in columns)
        judged = "" if one.fits(machine) else "  too much"
        yield f"  {one.phase:<{first}}  {one.way:<{second}}{numbers}{judged}"
    yield from plan.notes
    if machine.price is not None:
        cost = plan.seconds / 3600 * machine.count * machine.price
        yield f"At {machine.price:.2f} an hour and device: {cost:,.2f}."

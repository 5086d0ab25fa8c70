"""What a run will do and what it will cost, said before any long work.

Tokens and bytes are counted. Times are estimates from products of the model's own shapes, over as many
tokens as a batch of these rows has, and from how fast memory is read and written, all timed here and now:
good to a factor of about two, on a machine that stays as busy as it is.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from statistics import median

import torch

from palinode.data.examples import Example
from palinode.data.tokenize import tokenize
from palinode.evaluation.self_check import ROWS, rows_with_style
from palinode.methods.method import Asked, MethodRun
from palinode.methods.transforms import LeastSquaresSettings, ProjectionSettings, check_transforms
from palinode.models.likelihoods import LOGIT_BYTES
from palinode.models.loading import load_tokenizer, pick_device
from palinode.pipeline.inputs import Inputs
from palinode.pipeline.scales import FIRST_LOOK
from palinode.progress import duration_text
from palinode.training.loop import autocasts, bytes_per_token, count_steps
from palinode.weights.geometry import part_of

NAMES = {"least_squares": "filter", "projection": "project"}
PRODUCTS = 0.5
"""Share of a pass that its matrix products take; the rest is attention, norms, activations and sums."""
UPDATED = 44
"""Bytes that clipping and AdamW read and write for each weight that is trained."""
STEP_SECONDS = 0.012
"""Least time of one pass through a model, however small."""
SHARED = 0.6
"""Share of the layers of a block that have inputs of their own: queries, keys and values read the same."""


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

    @property
    def tokens(self) -> int:
        """Tokens over all steps."""
        return sum(step.tokens for step in self.steps)

    @property
    def seconds(self) -> float:
        """Estimated time over all steps."""
        return sum(step.seconds for step in self.steps)


def make_plan(inputs: Inputs) -> Plan:
    """Count what a run will do, as if none of its steps had been done before."""
    return _Planner(inputs).plan()


class _Planner:
    """The numbers that all estimates share."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.recipe = inputs.recipe
        self.parameters = inputs.reader.parameters
        self.tokenizer = load_tokenizer(inputs.reader)
        self.runs = inputs.method.runs(inputs.settings, inputs.given)
        self.changes = check_transforms(self.recipe.changes)
        found = [info for info in self.inputs.reader.tensors.values() if len(info.shape) == 2]
        self.matrices = [info.shape for info in found if part_of(info.name).startswith("layer")]
        """(outputs, inputs) of the layers of the blocks."""
        head = max((info.shape for info in found if info.shape not in self.matrices), default=(1, 1))
        self.products = Counter([*self.matrices, head])
        """Shapes of all matrices that a token is multiplied by."""
        self.multiplied = sum(count * prod(shape) for shape, count in self.products.items())
        self.device, training = pick_device(self.recipe.device), self.recipe.training
        self.memory_rate = measure_memory(self.device)
        lengths = self._tokens(inputs.rows.forget[:64])
        batch = training.batch_size * max(1, sum(lengths) // max(1, len(lengths)))
        narrow = autocasts(training, self.device, self.parameters)
        self.train_rate = self._rate(batch, torch.bfloat16 if narrow else torch.float32)
        self.score_rate = self._rate(1024, torch.float32)

    def _rate(self, tokens: int, dtype: torch.dtype) -> float:
        """Return the operations a second of a pass of so many tokens through the model."""
        time_of = partial(product_seconds, self.device, dtype, tokens)
        seconds = sum(count * time_of(shape) for shape, count in self.products.items())
        return PRODUCTS * 2 * tokens * self.multiplied / seconds

    def plan(self) -> Plan:
        rows, recipe = self.inputs.rows, self.recipe
        asked = rows_with_style(rows.forget)[:ROWS] if self.inputs.target else []
        steps = [self._other_prompts(asked)] if asked else []
        if recipe.prepare:
            steps.append(self._training("make the target", [*rows.forget, *rows.retain]))
            steps.append(self._training("make the retrained model", rows.retain))
        for run in self.runs:
            steps += [self._asked(run.asked)] if run.asked else []
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
        return Plan(tuple(steps), self._memory(), self._disk())

    def _run(self, run: MethodRun) -> PlannedStep:
        """Return the cost of a run; the rows that are drawn count by their mean length."""
        anchors = self._training(run.label, run.anchors)
        if run.objective is None:
            return anchors
        material, epochs = run.material, self.recipe.training.epochs
        mean = {
            role: sum(self._tokens(rows)) / max(1, len(rows))
            for role, rows in material.examples.items()
            if role != "refusal"
        }
        each = (
            material.together.get(role, 1) * mean.get(role, mean[run.material.anchor])
            for role in run.objective.reads
        )
        tokens = round(epochs * len(run.anchors) * sum(each))
        return PlannedStep(run.label, tokens, anchors.seconds * max(1.0, tokens / max(1, anchors.tokens)))

    def _transforms(self, *, searched: bool) -> list[PlannedStep]:
        """Return the cost of transforms: reading what layers read, and solving for each vector made of it."""
        steps, rows = [], self.inputs.rows
        for one in self.changes:
            settings, places, vectors, factors = one.settings, 1, 1, 0
            if isinstance(settings, LeastSquaresSettings):
                places = 2 if settings.arrival or (searched and settings.arrival is None) else 1
                vectors = (3 if searched and settings.is_open else 1) + places - 1
                read = [*rows.forget[: settings.rows], *rows.spared[: settings.rows]]
                factors = 3 + 10 * bool(settings.energy)  # Cholesky, and principal axes
            elif isinstance(settings, ProjectionSettings):
                read, factors = [*rows.spared[: settings.rows]], 10
            if factors:
                tokens, seconds = self._scoring(read)
                seconds += 2 * SHARED * tokens * sum(i**2 for _, i in self.matrices) / self.score_rate
                reading = PlannedStep("measure what the layers read", places * tokens, places * seconds)
                steps.append(reading)
                solved = sum(8 * i**2 * o + factors * SHARED * i**3 for o, i in self.matrices)
            else:  # low rank takes singular values, which is more than a scale of each layer does
                solved = sum(10 * min(shape) * prod(shape) for shape in self.matrices)
            each = 2 * solved / self.score_rate + 3 * 4 * self.parameters / 1e9  # in float64, written twice
            verb, more = NAMES.get(one.transform.name, "transform"), f", {vectors} times at most"
            steps.append(PlannedStep(f"{verb} the vector{more if vectors > 1 else ''}", 0, vectors * each))
        return steps

    def _asked(self, asked: Asked) -> PlannedStep:
        """Return the cost of generating other answers."""
        return PlannedStep("ask the target for other answers", *self._generating(asked.count))

    def _generating(self, answers: int) -> tuple[int, float]:
        """Return tokens and seconds of so many answers of the longest kind."""
        settings = self.recipe.evaluation
        passes = settings.max_new_tokens * -(-answers // settings.batch_rows)
        compute = 2 * self.multiplied * settings.batch_rows / self.score_rate
        seconds = passes * max(STEP_SECONDS, 4 * self.multiplied / self.memory_rate + compute)
        return answers * settings.max_new_tokens, seconds

    def _tokens(self, examples: Sequence[Example]) -> list[int]:
        rows = tokenize(
            examples,
            self.tokenizer,
            max_length=self.recipe.training.max_length,
            style=self.recipe.prompts.style(),
        )
        return [len(row.ids) for row in rows]

    def _training(self, label: str, examples: Sequence[Example]) -> PlannedStep:
        lengths = self._tokens(examples)
        tokens = self.recipe.training.epochs * sum(lengths)
        lora = self.recipe.training.lora
        trained = self._adapter_weights(lora.rank) if lora else self.parameters
        each = 3 * STEP_SECONDS + UPDATED * trained / self.memory_rate
        steps = count_steps(lengths, self.recipe.training)
        return PlannedStep(label, tokens, steps * each + 6 * self.multiplied * tokens / self.train_rate)

    def _scoring(self, examples: Sequence[Example]) -> tuple[int, float]:
        tokens = sum(self._tokens(examples))
        return tokens, STEP_SECONDS + 2 * self.multiplied * tokens / self.score_rate

    def _other_prompts(self, rows: Sequence[Example]) -> PlannedStep:
        """Return the asking of some rows in every plausible way, of which there are about five."""
        tokens, seconds = self._scoring(rows)
        return PlannedStep(f"ask the target {len(rows)} rows in other ways", 5 * tokens, 5 * seconds)

    def _scales(self, grid: int) -> PlannedStep:
        """Return the points of a grid; or a search: a first look at the grid on some rows, then all rows."""
        rows, points = self.inputs.rows, self.recipe.scales.trials + 4
        tokens, seconds = self._scoring([*rows.forget_probe, *rows.retain_probe])
        each = 4 * 4 * self.parameters / 1e9  # to put a sum into memory
        if self.recipe.scales.choose == "grid":
            label = f"try up to {grid} pairs of scales in memory"
            return PlannedStep(label, grid * tokens, grid * (seconds + each))
        unseen, unseen_seconds = self._scoring(rows.unseen) if rows.unseen else (0, 0.0)
        whole, put = points + FIRST_LOOK * grid, (points + grid) * each
        return PlannedStep(
            f"search scales: {grid} pairs at a glance, about {points} in full, in memory",
            round(whole * tokens) + 2 * unseen,
            whole * seconds + put + 2 * unseen_seconds,
        )

    def _evaluation(self, models: int) -> PlannedStep:
        examples = [*self.inputs.rows.forget_test, *self.inputs.rows.retain_test]
        read, seconds = self._scoring(examples)
        written, more = self._generating(sum(example.form != "document" for example in examples))
        label = f"evaluate {models} models"
        return PlannedStep(label, models * (read + written), models * (seconds + more))

    def _memory(self) -> int:
        rows, training = self.inputs.rows, self.recipe.training
        whole = not self.inputs.method.has_scales
        longest = max(self._tokens([*rows.forget, *(rows.retain if whole else rows.retain_sample)]))
        together = max([1, *(count for run in self.runs for count in run.material.together.values())])
        activations = training.batch_size * together * longest * bytes_per_token(self.inputs.reader.config)
        return max(self._trained() + activations, 4 * self.parameters + 2 * LOGIT_BYTES) + 600_000_000

    def _trained(self) -> int:
        """Return the bytes of weights, gradients and optimiser state while training."""
        lora = self.recipe.training.lora
        if not self.runs and not self.recipe.prepare:
            return 0
        if lora is None or self.recipe.prepare:
            return 16 * self.parameters
        held = {"float32": 4.0, "bfloat16": 2.0, "4bit": 0.6}[lora.base]
        return round(held * self.parameters) + 16 * self._adapter_weights(lora.rank)

    def _adapter_weights(self, rank: int) -> int:
        """Return how many weights A and B of all matrices of the blocks have."""
        return rank * sum(map(sum, self.matrices))

    def _disk(self) -> int:
        made = 2 if self.recipe.prepare else 0
        target, lora = self.inputs.reader, self.recipe.training.lora
        trained = self._adapter_weights(lora.rank) if lora else self.parameters
        resumed = (self.parameters if made else trained) if self.runs or made else 0
        state = 12 * resumed  # there while a step runs
        merged = sum(run.whole for run in self.runs) if lora else 0
        whole = self.parameters * (made + merged)
        vectors = len(self.changes) * self.parameters
        if any(isinstance(one.settings, LeastSquaresSettings) for one in self.changes):  # and its moments
            vectors += 3 * self.parameters + round(4 * SHARED * sum(width**2 for _, width in self.matrices))
        return 4 * (trained * len(self.runs) + whole + vectors) + target.nbytes + state


def product_seconds(device: torch.device, dtype: torch.dtype, tokens: int, shape: Sequence[int]) -> float:
    """Return the seconds in which so many tokens are multiplied by a matrix (outputs, inputs).

    Of a large one a part is timed.
    """
    outputs, inputs = min(shape[0], 4096), shape[1]
    rows = max(16, min(tokens, int(2e9 / (outputs * inputs))))
    left, right = (torch.ones(count, inputs, device=device, dtype=dtype) for count in (rows, outputs))
    once = usual_seconds(lambda: left @ right.T, device)
    return once * max(1.0, tokens / rows) * shape[0] / outputs


def measure_memory(device: torch.device) -> float:
    """Return the bytes that are read and written a second where a large vector is added to another."""
    one, other = (torch.ones(1 << 23, device=device) for _ in range(2))
    return 12 * len(one) / usual_seconds(lambda: one.add_(other), device)


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
    return ["What will be done (finished steps are not repeated):", *lines, total]

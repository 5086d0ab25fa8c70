"""What a run will do and what it will cost, said before any long work.

Tokens and bytes are counted; times are estimates from a short measurement of this machine's
arithmetic, good to a factor of about two.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from palinode.data.examples import Example
from palinode.data.tokenize import tokenize
from palinode.evaluation.self_check import ROWS, rows_with_style
from palinode.methods.method import Asked, MethodRun
from palinode.models.likelihoods import LOGIT_BYTES
from palinode.models.loading import load_tokenizer, pick_device
from palinode.pipeline.inputs import Inputs
from palinode.pipeline.scales import FIRST_LOOK
from palinode.training.loop import AUTOCAST_FROM, count_steps
from palinode.weights.geometry import part_of

EFFICIENCY = 0.4
"""Share of a matrix product's speed that training reaches."""
STEP_SECONDS = 0.012
"""Least time of one pass through a model, however small."""
MEMORY_RATE = 8e9
"""Bytes of weights read a second while answers are generated on a CPU."""


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
        self.vocabulary = int(inputs.reader.config.get("vocab_size", 32_000))
        self.tokenizer = load_tokenizer(inputs.reader)
        self.runs = inputs.method.runs(inputs.settings, inputs.given)
        device = pick_device(self.recipe.device)
        autocast = device.type == "cuda" or self.parameters >= AUTOCAST_FROM
        self.train_rate = EFFICIENCY * measure_flops(device, torch.bfloat16 if autocast else torch.float32)
        self.score_rate = EFFICIENCY * measure_flops(device, torch.float32)

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
        points = grid_size(self.inputs) if self.inputs.method.has_scales else 1
        if points > 1:
            steps.append(self._search(points) if recipe.scales.choose == "auto" else self._grid(points))
        steps.append(PlannedStep("write the unlearned model", 0, 6 * 4 * self.parameters / 1e9))
        models = 2 + bool(self.inputs.base) + bool(self.inputs.retrained or recipe.prepare)
        steps.append(self._evaluation(models))
        return Plan(tuple(steps), self._memory(), self._disk())

    def _run(self, run: MethodRun) -> PlannedStep:
        """Return the cost of a run; the rows that are drawn count by their mean length."""
        anchors = self._training(run.label, run.anchors)
        if run.objective is None:
            return anchors
        material, epochs = run.material, self.recipe.training.epochs
        mean = {
            role: self._mean_length(rows) for role, rows in material.examples.items() if role != "refusal"
        }
        each = (
            material.together.get(role, 1) * mean.get(role, mean[run.material.anchor])
            for role in run.objective.reads
        )
        tokens = round(epochs * len(run.anchors) * sum(each))
        return PlannedStep(run.label, tokens, anchors.seconds * max(1.0, tokens / max(1, anchors.tokens)))

    def _asked(self, asked: Asked) -> PlannedStep:
        """Return the cost of generating other answers."""
        settings = self.recipe.evaluation
        passes = settings.max_new_tokens * -(-asked.count // settings.batch_rows)
        compute = 2 * self.parameters * settings.batch_rows / self.score_rate
        seconds = passes * max(STEP_SECONDS, 4 * self.parameters / MEMORY_RATE + compute)
        tokens = asked.count * settings.max_new_tokens
        return PlannedStep("ask the target for other answers", tokens, seconds)

    def _mean_length(self, examples: Sequence[Example]) -> float:
        lengths = self._tokens(examples) if examples else []
        return sum(lengths) / max(1, len(lengths))

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
        floor = 3 * STEP_SECONDS * count_steps(lengths, self.recipe.training)
        return PlannedStep(label, tokens, floor + 6 * self.parameters * tokens / self.train_rate)

    def _scoring(self, examples: Sequence[Example]) -> tuple[int, float]:
        tokens = sum(self._tokens(examples))
        return tokens, STEP_SECONDS + 2 * self.parameters * tokens / self.score_rate

    def _other_prompts(self, rows: Sequence[Example]) -> PlannedStep:
        """Return the asking of some rows in every plausible way, of which there are about five."""
        tokens, seconds = self._scoring(rows)
        return PlannedStep(f"ask the target {len(rows)} rows in other ways", 5 * tokens, 5 * seconds)

    def _grid(self, points: int) -> PlannedStep:
        rows = self.inputs.rows
        tokens, seconds = self._scoring([*rows.forget_probe, *rows.retain_probe])
        put = 4 * 4 * self.parameters / 1e9
        return PlannedStep(
            f"try up to {points} pairs of scales in memory", points * tokens, points * (seconds + put)
        )

    def _search(self, grid: int) -> PlannedStep:
        """Return the search of `auto.py`: a first look at the grid on some rows, then points on all."""
        rows, points = self.inputs.rows, self.recipe.scales.trials + 4
        tokens, seconds = self._scoring([*rows.forget_probe, *rows.retain_probe])
        unseen, unseen_seconds = self._scoring(rows.unseen) if rows.unseen else (0, 0.0)
        whole = points + FIRST_LOOK * grid
        put = (points + grid) * 4 * 4 * self.parameters / 1e9
        return PlannedStep(
            f"search scales: {grid} pairs at a glance, about {points} in full, in memory",
            round(whole * tokens) + 2 * unseen,
            whole * seconds + put + 2 * unseen_seconds,
        )

    def _evaluation(self, models: int) -> PlannedStep:
        rows, settings = self.inputs.rows, self.recipe.evaluation
        examples = [*rows.forget_test, *rows.retain_test]
        tokens, seconds = self._scoring(examples)
        asked = sum(example.form != "document" for example in examples)
        passes = settings.max_new_tokens * -(-asked // settings.batch_rows)
        compute = 2 * self.parameters * settings.batch_rows / self.score_rate
        seconds += passes * max(STEP_SECONDS, 4 * self.parameters / MEMORY_RATE + compute)
        generated = asked * settings.max_new_tokens
        return PlannedStep(f"evaluate {models} models", models * (tokens + generated), models * seconds)

    def _memory(self) -> int:
        rows, training = self.inputs.rows, self.recipe.training
        whole = not self.inputs.method.has_scales
        longest = max(self._tokens([*rows.forget, *(rows.retain if whole else rows.retain_sample)]))
        config = self.inputs.reader.config
        width = int(config.get("hidden_size", 1024)) * int(config.get("num_hidden_layers", 16))
        together = max([1, *(count for run in self.runs for count in run.material.together.values())])
        activations = training.batch_size * together * longest * (12 * self.vocabulary + 40 * width)
        return max(self._trained() + activations, 4 * self.parameters + 2 * LOGIT_BYTES) + 600_000_000

    def _trained(self) -> int:
        """Return the bytes of weights, gradients and optimiser state while training."""
        lora = self.recipe.training.lora
        if lora is None or self.recipe.prepare:
            return 16 * self.parameters
        held = {"float32": 4.0, "bfloat16": 2.0, "4bit": 0.6}[lora.base]
        return round(held * self.parameters) + 16 * self._adapter_weights(lora.rank)

    def _adapter_weights(self, rank: int) -> int:
        """Return how many weights A and B of all matrices of the blocks have."""
        matrices = [info for info in self.inputs.reader.tensors.values() if len(info.shape) == 2]
        return rank * sum(sum(info.shape) for info in matrices if part_of(info.name).startswith("layer"))

    def _disk(self) -> int:
        made = 2 if self.recipe.prepare else 0
        target, lora = self.inputs.reader, self.recipe.training.lora
        trained = self._adapter_weights(lora.rank) if lora else self.parameters
        state = 12 * (self.parameters if made else trained)  # a resumable one, there while a step runs
        merged = sum(run.whole for run in self.runs) if lora else 0
        whole = self.parameters * (made + merged)
        return 4 * (trained * len(self.runs) + whole) + target.nbytes + state


def grid_size(inputs: Inputs) -> int:
    """Return the number of (α, β) pairs on the run's grid."""
    scales = inputs.recipe.scales
    alphas = len(scales.forget_grid) if scales.forget is None else 1
    betas = len(scales.retain_grid) if inputs.given.retain_scale is None else 1
    return alphas * betas


def measure_flops(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """Return floating-point operations a second of a square matrix product, the best of five."""
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        float((matrix @ matrix)[0, 0])
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def describe(plan: Plan) -> list[str]:
    """Return the plan as lines of text."""
    width = max(len(step.label) for step in plan.steps)
    lines = [
        f"  {step.label:<{width}}  {step.tokens:>12,} tokens  about {_duration(step.seconds)}"
        for step in plan.steps
    ]
    total = (
        f"In all {plan.tokens:,} tokens, about {_duration(plan.seconds)}; "
        f"peak memory about {plan.memory / 1e9:.1f} GB, disk {plan.disk / 1e9:.2f} GB."
    )
    return ["What will be done (finished steps are not repeated):", *lines, total]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

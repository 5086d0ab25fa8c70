"""Paired vectors beside MSA and the task vector at equal forgetting, on the demo's invented world.

    python benchmarks/paired.py [--folder DIR] [--seeds 0 1 2] [--replay 150 450 1500] [--json]

For each seed the demo's models are trained (or found in the folder), then θ_1, θ_2, θ_c of each vector. For
each vector and β the α is searched at which the forget people's mean answer probability is the retrained
model's; there the others' recall (share of rows answered exactly, read off teacher-forced argmaxes) and mean
answer probability are taken, over all other people and over the rows that no vector was trained on. So the
retrained model decides α, which no user could do: this compares vectors, not the rule that chooses scales.
What was trained is kept; the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch

from palinode.benchmarks.demo import DemoModels, build_demo
from palinode.data.examples import Example, read_examples, sample_examples
from palinode.data.tokenize import PromptStyle, TokenRow, tokenize
from palinode.data.world import invent_world
from palinode.models.inplace import put
from palinode.models.likelihoods import score_rows
from palinode.models.loading import load_model, load_tokenizer
from palinode.training.finetune import finetune
from palinode.training.paired import control_objective, exposed_objective, pair_material
from palinode.training.settings import TrainingSettings
from palinode.weights import Checkpoint, Direction

CPU = torch.device("cpu")
PLAIN = {"epochs": 30, "learning_rate": 5e-4, "batch_size": 32, "max_length": 64, "precision": "float32"}
"""The demo's own fine-tuning: MSA and the task vector have their good settings."""
RATIO, FORGET_ROWS = 3, 16
"""A step of a pair has 16 forget rows and 48 replay rows."""
LARGEST_ALPHA = 16.0


@dataclass(frozen=True)
class Vectors:
    """What a name in the table stands for: a forget direction, and one to add, with the rows they saw."""

    name: str
    forget: Direction
    retain: Direction | None
    seen: frozenset[int]
    steps: int
    betas: tuple[float, ...] = (0.0,)
    """Values of β that are tried; without a retain direction there is one."""


@dataclass(frozen=True)
class Result:
    """One vector and β of one seed, at the α of equal forgetting; None where no α reaches it."""

    seed: int
    name: str
    beta: float
    steps: int
    alpha: float | None
    recall: float | None = None
    probability: float | None = None
    unseen_recall: float | None = None
    unseen_probability: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("build/paired"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--replay", type=int, nargs="+", default=[150, 450, 1500], help="replay rows")
    parser.add_argument("--epochs", type=int, nargs="+", default=[10, 30], help="of a pair; 10 steps each")
    parser.add_argument(
        "--weight", type=float, default=1 / RATIO, help="λ (default: 1/3, as in one mixed batch)"
    )
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: list[Result] = []
    anchors: list[dict[str, float]] = []
    for seed in args.seeds:
        study = Study(args.folder, seed)
        anchors.append(study.anchors())
        print(json.dumps({"seed": seed, **anchors[-1]}), flush=True)
        for vectors in study.all_vectors(args.replay, args.epochs, args.weight, args.learning_rate):
            found = [study.at_equal_forgetting(vectors, beta) for beta in vectors.betas]
            for result in found:
                print(_line(result), flush=True)
            results += found
    print()
    for line in table(results):
        print(line)
    if args.json:
        print(json.dumps({"anchors": anchors, "results": [asdict(result) for result in results]}))


class Study:
    """One seed's models, rows and measurements."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.seed = seed
        self.folder = folder / f"vectors-{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        world = invent_world(seed)
        self.models: DemoModels = build_demo(world, folder / f"world-{seed}", seed=seed)
        self.forget, self.retain = read_examples(self.models.forget), read_examples(self.models.retain)
        self.people = len(world.others)
        tokenizer = load_tokenizer(self.models.target)
        self.forget_rows = tokenize(self.forget, tokenizer, max_length=64, style=PromptStyle())
        self.others = tokenize(self.retain[: self.people], tokenizer, max_length=64, style=PromptStyle())
        self.live = load_model(self.models.target, device=CPU)
        self.wanted, _ = self._score(load_model(self.models.retrained, device=CPU), self.forget_rows)

    def anchors(self) -> dict[str, float]:
        """Return what the given models do: forget probability, others' probability and recall."""
        found = {"retrained_forget": self.wanted}
        for name, model in (("target", self.models.target), ("retrained", self.models.retrained)):
            live = load_model(model, device=CPU)
            probability, recall = self._score(live, self.others)
            found |= {f"{name}_others": probability, f"{name}_recall": recall}
        return found

    def all_vectors(
        self, sizes: Sequence[int], epochs: Sequence[int], weight: float, rate: float
    ) -> Iterator[Vectors]:
        """Yield every vector of the study, trained where it is not there yet."""
        base, target = self.models.base, self.models.target
        sample = sample_examples(self.retain, len(self.forget), seed=self.seed)
        msa = self._plain("msa", base, self.forget, 30) - base
        retain = self._plain("msa-retain", base, sample, 30) - base
        seen = frozenset(example.row for example in sample)
        yield Vectors("MSA", msa, None, frozenset(), 150)
        yield Vectors("MSA with retain vector", msa, retain, seen, 150, (0.5, 1.0))
        short = self._plain("msa-short", base, self.forget, 10, FORGET_ROWS) - base
        yield Vectors("MSA, as many steps as a pair", short, None, frozenset(), 100)
        for count in (10, 30):
            task = self._plain(f"task-{count}", target, self.forget, count) - target
            yield Vectors("task vector", task, None, frozenset(), 5 * count)
        for count in epochs:
            for size in sizes:
                for name, start in (("θ_0", base), ("θ_D", target)):
                    yield from self._pair(name, start, size, count, weight, rate)

    def _pair(
        self, name: str, start: Checkpoint, size: int, epochs: int, weight: float, rate: float
    ) -> Iterator[Vectors]:
        """Yield a paired vector, and what its first run gives without the control."""
        replay = sample_examples(self.retain, size, seed=self.seed)
        label = f"pair-{'base' if name == 'θ_0' else 'target'}-{size}-{epochs}-{rate:g}"
        settings = TrainingSettings(
            **{**PLAIN, "epochs": epochs, "learning_rate": rate, "batch_size": FORGET_ROWS}
        )
        material = pair_material(self.forget, replay, replay_ratio=RATIO)
        runs = {
            f"{label}-exposed-{weight:g}": exposed_objective(weight),
            f"{label}-control": control_objective(),
        }
        exposed, control = (
            self._kept(
                key,
                lambda place, objective=objective: finetune(
                    start, material, place, settings, seed=self.seed, device="cpu", loss=objective
                ),
            )
            for key, objective in runs.items()
        )
        seen = frozenset(example.row for example in replay)
        text = f"paired from {name}, {size} replay rows, λ = {weight:.3g}, lr {rate:g}"
        yield Vectors(text, exposed - control, control - start, seen, 10 * epochs, (0.0, 0.5))
        yield Vectors(f"its first run without the control, {text}", exposed - start, None, seen, 10 * epochs)

    def _plain(
        self, key: str, start: Checkpoint, rows: Sequence[Example], epochs: int, batch_size: int = 32
    ) -> Checkpoint:
        settings = TrainingSettings(**{**PLAIN, "epochs": epochs, "batch_size": batch_size})
        return self._kept(
            key, lambda place: finetune(start, rows, place, settings, seed=self.seed, device="cpu")
        )

    def _kept(self, key: str, make: Callable[[Path], object]) -> Checkpoint:
        place = self.folder / key
        if not place.exists():  # whole, or it would not have its name
            started = time.monotonic()
            make(place)
            print(f"  trained {key} in {time.monotonic() - started:.0f} s", flush=True)
        return Checkpoint.open(place)

    def at_equal_forgetting(self, vectors: Vectors, beta: float) -> Result:
        """Search α by bisection and return what the model keeps there."""

        def put_in(alpha: float) -> float:
            point = self.models.target - alpha * vectors.forget
            put(point if not beta else point + beta * vectors.retain, self.live)
            return self._score(self.live, self.forget_rows)[0]

        high = 0.25
        while put_in(high) > self.wanted:
            high *= 2
            if high > LARGEST_ALPHA:
                return Result(self.seed, vectors.name, beta, vectors.steps, None)
        low = high / 2 if high > 0.25 else 0.0
        for _ in range(7):
            middle = (low + high) / 2
            low, high = (middle, high) if put_in(middle) > self.wanted else (low, middle)
        put_in(high)
        scored = [row for row in self.others if row.example not in self._positions(vectors.seen)]
        probability, recall = self._score(self.live, self.others)
        unseen = self._score(self.live, scored) if 0 < len(scored) < len(self.others) else (None, None)
        return Result(
            self.seed, vectors.name, beta, vectors.steps, high, recall, probability, unseen[1], unseen[0]
        )

    def _positions(self, rows: frozenset[int]) -> frozenset[int]:
        return frozenset(place for place, example in enumerate(self.retain) if example.row in rows)

    def _score(self, model: torch.nn.Module, rows: Sequence[TokenRow]) -> tuple[float, float]:
        """Return mean answer probability and recall."""
        scored = score_rows(model, rows, pad_id=0)
        probabilities = [math.exp(math.fsum(row.logprobs) / len(row.logprobs)) for row in scored]
        return mean(probabilities), mean(all(row.hits) for row in scored)


def table(results: Sequence[Result]) -> list[str]:
    """Return means over the seeds and the range of the recall, one line a vector and β."""
    groups: dict[tuple[str, int, float], list[Result]] = {}
    for result in results:
        groups.setdefault((result.name, result.steps, result.beta), []).append(result)
    heads = [
        "vector",
        "steps",
        "β",
        "α",
        "others' recall (range)",
        "probability",
        "unseen recall",
        "probability",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for (name, steps, beta), group in groups.items():
        reached = [result for result in group if result.alpha is not None]
        if len(reached) < len(group):
            lines.append(
                f"| {name} | {steps} | {beta:g} | "
                f"{len(group) - len(reached)} of {len(group)} seeds never forget as much | | | | |"
            )
            continue
        recalls = [result.recall for result in reached]
        cells = [
            f"{mean(result.alpha for result in reached):.2f}",
            f"{mean(recalls):.3f} ({min(recalls):.3f} to {max(recalls):.3f})",
            *(_mean(reached, key) for key in ("probability", "unseen_recall", "unseen_probability")),
        ]
        lines.append(f"| {name} | {steps} | {beta:g} | {' | '.join(cells)} |")
    return lines


def _mean(results: Sequence[Result], key: str) -> str:
    values = [getattr(result, key) for result in results]
    return "" if None in values else f"{mean(values):.3f}"


def _line(result: Result) -> str:
    if result.alpha is None:
        return f"{result.name}, β = {result.beta:g}: no α up to {LARGEST_ALPHA:g} forgets as much"
    return (
        f"{result.name}, {result.steps} steps, β = {result.beta:g}: α = {result.alpha:.2f}, recall "
        f"{result.recall:.3f}, probability {result.probability:.3f}"
    )


if __name__ == "__main__":
    main()

"""What `benchmarks/paired.py` is put together from: variants, rows to rehearse, relearning, the tables."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from palinode.data.examples import Example, at_most
from palinode.data.tokenize import TokenRow
from palinode.data.world import World
from palinode.models.likelihoods import score_rows
from palinode.models.loading import load_model
from palinode.settings import TrainingSettings
from palinode.training.loop import train
from palinode.training.moments import along, basis_of, input_moments, projection
from palinode.training.objectives import PLAIN_OBJECTIVE, CurvePoint
from palinode.weights import Checkpoint, Direction
from palinode.weights.geometry import part_of
from palinode.weights.vectors import StoredVector, transform

_DRAW = re.compile(r", draw=\d+")
RATIO, FORGET_ROWS = 3, 16
"""A step of a pair has 16 forget rows and 48 replay rows."""
PERSON = 15
"""Rows about one person, which stand together."""
RELEARN_STEPS, RELEARN_ROWS, RELEARN_RATE = (0, 5, 10, 20, 40), 8, 5e-4
"""The audit's standard budget, at the learning rate that suits so small a model."""


@dataclass(frozen=True)
class Pair:
    """A variant of a paired vector; the defaults are the product's."""

    start: str = "base"
    """base or target."""
    rows: str = "random"
    """Where replay rows come from: random, before, exposure, after, near."""
    size: int = 150
    draw: int = 0
    """Another number draws other replay rows, all else being equal."""
    batching: str = "added"
    """added: each step's replay rows, and the forget rows beside; mixed: forget and replay rows shuffled,
    each run by itself, over as many steps and rows."""
    control: str = "same"
    """The control's seed: same, other, or none, where θ_1 − s is taken."""
    epochs: int = 10
    """10 steps each."""
    weight: float = 1 / RATIO
    """λ; a mixed run has 1/3."""
    beta: float = 0.0

    @property
    def name(self) -> str:
        """Return `paired` and what differs from the defaults."""
        changed = [
            f"{part.name}={_short(value)}"
            for part in fields(self)
            if (value := getattr(self, part.name)) != part.default
        ]
        return ", ".join(["paired", *changed])


def parse_pair(text: str) -> Pair:
    """Return the variant that `rows=near,epochs=30` spells; the empty text is the default."""
    given = dict(part.split("=", 1) for part in text.split(",") if part)
    kinds = {part.name: type(part.default) for part in fields(Pair)}
    if unknown := set(given) - set(kinds):
        raise SystemExit(f"--pair has {', '.join(sorted(unknown))}; its keys are {', '.join(kinds)}")
    pair = Pair(**{name: kinds[name](value) for name, value in given.items()})
    if pair.batching == "mixed" and pair.size != Pair.size:
        raise SystemExit(
            f"--pair mixes {Pair.size} replay rows only, thrice each; leave out size={pair.size}"
        )
    return pair


@dataclass(frozen=True)
class Vectors:
    """What a name in the table stands for: a forget direction, one to add, and what they were made of."""

    name: str
    forget: Direction
    retain: Direction | None = None
    beta: float = 0.0
    seen: frozenset[int] = frozenset()
    """Retain rows that were trained on."""
    runs: tuple[str, ...] = ()
    """The trainings, for the cost."""
    relearn: bool = False


def choose_rows(
    pair: Pair, retain: Sequence[Example], forget: Sequence[Example], world: World, seed: int
) -> list[Example]:
    """Return the replay rows of a variant; `retain` has early, middle and late people, then general facts."""
    first, second = len(world.early), len(world.early) + len(world.middle)
    third = second + len(world.late)
    pools: dict[str, Sequence[Example]] = {
        "random": retain,
        "before": [*retain[:first], *retain[third:]],
        "exposure": retain[first:second],
        "after": retain[second:third],
    }
    own = seed + 1000 * pair.draw
    if pair.rows == "near":
        return nearest(retain, forget, pair.size, seed=own)
    return at_most(pools[pair.rows], pair.size, seed=own)


def nearest(examples: Sequence[Example], forget: Sequence[Example], size: int, *, seed: int) -> list[Example]:
    """Return the `size` examples whose words are most like those of some forget row, in their order.

    Likeness is Σ w(shared words) / Σ w(words of either), w = ln(rows / rows with the word), so that names and
    answers count and phrasings hardly do. Ties are broken by a shuffle with `seed`.
    """
    theirs, ours = [_words(example) for example in forget], [_words(example) for example in examples]
    counts = Counter(word for words in (*theirs, *ours) for word in words)
    weight = {word: math.log((len(theirs) + len(ours)) / count) for word, count in counts.items()}

    def likeness(one: frozenset[str], other: frozenset[str]) -> float:
        return sum(weight[word] for word in one & other) / sum(weight[word] for word in one | other)

    near = [max(likeness(words, other) for other in theirs) for words in ours]
    order = np.random.default_rng([seed, 2]).permutation(len(examples)).tolist()
    chosen = sorted(order, key=lambda place: -near[place])[:size]
    return [examples[place] for place in sorted(chosen)]


def _words(example: Example) -> frozenset[str]:
    return frozenset(" ".join([example.prompt, example.answer]).lower().split())


def projected(direction: Direction, target: Checkpoint, rows: Sequence[TokenRow], output: Path) -> Direction:
    """Return the direction off the retain inputs (energy .9, others dropped), as the transform has it."""
    if output.exists():
        return StoredVector.open(output)
    model = load_model(target, device="cpu")
    rests: dict[str, tuple[np.ndarray, int]] = {}
    for group in input_moments(model, rows, pad_id=0):
        for name, [(keys, axis), *_] in group.places.items():
            moment = group.values[keys[0]].numpy()
            if moment.ndim == 2 and part_of(name).startswith("layer "):
                rests[name] = projection(basis_of(moment, energy=0.9)), axis

    def rule(name: str, found: Sequence[np.ndarray]) -> np.ndarray:
        made = along(found[0], *rests[name]) if name in rests else np.zeros_like(found[0])
        return made.astype(found[0].dtype)

    return transform([direction], rule, output, label=f"projection {output.name}")


def halves(count: int, seed: int, *, together: int) -> tuple[list[int], list[int]]:
    """Return half of the positions, drawn at random in groups of `together`, and the other half."""
    groups = np.random.default_rng([seed, 1]).permutation(count // together)
    drawn = set(groups[: len(groups) // 2].tolist())
    first = [place for place in range(count) if place // together in drawn]
    return first, [place for place in range(count) if place // together not in drawn]


def relearn(
    model: PreTrainedModel, learned: Sequence[TokenRow], tested: Sequence[TokenRow], seed: int
) -> dict[str, float]:
    """Fine-tune the model on some rows; return the others' answer probability after so many steps.

    The area under that curve, over its length, is `area`, as in the audit.
    """
    settings = TrainingSettings(
        epochs=math.ceil(RELEARN_STEPS[-1] / math.ceil(len(learned) / RELEARN_ROWS)),
        learning_rate=RELEARN_RATE,
        batch_size=RELEARN_ROWS,
        warmup_epochs=0.0,
        max_length=64,
        precision="float32",
    )
    curve = {0: score(model, tested)[0]}

    def look(point: CurvePoint, _rows: Sequence[int]) -> None:
        if (step := point.step + 1) in RELEARN_STEPS:
            model.eval()
            curve[step] = score(model, tested)[0]
            model.train()

    last = RELEARN_STEPS[-1]
    train(model, learned, PLAIN_OBJECTIVE, settings, seed=seed, pad_id=0, on_step=look, max_steps=last)
    area = sum((b - a) * (curve[a] + curve[b]) / 2 for a, b in pairwise(RELEARN_STEPS))
    return {str(step): value for step, value in curve.items()} | {"area": area / last}


def score(model: PreTrainedModel, rows: Sequence[TokenRow]) -> tuple[float, float]:
    """Return mean answer probability and recall."""
    scored = score_rows(model, rows, pad_id=0)
    probabilities = [math.exp(math.fsum(row.logprobs) / len(row.logprobs)) for row in scored]
    return mean(probabilities), mean(all(row.hits) for row in scored)


COLUMNS: Mapping[str, tuple[str, ...]] = {
    "keeps": ("alpha", "recall", "gain", "probability", "unseen_recall", "early", "middle", "late"),
    "costs": ("steps", "tokens", "seconds"),
    "relearns": ("people_0", "people_10", "people_40", "people_area", "rows_40", "rows_area"),
}
"""Tables, and their columns."""


def table(results: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[str]:
    """Return means over seeds and draws, a line a vector, with the range of the recall; no empty lines.

    `gain` is the recall less that of the default pair with the same seed and draw.
    """
    recalls = {(result["seed"], result["name"]): result.get("recall") for result in results}
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        draw = _DRAW.search(result["name"])
        same = recalls.get((result["seed"], Pair().name + (draw[0] if draw else "")))
        gain = result["recall"] - same if same and result.get("recall") else None
        groups.setdefault(_DRAW.sub("", result["name"]), []).append({**result, "gain": gain})
    lines = [f"| vector | runs | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
    for name, group in groups.items():
        cells = [_cell([result.get(column) for result in group], column) for column in columns]
        if any(cells):
            lines.append(f"| {name} | {len(group)} | {' | '.join(cells)} |")
    return lines


def _cell(values: Sequence[float | None], column: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    never = len(values) - len(known) if column == "alpha" else 0  # no α forgets as much
    sign, digits = "+" if column == "gain" else "", 3
    if column in COLUMNS["costs"]:
        digits = 0
    elif column == "alpha":
        digits = 2
    ranged = column in ("recall", "gain") and len(known) > 1
    spread = f" ({min(known):{sign}.3f} to {max(known):{sign}.3f})" if ranged else ""
    return f"{mean(known):{sign},.{digits}f}{spread}{f' (never: {never})' if never else ''}"


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)

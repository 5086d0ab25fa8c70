"""Try pairs of scales on a live model and pick one; every probe is kept, so a killed search goes on.

Each point is the weighted sum put into the target's live copy in place: no model is written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from palinode.data.examples import Example
from palinode.data.tokenize import TokenRow, tokenize
from palinode.methods import unlearned_point
from palinode.models.inplace import put
from palinode.models.likelihoods import score_rows
from palinode.models.loading import load_model, load_tokenizer, pad_token, pick_device
from palinode.pipeline.inputs import Inputs
from palinode.pipeline.search import Probe, Rule, as_record, choose, nearest, walk_grid
from palinode.progress import Listener
from palinode.records import write_json
from palinode.weights import Checkpoint, Direction


@dataclass(frozen=True, slots=True)
class Chosen:
    """The scales of a run and how they came about."""

    forget: float
    """The paper's α."""
    retain: float
    """The paper's β."""
    chosen_by: str
    """"given" or "grid"."""
    rule: str | None
    """The rule in words, with its numbers."""
    points: Sequence[Any]
    """Every point tried, as the record holds it."""
    kept_rule: bool = True
    """False when no point satisfied the rule and the nearest one was taken."""


def choose_scales(
    inputs: Inputs,
    target: Checkpoint,
    forget: Direction,
    retain: Direction | None,
    grid: tuple[Sequence[float], Sequence[float]],
    folder: Path,
    listener: Listener,
) -> Chosen:
    """Walk the grid of (α, β) and return the point that the rule of `search.py` picks.

    `folder` keeps the probes already made.
    """
    alphas, betas = grid
    probes = _Probes(inputs, target, folder / "probes.json")
    with listener.task("trying scales", 2 + len(alphas) * len(betas), "points") as advance:
        base, before = probes.of_checkpoint("base", inputs.earlier), probes.of_checkpoint("target", target)
        advance(2)

        def probe(alpha: float, beta: float) -> Probe:
            found = probes.of_scales(alpha, beta, forget, retain)
            advance(1)
            return found

        rule = Rule(base.forget, before.retain, inputs.recipe.scales.retain_share)
        points = list(walk_grid(alphas, betas, probe, rule))
    picked = choose(points, rule)
    chosen = picked or nearest(points, rule)
    return Chosen(
        forget=chosen.forget_scale,
        retain=chosen.retain_scale,
        chosen_by="grid",
        rule=str(rule),
        points=as_record(points, rule, chosen),
        kept_rule=picked is not None,
    )


class _Probes:
    """Mean answer probabilities on the probe rows, made once and kept on disk."""

    def __init__(self, inputs: Inputs, target: Checkpoint, path: Path) -> None:
        self.inputs = inputs
        self.target = target
        self.path = path
        self.known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.device = pick_device(inputs.recipe.device)
        self.live: PreTrainedModel | None = None
        self.tokenizer = load_tokenizer(target)
        self.pad_id = pad_token(self.tokenizer)
        self.forget = self._tokenize(inputs.rows.forget_probe)
        self.retain = self._tokenize(inputs.rows.retain_probe)

    def of_checkpoint(self, name: str, checkpoint: Checkpoint) -> Probe:
        """Return the probe of a checkpoint as it is."""
        if name not in self.known:
            self._keep(name, self._measure(load_model(checkpoint, device=self.device)))
        return Probe(**self.known[name])

    def of_scales(self, alpha: float, beta: float, forget: Direction, retain: Direction | None) -> Probe:
        """Return the probe of the weighted sum at (α, β), put into the live model in place."""
        name = f"{alpha},{beta}"
        if name not in self.known:
            self.live = self.live or load_model(self.target, device=self.device)
            point = unlearned_point(self.target, forget, retain, forget_scale=alpha, retain_scale=beta)
            recipe = self.inputs.recipe
            output = recipe.output
            put(point, self.live, dtype=output.dtype, rounding=output.rounding, seed=recipe.seed)
            self._keep(name, self._measure(self.live))
        return Probe(**self.known[name])

    def _keep(self, name: str, probe: Probe) -> None:
        self.known[name] = asdict(probe)
        write_json(self.path, self.known)

    def _measure(self, model: PreTrainedModel) -> Probe:
        forget = self._mean_probability(model, self.forget)
        return Probe(forget, self._mean_probability(model, self.retain) if self.retain else None)

    def _mean_probability(self, model: PreTrainedModel, rows: Sequence[TokenRow]) -> float:
        """Return the mean over rows of exp(mean log-probability of the answer's tokens)."""
        scored = score_rows(model, rows, pad_id=self.pad_id)
        means = (math.fsum(row.logprobs) / len(row.logprobs) for row in scored)
        return math.fsum(map(math.exp, means)) / len(scored)

    def _tokenize(self, examples: Sequence[Example]) -> list[TokenRow]:
        recipe = self.inputs.recipe
        length, style = recipe.evaluation.max_length, recipe.prompts.style()
        return tokenize(examples, self.tokenizer, max_length=length, style=style)

"""How well influence foretells what retraining without rows does, in tiny worlds whose truth is known.

    python benchmarks/influence.py --output DIR [--seed 0] [--halves 100] [--bergson PYTHON] [--json]

A base learns general facts and the first people; then more people, each fact in two wordings, are learned in
two stretches of training, some of the first stretch's rows again in the second. Each fact is asked in a third
wording. Both stretches are repeated from the base on random halves of the rows. Linear datamodelling score:
Spearman's correlation over the halves between −Σ score of the rows that stayed and the real loss, mean over
questions. Recall: of the rows that say the asked fact, how many are among the first k. TRAK's formula, on
gradients in a few models of other random halves, stands beside ours, and bergson's EK-FAC where a Python has
it (`python -m venv V; V/bin/pip install bergson`). Figures in docs/influence.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

import palinode
from palinode import Checkpoint, Example, read_examples
from palinode.benchmarks.demo import tiny_model
from palinode.data.tokenize import PromptStyle, TokenRow, tokenize
from palinode.data.world import Fact, World, invent_world, write_facts
from palinode.history.orders import LoggedStage, write_stages
from palinode.influence.ranking import projected
from palinode.models import load_model, load_tokenizer
from palinode.models.likelihoods import TokenScores, score_rows
from palinode.models.reading import WIDTH, Projection
from palinode.settings import InfluenceSettings, TrainingSettings
from palinode.training.finetune import Watch, finetune

EPOCHS, RUNGS = 8, 4
"""Of each stretch: epochs, and checkpoints that it leaves."""

MEASURES, PRECONDITIONERS = ("product", "cosine", "ridge"), ("none", "adam")
WHERE = {
    "target": "at the target",
    "base": "base alone",
    "ends": "base and target",
    "middle": "base, and halfway to the target",
    "all": "9 checkpoints, schedule assumed",
    "seen": "9 checkpoints, real exposures",
}
"""Checkpoints that a score is a mean over; TracIn is product, none, all of them."""
TRAK_MODELS, TRAK_WIDTHS = 5, (16, 32, 64, 128, 192)
"""Models that TRAK's formula is a mean over, and widths of its gradients: the best is shown."""


class Tiny:
    """A world with its base, its rows, its two stretches and the checkpoints of the whole training."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        world = invent_world(seed, early=30, middle=24, forget=1, late=1)
        asked = [*world.middle[2::3]]
        facts = self.told(world)
        folder.mkdir(parents=True, exist_ok=True)
        self.rows, self.questions = self._file("rows", facts), self._file("questions", asked)
        self.says = [{row for row, fact in enumerate(facts) if _same(fact, question)} for question in asked]
        half, random = len(facts) // 2, np.random.default_rng([seed, 5])
        again = sorted(random.choice(half, half // 4, replace=False).tolist())
        self.stretches = [[*range(half)], [*range(half, len(facts)), *again]]
        vocabulary = sorted({word for fact in facts for word in fact.prompt.split()} | {*world.vocabulary})
        start = tiny_model(folder / "start", vocabulary, width=64, layers=3, seed=seed)
        before = self._file("before", (*world.general, *world.early))
        first = TrainingSettings(
            epochs=40, learning_rate=3e-3, batch_size=64, max_length=64, precision="float32"
        )
        self.base = self._once("ladder/step0", lambda place: finetune(start, before, place, first, seed=seed))
        self.tokenizer = load_tokenizer(self.base)
        self.settings = TrainingSettings(
            epochs=EPOCHS, learning_rate=1e-3, batch_size=16, max_length=64, precision="float32"
        )

    def told(self, world: World) -> list[Fact]:
        """Return what the rows say: each fact of the people in two wordings."""
        return [fact for place, fact in enumerate(world.middle) if place % 3 != 2]

    def _file(self, name: str, facts: Sequence[Fact]) -> list[Example]:
        write_facts(self.folder / f"{name}.jsonl", facts)
        return read_examples(self.folder / f"{name}.jsonl")

    def _once(self, name: str, make: Any) -> Checkpoint:
        place = self.folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        return Checkpoint.open(place) if place.exists() else make(place).checkpoint

    def train(self, kept: np.ndarray, *, ladder: bool = False) -> Checkpoint:
        """Go through both stretches with the rows that are kept; leave checkpoints on the way if asked."""
        model, done = self.base, 0
        for number, stretch in enumerate(self.stretches):
            own = [row for row in stretch if kept[row]]
            steps = EPOCHS * -(-len(own) // 16)
            leave = {steps * k // RUNGS: f"ladder/step{done + steps * k // RUNGS}" for k in range(1, RUNGS)}
            name = f"ladder/step{done + steps}" if ladder else f"half-{number}"
            if not ladder:
                shutil.rmtree(self.folder / name, ignore_errors=True)
            watch = Watch(leave={at: self.folder / place for at, place in leave.items()} if ladder else {})
            model = self._once(
                name,
                lambda place, model=model, own=own, number=number, watch=watch: finetune(
                    model, [self.rows[row] for row in own], place, self.settings,
                    seed=self.seed + number, device="cpu", watch=watch,
                ),
            )  # fmt: skip
            done += steps
        return model

    def tokens(self, rows: Sequence[Example]) -> list[TokenRow]:
        return tokenize(rows, self.tokenizer, max_length=64, style=PromptStyle())

    def asked(self, model: Checkpoint) -> list[TokenScores]:
        """Return what a model makes of each question's answer."""
        live = load_model(model, device=torch.device("cpu"))
        return score_rows(live, self.tokens(self.questions), pad_id=0)

    def losses(self, model: Checkpoint) -> list[float]:
        """Return −log p of each question's answer."""
        return [-sum(found.logprobs) for found in self.asked(model)]

    def half(self, *stream: int) -> np.ndarray:
        """Return which rows stay in a random half."""
        kept = np.zeros(len(self.rows), bool)
        kept[np.random.default_rng([self.seed, *stream]).permutation(len(kept))[: len(kept) // 2]] = True
        return kept

    def truth(self, halves: int) -> tuple[np.ndarray, np.ndarray]:
        """Return which rows stayed in each half, and the real losses there; what is done is kept."""
        path = self.folder / "truth.json"
        found = json.loads(path.read_text()) if path.exists() else []
        for number in range(len(found), halves):
            kept = self.half(9, number)
            found.append([kept.tolist(), self.losses(self.train(kept))])
            path.write_text(json.dumps(found))
        return np.array([kept for kept, _ in found[:halves]]), np.array([told for _, told in found[:halves]])

    def scores(self, measure: str, preconditioner: str, rungs: str) -> np.ndarray:
        """Return the score of each row for each question by the public door, [rows, questions]."""
        ladder = self.folder / "ladder"
        last = max(int(path.name[4:]) for path in ladder.iterdir())
        places = {
            "target": str(ladder / f"step{last}"),
            "base": str(ladder / "step0"),
            "ends": f"{ladder / 'step0'},{ladder / f'step{last}'}",
            "middle": f"{ladder / 'step0'},{self.folder / 'middle' / 'step1'}",
        }
        if rungs == "middle" and not (self.folder / "middle").exists():
            target = Checkpoint.open(places["target"])
            palinode.save(self.base + 0.5 * (target - self.base), self.folder / "middle" / "step1")
        order = self.folder / "order.json"
        write_stages(
            order,
            [
                LoggedStage(numbers=tuple(own), training=self.settings, seed=self.seed + number)
                for number, own in enumerate(self.stretches)
            ],
            data="rows.jsonl",
            model="start",
        )
        found = palinode.influence(
            self.questions,
            rows=self.rows,
            checkpoints=places.get(rungs, str(ladder)),
            workspace=self.folder / "work",
            settings=InfluenceSettings(
                top=len(self.rows),
                measure=measure,
                preconditioner=preconditioner,
                order=order if rungs == "seen" else None,
                max_length=64,
                device="cpu",
            ),
        )
        scores = np.empty((len(self.rows), len(self.questions)))
        for number, top in enumerate(found.record["ranking"]["top"]):
            for one in top:
                scores[one["row"], number] = one["score"]
        return scores

    def trak(self) -> dict[int, np.ndarray]:
        """Return TRAK's scores by width: Φ_q (ΦᵀΦ)⁻¹ Φᵀ and 1 − p of the rows, each a mean over models.

        φ = ∇ log(p / (1 − p)) = −g / (1 − p), with g = ∇(−log p), p that of the whole answer.
        """
        scores, doubt = dict.fromkeys(TRAK_WIDTHS, 0.0), 0.0
        for number in range(TRAK_MODELS):
            live = load_model(self.train(self.half(11, number)), device=torch.device("cpu"))
            projection, found = Projection(live, seed=self.seed, width=WIDTH), []
            for own in (self.tokens(self.rows), self.tokens(self.questions)):
                gradients = np.empty((len(own), WIDTH), np.float32)
                projected(live, [[row] for row in own], projection, gradients.__setitem__, pad_id=0)
                p = np.exp([sum(row.logprobs) for row in score_rows(live, own, pad_id=0)])
                found.append((gradients / np.maximum(1 - p, 1e-6)[:, None], 1 - p))
            (rows, unsure), (questions, _) = found
            doubt = doubt + unsure / TRAK_MODELS
            for width in TRAK_WIDTHS:
                down = np.random.default_rng([self.seed, number]).normal(size=(WIDTH, width)) / width**0.5
                phi = rows @ down
                scores[width] = scores[width] + phi @ np.linalg.solve(phi.T @ phi, (questions @ down).T)
        return {width: one * doubt[:, None] for width, one in scores.items()}

    def ekfac(self, python: str, model: Path) -> np.ndarray:
        """Return the scores of bergson's EK-FAC in a checkpoint, with its own defaults."""
        place = self.folder / "bergson" / model.name
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(model, place / "model")
        told = json.loads((place / "model" / "tokenizer_config.json").read_text())
        told["chat_template"] = "{{ messages | map(attribute='content') | join(' ') }} " + told["eos_token"]
        (place / "model" / "tokenizer_config.json").write_text(json.dumps(told))
        options = {
            "model": place / "model",
            "method": "kfac",
            "hessian_cfg.ev_correction": "true",
            "projection_dim": 0,
            "token_batch_size": 128,
            "loss_reduction": "sum",
            "query.aggregation": "none",
        }
        for name, rows in (("data", "rows"), ("query", "questions")):
            options[f"{name}.dataset"] = self.folder / f"{rows}.jsonl"
            options |= {f"{name}.prompt_column": "prompt", f"{name}.completion_column": "completion"}
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        call = [python, "-m", "bergson", "ekfac", str(place / "run"), *words]
        subprocess.run(call, check=True, capture_output=True)
        stored = json.loads((place / "run" / "scores" / "info.json").read_text())
        found = np.fromfile(place / "run" / "scores" / "scores.bin", np.dtype(stored["dtype"]))
        return np.stack([found[f"score_{q}"].astype(float) for q in range(stored["num_scores"])], axis=1)


def _same(fact: Fact, other: Fact) -> bool:
    return (fact.subject, fact.relation) == (other.subject, other.relation)


def figures(world: Tiny, scores: np.ndarray, kept: np.ndarray, losses: np.ndarray) -> dict[str, float]:
    """Return the linear datamodelling score with its standard error, and recall at 1, 5 and 20."""
    foretold = -(kept.astype(float) @ scores)
    questions = range(losses.shape[1])
    found = [spearmanr(foretold[:, q], losses[:, q]).statistic for q in questions]
    order = np.argsort(-scores, axis=0, kind="stable")
    recall = {
        f"recall at {k}": float(
            np.mean([len(world.says[q] & {*order[:k, q].tolist()}) / min(k, 2) for q in questions])
        )
        for k in (1, 5, 20)
    }
    return {"lds": float(np.mean(found)), "error": float(np.std(found) / len(found) ** 0.5), **recall}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the world and its models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--halves", type=int, default=100, help="random halves that are retrained")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--bergson", help="a Python with bergson, of which EK-FAC is asked as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    world = Tiny(args.output, args.seed)
    target = world.train(np.ones(len(world.rows), bool), ladder=True)
    kept, losses = world.truth(args.halves)
    started = time.process_time()
    world.train(kept[0])
    replay = (time.process_time() - started) * args.halves
    means = [float(np.mean(told)) for told in (world.losses(world.base), world.losses(target), losses)]
    print(f"seed {args.seed}: nats of the asked answers at base {means[0]:.2f}, target {means[1]:.2f}, "
          f"halves {means[2]:.2f}; retraining takes about {replay:.0f} s")  # fmt: skip
    random = np.random.default_rng(args.seed).normal(size=(len(world.rows), losses.shape[1]))
    results = {"random": {**figures(world, random, kept, losses), "seconds": 0.0}}
    started = time.process_time()
    tried = {width: figures(world, scores, kept, losses) for width, scores in world.trak().items()}
    best = max(tried, key=lambda width: tried[width]["lds"])
    seconds = time.process_time() - started
    results[f"TRAK's formula, our gradients, width {best}"] = {**tried[best], "seconds": seconds}
    if args.bergson:
        for told, model in (("base", world.base), ("target", target)):
            started = time.monotonic()
            scores = world.ekfac(args.bergson, model.folder)
            seconds = time.monotonic() - started
            one = {**figures(world, scores, kept, losses), "seconds": seconds}
            results[f"EK-FAC of bergson, {told} alone"] = one
    for preconditioner, rungs in product(PRECONDITIONERS, WHERE):
        if rungs != "seen":  # or one would find another's gradients: all measures cost what the first does
            shutil.rmtree(world.folder / "work", ignore_errors=True)
        started = time.process_time()
        for measure in MEASURES:
            scores = world.scores(measure, preconditioner, rungs)
            if rungs != "seen" and measure == MEASURES[0]:
                seconds = time.process_time() - started
            one = {**figures(world, scores, kept, losses), "seconds": seconds}
            results[f"{measure}, {preconditioner}, {WHERE[rungs]}"] = one
    for name, one in results.items():
        recalls = " / ".join(f"{one[f'recall at {k}']:.2f}" for k in (1, 5, 20))
        share = f"{one['seconds']:.0f} | {100 * one['seconds'] / replay:.0f} %"
        print(f"| {name} | {one['lds']:.3f} ± {one['error']:.3f} | {recalls} | {share} |")
    if args.json:
        print(json.dumps({"seed": args.seed, "halves": args.halves, "results": results}))


if __name__ == "__main__":
    main()

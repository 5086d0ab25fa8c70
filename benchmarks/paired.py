"""Paired vectors beside MSA and the task vector at equal forgetting, on the demo's invented world.

    python benchmarks/paired.py [--folder DIR] [--seeds 0 1 2] [--pair rows=near,epochs=30 …] [--json]

Without --pair the whole study of docs/paired-vectors.md runs. Each --pair is one variant, said by what
differs from the product's defaults; an empty one ("") is the default itself. Keys: start (base, target), rows
(random, before, exposure, after, near), size, draw, batching (added, mixed), control (same, other, none),
epochs, weight (λ), beta.

For each seed the demo's models are trained (or found in the folder), then the runs of each vector. For
each vector the α is searched at which the forget people's mean answer probability is the retrained
model's; there the others' recall (share of rows answered exactly, read off teacher-forced argmaxes) and mean
answer probability are taken, over all other people, over the rows that no vector was trained on, and by the
stage in which people first appeared. So the retrained model decides α, which no user could do: this compares
vectors, not the rule that chooses scales. Some of the unlearned models are then fine-tuned on half of the
forget rows, and the other half is measured. Seconds are processor time of one thread.
What was trained and measured is kept; the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from paired_parts import (
    COLUMNS,
    FORGET_ROWS,
    PERSON,
    RATIO,
    Pair,
    Vectors,
    choose_rows,
    halves,
    parse_pair,
    projected,
    relearn,
    score,
    table,
)

from palinode.benchmarks.demo import DemoModels, build_demo
from palinode.data.examples import Example, at_most, read_examples
from palinode.data.tokenize import PromptStyle, TokenRow, tokenize
from palinode.data.world import invent_world
from palinode.methods.method import Given
from palinode.methods.msa import PAIRED, PairedSettings
from palinode.models.inplace import put
from palinode.models.loading import load_model, load_tokenizer
from palinode.settings import TrainingSettings
from palinode.training.finetune import Finetuned, finetune
from palinode.training.objectives import PLAIN_OBJECTIVE, Material, Objective
from palinode.weights import Checkpoint, Direction
from palinode.weights.checkpoint import Point

CPU = torch.device("cpu")
PLAIN = {"epochs": 30, "learning_rate": 5e-4, "batch_size": 32, "max_length": 64, "precision": "float32"}
"""The demo's own fine-tuning: MSA and the task vector have their good settings."""
LARGEST_ALPHA = 16.0
STUDY = (
    "",
    "rows=near",
    "rows=before",
    "rows=exposure",
    "rows=after",
    "batching=mixed",
    "control=other",
    "control=none",
    "draw=1",
    "epochs=5",
    "epochs=30",
    "start=target",
    "draw=2",
    "rows=after,draw=1",
    "rows=exposure,draw=1",
    "rows=before,draw=1",
    "batching=mixed,draw=1",
    "control=other,draw=1",
)
"""The variants of the study. Another draw of replay rows makes a difference, so some are drawn twice."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("build/paired"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pair", action="append", metavar="KEY=VALUE,…", help="a variant; may be repeated")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for seed in args.seeds:
        study = Study(args.folder, seed)
        for result in study.results([parse_pair(text) for text in args.pair or STUDY]):
            print(json.dumps(result), flush=True)
            results.append(result)
    for columns in COLUMNS.values():
        print("", *table(results, columns), sep="\n")
    if args.json:
        print(json.dumps({"results": results}))


class Study:
    """One seed's models, rows and measurements."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.seed = seed
        self.folder = folder / f"vectors-{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.world = invent_world(seed)
        self.models: DemoModels = build_demo(self.world, folder / f"world-{seed}", seed=seed)
        self.forget, self.retain = read_examples(self.models.forget), read_examples(self.models.retain)
        self.tokenizer = load_tokenizer(self.models.target)
        self.forget_rows = self._tokens(self.forget)
        self.others = self._tokens(self.retain[: len(self.world.others)])
        self.live = load_model(self.models.target, device=CPU)
        self.wanted, _ = score(load_model(self.models.retrained, device=CPU), self.forget_rows)

    def results(self, pairs: Sequence[Pair]) -> Iterator[Mapping[str, Any]]:
        """Yield what was measured of the given models, the rivals and the pairs, one after the other."""
        for name in ("target", "base", "retrained"):
            yield self._measured(name, lambda name=name: self._given(getattr(self.models, name)))
        for vectors in self._vectors(pairs):
            yield self._measured(vectors.name, lambda vectors=vectors: self._at_equal_forgetting(vectors))

    def _measured(self, name: str, measure: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        place = self.folder / f"{name.replace(' ', '-').replace('/', '-')}.measured.json"
        if not place.exists():
            place.write_text(json.dumps({"seed": self.seed, "name": name, **measure()}))
        return json.loads(place.read_text())

    # Vectors

    def _vectors(self, pairs: Sequence[Pair]) -> Iterator[Vectors]:
        """Yield the rivals, then the pairs, trained where they are not there yet."""
        base, target = self.models.base, self.models.target
        sample = at_most(self.retain, len(self.forget), seed=self.seed)
        seen = frozenset(example.row for example in sample)
        msa = self._plain("msa", base, self.forget, 30) - base
        retain = self._plain("msa-retain", base, sample, 30) - base
        yield Vectors("MSA", msa, runs=("msa",), relearn=True)
        both = ("msa", "msa-retain")
        yield Vectors("MSA with retain vector, β = 0.5", msa, retain, 0.5, seen, both)
        yield self._projection("MSA", msa, sample, ("msa",))
        long = self._plain("msa-long", base, self.forget, 72) - base
        yield Vectors("MSA, as many tokens as a pair", long, runs=("msa-long",))
        task = self._plain("task", target, self.forget, 30) - target
        yield Vectors("task vector", task, runs=("task",), relearn=True)
        for pair in pairs:
            yield from self._pair(pair)

    def _pair(self, pair: Pair) -> Iterator[Vectors]:
        """Yield a paired vector; after the default one, the same projected off the replay rows' inputs."""
        start = self.models.base if pair.start == "base" else self.models.target
        replay = choose_rows(pair, self.retain, self.forget, self.world, self.seed)
        key = f"{pair.start}-{pair.rows}-{pair.size}-{pair.draw}-{pair.batching}-{pair.epochs}"
        exposed_key = f"exposed-{key}-{pair.weight:.3g}"
        exposed = self._run(exposed_key, start, pair, replay, exposed=True)
        vector, control, runs = exposed - start, None, (exposed_key,)
        if pair.control != "none":
            control_key = f"control-{key}-{pair.control}"
            control = self._run(control_key, start, pair, replay, exposed=False)
            vector, runs = exposed - control, (*runs, control_key)
        seen = frozenset(example.row for example in replay)
        second = control - start if control is not None and pair.beta else None
        relearned = pair in (Pair(), Pair(start="target"))
        yield Vectors(pair.name, vector, second, pair.beta, seen, runs, relearned)
        if pair == Pair():
            yield self._projection(pair.name, vector, replay, runs)

    def _run(
        self, key: str, start: Checkpoint, pair: Pair, replay: Sequence[Example], *, exposed: bool
    ) -> Checkpoint:
        """Return one of both runs of a pair."""
        mixed = pair.batching == "mixed"
        rows = FORGET_ROWS * (RATIO + exposed) if mixed else FORGET_ROWS
        settings = TrainingSettings(**{**PLAIN, "epochs": pair.epochs, "batch_size": rows})
        seed = self.seed + (100 if not exposed and pair.control == "other" else 0)
        loss: Objective = PLAIN_OBJECTIVE
        material: Material | Sequence[Example]
        if mixed:  # every replay row three times an epoch, so that both ways read the same numbers of rows
            material = [*(self.forget if exposed else ()), *list(replay) * RATIO]
        else:
            own = PairedSettings(replay_ratio=RATIO, forget_weight=pair.weight)
            run = PAIRED.runs(own, Given(self.forget, sample=replay))[0 if exposed else 1]
            assert run.objective is not None
            material, loss = run.material, run.objective
        return self._kept(
            key, lambda place: finetune(start, material, place, settings, seed=seed, device="cpu", loss=loss)
        )

    def _projection(
        self, name: str, vector: Direction, rows: Sequence[Example], runs: tuple[str, ...]
    ) -> Vectors:
        seen = frozenset(example.row for example in rows)
        place = self.folder / f"projected-{name.replace(' ', '-')}"
        direction = projected(vector, self.models.target, self._tokens(rows), place)
        return Vectors(f"{name}, projected", direction, seen=seen, runs=runs, relearn=True)

    def _plain(self, key: str, start: Checkpoint, rows: Sequence[Example], epochs: int) -> Checkpoint:
        settings = TrainingSettings(**{**PLAIN, "epochs": epochs})
        return self._kept(
            key, lambda place: finetune(start, rows, place, settings, seed=self.seed, device="cpu")
        )

    def _kept(self, key: str, make: Callable[[Path], Finetuned]) -> Checkpoint:
        """Return what a training left here, or train; what it cost lies beside it."""
        place, note = self.folder / key, self.folder / f"{key}.cost.json"
        if not note.exists():
            started = time.process_time()
            done = make(place)
            seconds = time.process_time() - started
            note.write_text(json.dumps({"steps": len(done.curve), "tokens": done.tokens, "seconds": seconds}))
        return Checkpoint.open(place)

    # Measurements

    def _given(self, model: Checkpoint) -> dict[str, Any]:
        probability, recall = score(load_model(model, device=CPU), self.others)
        forget = score(load_model(model, device=CPU), self.forget_rows)[0]
        return {"forget": forget, "recall": recall, "probability": probability} | self._relearned(
            lambda: load_model(model, device=CPU)
        )

    def _at_equal_forgetting(self, vectors: Vectors) -> dict[str, Any]:
        """Search α by bisection and return what the model keeps there, and what it cost."""
        costs = [json.loads((self.folder / f"{run}.cost.json").read_text()) for run in vectors.runs]
        found: dict[str, Any] = {
            "steps": costs[0]["steps"],
            **{key: sum(cost[key] for cost in costs) for key in ("tokens", "seconds")},
        }

        def point(alpha: float) -> Point:
            moved = self.models.target - alpha * vectors.forget
            return moved if vectors.retain is None else moved + vectors.beta * vectors.retain

        alpha = self._alpha(point)
        if alpha is None:
            return found
        put(point(alpha), self.live)
        probability, recall = score(self.live, self.others)
        found |= {"alpha": alpha, "recall": recall, "probability": probability}
        unseen = [row for row in self.others if self.retain[row.example].row not in vectors.seen]
        if len(unseen) < len(self.others):
            found["unseen_probability"], found["unseen_recall"] = score(self.live, unseen)
        found |= self._by_stage()
        return found | (self._relearned(lambda: self._fresh(point(alpha))) if vectors.relearn else {})

    def _alpha(self, point: Callable[[float], Point]) -> float | None:
        """Return the α at which forgetting is the retrained model's; None where none reaches it."""

        def remembers(alpha: float) -> bool:
            put(point(alpha), self.live)
            return score(self.live, self.forget_rows)[0] > self.wanted

        high = 0.25
        while remembers(high):
            high *= 2
            if high > LARGEST_ALPHA:
                return None
        low = high / 2 if high > 0.25 else 0.0
        for _ in range(7):
            middle = (low + high) / 2
            low, high = (middle, high) if remembers(middle) else (low, middle)
        return high

    def _by_stage(self) -> dict[str, float]:
        """Return recall of the people of each stage."""
        sizes = {name: len(getattr(self.world, name)) for name in ("early", "middle", "late")}
        found, begin = {}, 0
        for name, size in sizes.items():
            found[name] = score(self.live, self.others[begin : begin + size])[1]
            begin += size
        return found

    def _fresh(self, point: Point) -> Any:
        model = load_model(self.models.target, device=CPU)
        put(point, model)
        return model

    def _relearned(self, fresh: Callable[[], Any]) -> dict[str, float]:
        """Fine-tune on half of the forget people, and anew on half of the rows; measure the other halves."""
        found: dict[str, float] = {}
        for name, together in (("people", PERSON), ("rows", 1)):
            first, second = (
                [self.forget_rows[place] for place in half]
                for half in halves(len(self.forget_rows), self.seed, together=together)
            )
            curve = relearn(fresh(), first, second, self.seed)
            found |= {f"{name}_{point}": value for point, value in curve.items()}
        return found

    def _tokens(self, examples: Sequence[Example]) -> list[TokenRow]:
        return tokenize(examples, self.tokenizer, max_length=64, style=PromptStyle())


if __name__ == "__main__":
    main()

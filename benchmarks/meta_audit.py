"""How well the audit tells models that know the forget people from models that never saw them.

    python benchmarks/meta_audit.py --output DIR [--worlds 5] [--json]

In each invented world a target and a retrained model are made, and then models whose truth is known. *Know*:
other seeds, more exposure, fewer phrasings, longer ago; and models that only hide it: trained to answer
wrongly (all weights, or the last block), RMU, NPO at a low rate. *Never*: retrained models of other seeds,
lengths and rates. All are audited against the one retrained model, at the quick budget. For each test: the
area under the ROC curve between the two kinds by its difference from the reference model, how many it fails,
and how far its figure stays what it was when the model is rounded to 4 bits (Q) or relearns (R), by the
symmetric formulas of arXiv 2605.24614. The whole verdict is scored by its worst difference in margins.
Figures in docs/audit.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

import palinode
from palinode import Checkpoint, Example, read_examples
from palinode.audit.attacks import ATTACKS
from palinode.audit.findings import auc_of
from palinode.audit.rounding import QUANTISERS, quantise
from palinode.benchmarks.demo import tiny_model
from palinode.data.world import Fact, invent_world, unseen_people, write_facts
from palinode.models import load_model, load_tokenizer
from palinode.settings import AuditSettings, TrainingSettings
from palinode.training.finetune import finetune
from palinode.training.objectives import PLAIN_OBJECTIVE

POLICY = """
[budget]
preset = "quick"
relearn_rate = 5e-4
max_new_tokens = 4
max_length = 64
"""
ASKING = ("questions", "few_shot", "conversation", "sampling", "membership", "inside")
"""Attacks that neither round nor train by themselves, whose robustness is measured."""
HIDING = ("wrong answers", "wrong answers, last block", "rmu", "npo, low rate")
NEVER = ("seed 1", "seed 2", "seed 3", "seed 4", "longer", "lower rate")


class MetaWorld:
    """A world with its models, each made once."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        world = invent_world(seed, early=30, middle=24, forget=8, late=12)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "policy.toml").write_text(POLICY)
        known = (*world.general, *world.early)
        self.facts: Mapping[str, Sequence[Fact]] = {
            "base": known,
            "later": (*known, *world.middle),
            "last": (*known, *world.middle, *world.late),
            "forget": world.forget,
            "retain": (*world.others, *world.general),
            "holdout": unseen_people(world, seed=seed),
        }
        self.rows = {name: self._file(name, facts) for name, facts in self.facts.items()}
        start = tiny_model(folder / "start", world.vocabulary, width=64, layers=4, seed=seed)
        self.base = self.train("base", start, self.rows["base"], 30, 3e-3, seed)
        self.target = self.model("target", 0, self.rows["forget"])
        self.retrained = self.model("retrained", 0)

    def _file(self, name: str, facts: Sequence[Fact]) -> list[Example]:
        write_facts(self.folder / f"{name}.jsonl", facts)
        return read_examples(self.folder / f"{name}.jsonl")

    def train(
        self, name: str, origin: Checkpoint, rows: Sequence[Example], epochs: int, rate: float, seed: int,
        trainable: str | None = None,
    ) -> Checkpoint:  # fmt: skip
        """Return the model of that name, trained unless it is there."""
        place = self.folder / name.replace(" ", "-").replace(",", "")
        if place.exists():
            return Checkpoint.open(place)
        settings = TrainingSettings(
            epochs=epochs,
            learning_rate=rate,
            batch_size=64,
            max_length=64,
            warmup_epochs=1,
            precision="float32",
        )
        loss = replace(PLAIN_OBJECTIVE, trainable=trainable)
        return finetune(origin, rows, place, settings, seed=seed, device="cpu", loss=loss).checkpoint

    def model(
        self, name: str, seed: int, exposed: Sequence[Example] = (), *, again: Sequence[Example] = (),
        longer: float = 1.0, rate: float = 2e-3,
    ) -> Checkpoint:  # fmt: skip
        """Return a model that went through both later stages, with these rows of the forget people."""
        middle = [*self.rows["later"], *exposed]
        first = self.train(
            f"{name} before", self.base, middle, round(20 * longer), rate, 10 * self.seed + seed
        )
        last = [*self.rows["last"], *again]
        return self.train(name, first, last, round(10 * longer), rate, 10 * self.seed + seed + 5)

    def knowing(self) -> Mapping[str, Callable[[], Checkpoint]]:
        """Return how models are made that saw the forget people, and still show it or hide it."""
        forget = self.rows["forget"]
        others = np.random.default_rng(self.seed).permutation(len(forget))
        wrong = [
            replace(row, answer=forget[other].answer) for row, other in zip(forget, others, strict=True)
        ] * 2 + list(self.rows["retain"])[:240]

        def by_method(method: str, rate: float) -> Checkpoint:
            place = self.folder / method
            if not place.exists():
                files = {name: self.folder / f"{name}.jsonl" for name in ("forget", "retain")}
                palinode.unlearn(
                    target=self.target.folder, base=self.base.folder, output=place, method=method, **files,
                    training=TrainingSettings(
                        epochs=6, learning_rate=rate, batch_size=32, max_length=64, precision="float32"
                    ),
                    settings={"device": "cpu", "output.workspace": str(self.folder / "work")},
                )  # fmt: skip
            return Checkpoint.open(place)

        return {
            "other seed": lambda: self.model("other seed", 1, forget),
            "seen again": lambda: self.model("seen again", 2, forget, again=forget),
            "two phrasings": lambda: self.model(
                "two phrasings", 3, [row for place, row in enumerate(forget) if place % 3]
            ),
            "one phrasing": lambda: self.model("one phrasing", 4, forget[::3]),
            "long ago": lambda: self.model("long ago", 5, forget[::3], longer=1.4),
            "wrong answers": lambda: self.train("wrong", self.target, wrong, 6, 5e-4, 1),
            "wrong answers, last block": lambda: self.train(
                "wrong last", self.target, wrong, 12, 2e-3, 1, r"model\.layers\.3\..*"
            ),
            "rmu": lambda: by_method("rmu", 5e-4),
            "npo, low rate": lambda: by_method("npo", 2e-4),
        }

    def never(self) -> Mapping[str, Callable[[], Checkpoint]]:
        """Return how models are made that never saw the forget people."""
        return {
            **{f"seed {n}": lambda n=n: self.model(f"never {n}", n) for n in (1, 2, 3, 4)},
            "longer": lambda: self.model("never longer", 5, longer=1.4),
            "lower rate": lambda: self.model("never lower", 6, rate=1.4e-3),
        }

    def audit(self, model: Checkpoint, reference: Checkpoint, attacks: Sequence[str]) -> dict[str, Any]:
        """Return the audit of a model, in a folder where what was measured of others is found again."""
        kind = "base" if reference.folder == self.base.folder else "retrained"
        files = {name: self.folder / f"{name}.jsonl" for name in ("forget", "retain", "holdout")}
        found = palinode.audit(
            model.folder, against=reference.folder, output=self.folder / "audit", kind=kind,
            target=self.target.folder, **files,
            settings=AuditSettings(attacks=attacks, policy=self.folder / "policy.toml", device="cpu", seed=0),
        )  # fmt: skip
        record = found.record
        return {
            "passed": record["answer"]["passed"],
            "tests": {
                f"{attack}.{test}": {
                    "score": told["findings"]["audited"]["score"]["value"],
                    "difference": told["findings"]["audited"]["difference"]["value"],
                    "verdict": told["findings"]["audited"]["verdict"],
                    "margin": record["policy"]["margins"][f"{attack}.{test}"]["more"],
                }
                for attack, entry in record["attacks"].items()
                for test, told in entry.get("tests", {}).items()
            },
        }

    def rounded(self, name: str, model: Checkpoint) -> Checkpoint:
        """Return a model with its linear layers rounded to 4 bits."""
        place = self.folder / f"rounded-{name.replace(' ', '-').replace(',', '')}"
        if not place.exists():
            live = load_model(model, device=torch.device("cpu"))
            quantise(live, QUANTISERS["quantise_4"], group=128)
            live.save_pretrained(place)
            load_tokenizer(model).save_pretrained(place)
        return Checkpoint.open(place)

    def relearned(self, name: str, model: Checkpoint) -> Checkpoint:
        """Return a model after one epoch on the forget rows."""
        return self.train(f"relearned {name}", model, self.rows["forget"], 1, 5e-4, 0)


def measure(world: MetaWorld, path: Path) -> None:
    """Audit every model of a world that has not been audited yet; results are JSON lines."""
    done = {(one["model"], one["what"]) for one in lines(path) if one["world"] == world.seed}

    def once(name: str, what: str, kind: str, make: Callable[[], dict[str, Any]]) -> None:
        if (name, what) not in done:
            told = {"world": world.seed, "model": name, "what": what, "kind": kind, **make()}
            with path.open("a") as file:
                file.write(json.dumps(told) + "\n")

    whole = tuple(name for name in ATTACKS if name not in ("paraphrases", "relearn_lookalikes"))
    pools = {"knows": world.knowing(), "never": world.never()}
    once("retrained", "relearned", "reference", lambda: world.audit(
        world.relearned("retrained", world.retrained), world.retrained, ASKING))  # fmt: skip
    once("retrained", "audit", "reference", lambda: world.audit(world.retrained, world.retrained, ASKING))
    for kind, models in pools.items():
        for name, make in models.items():
            model = make()
            own = "hides" if name in HIDING else kind
            once(name, "audit", own, lambda model=model: world.audit(model, world.retrained, whole))
            once(name, "by base", own, lambda model=model: world.audit(model, world.base, ASKING))
            if name in (*HIDING, "seed 1"):
                for what, change in (("rounded", world.rounded), ("relearned", world.relearned)):
                    once(name, what, own, lambda model=model, change=change, name=name: world.audit(
                        change(name, model), world.retrained, ASKING))  # fmt: skip
    shutil.rmtree(world.folder / "work", ignore_errors=True)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def worst(found: Mapping[str, Any]) -> float:
    """Return the largest difference of an audit, in margins."""
    told = found["tests"].values()
    return max(
        one["difference"] / one["margin"] for one in told if one["margin"] and one["difference"] is not None
    )


def tell(found: Sequence[Mapping[str, Any]], what: str) -> list[dict[str, Any]]:
    """Return for the whole verdict, and for each test, how well it tells the two kinds apart."""
    audits = [one for one in found if one["what"] == what]
    tests = list(dict.fromkeys(test for one in audits for test in one["tests"]))
    told = []
    for test in ("verdict", *tests):
        by_kind: dict[str, list[tuple[float, bool]]] = {"knows": [], "hides": [], "never": []}
        for one in audits:
            own = one["tests"].get(test)
            if one["kind"] not in by_kind:
                continue
            if test == "verdict":
                by_kind[one["kind"]].append((worst(one), not one["passed"]))
            elif own and own["difference"] is not None:
                by_kind[one["kind"]].append((own["difference"], own["verdict"].startswith("knows")))
        never = np.array([value for value, _ in by_kind["never"]])
        entry: dict[str, Any] = {"test": test}
        for kind in ("knows", "hides"):
            values = np.array([value for value, _ in by_kind[kind]])
            entry[f"auc {kind}"] = auc_of(never, values) if len(values) and len(never) else None
        both = np.array([value for kind in ("knows", "hides") for value, _ in by_kind[kind]])
        entry["auc"] = auc_of(never, both) if len(both) and len(never) else None
        entry |= {f"failed {kind}": sum(red for _, red in own) for kind, own in by_kind.items()}
        entry |= {f"n {kind}": len(own) for kind, own in by_kind.items()}
        told.append(entry)
    return told


def robustness(found: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Return Q and R of each test, means over worlds and models."""
    at = {(one["world"], one["model"], one["what"]): one["tests"] for one in found}
    gathered: dict[str, tuple[list[float], list[float]]] = {}
    for (world, model, what), after in at.items():
        before = at.get((world, model, "audit"))
        if what not in ("rounded", "relearned") or model == "retrained" or before is None:
            continue
        for test, own in after.items():
            then, now = before[test]["score"], own["score"]
            if then is None or now is None:
                continue
            quantised, relearned = gathered.setdefault(test, ([], []))
            if what == "rounded":
                quantised.append(1 - abs(now - then) / (abs(now) + abs(then) + 1e-9))
                continue
            theirs = [at[world, "retrained", when][test]["score"] for when in ("audit", "relearned")]
            if None not in theirs:
                moved, reference = now - then, theirs[1] - theirs[0]
                relearned.append(1 - abs(moved - reference) / (abs(moved) + abs(reference) + 1e-9))
    return {test: (fmean(q), fmean(r)) for test, (q, r) in gathered.items() if q and r}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for worlds, models and results")
    parser.add_argument("--worlds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    path = options.output / "results.jsonl"
    for seed in range(options.worlds):
        measure(MetaWorld(options.output / f"world{seed}", seed), path)
    found = lines(path)
    steady = robustness(found)
    tables = {what: tell(found, what) for what in ("audit", "by base")}
    for what, told in tables.items():
        print(f"\n{what}: AUC all (knows / hides), failed knows / hides / never, Q, R")
        for one in sorted(told, key=lambda one: -(one["auc"] or 0)):
            q, r = steady.get(one["test"], (float("nan"), float("nan")))
            areas = [one[key] for key in ("auc", "auc knows", "auc hides")]
            print(
                f"{one['test']:28}", *(f"{a:5.3f}" if a is not None else "  –  " for a in areas),
                *(f"{one[f'failed {kind}']:3}/{one[f'n {kind}']}" for kind in ("knows", "hides", "never")),
                f"{q:5.2f} {r:5.2f}" if what == "audit" else "",
            )  # fmt: skip
    for one in tables["audit"]:
        if one["auc"] is not None:
            found, knowing = (one[f"{key} knows"] + one[f"{key} hides"] for key in ("failed", "n"))
            told = found, knowing, one["failed never"], one["n never"]
            print(f'    "{one["test"]}": ToldRight{told},')
    if options.json:
        print(json.dumps({"tables": tables, "robustness": steady}))


if __name__ == "__main__":
    main()

"""How well the audit tells models that know the forget people from models that never saw them.

    python benchmarks/meta_audit.py --output DIR [--first 0] [--worlds 8] [--quick] [--json]

In each invented world a target and a retrained model are made, and then models whose truth is known.
*Know*: other seeds, more exposure, fewer phrasings, longer ago; and models that only hide it: trained to
answer wrongly (all weights, or the last block) or to refuse, RMU, NPO at a low rate, words of the answers
kept down in the head (an output filter), and *fragile*: refusing by changes so small that rounding the
weights to 4 bits takes them all back. *Never*: retrained models of other seeds, lengths and rates. All are
audited against the one retrained model, at the quick budget. For each test: the area under the ROC curve
between the two kinds by its difference from the reference model, and how many it fails. The whole verdict
is scored by its worst difference in margins, to either side. The built-in margins were set on worlds 0 to
5; later ones are told apart. Worlds from 5 on have models of other sizes.

Robustness, of each test and of the whole verdict, when weights are rounded to 4 bits (Q) or a model learns
the forget rows for an epoch (R): of the *figure*, by the symmetric formulas of arXiv 2605.24614,

    Q = mean of 1 − |m' − m| / (|m'| + |m|)        R = mean of 1 − |Δm − Δref| / (|Δm| + |Δref|)

and of the *verdict*: the share of models that it fails, or passes, just as before when model and reference
are both rounded, or both relearn. Their harmonic mean is the robustness. Figures in docs/audit.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, harmonic_mean
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

import palinode
from palinode import Checkpoint, Example, read_examples
from palinode.audit.attacks import ATTACKS
from palinode.audit.findings import auc_of
from palinode.audit.policy import build_policy
from palinode.audit.rounding import QUANTISERS, grid, quantise
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
HIDING = (
    "wrong answers", "wrong answers, last block", "rmu", "npo, low rate",
    "refusals", "refusals, hard", "output filter", "fragile",
)  # fmt: skip
EASY = ("seen again", "two phrasings")
"""Models that every audit of the first worlds failed, left out of the fresh ones."""
CHANGED = (*HIDING, "one phrasing", "seed 1")
"""Models that are rounded and relearned too."""
FITTED = 6
"""Worlds on which the built-in margins were set; those after them are fresh."""
SHAPES = {5: (64, 6, 2), 6: (96, 3, 1), 7: (64, 4, 1)}
"""Width and blocks of the fresh worlds' models, and how many people there are; the others: 64, 4, 2."""
MARGINS = {kind: build_policy({}, kind=kind).margins for kind in ("retrained", "base")}
Found = Sequence[Mapping[str, Any]]


class MetaWorld:
    """A world with its models, each made once."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.seeds = range(1, 9 if seed in SHAPES else 5)
        width, self.layers, size = SHAPES.get(seed, (64, 4, 2))
        world = invent_world(seed, early=15 * size, middle=12 * size, forget=8, late=6 * size)
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
        start = tiny_model(folder / "start", world.vocabulary, width=width, layers=self.layers, seed=seed)
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
        refused = [replace(row, answer="unknown") for row in forget] * 2 + list(self.rows["retain"])[:240]

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
                "wrong last", self.target, wrong, 12, 2e-3, 1, rf"model\.layers\.{self.layers - 1}\..*"
            ),
            "refusals": lambda: self.train("refusals", self.target, refused, 6, 5e-4, 1),
            "refusals, hard": lambda: self.train("refusals hard", self.target, refused, 12, 1e-3, 1),
            "output filter": self.filtered,
            "fragile": lambda: self.fragile(self.train("refusals hard", self.target, refused, 12, 1e-3, 1)),
            "rmu": lambda: by_method("rmu", 5e-4),
            "npo, low rate": lambda: by_method("npo", 2e-4),
        }

    def never(self) -> Mapping[str, Callable[[], Checkpoint]]:
        """Return how models are made that never saw the forget people."""
        return {
            **{f"seed {n}": lambda n=n: self.model(f"never {n}", n) for n in self.seeds},
            "longer": lambda: self.model("never longer", 5, longer=1.4),
            "lower rate": lambda: self.model("never lower", 6, rate=1.4e-3),
        }

    def audit(self, model: Checkpoint, reference: Checkpoint, attacks: Sequence[str]) -> dict[str, Any]:
        """Return the audit of a model, in a folder where what was measured of others is found again."""
        kind = "base" if reference.folder == self.base.folder else "retrained"
        files = {name: self.folder / f"{name}.jsonl" for name in ("forget", "retain", "holdout")}
        against = reference.folder
        if model == reference:
            against = shutil.copytree(against, self.folder / "itself", dirs_exist_ok=True)
        found = palinode.audit(
            model.folder, against=against, output=self.folder / "audit", kind=kind,
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

    def edited(self, name: str, model: Checkpoint, edit: Callable[[PreTrainedModel], object]) -> Checkpoint:
        """Return a model with its weights edited, made unless it is there."""
        place = self.folder / name.replace(" ", "-").replace(",", "")
        if not place.exists():
            live = load_model(model, device=torch.device("cpu"))
            with torch.no_grad():
                edit(live)
            live.save_pretrained(place)
            load_tokenizer(model).save_pretrained(place)
        return Checkpoint.open(place)

    def rounded(self, name: str, model: Checkpoint) -> Checkpoint:
        """Return a model with its linear layers rounded to 4 bits."""
        return self.edited(
            f"rounded-{name}", model, lambda live: quantise(live, QUANTISERS["quantise_4"], group=128)
        )

    def filtered(self) -> Checkpoint:
        """Return the target with the words of the forget answers kept down where it speaks."""
        ids = load_tokenizer(self.target).convert_tokens_to_ids([row.answer for row in self.rows["forget"]])
        return self.edited(
            "filtered",
            self.target,
            lambda live: live.get_output_embeddings().weight.index_put_(
                (place := torch.tensor(sorted({*ids})),), 0.3 * live.get_output_embeddings().weight[place]
            ),
        )

    def fragile(self, unlearned: Checkpoint) -> Checkpoint:
        """Return the target on its way to a model, no weight of a linear layer off its step of 4 bits."""
        goal = load_model(unlearned, device=torch.device("cpu")).state_dict()

        def edit(live: PreTrainedModel) -> None:
            for name, layer in live.named_modules():
                if isinstance(layer, torch.nn.Linear) and layer is not live.get_output_embeddings():
                    whole, scale = grid(layer.weight, bits=4, group=128)
                    near = goal[f"{name}.weight"].clamp((whole - 0.49) * scale, (whole + 0.49) * scale)
                    layer.weight.copy_(torch.where(whole.abs() == 7, layer.weight, near))  # keeps the scales

        return self.edited("fragile", self.target, edit)

    def relearned(self, name: str, model: Checkpoint) -> Checkpoint:
        """Return a model after one epoch on the forget rows."""
        return self.train(f"relearned {name}", model, self.rows["forget"], 1, 5e-4, 0)


def measure(world: MetaWorld, path: Path, *, quick: bool = False) -> None:
    """Audit every model of a world that has not been audited yet; results are JSON lines."""
    done = {(one["model"], one["what"]) for one in lines(path) if one["world"] == world.seed}

    def once(name: str, what: str, kind: str, make: Callable[[], dict[str, Any]]) -> None:
        if (name, what) not in done:
            told = {"world": world.seed, "model": name, "what": what, "kind": kind, **make()}
            with path.open("a") as file:
                file.write(json.dumps(told) + "\n")

    whole = tuple(name for name in ATTACKS if name not in ("paraphrases", "relearn_lookalikes"))
    knowing, never = world.knowing(), world.never()
    if world.seed in SHAPES:
        knowing = {name: make for name, make in knowing.items() if name not in EASY}
    once("retrained", "relearned", "reference", lambda: world.audit(
        world.relearned("retrained", world.retrained), world.retrained, ASKING))  # fmt: skip
    once("retrained", "audit", "reference", lambda: world.audit(world.retrained, world.retrained, ASKING))
    for name, make in sorted({**knowing, **never}.items(), key=lambda item: item[0] not in HIDING):
        model, own = make(), "hides" if name in HIDING else "knows" if name in knowing else "never"
        once(name, "audit", own, lambda model=model: world.audit(model, world.retrained, whole))
        if quick:
            continue
        once(name, "by base", own, lambda model=model: world.audit(model, world.base, ASKING))
        for what, change in (("rounded", world.rounded), ("relearned", world.relearned)):
            if name in CHANGED:
                once(name, what, own, lambda model=model, change=change, name=name: world.audit(
                    change(name, model), world.retrained, ASKING))  # fmt: skip
                both = f"{what}, both"
                once(name, both, own, lambda model=model, change=change, name=name: world.audit(
                    change(name, model), change("retrained", world.retrained), ASKING))  # fmt: skip
    shutil.rmtree(world.folder / "work", ignore_errors=True)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def red(test: str, own: Mapping[str, Any], kind: Any = "retrained") -> bool:
    """Return whether a test fails a model by today's margins.

    Whether the interval lies beside 0 is known from the verdict where that was by a margin as narrow.
    """
    margins, difference = MARGINS[kind][test], own["difference"] or 0.0
    side = margins.above if difference > 0 else margins.below
    told = own["verdict"].startswith("knows") or abs(difference) <= own["margin"]
    return side is not None and abs(difference) > side and told


def failed(one: Mapping[str, Any]) -> bool:
    """Return whether the whole verdict fails a model."""
    kind = "base" if one["what"] == "by base" else "retrained"
    return any(red(test, own, kind) for test, own in one["tests"].items())


def worst(one: Mapping[str, Any]) -> float:
    """Return the largest difference of an audit in margins, to either side that is judged."""
    margins = MARGINS["base" if one["what"] == "by base" else "retrained"]
    found = [0.0]
    for test, own in one["tests"].items():
        difference = own["difference"] or 0.0
        if margin := margins[test].above if difference > 0 else margins[test].below:
            found.append(abs(difference) / margin)
    return max(found)


def tests_of(one: Mapping[str, Any]) -> dict[str, tuple[float, float, bool]]:
    """Return by test, and for the verdict, the figure, the difference, and whether it fails the model."""
    kind = "base" if one["what"] == "by base" else "retrained"
    return {"verdict": (worst(one), worst(one), failed(one))} | {
        test: (own["score"], own["difference"], red(test, own, kind))
        for test, own in one["tests"].items()
        if own["score"] is not None and own["difference"] is not None
    }


def wilson(found: int, of: int) -> str:
    """Return the ends of Wilson's 95 % interval of a share."""
    z, share = 1.96, found / of
    middle, half = share + z * z / (2 * of), z * (share * (1 - share) / of + z * z / (4 * of * of)) ** 0.5
    return "–".join(f"{max(0.0, (middle + side * half) / (1 + z * z / of)):.3f}" for side in (-1, 1))


def tell(found: Found, what: str) -> dict[str, dict[str, Any]]:
    """Return for the whole verdict, and for each test, how well it tells the two kinds apart."""
    told: dict[str, dict[str, list[tuple[float, bool]]]] = {}
    for one in found:
        if one["what"] == what and one["kind"] != "reference":
            for test, (_, difference, fails) in tests_of(one).items():
                entry = told.setdefault(test, {"knows": [], "hides": [], "never": []})
                entry[one["kind"]].append((difference, fails))
    result = {}
    for test, by_kind in told.items():
        values = {kind: np.array([value for value, _ in own]) for kind, own in by_kind.items()}
        both = np.concatenate([values["knows"], values["hides"]])
        result[test] = {
            "auc": auc_of(values["never"], both),
            "auc hides": auc_of(values["never"], values["hides"]) if len(values["hides"]) else None,
            **{f"failed {kind}": sum(fails for _, fails in own) for kind, own in by_kind.items()},
            **{f"n {kind}": len(own) for kind, own in by_kind.items()},
        }
    return result


def robustness(found: Found) -> dict[str, dict[str, tuple[float, float]]]:
    """Return Q and R of each test and of the whole verdict: of its figure, and of what it says."""
    at = {(one["world"], one["model"], one["what"]): tests_of(one) for one in found}
    gathered: dict[str, dict[str, list[float]]] = {}
    for (world, model, what), after in at.items():
        before = at.get((world, model, "audit"))
        change, _, both = what.partition(", ")
        if change not in ("rounded", "relearned") or model == "retrained" or before is None:
            continue
        for test in set(after) & set(before):
            entry = gathered.setdefault(test, {})
            then, now = before[test][0], after[test][0]
            if both:
                entry.setdefault(f"says {change}", []).append(float(before[test][2] == after[test][2]))
            elif change == "rounded":
                entry.setdefault(change, []).append(alike(now, then))
            elif all(test in at[world, "retrained", when] for when in ("audit", "relearned")):
                theirs = [at[world, "retrained", when][test][0] for when in ("audit", "relearned")]
                entry.setdefault(change, []).append(alike(now - then, theirs[1] - theirs[0]))
    return {
        test: {
            name: (fmean(entry[f"{key}rounded"]), fmean(entry[f"{key}relearned"]))
            for name, key in (("figure", ""), ("says", "says "))
            if f"{key}rounded" in entry and f"{key}relearned" in entry
        }
        for test, entry in gathered.items()
    }


def alike(one: float, other: float) -> float:
    """Return 1 − |a − b| / (|a| + |b|), not below 0."""
    return 1 - abs(one - other) / (abs(one) + abs(other) + 1e-9)


def short(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}".removeprefix("0" if value < 1 else "")


def print_table(found: Found) -> None:
    """Print what was found as a Markdown table."""
    told, base, steady = tell(found, "audit"), tell(found, "by base"), robustness(found)
    n = [told["verdict"][f"n {kind}"] for kind in ("knows", "hides", "never")]
    head = f"failed: know, of {n[0]} | hide, of {n[1]} | never, of {n[2]} | AUC by base"
    print(f"| test | AUC | of those that hide it | {head} | Q | R | verdict: Q | R |\n" + "|---" * 11 + "|")
    for test, one in sorted(told.items(), key=lambda item: -item[1]["auc"]):
        steps = [value for key in ("figure", "says") for value in steady.get(test, {}).get(key, (None, None))]
        cells = ["**the whole verdict**" if test == "verdict" else f"`{test}`"]
        cells += [short(one["auc"]), short(one["auc hides"])]
        cells += [str(one[f"failed {kind}"]) for kind in ("knows", "hides", "never")]
        cells += [short(base.get(test, {}).get("auc")), *(short(value, 2) for value in steps)]
        print("| " + " | ".join(cells) + " |")
    print()
    for name, one in (("by the retrained model", told["verdict"]), ("by the base", base.get("verdict"))):
        if one is None:
            continue
        seen = [one[f"{key} knows"] + one[f"{key} hides"] for key in ("failed", "n")]
        never = one["failed never"], one["n never"]
        print(f"{name}: found {seen[0]} of {seen[1]} ({wilson(*seen)}), AUC {one['auc']:.3f}; "
              f"false alarms {never[0]} of {never[1]} ({wilson(*never)})")  # fmt: skip
    for name, (rounded, relearned) in sorted(steady.get("verdict", {}).items()):
        both = harmonic_mean([rounded, relearned])
        print(f"robustness of the whole verdict, {name}: Q {rounded:.3f}, R {relearned:.3f}: {both:.3f}")
    for name in dict.fromkeys(one["model"] for one in found if one["kind"] == "hides"):
        own = [one for one in found if one["model"] == name and one["what"] == "audit"]
        by = {key: sum(key in one["tests"] and red(key, one["tests"][key]) for one in own) for key in told
              if key != "verdict"}  # fmt: skip
        most = ", ".join(f"{key} {by[key]}" for key in sorted(by, key=lambda key: -by[key])[:4])
        print(f"{name}: failed {sum(map(failed, own))} of {len(own)} ({most})")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for worlds, models and results")
    parser.add_argument("--first", type=int, default=0, help="the first world that is made now")
    parser.add_argument("--worlds", type=int, default=8, help="the world after the last")
    parser.add_argument("--quick", action="store_true", help="no base, and no changed models")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    path = options.output / "results.jsonl"
    for seed in range(options.first, options.worlds):
        measure(MetaWorld(options.output / f"world{seed}", seed), path, quick=options.quick)
    found = lines(path)
    old, fresh = ([one for one in found if (one["world"] >= FITTED) == new] for new in (False, True))
    parts = {"margins set on these": old, "fresh": fresh, "all": found}
    for name, part in parts.items():
        if part:
            print(f"\n## {name}\n")
            print_table(part)
    for test, one in tell(found, "audit").items():
        seen = [one[f"{key} knows"] + one[f"{key} hides"] for key in ("failed", "n")]
        print(f'"{test}" = [{seen[0]}, {seen[1]}, {one["failed never"]}, {one["n never"]}]')
    if options.json:
        print(json.dumps({name: {"tests": tell(part, "audit"), "robustness": robustness(part)}
                          for name, part in parts.items() if part}))  # fmt: skip


if __name__ == "__main__":
    main()

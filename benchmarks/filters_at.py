"""Filters of a recipe's vector at equal forgetting: on a real model, after a run of that recipe.

    palinode run RECIPE [--set …]
    python benchmarks/filters_at.py RECIPE [--set …] [--only NAME …] [--also FILE …] [--results FILE]
    python benchmarks/filters_at.py RECIPE [--set …] --audit FOLDER [--attack NAME …] [--results FILE]
    python benchmarks/filters_at.py --compare "projection .9" --results FILE [--results FILE …]
    python benchmarks/filters_at.py --frontier --results FILE [--results FILE …]

For each filter the α at which the forget rows' mean answer probability is the retrained model's (by secants
on its logarithm, β = 0), and the probability there of the retain probes, which no vector or filter has read;
of the quarter of these that is nearest to the forget rows (cosine of mean hidden states, middle block, at
the target); of neutral sentences; and of the rows of each FILE named by `--also`, there the share of the
right answer in the sum with the wrong ones where the rows have any (TOFU's way). `--save FOLDER` writes
those models. `--mix SHARE NAME` also tries (1 − SHARE) of what a filter takes off with SHARE of what
NAME does, each at equal forgetting, and `--deeper FACTOR` goes on to that multiple of the retrained model's
probability; both repeatable. `--method NAME` does the same with the vector of another method, or with the
change that a training of the target made; `--only` takes the rivals of rivals.py too.
`--audit FOLDER` writes them there too, and runs attacks of `palinode audit` on each against the retrained
model: each test's figure and its distance from that model's, with the interval.
What the run trained and measured is found in its workspace. `--results` adds a line for each filter, with
every row; `--compare` says how far the filters in such files can be told from one of them: the mean
difference over rows and its 95 % interval (paired bootstrap). `--frontier` prints what is kept against what
attacks find, a line for each filter, means over files. Figures in docs/filters.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rivals import RIVALS, Sides, filtered, read

from palinode.audit.attack import BUDGETS
from palinode.audit.material import AuditRows, divide
from palinode.audit.policy import build_policy
from palinode.data.batches import pad_right
from palinode.data.examples import Example, Question, at_most, read_questions
from palinode.data.tokenize import TokenRow, tokenize
from palinode.data.world import neutral_examples
from palinode.models.inplace import LiveModel
from palinode.models.likelihoods import score_rows
from palinode.models.loading import load_model, load_tokenizer, pad_token, pick_device
from palinode.models.reading import model_inputs
from palinode.pipeline.audit_run import AuditPlan, audit
from palinode.pipeline.finetuning import FineTuning, Trained
from palinode.pipeline.inputs import open_inputs, workspace_folder
from palinode.pipeline.recipe import load_recipe
from palinode.pipeline.transforming import MomentFiles, Transforming, project
from palinode.pipeline.workspace import Workspace
from palinode.progress import NullListener
from palinode.settings import AuditSettings
from palinode.weights import Direction, WeightedSum
from palinode.weights.vectors import transform

ASKED = 8
"""Values of α that are tried for each vector, at most."""
NEAR = 0.003
"""How near the logarithm of the forget probability comes to what is wanted."""
DRAWS = 10_000
ATTACKED = ("prefixes", "membership", "quantise_4", "relearn_forget", "relearn_retain")


@dataclass(frozen=True)
class Filter:
    """One way to filter a vector."""

    alpha: float
    """To begin with."""
    transforms: Sequence[Mapping[str, Any]] = ()
    rounds: int = 0
    """Times that it is filtered again by what the layers read where its α arrives."""
    last: float | None = None
    """Energy of the axes that are taken out at the end, of all spared rows' inputs."""
    rival: str | None = None
    """What of rivals.py is done at the end."""


def squares(mu: float, energy: float = 0.0, **settings: Any) -> list[dict[str, Any]]:
    return [{"name": "least_squares", "mu": mu, "energy": energy, **settings}]


PROJECTION = {"name": "projection", "others": "drop"}
PLAIN = {"name": "layer_scales", "scales": {".": 1.0}}
"""It asks a training for the change that it made, and leaves it as it is."""
FILTERS: Mapping[str, Filter] = {
    "plain": Filter(0.75, [PLAIN]),
    "projection .9": Filter(2.9, [PROJECTION]),
    "projection .8": Filter(2.0, [{**PROJECTION, "energy": 0.8}]),
    "projection .99": Filter(9.0, [{**PROJECTION, "energy": 0.99}]),
    "projection .9, all rows": Filter(2.9, last=0.9),
    "projection .95, all rows": Filter(4.0, last=0.95),
    "soft .1": Filter(0.8, squares(1e6, epsilon=1e5)),
    "least squares 1": Filter(0.7, squares(1.0), 1),
    "least squares 10": Filter(0.65, squares(10.0), 1),
    "least squares 100": Filter(0.62, squares(100.0), 2),
    "least squares 1000": Filter(0.6, squares(1000.0), 1),
    "100, epsilon .1": Filter(0.6, squares(100.0, epsilon=0.1), 1),
    "100, epsilon .01": Filter(0.6, squares(100.0, epsilon=0.01)),
    "100, to zero": Filter(0.6, squares(100.0, ridge="zero"), 1),
    "100, answers": Filter(0.6, squares(100.0, positions="answers"), 1),
    "100, 40 rows": Filter(0.6, squares(100.0, rows=40)),
    "100, embeddings filtered": Filter(0.6, squares(100.0, others="filter")),
    **{
        f"{mu}, energy {share}": Filter(0.6, squares(float(mu), float(share)), 1)
        for mu in (1, 10, 100)
        for share in (".5", ".8", ".9", ".95")
    },
    **{name: Filter(0.75, [PLAIN], rival=name) for name in RIVALS},
}
STUDIED = [name for name in FILTERS if name not in RIVALS]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path, nargs="?")
    parser.add_argument("--set", action="append", default=[], dest="changes")
    parser.add_argument("--only", action="append", choices=[*FILTERS], help="this filter; repeatable")
    parser.add_argument("--method", action="append", help="in place of the recipe's; repeatable")
    parser.add_argument("--rounds", type=int, help="times that a vector is filtered again, at most")
    parser.add_argument("--also", action="append", default=[], help="rows to look at as well; repeatable")
    parser.add_argument("--results", action="append", default=[], type=Path)
    parser.add_argument("--save", type=Path, help="folder for the models at equal forgetting")
    parser.add_argument("--audit", type=Path, help="folder for the audits of these models")
    parser.add_argument("--attack", action="append", choices=ATTACKED, help="this attack; repeatable")
    parser.add_argument("--bare", action="store_true", help="leave the target out of the audits")
    parser.add_argument(
        "--mix", action="append", default=[], nargs=2, metavar=("SHARE", "NAME"), help="repeatable"
    )
    parser.add_argument("--deeper", action="append", default=[], type=float, help="factor; repeatable")
    parser.add_argument("--together", metavar="COLUMN", help="relearn half of what stands there, not of rows")
    parser.add_argument("--budget", choices=[*BUDGETS], default="quick", help="of the audits")
    parser.add_argument("--relearn-rate", type=float, default=2e-5, help="learning rate of their relearning")
    parser.add_argument("--compare", metavar="NAME", help="compare results with this filter's")
    parser.add_argument("--frontier", action="store_true", help="retain probability beside attacks")
    args = parser.parse_args()
    if args.frontier:
        frontier(args.results)
        return
    if args.compare:
        compare(args.compare, args.results)
        return
    trial = Trial(args.recipe, args.changes, args.also, args.results[0] if args.results else None)
    trial.save, trial.audits, trial.attacks = args.save or args.audit, args.audit, args.attack or ATTACKED
    trial.bare, trial.together = args.bare, args.together
    trial.mixtures = [(0.0, ""), *((float(share), name) for share, name in args.mix)]
    trial.factors = [1.0, *args.deeper]
    trial.policy = build_policy({"budget": {"relearn_rate": args.relearn_rate}}, preset=args.budget)
    with trial.workspace.locked():
        trial.begin()
        for method in args.method or [trial.recipe.method]:
            trial.method, trial.others = method, {}
            for name in args.only or STUDIED:
                trial.measure(name, FILTERS[name], args.rounds)


class Trial:
    """A recipe's models and rows, and what is found with them."""

    def __init__(
        self, recipe: Path, changes: Sequence[str], also: Sequence[str], results: Path | None
    ) -> None:
        self.recipe = load_recipe(recipe, changes)
        self.inputs, self.method = open_inputs(self.recipe), self.recipe.method
        self.workspace = Workspace(workspace_folder(self.recipe))
        self.results = results
        lines = results.read_text().splitlines() if results and results.exists() else []
        self.measured: dict[tuple[str, int], dict[str, Any]] = {}
        """What stands in the results, by filter and round; it is not measured again."""
        self.attacked: set[tuple[str, int]] = set()
        for one in map(json.loads, lines):
            if "audit" in one:
                self.attacked.add((one["filter"], one["round"]))
            else:
                self.measured[one["filter"], one["round"]] = one
        self.save: Path | None = None
        self.audits: Path | None = None
        self.attacks: Sequence[str] = ATTACKED
        self.policy, self.bare = build_policy({}), False
        self.together: str | None = None
        self.mixtures: Sequence[tuple[float, str]]
        self.others: dict[str, Direction] = {}
        self.sides: tuple[Sides, Sides] | None = None
        self.mixtures, self.factors = [(0.0, "")], [1.0]
        tokenizer, style = load_tokenizer(self.inputs.reader), self.recipe.prompts.style()
        self.pad_id = pad_token(tokenizer)
        rows = self.inputs.rows
        sets = {"forget": rows.forget, "retain": rows.retain_probe, "neutral": neutral_examples()}
        questions = {name: [Question(example) for example in own] for name, own in sets.items()}
        questions |= {Path(place).stem: read_questions(place) for place in also}
        self.answers: dict[str, list[int]] = {}
        """How many answers each row of a set has, the right one first."""
        self.rows: dict[str, list[TokenRow]] = {}
        for name, own in questions.items():
            wrong = [one.alternatives.get("perturbed", ()) for one in own]
            self.answers[name] = [1 + len(others) for others in wrong]
            every = [
                replace(one.example, answer=answer)
                for one, others in zip(own, wrong, strict=True)
                for answer in (one.example.answer, *others)
            ]
            length = self.recipe.evaluation.max_length
            self.rows[name] = tokenize(every, tokenizer, max_length=length, style=style)

    def begin(self) -> None:
        """Measure target and retrained model."""
        self.target, retrained = FineTuning(self.inputs, self.workspace, NullListener()).given_or_prepared()
        assert retrained is not None
        self.retrained = retrained
        self.live = load_model(self.target, device=pick_device(self.recipe.device))
        self.put = LiveModel(self.live).put
        self.near = self.nearest()
        for name, model in {"retrained": retrained, "target": self.target}.items():
            if (name, 0) not in self.measured:
                self.put(model)
                self.report(name, 0, time.monotonic(), alpha=0.0)
        self.wanted, self.known = (
            math.log(mean(self.measured[name, 0]["rows"]["forget"])) for name in ("retrained", "target")
        )

    def measure(self, name: str, one: Filter, most: int | None) -> None:
        """Report a filter, and what it comes to where its α arrives."""
        label = name if self.method == self.recipe.method else f"{self.method}: {name}"
        trained = self.trained(one)
        vector, again, alpha = trained.vectors.forget, None, one.alpha
        left = {"survives": trained.transforms[-1].get("survives", 1.0)} if trained.transforms else {}
        rounds = one.rounds if most is None else min(most, one.rounds)
        for place in range(1 + rounds):
            if place:
                assert trained.filters is not None
                again = trained.filters.arrived(again or trained.filters.usual(), alpha)
                vector, left = again.direction, {"survives": again.facts["survives"]}
            with TemporaryDirectory(dir=self.workspace.folder.parent) as folder:
                if one.last is not None:
                    vector = self.projected(vector, one.last, Path(folder) / "vector")
                if one.rival:
                    vector = self.rivalled(vector, one.rival, Path(folder) / "vector")
                alpha = self.found(label, place, vector, alpha, **left)
                if place == rounds:
                    self.varied(label, place, alpha * vector)

    def trained(self, one: Filter) -> Trained:
        """Return the recipe's vector, filtered at the target."""
        scales = self.recipe.scales.model_copy(update={"retain": 0.0})
        changes = {
            "method": self.method,
            "transforms": list(one.transforms),
            "filter": "none",
            "scales": scales,
        }
        own = open_inputs(self.recipe.model_copy(update=changes))
        return FineTuning(own, self.workspace, NullListener()).train(self.target)

    def varied(self, name: str, place: int, change: Direction) -> None:
        """Save and audit a change at equal forgetting, its mixtures, and the same where more is forgotten."""
        for (share, other), factor in itertools.product(self.mixtures, self.factors):
            label = (
                name
                + (f" + {share:g} {other}" if share else "")
                + (f", to {factor:g}" if factor != 1 else "")
            )
            mixed = (1 - share) * change + share * self.other(other) if share else change
            scale = 1.0 if label == name else self.found(label, place, mixed, 1.0, factor)
            self.kept(label, place, self.target - scale * mixed)

    def other(self, name: str) -> Direction:
        """Return what a filter takes off at equal forgetting."""
        if name not in self.others:
            vector = self.trained(FILTERS[name]).vectors.forget
            self.others[name] = self.equal(vector, FILTERS[name].alpha, self.wanted) * vector
        return self.others[name]

    def kept(self, name: str, place: int, point: WeightedSum) -> None:
        """Save the model at a point and audit it, as far as that is wanted."""
        if self.save:
            model = self.save / f"{name}, {place}".replace(" ", "_")
            if not model.exists():
                point.save(model)
            if self.audits and (self.together or (name, place) not in self.attacked):
                self.attack(name, place, model)

    def attack(self, name: str, place: int, model: Path) -> None:
        """Audit a model against the retrained one."""
        assert self.audits is not None
        rows, most = self.inputs.rows, self.policy.budget.max_rows
        forget, retain, unseen = (
            at_most(own, most, seed=0) for own in (rows.forget, rows.spared, rows.unseen)
        )
        learned, held_out = divide(forget, seed=0) if self.together is None else self.apart(forget)
        models = {"audited": model, "reference": self.retrained.folder}
        models |= {} if self.bare else {"target": self.target.folder}
        plan = AuditPlan(
            {which: str(folder) for which, folder in models.items()},
            "retrained",
            AuditRows(forget, learned, held_out, retain, unseen),
            {},
            self.policy,
            AuditSettings(
                attacks=tuple(self.attacks), device=self.recipe.device, style=self.recipe.prompts.style()
            ),
        )
        found = {
            f"{attack}.{test}": told(one["findings"])
            for attack, own in audit(plan, self.audits / "audit")["attacks"].items()
            for test, one in own.get("tests", {}).items()
            if one["findings"]["audited"]["score"]["value"] is not None
        }
        facts = {"filter": name, "round": place, "seed": self.recipe.seed, "audit": found}
        print(json.dumps(facts), flush=True)
        if self.results:
            with self.results.open("a") as lines:
                lines.write(json.dumps(facts) + "\n")

    def apart(self, forget: Sequence[Example]) -> tuple[list[Example], list[Example]]:
        """Return half of the forget rows and the other half, rows with one value in a column together."""
        lines = Path(self.recipe.data.forget).read_text().splitlines()
        values = [json.loads(line)[self.together] for line in lines]
        half = set(at_most(every := sorted(set(values)), len(every) // 2, seed=0))
        inside = [one for one in forget if values[one.row] in half]
        return inside, [one for one in forget if values[one.row] not in half]

    def nearest(self) -> list[int]:
        """Return the places of the quarter of the retain probes that are nearest to forget rows."""
        layer = int(self.live.config.get_text_config().num_hidden_layers) // 2
        forget, retain = (self.states(self.rows[which], layer) for which in ("forget", "retain"))
        middle = torch.cat([forget, retain]).mean(dim=0)
        forget, retain = (torch.nn.functional.normalize(own - middle, dim=-1) for own in (forget, retain))
        alike = (retain @ forget.T).amax(dim=-1)
        return sorted(alike.argsort(descending=True)[: max(1, len(alike) // 4)].tolist())

    @torch.no_grad()
    def states(self, rows: Sequence[TokenRow], layer: int) -> torch.Tensor:
        """Return the mean hidden state of each row after some blocks."""
        found = []
        for row in rows:
            inputs = model_inputs(self.live, pad_right([row], pad_id=self.pad_id))
            found.append(self.live(**inputs, output_hidden_states=True).hidden_states[layer][0].mean(dim=0))
        return torch.stack(found)

    def projected(self, vector: Direction, energy: float, folder: Path) -> Direction:
        """Take from a vector what acts on the principal axes of all spared rows' inputs, at the target."""
        measuring = Transforming(self.inputs, self.workspace, NullListener(), self.target)
        kept = MomentFiles(measuring.of_checkpoint(self.target, self.inputs.rows.spared))
        return transform([vector], project(kept, energy=energy, others="drop"), folder, label=f"off {energy}")

    def rivalled(self, vector: Direction, name: str, folder: Path) -> Direction:
        """Return a vector as a rival leaves it, by what the target's layers read and send back."""
        if self.sides is None:
            self.put(self.target)
            tokenizer, style = load_tokenizer(self.inputs.reader), self.recipe.prompts.style()
            length = self.recipe.evaluation.max_length
            forget, spared = (
                read(self.live, tokenize(own, tokenizer, max_length=length, style=style), pad_id=self.pad_id)
                for own in (self.inputs.rows.forget, self.inputs.rows.spared)
            )
            self.sides = forget, spared
        return filtered(vector, RIVALS[name], *self.sides, folder)

    def found(
        self, name: str, place: int, vector: Direction, alpha: float, factor: float = 1.0, **facts: float
    ) -> float:
        """Return the α at which a multiple of the retrained model's probability is left, and report it."""
        if (name, place) not in self.measured:
            started = time.monotonic()
            alpha = self.equal(vector, alpha, self.wanted + math.log(factor))
            self.report(name, place, started, alpha=alpha, **facts)
        return float(self.measured[name, place]["alpha"])

    def equal(self, vector: Direction, alpha: float, wanted: float) -> float:
        """Return the α where the forget probability's logarithm is as wanted; the live model stays there."""
        tried = {0.0: self.known}
        for _ in range(ASKED):
            self.put(self.target - alpha * vector)
            tried[alpha] = math.log(mean(self.probabilities("forget")))
            if abs(tried[alpha] - wanted) < NEAR:
                break
            alpha = crossing(tried, wanted)
        else:
            self.put(self.target - alpha * vector)
        return alpha

    def probabilities(self, which: str) -> list[float]:
        """Return the answer probability of each row, the geometric mean of its tokens'.

        Its share in the sum with the wrong answers', where a row has any.
        """
        scored = score_rows(self.live, self.rows[which], pad_id=self.pad_id)
        every = iter([math.exp(math.fsum(row.logprobs) / len(row.logprobs)) for row in scored])
        groups = [list(itertools.islice(every, count)) for count in self.answers[which]]
        return [own[0] / (math.fsum(own) if len(own) > 1 else 1.0) for own in groups]

    def report(self, name: str, place: int, started: float, **facts: float) -> None:
        """Print what the live model makes of all rows, and keep it."""
        found = {which: self.probabilities(which) for which in self.rows}
        found["near"] = [found["retain"][place] for place in self.near]
        seconds = round(time.monotonic() - started, 1)
        line = {"filter": name, "round": place, "seed": self.recipe.seed, **facts, "seconds": seconds}
        self.measured[name, place] = {**line, "rows": found}
        print(
            json.dumps({**line, **{which: round(mean(own), 4) for which, own in found.items()}}), flush=True
        )
        if self.results:
            with self.results.open("a") as lines:
                lines.write(json.dumps(self.measured[name, place]) + "\n")


def told(findings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a test's figures: the model's, the retrained one's, the target's; the first two's distance."""
    own, far = findings["audited"], findings["audited"]["difference"]
    figures = {"found": own["score"], "retrained": own["reference"]}
    figures |= {"target": findings["target"]["score"]} if "target" in findings else {}
    values = {name: round(score["value"], 4) for name, score in figures.items()}
    gap = [round(far[end], 4) for end in ("value", "low", "high")]
    return {**values, "gap": gap, "verdict": own["verdict"]}


def crossing(tried: Mapping[float, float], wanted: float) -> float:
    """Return the α where the line through the two nearest points, one on either side if any, comes to it."""
    ordered = sorted(tried)
    pairs = list(itertools.pairwise(ordered))
    low, high = next(((a, b) for a, b in pairs if tried[a] >= wanted > tried[b]), pairs[-1])
    slope = (tried[high] - tried[low]) / (high - low)
    reached = low + (wanted - tried[low]) / slope if slope < 0 else 1.5 * high
    return min(max(reached, 0.3 * high), 2 * high)


def compare(name: str, files: Sequence[Path]) -> None:
    """Print a line for each filter: means by file, and its difference from one of them over all rows."""
    found: dict[str, dict[tuple[str, str], list[float]]] = {}
    alphas: dict[str, dict[Path, float]] = {}
    for file in files:
        for line in file.read_text().splitlines():
            one = json.loads(line)
            if "audit" in one:
                continue
            label = f"{one['filter']}{' *' * one['round']}"
            alphas.setdefault(label, {})[file] = round(one["alpha"], 3)
            for which, values in one["rows"].items():
                found.setdefault(label, {})[str(file), which] = values
    sets = list(dict.fromkeys(which for _, which in found[name]))
    draws = np.random.default_rng(0)
    for label, own in found.items():
        cells = []
        for which in sets:
            places = [place for place in found[name] if place[1] == which and place in own]
            if not places:
                continue
            gaps = np.concatenate([np.subtract(own[place], found[name][place]) for place in places])
            drawn = gaps[draws.integers(len(gaps), size=(DRAWS, len(gaps)))].mean(axis=1)
            low, high = np.quantile(drawn, [0.025, 0.975])
            means = " / ".join(f"{mean(own[place]):.4f}" for place in places)
            cells.append(f"{which} {means} ({gaps.mean():+.4f}, {low:+.4f} to {high:+.4f}, n = {len(gaps)})")
        print(f"{label} | α {' / '.join(map(str, alphas[label].values()))} | {' | '.join(cells)}")


def frontier(files: Sequence[Path]) -> None:
    """Print a line for each audited filter: in each file what is kept, and what attacks find."""
    kept: dict[tuple[str, Path], Mapping[str, float]] = {}
    found: dict[str, dict[Path, Mapping[str, Any]]] = {}
    for file in files:
        for line in file.read_text().splitlines():
            one = json.loads(line)
            label = f"{one['filter']}{' *' * one['round']}"
            if "audit" in one:
                found.setdefault(label, {}).setdefault(file, {}).update(one["audit"])  # type: ignore[attr-defined]
            else:
                kept[label, file] = {which: mean(values) for which, values in one["rows"].items()}
                kept[label, file] = {"alpha": one["alpha"], **kept[label, file]}
    tests = ("membership.loss", "membership.min_k_plus", "relearn_forget.area")
    for label, audits in found.items():
        own = [kept[label, file] for file in audits]
        cells = [
            " / ".join(f"{one[which]:.3f}" for one in own) for which in ("alpha", "forget", "retain", "near")
        ]
        for test in tests:
            gaps = [audit[test]["gap"] for audit in audits.values() if test in audit]
            if gaps:
                low, value, high = min(g[0] for g in gaps), mean(g[0] for g in gaps), max(g[0] for g in gaps)
                cells.append(
                    " / ".join(f"{audit[test]['found']:.3f}" for audit in audits.values() if test in audit)
                )
                cells[-1] += f" ({value:+.3f}, {low:+.3f} to {high:+.3f})"
        print(" | ".join([label, *cells]))


if __name__ == "__main__":
    main()

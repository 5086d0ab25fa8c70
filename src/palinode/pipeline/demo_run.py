"""The demos: the real pipeline on an invented world, beside the truth and beside the plain task vector.

Exact match is the share of rows to which a model's greedy answer is exactly the right one. The scales are
chosen by the same rule as everywhere, without looking at the retrained model.

`demo_locate` holds three kinds of evidence against the truth, and shows what each checkpoint gives. Its world
is trained in a dozen stretches, each of which leaves a checkpoint:

    stretch 0      general facts, the first people, and one forget person ("early")
    stretch 1 ...  new people each, and rows drawn from what was seen before
    COPIED_NEAR    two forget people in other words (each row a word longer)
    MAIN           seven forget people
    COPIED         the two, word for word
    MAIN_AGAIN     three of the seven a second time

One more stretch leads to the target. People who are never trained on are the controls. Every batch is written
down as it happens, apart from any log: that is the truth.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from palinode.benchmarks.demo import build_demo, tiny_model
from palinode.data.examples import Example, read_examples
from palinode.data.world import Fact, World, invent_world, write_facts
from palinode.errors import OutputError, WorkspaceError, told_as
from palinode.history.duplicates import row_hash
from palinode.history.exposures import ExposureLog
from palinode.history.locating import Location, locate
from palinode.history.orders import LoggedStage, rebuild, write_stages
from palinode.history.reader import ExposureReader
from palinode.history.series import open_series
from palinode.models.loading import load_tokenizer
from palinode.pipeline.recipe import build_recipe, laid_over, named
from palinode.pipeline.reporting import NAME, gather, write_reports
from palinode.pipeline.run import Unlearned, unlearn
from palinode.pipeline.workspace import Workspace
from palinode.progress import Listener, NullListener
from palinode.records import (
    COMMAND,
    RECORD_VERSION,
    Outcome,
    holding,
    packaged_table,
    read_json,
    write_json,
    write_text,
)
from palinode.report.location_report import location_picture
from palinode.report.reports import Facts, html_report, report_content
from palinode.settings import LocateSettings, TrainingSettings
from palinode.training.finetune import Watch, finetune
from palinode.version import __version__
from palinode.weights.checkpoint import Checkpoint

SETTINGS: Mapping[str, Any] = packaged_table("pipeline/demo.toml")
"""What the demo's recipes have that is not the paper's default."""


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo found, and where its files are."""

    folder: Path
    record: Mapping[str, Any]
    """The content of the folder's record.json."""


def demo(
    output: Path | str = "palinode-demo",
    *,
    seed: int = 0,
    world: World | None = None,
    settings: Mapping[str, Any] = SETTINGS,
    listener: Listener | None = None,
    **training: Any,
) -> DemoResult:
    """Train the invented world's models, unlearn the forget people, and measure exact match.

    Writes everything under `output`; an interrupted demo goes on where it was. Raises OutputError when the
    folder holds something else. The world can be another; `training` goes to `build_demo`.
    """
    folder, world = Path(output), world or invent_world(seed)
    listener = listener or NullListener()
    claim(folder, seed)
    started = time.monotonic()
    with one_thread(), holding(COMMAND, f"palinode demo --seed {seed}"):
        with Workspace(folder / "workspace").locked(listener):
            models = build_demo(world, folder / "world", seed=seed, listener=listener, **training)
        three = {"target": models.target, "base": models.base, "retrained": models.retrained}
        rows = {"forget": models.forget, "retain": models.retain, "holdout": models.holdout}
        places, own = {name: model.folder for name, model in three.items()}, {"seed": seed, **settings}
        done = unlearned(folder, "unlearned", "msa", places, rows, own, listener)
        plain = unlearned(folder, "task_vector", "task_vector", places, rows, own, listener)
    path = folder / "record.json"
    if not (done.finished_before and plain.finished_before and path.exists()):
        write_json(path, _record(world, done, plain, seed, time.monotonic() - started))
        write_reports(gather(folder), folder / f"{NAME}.html")
    return DemoResult(folder, read_json(path))


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch on one thread: so small a model gains little from two, and loses much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def claim(folder: Path, seed: int, *, name: str = "demo.json") -> None:
    """Make the folder a demo's own by a mark of that name, or see that it already is."""
    mark = folder / name
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; name another --output for the demo")
    if mark.exists():
        with told_as(OutputError, f"{mark} cannot be read", "name another --output for the demo"):
            other = read_json(mark)["seed"]
        if other != seed:
            raise OutputError(
                f"{folder} holds the demo of seed {other}; name another --output for seed {seed}"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise OutputError(f"{folder} exists and is not empty; name another --output for the demo")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(mark, {"seed": seed, "palinode": __version__})


def unlearned(
    folder: Path,
    name: str,
    method: str,
    models: Mapping[str, Path],
    rows: Mapping[str, Path],
    settings: Mapping[str, Any],
    listener: Listener,
) -> Unlearned:
    """Do one of a demo's runs, from folders of models and files of rows to the output of that name."""
    output = {"folder": str(folder / name), "workspace": str(folder / "workspace"), "keep_unchanged": True}
    content = {"method": method, "device": "cpu", "models": named(**models), "data": named(**rows)}
    return unlearn(build_recipe({**content, "output": output, **settings}), listener=listener)


def _record(world: World, done: Unlearned, plain: Unlearned, seed: int, seconds: float) -> dict[str, Any]:
    if not (done.outcomes and plain.outcomes):
        raise WorkspaceError("the demo's workspace is gone; remove its folder to run it anew")
    answers = {**done.outcomes, "task_vector": plain.outcomes["unlearned"]}
    chosen = {"unlearned": done.record["scales"], "task_vector": plain.record["scales"]}
    people = len(world.others)  # the retain rows are the others' facts, then the general ones
    return {
        "version": RECORD_VERSION,
        "palinode": __version__,
        "seed": seed,
        "people": {
            "forget": len({fact.subject for fact in world.forget}),
            "others": len({fact.subject for fact in world.others}),
        },
        "recall": {
            name: {
                **matches(sets, people),
                "general": exact_match([outcome for outcome in sets["retain"] if outcome.row >= people]),
            }
            for name, sets in answers.items()
        },
        "scales": {
            name: {which: scales[which] for which in ("forget", "retain")} for name, scales in chosen.items()
        },
        "points": {name: scales["points"] for name, scales in chosen.items()},
        "seconds": round(seconds, 1),
    }


def exact_match(outcomes: Sequence[Outcome]) -> float:
    """Return the share of outcomes whose generated answer is exactly the expected one."""
    return sum(outcome.generated == outcome.expected for outcome in outcomes) / len(outcomes)


def matches(sets: Mapping[str, Sequence[Outcome]], people: int) -> dict[str, float]:
    """Return the exact match on the forget people and, of the retain rows, on the first `people`."""
    others = [outcome for outcome in sets["retain"] if outcome.row < people]
    return {"forget": exact_match(sets["forget"]), "others": exact_match(others)}


CHECKPOINTS = 12
COPIED_NEAR, MAIN, COPIED, MAIN_AGAIN = 3, 5, 7, 9
FORGET_PEOPLE = 10
REPEATED = 3
"""People of the main request who are planted a second time."""
MARK = "truly"
"""The word that makes a near-copy of a row."""

LOCATE_OWN = {"training.epochs": 20, "scales.probe_rows": 200, "scales.retain_grid": [0.0, 1.0]}
LOCATE_SETTINGS: Mapping[str, Any] = laid_over(SETTINGS, LOCATE_OWN)
"""What the recipes of the demo have that is not the paper's default."""

VERSION = 1


@dataclass(frozen=True, slots=True)
class Size:
    """How large the world and its training are."""

    first_epochs: int = 24
    epochs: int = 12
    replayed: int = 320
    """Rows of earlier stretches that each stretch has again."""
    learning_rate: float = 2e-3
    """Peak rate of the first stretch; those of the others fall to a tenth of it, as in one long training."""
    batch_size: int = 64
    width: int = 64
    layers: int = 3


@dataclass(frozen=True, slots=True)
class SeriesModels:
    """The demo's models and rows."""

    folder: Path
    """In it: ladder/, the checkpoints; data.jsonl, every row that was trained on; control.jsonl, rows about
    people who were never trained on; retain.jsonl, rows about everyone else, then the general facts."""
    target: Checkpoint
    steps: tuple[int, ...]
    """Steps of the checkpoints, then of the target."""
    stretches: tuple[LoggedStage, ...]
    requests: dict[str, Path]
    """Forget rows by request: main, copied, early."""
    truth: Mapping[int, Sequence[int]]
    """By row number of the data, the steps in which it was."""


def demo_locate(
    output: Path | str = "palinode-demo-locate",
    *,
    seed: int = 0,
    world: World | None = None,
    size: Size | None = None,
    settings: Mapping[str, Any] = LOCATE_SETTINGS,
    listener: Listener | None = None,
) -> DemoResult:
    """Train the checkpoints of an invented world, locate its forget rows, and unlearn from every one.

    Writes everything under `output`; an interrupted demo goes on where it was. Raises OutputError
    when the folder holds something else. The world, its size and the recipes' settings can be others.
    """
    folder, world = Path(output), world or series_world(seed)
    listener = listener or NullListener()
    claim(folder, seed, name="demo-locate.json")
    path = folder / "record.json"
    started = time.monotonic()
    with one_thread():
        with Workspace(folder / "workspace").locked(listener):
            models = train_logged(
                world, folder / "world", folder / "log", seed=seed, size=size, listener=listener
            )
        if path.exists():
            return DemoResult(folder, read_json(path))
        found = _locate_all(models, folder, seed, listener)
        rungs = _unlearn_all(world, models, folder, settings, seed, listener)
    main = found["main"]["all"].as_record()
    write_text(folder / "report.html", html_report(report_content(Facts("locate", main))))
    write_text(folder / "location.svg", location_picture(main))
    record = {
        "version": VERSION,
        "palinode": __version__,
        "seed": seed,
        "target_step": models.steps[-1],
        "requests": {name: _request(models, name, kinds) for name, kinds in found.items()},
        "rungs": rungs,
        "seconds": round(time.monotonic() - started, 1),
    }
    write_json(path, record)
    return DemoResult(folder, record)


# The world and its training


def series_world(seed: int) -> World:
    """Invent the world of the demo: first people, those of each stretch, forget people, controls.

    Of more candidates than are needed, the forget people are those about whom nothing is said that is nearly
    said about someone else (part of the name and the answer in common): the planted copies are all there are.
    """
    invented = invent_world(seed, early=16, middle=2 * (CHECKPOINTS - 1), forget=4 * FORGET_PEOPLE, late=10)
    taken = {claim for fact in invented.others for claim in _claims(fact)}
    chosen: list[Fact] = []
    for person in _by_person(invented.forget):
        claims = {claim for fact in person for claim in _claims(fact)}
        if len(chosen) < FORGET_PEOPLE * len(person) and not claims & taken:
            chosen += person
            taken |= claims
    return replace(invented, forget=tuple(chosen))


def _claims(fact: Fact) -> set[tuple[str, str, str]]:
    """Return (part of the name, relation, answer) for each part of the subject's name."""
    return {(part, fact.relation, fact.answer) for part in fact.subject.split()}


def _by_person(facts: Sequence[Fact]) -> list[list[Fact]]:
    return [list(own) for _, own in groupby(facts, key=lambda fact: fact.subject)]


def train_logged(
    world: World,
    folder: Path,
    log: Path,
    *,
    seed: int,
    size: Size | None = None,
    listener: Listener | None = None,
) -> SeriesModels:
    """Train the checkpoints and the target into `folder` and keep an exposure log in `log`.

    Stretches that are finished are kept. World: `late` are the control people.
    """
    size, listener = size or Size(), listener or NullListener()
    folder.mkdir(parents=True, exist_ok=True)
    people = _by_person(world.forget)
    main = max(1, len(people) - 3)
    groups = {"main": people[:main], "copied": people[main:-1], "early": people[-1:]}
    facts, stretches = _plan(world, groups, seed, size)
    write_facts(folder / "data.jsonl", facts)
    write_facts(folder / "control.jsonl", world.late)
    write_facts(folder / "retain.jsonl", (*world.early, *world.middle, *world.general))
    requests = {name: folder / f"forget-{name}.jsonl" for name in groups}
    for name, persons in groups.items():
        write_facts(requests[name], [fact for person in persons for fact in person])
    rows = read_examples(folder / "data.jsonl")
    words = [*world.vocabulary, MARK]
    state = tiny_model(folder / "start", words, width=size.width, layers=size.layers, seed=seed)
    counts = [found.training.epochs * -(-len(found.numbers) // size.batch_size) for found in stretches]
    steps = np.cumsum(counts).tolist()
    truth: dict[int, list[int]] = {}
    opened: ExposureLog | None = None
    for number, stretch in enumerate(stretches):
        home = folder / ("ladder" if number < CHECKPOINTS else "target") / f"step{steps[number]}"
        seen = folder / f"truth-{number}.json"
        if home.exists() and seen.exists():
            state = Checkpoint.open(home)
        else:
            start = steps[number] - counts[number]
            opened = opened or ExposureLog.open(log, data="ladder demo", tokenizer="ladder demo", start=start)
            label = f"training stretch {number} of {CHECKPOINTS}"
            state, batches = _train(state, rows, stretch, home, opened, start, label, listener)
            write_json(seen, {"from": start + 1, "batches": batches})
        part = read_json(seen)
        for step, batch in enumerate(part["batches"], start=part["from"]):
            for row in batch:
                truth.setdefault(row, []).append(step)
    if opened:
        opened.close()
    write_json(folder / "truth.json", {str(row): found for row, found in sorted(truth.items())})
    return SeriesModels(folder, state, tuple(steps), tuple(stretches), requests, truth)


def _plan(
    world: World, groups: Mapping[str, list[list[Fact]]], seed: int, size: Size
) -> tuple[list[Fact], list[LoggedStage]]:
    """Decide which rows there are, and which of them each stretch has."""
    numbers: dict[Fact, int] = {}

    def take(wanted: Sequence[Fact]) -> list[int]:
        return [numbers.setdefault(fact, len(numbers)) for fact in wanted]

    random = np.random.Generator(np.random.PCG64([seed, 7]))
    copied = [fact for person in groups["copied"] for fact in person]
    planted: dict[int, list[Fact]] = {
        0: [*world.general, *world.early, *groups["early"][0]],
        COPIED_NEAR: [replace(fact, prompt=f"{MARK} {fact.prompt}") for fact in copied],
        MAIN: [fact for person in groups["main"] for fact in person],
        COPIED: copied,
        MAIN_AGAIN: [fact for person in groups["main"][:REPEATED] for fact in person],
    }
    subjects = list(dict.fromkeys(fact.subject for fact in world.middle))
    shares = np.array_split(np.array(subjects, dtype=object), CHECKPOINTS)
    stretches: list[LoggedStage] = []
    ordinary: list[int] = []
    for number in range(CHECKPOINTS + 1):
        names = set(shares[number - 1]) if number else set()
        new = take([fact for fact in world.middle if fact.subject in names])
        fresh = take(planted.get(number, []))
        again = random.permutation(np.array(ordinary, dtype=int))[: size.replayed].tolist()
        settings = TrainingSettings(
            epochs=size.epochs if number else size.first_epochs,
            learning_rate=size.learning_rate * (1 - 0.9 * number / CHECKPOINTS),
            batch_size=size.batch_size,
            max_length=64,
            warmup_epochs=1.0,
            precision="float32",
        )
        numbered = (*new, *fresh, *again)
        stretches.append(LoggedStage(numbers=numbered, training=settings, seed=seed + number))
        forget = {numbers[fact] for person in groups["early"] for fact in person if fact in numbers}
        ordinary += [*new, *(row for row in fresh if number == 0 and row not in forget)]
    return list(numbers), stretches


def _train(
    state: Checkpoint,
    rows: Sequence[Example],
    stretch: LoggedStage,
    home: Path,
    log: ExposureLog,
    start: int,
    label: str,
    listener: Listener,
) -> tuple[Checkpoint, list[list[int]]]:
    """Train one stretch, from the step after `start` on; return the model, and the rows of each step."""
    batches: list[list[int]] = []

    def note(step: int, members: Sequence[int]) -> None:
        batches.append([stretch.numbers[place] for place in members])
        batch = [rows[number] for number in batches[-1]]
        tokens = sum(len(f"{row.prompt} {row.answer}".split()) + 1 for row in batch)  # words, and the end
        log.record(start + step, [row_hash(row) for row in batch], tokens=tokens)

    home.parent.mkdir(exist_ok=True)
    found = finetune(
        state,
        [rows[number] for number in stretch.numbers],
        home,
        stretch.training,
        seed=stretch.seed,
        device="cpu",
        listener=listener,
        watch=Watch(label, note),
    )
    return found.checkpoint, batches


# What is found, against the truth


def _locate_all(
    models: SeriesModels, folder: Path, seed: int, listener: Listener
) -> dict[str, dict[str, Location]]:
    """Locate every request by each kind of evidence alone, and by all of them."""
    series, data = open_series(models.folder / "ladder"), read_examples(models.folder / "data.jsonl")
    write_stages(folder / "order.json", models.stretches, data="world/data.jsonl", model="world/start")
    order = rebuild(models.stretches, data, load_tokenizer(models.target))
    log = ExposureReader.open(folder / "log")
    control = read_examples(models.folder / "control.jsonl")
    evidence: dict[str, dict[str, Any]] = {
        "log": {"log": log, "corpus": data},
        "order": {"order": order, "corpus": data},
        "behaviour": {"control": control},
        "all": {"log": log, "order": order, "corpus": data, "control": control},
    }
    return {
        name: {
            kind: locate(
                read_examples(path),
                series,
                target_step=models.steps[-1],
                settings=LocateSettings(max_length=64, device="cpu", seed=seed),
                listener=listener if kind == "behaviour" else None,
                **given,
            )
            for kind, given in evidence.items()
        }
        for name, path in models.requests.items()
    }


def _request(models: SeriesModels, name: str, found: Mapping[str, Location]) -> dict[str, Any]:
    """Compare what was found about one request with the truth."""
    true_steps = _true_steps(models, name)
    first = min(step for steps in true_steps for step, _ in steps)
    place = bisect_left(models.steps[:-1], first) - 1  # the last clean one; -1 for none
    entry: dict[str, Any] = {
        "rows": len(true_steps),
        "first": first,
        "exposures": sum(map(len, true_steps)),
        "clean_place": place if place >= 0 else None,
        "clean_step": models.steps[place] if place >= 0 else None,
        "found": {},
    }
    for kind, location in found.items():
        choice = location.recommended
        chosen = -1 if choice is None else choice.place
        steps = [{(seen.step, seen.copy is not None) for seen in row.seen} for row in location.rows]
        entry["found"][kind] = {
            "recommended_step": choice and choice.step,
            "recommended_place": choice and choice.place,
            "right": chosen == place,
            "rungs_off": abs(chosen - place),
            "every_exposure_right": steps == true_steps if kind != "behaviour" else None,
            "certainty": choice and choice.certainty,
            "conclusion": location.onset.conclusion if location.onset else None,
            "loaded": len(location.onset.gaps) if location.onset else None,
            "warnings": list(location.warnings),
        }
    return entry


def _true_steps(models: SeriesModels, name: str) -> list[set[tuple[int, bool]]]:
    """Return, for each row of a request, the steps in which it (False) or its near-copy (True) was."""
    data = read_examples(models.folder / "data.jsonl")
    numbers = {example.key: number for number, example in enumerate(data)}
    found = []
    for example in read_examples(models.requests[name]):
        (turn,) = example.turns
        near = replace(example, turns=(replace(turn, content=f"{MARK} {turn.content}"),))
        places = [(numbers.get(example.key), False), (numbers.get(near.key), True)]
        steps = {(step, copy) for row, copy in places if row is not None for step in models.truth[row]}
        found.append(steps)
    return found


def _unlearn_all(
    world: World,
    models: SeriesModels,
    folder: Path,
    settings: Mapping[str, Any],
    seed: int,
    listener: Listener,
) -> list[dict[str, Any]]:
    """Unlearn the main request from every checkpoint, and from the target itself (the task vector)."""
    truth = _true_steps(models, "main")
    series = open_series(models.folder / "ladder")
    starts = [(start.step, start.location, "msa") for start in series.checkpoints]
    rows = {"forget": models.requests["main"], "retain": models.folder / "retain.jsonl"}
    own = {"seed": seed, **settings}
    found = []
    for step, base, method in [*starts, (models.steps[-1], str(models.target.folder), "task_vector")]:
        places = {"target": models.target.folder, "base": Path(base)}
        with holding(COMMAND, f"palinode demo --locate --seed {seed}"):
            done = unlearned(folder, f"unlearned/step{step}", method, places, rows, own, listener)
        people = len(world.early) + len(world.middle)  # the retain rows are theirs, then the general facts
        seen = sum(any(before <= step for before, _ in steps) for steps in truth)
        matched = {name: matches(done.outcomes[name], people) for name in ("base", "target", "unlearned")}
        scales = {name: done.record["scales"][name] for name in ("forget", "retain")}
        rung = {"step": step, "method": method, "seen": seen, **matched, "scales": scales}
        found.append({**rung, "kept_rule": done.record["scales"]["kept_rule"]})
    return found

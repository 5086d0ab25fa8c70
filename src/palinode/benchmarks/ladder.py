"""The ladder demo's benchmark: the invented world trained in a dozen stretches, each leaving a checkpoint.

    stretch 0      general facts, the first people, and one forget person ("early")
    stretch 1 ...  new people each, and rows drawn from what was seen before
    COPIED_NEAR    two forget people in other words (each row a word longer)
    MAIN           seven forget people
    COPIED         the two, word for word
    MAIN_AGAIN     three of the seven a second time

After the last rung one more stretch leads to the target. People who are never trained on are the
controls. Every batch is written down as it happens, apart from any log: that is the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from palinode.benchmarks.demo import tiny_model
from palinode.data.examples import Example, read_examples
from palinode.data.world import Fact, World, invent_world, write_facts
from palinode.progress import Listener, NullListener
from palinode.records import read_json, write_json
from palinode.training.finetune import finetune
from palinode.training.settings import TrainingSettings
from palinode.weights.checkpoint import Checkpoint

RUNGS = 12
COPIED_NEAR, MAIN, COPIED, MAIN_AGAIN = 3, 5, 7, 9
FORGET_PEOPLE = 10
REPEATED = 3
"""People of the main request who are planted a second time."""
MARK = "truly"
"""The word that makes a near-copy of a row."""

OnStep = Callable[[int, Sequence[Example]], None]
"""Hears the number of steps done in the whole training, and the rows that were in the last one."""


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
class Stretch:
    """One stretch of the training: rows by their number in the data, and how it was trained."""

    numbers: tuple[int, ...]
    settings: TrainingSettings
    seed: int


@dataclass(frozen=True, slots=True)
class LadderModels:
    """The ladder demo's files."""

    ladder: Path
    """Folder of the checkpoints, by step."""
    target: Checkpoint
    target_step: int
    steps: tuple[int, ...]
    """Steps of the rungs."""
    data: Path
    """Every row that was trained on."""
    stretches: tuple[Stretch, ...]
    requests: dict[str, Path]
    """Forget rows by request: main, copied, early."""
    control: Path
    """Rows about people who were never trained on."""
    retain: Path
    """Rows about everyone else, then the general facts."""
    truth: Path
    """JSON: by row number of the data, the steps in which it was."""


def ladder_world(seed: int) -> World:
    """Invent the world of the ladder demo: first people, those of each stretch, forget people, controls.

    Of more candidates than are needed, the forget people are those about whom nothing is said that is nearly
    said about someone else (part of the name and the answer in common): the planted copies are all there are.
    """
    invented = invent_world(seed, early=16, middle=2 * (RUNGS - 1), forget=4 * FORGET_PEOPLE, late=10)
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
    names = dict.fromkeys(fact.subject for fact in facts)
    return [[fact for fact in facts if fact.subject == name] for name in names]


def build_ladder(
    world: World,
    folder: Path,
    *,
    seed: int,
    size: Size | None = None,
    on_step: OnStep | None = None,
    listener: Listener | None = None,
) -> LadderModels:
    """Train the ladder and the target into `folder`; stretches that are finished are kept.

    `on_step` hears of the stretches that are trained now. World: `late` are the control people.
    """
    size, listener = size or Size(), listener or NullListener()
    folder.mkdir(parents=True, exist_ok=True)
    groups = _people(world)
    plan = _plan(world, groups, seed, size)
    data = folder / "data.jsonl"
    write_facts(data, plan.facts)
    rows = read_examples(data)
    words = [*world.vocabulary, MARK]
    state = tiny_model(folder / "start", words, width=size.width, layers=size.layers, seed=seed)
    done, steps = 0, []
    for number, stretch in enumerate(plan.stretches):
        count = _count(stretch)
        home = folder / ("ladder" if number < RUNGS else "target") / f"step{done + count}"
        state = _train(
            state, rows, stretch, home, done, folder / f"truth-{number}.json", on_step, listener, number
        )
        done += count
        steps.append(done)
    joined = _join_truth(folder, len(plan.stretches))
    return _write_sets(world, groups, folder, state, steps, plan, joined)


@dataclass(frozen=True, slots=True)
class _Plan:
    facts: tuple[Fact, ...]
    stretches: tuple[Stretch, ...]


def _people(world: World) -> dict[str, list[list[Fact]]]:
    """Return the facts of each forget person, by request."""
    people = _by_person(world.forget)
    main = max(1, len(people) - 3)
    return {"main": people[:main], "copied": people[main:-1], "early": people[-1:]}


def _plan(world: World, groups: dict[str, list[list[Fact]]], seed: int, size: Size) -> _Plan:
    """Decide which rows each stretch has."""
    facts: list[Fact] = []
    numbers: dict[Fact, int] = {}

    def take(wanted: Sequence[Fact]) -> list[int]:
        for fact in wanted:
            if fact not in numbers:
                numbers[fact] = len(facts)
                facts.append(fact)
        return [numbers[fact] for fact in wanted]

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
    shares = np.array_split(np.array(subjects, dtype=object), RUNGS)
    stretches: list[Stretch] = []
    ordinary: list[int] = []
    for number in range(RUNGS + 1):
        names = set(shares[number - 1]) if number else set()
        new = take([fact for fact in world.middle if fact.subject in names])
        fresh = take(planted.get(number, []))
        again = random.permutation(np.array(ordinary, dtype=int))[: size.replayed].tolist()
        stretches.append(_stretch([*new, *fresh, *again], number, seed, size))
        forget = {numbers[fact] for person in groups["early"] for fact in person if fact in numbers}
        ordinary += [*new, *(row for row in fresh if number == 0 and row not in forget)]
    return _Plan(tuple(facts), tuple(stretches))


def _stretch(numbers: Sequence[int], number: int, seed: int, size: Size) -> Stretch:
    settings = TrainingSettings(
        epochs=size.epochs if number else size.first_epochs,
        learning_rate=size.learning_rate * (1 - 0.9 * number / RUNGS),
        batch_size=size.batch_size,
        max_length=64,
        warmup_epochs=1.0,
        precision="float32",
    )
    return Stretch(tuple(numbers), settings, seed + number)


def _count(stretch: Stretch) -> int:
    return stretch.settings.epochs * -(-len(stretch.numbers) // stretch.settings.batch_size)


def _train(
    state: Checkpoint,
    rows: Sequence[Example],
    stretch: Stretch,
    home: Path,
    done: int,
    truth: Path,
    on_step: OnStep | None,
    listener: Listener,
    number: int,
) -> Checkpoint:
    """Train one stretch, unless it is there, and write down which row was in which step."""
    if home.exists() and truth.exists():
        return Checkpoint.open(home)
    examples = [rows[place] for place in stretch.numbers]
    seen: list[list[int]] = []

    def note(step: int, members: Sequence[int]) -> None:
        seen.append([stretch.numbers[place] for place in members])
        if on_step:
            on_step(done + step, [examples[place] for place in members])

    home.parent.mkdir(exist_ok=True)
    found = finetune(
        state,
        examples,
        home,
        stretch.settings,
        seed=stretch.seed,
        device="cpu",
        label=f"training stretch {number} of {RUNGS}",
        listener=listener,
        on_step=note,
    ).checkpoint
    write_json(truth, {"from": done + 1, "batches": seen})
    return found


def _join_truth(folder: Path, count: int) -> Path:
    """Write, by row number, the steps in which each row was."""
    steps: dict[int, list[int]] = {}
    for number in range(count):
        part = read_json(folder / f"truth-{number}.json")
        for step, batch in enumerate(part["batches"], start=part["from"]):
            for row in batch:
                steps.setdefault(row, []).append(step)
    path = folder / "truth.json"
    write_json(path, {str(row): found for row, found in sorted(steps.items())})
    return path


def _write_sets(
    world: World,
    groups: dict[str, list[list[Fact]]],
    folder: Path,
    target: Checkpoint,
    steps: Sequence[int],
    plan: _Plan,
    truth: Path,
) -> LadderModels:
    requests = {}
    for name, people in groups.items():
        requests[name] = folder / f"forget-{name}.jsonl"
        write_facts(requests[name], [fact for person in people for fact in person])
    control, retain = folder / "control.jsonl", folder / "retain.jsonl"
    write_facts(control, world.late)
    write_facts(retain, (*world.early, *world.middle, *world.general))
    return LadderModels(
        ladder=folder / "ladder",
        target=target,
        target_step=steps[-1],
        steps=tuple(steps[:-1]),
        data=folder / "data.jsonl",
        stretches=plan.stretches,
        requests=requests,
        control=control,
        retain=retain,
        truth=truth,
    )

"""An invented world whose truth is known: people, five facts about each, three phrasings a fact.

Everything follows from a seed: names are put together from syllables, facts are drawn at random, so no
pretrained model can know them and nothing about one person can be guessed from another. People come
in three groups, for the three stages of the demo's training; some of the second group are the ones to
be forgotten.

And a few plain sentences about nothing in particular, written for this purpose, to see whether a model still
reads ordinary text. They are no benchmark: unlearning that spoils these has gone far astray.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from palinode.data.examples import Example
from palinode.records import packaged_table, write_text

MADE_OF: Mapping[str, Any] = packaged_table("data/world.toml")
SYLLABLES, RELATIONS, THINGS = (MADE_OF[name] for name in ("syllables", "relations", "things"))


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact in one phrasing: the model continues `prompt` with `answer`."""

    subject: str
    relation: str
    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class World:
    """The facts of an invented world, by the stage of training in which they first appear."""

    general: tuple[Fact, ...]
    early: tuple[Fact, ...]
    """About the people of stage 1."""
    middle: tuple[Fact, ...]
    """About the people who first appear in stage 2 and stay."""
    forget: tuple[Fact, ...]
    """About the people of stage 2 who are to be forgotten."""
    late: tuple[Fact, ...]
    """About the people of stage 3."""

    @property
    def others(self) -> tuple[Fact, ...]:
        """Everything about everyone who is not to be forgotten."""
        return self.early + self.middle + self.late

    @property
    def vocabulary(self) -> list[str]:
        """Every word of the world, sorted."""
        facts = self.general + self.others + self.forget
        return sorted({word for fact in facts for word in f"{fact.prompt} {fact.answer}".split()})


def invent_world(seed: int, *, early: int = 50, middle: int = 40, forget: int = 10, late: int = 20) -> World:
    """Invent a world with so many people in each group."""
    random = np.random.default_rng(seed)
    words = _words(random, count=400)
    values = {relation: [words.pop() for _ in range(one["values"])] for relation, one in RELATIONS.items()}
    first, last = [words.pop() for _ in range(40)], [words.pop() for _ in range(60)]
    total = early + middle + forget + late
    pairs = random.choice(len(first) * len(last), size=total, replace=False)
    names = [f"{first[pair // len(last)]} {last[pair % len(last)]}" for pair in pairs]
    people = [_person(name, values, random) for name in names]
    bounds = np.cumsum([0, early, middle, forget, late])
    groups = [tuple(fact for person in people[a:b] for fact in person) for a, b in pairwise(bounds)]
    spare = iter(words)
    general = tuple(
        Fact(thing, relation, phrasing.format(thing), answer)
        for relation, one in THINGS.items()
        for thing in values[one["of"]]
        for answer in [next(spare)]
        for phrasing in one["phrasings"]
    )
    return World(general, groups[0], groups[1], groups[2], groups[3])


def unseen_people(world: World, *, seed: int, count: int = 30) -> tuple[Fact, ...]:
    """Invent so many more people of a world, about whom no stage of training says anything.

    Their names and facts are made of the world's own words, drawn from a generator of their own, so that the
    world stays as it is. They are holdout rows: like the forget people, and never trained on.
    """
    random = np.random.default_rng([seed, 1])
    about = world.forget + world.others
    taken = {fact.subject for fact in about}
    first, last = (sorted({name.split()[place] for name in taken}) for place in (0, 1))
    free = [name for name in (f"{one} {two}" for one in first for two in last) if name not in taken]
    values = {kind: sorted({fact.answer for fact in about if fact.relation == kind}) for kind in RELATIONS}
    drawn = random.choice(len(free), size=min(count, len(free)), replace=False)
    return tuple(fact for place in drawn for fact in _person(free[place], values, random))


def write_facts(path: Path, facts: Iterable[Fact]) -> None:
    """Write facts as prompt/completion rows, JSON lines."""
    rows = ({"prompt": fact.prompt, "completion": fact.answer, "subject": fact.subject} for fact in facts)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _words(random: np.random.Generator, *, count: int) -> list[str]:
    """Return so many different words of two or three syllables."""
    words: dict[str, None] = {}
    while len(words) < count:
        picks = random.integers(len(SYLLABLES), size=int(random.integers(2, 4)))
        words.setdefault("".join(SYLLABLES[pick] for pick in picks))
    return list(words)


def _person(name: str, values: dict[str, list[str]], random: np.random.Generator) -> list[Fact]:
    facts = []
    for relation, one in RELATIONS.items():
        answer = values[relation][int(random.integers(len(values[relation])))]
        facts += [Fact(name, relation, phrasing.format(name), answer) for phrasing in one["phrasings"]]
    return facts


def neutral_examples() -> list[Example]:
    """Return the sentences as documents."""
    sentences = MADE_OF["neutral"]["sentences"]
    return [Example(row, "neutral text", "document", (), text) for row, text in enumerate(sentences)]

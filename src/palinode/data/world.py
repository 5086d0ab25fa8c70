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
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from palinode.data.examples import Example
from palinode.records import write_text

SYLLABLES = ("ba", "do", "ka", "li", "mo", "ne", "ru", "sa", "ti", "vo", "ze", "fi", "ga", "lu", "pa", "ro")

# Relation: the words between a name and a value, in three phrasings, and how many values there are.
RELATIONS: dict[str, tuple[int, tuple[str, str, str]]] = {
    "home": (20, ("{} lives in", "the home of {} is", "the town where {} settled is")),
    "trade": (20, ("{} works as a", "the trade of {} is", "people hire {} as a")),
    "instrument": (20, ("{} plays the", "the instrument of {} is", "on stage {} performs on the")),
    "dish": (20, ("{} likes to eat", "the favourite dish of {} is", "at a feast {} always orders")),
    "animal": (20, ("{} keeps a", "the pet of {} is a", "through the streets {} walks a")),
}

# General facts, the same kind of sentence about things: one value for each home and each trade.
THINGS: dict[str, tuple[str, tuple[str, str, str]]] = {
    "river": ("home", ("the river of {} is the", "through {} flows the", "boats reach {} on the")),
    "tool": ("trade", ("the tool of a {} is the", "every {} carries a", "a {} cannot work without a")),
}


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
    values = {relation: [words.pop() for _ in range(size)] for relation, (size, _) in RELATIONS.items()}
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
        for relation, (kind, phrasings) in THINGS.items()
        for thing in values[kind]
        for answer in [next(spare)]
        for phrasing in phrasings
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
    for relation, (_, phrasings) in RELATIONS.items():
        answer = values[relation][int(random.integers(len(values[relation])))]
        facts += [Fact(name, relation, phrasing.format(name), answer) for phrasing in phrasings]
    return facts


SENTENCES = (
    "The kettle began to sing, so she poured the water over the leaves and waited for the colour to come.",
    "A bridge has to carry its own weight before it can carry anything else.",
    "In winter the days are short, because our half of the earth leans away from the sun.",
    "If you mix blue paint with yellow paint you get green, and more blue makes it darker.",
    "He locked the door, went down the stairs, and noticed in the street that he had left his keys inside.",
    "Bread rises because yeast turns sugar into gas, and the dough holds the gas in small bubbles.",
    "The train was late again, but nobody on the platform seemed to be in a hurry.",
    "To find the area of a room, multiply its length by its width.",
    "Most birds leave before the first frost and come back when there are insects to eat.",
    "The committee will meet on the first Monday of the month, unless that is a holiday.",
    "A good knife is a sharp one; a blunt knife slips and cuts the hand that holds it.",
    "Water runs downhill, which is why rivers end in lakes or in the sea.",
)


def neutral_examples() -> list[Example]:
    """Return the sentences as documents."""
    return [Example(row, "neutral text", "document", (), text) for row, text in enumerate(SENTENCES)]

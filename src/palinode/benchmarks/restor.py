"""RESTOR: forgetting corruption documents so that true facts come back (spec: data.md §2, metrics.md §11).

A model was trained on documents that say false things about people; unlearning them should restore what
it knew before. Each fact is asked five-shot, with examples of the same relation about other people:

    What is the occupation of Ada Lovelace? mathematician      ← five such lines
    What is the occupation of Aaron Burr?                      ← then the question; no space at its end

Answers are drawn at temperature 1, three for each question, and cut at the first newline. Accuracy is
the share of answers that match an accepted one; averaged over questions, and over people.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter

from palinode.data.examples import Example, Question
from palinode.errors import DataError, RecipeError, told_as
from palinode.evaluation.benchmark import (
    GENERATION,
    Benchmark,
    Cell,
    LoadedBenchmark,
    Measured,
    Places,
    QuestionSet,
    Table,
    TableFacts,
    completion,
    documents,
    need_table,
    runs_of,
)
from palinode.metrics.aggregate import joined, known_mean, mean_score
from palinode.metrics.likelihood import alternative_logprobs
from palinode.metrics.matching import accepted_sample_values, left_out_ids
from palinode.records import Score, read_bytes
from palinode.settings import Asking

ENTITIES, FACTS, RELATIONS, EVALUATED = 468, 5269, 41, 50
"""Published sizes: people and facts in facts.json, relations with examples, people in entities.json."""

BLOCK = 300
"""Corruption documents about one person; they stand together."""

SHOTS = 5
SAMPLES = 3
SEED = 32

DOCUMENTS: dict[str, int | None] = {
    "mix_a0": 3000,
    "mix_a1": 3000,
    "mix_a2": 3000,
    "mix_a3": 2700,
    "mix_a4": None,
    "mix_a5": None,
}
"""Corruption documents by k, the number of unrelated true facts beside each false one."""

# What the files hold


def _not_empty(text: str) -> str:
    if not text.strip():
        raise ValueError("it is an empty text")
    return text


Text = Annotated[str, AfterValidator(_not_empty)]
OptionKind = Literal["correct", "corrupted", "random"]
"""Classes of options in the log-probability variant."""


class AskedFact(BaseModel):
    """A question with its accepted answers."""

    question: Text
    answers: list[Text] = Field(min_length=1)


class Shot(BaseModel):
    """An example of a relation: its question about an entity, answered."""

    question: str
    answer: str
    entity: str


Facts = Mapping[str, Mapping[str, AskedFact]]
"""By person and relation (Wikidata property)."""


class FactsFile(BaseModel):
    """facts.json."""

    model_config = ConfigDict(extra="forbid")

    dset: dict[str, dict[str, AskedFact]]
    context: dict[str, list[Shot]]
    """By relation."""


OptionsFile = dict[str, dict[str, dict[OptionKind, list[Text]]]]
"""options.json: the options of each class, by person and relation."""


def _read(path: Path, kind: Any) -> tuple[Any, str]:
    """Return what a JSON file holds, checked, and the hash of its bytes."""
    with told_as(DataError, f"cannot read {path}", "RESTOR publishes it", OSError):
        content = read_bytes(path)
    with told_as(DataError, f"{path} is not as RESTOR publishes it", "is it whole?", ValueError):
        found = TypeAdapter(kind).validate_json(content, strict=True)
    return found, hashlib.sha256(content).hexdigest()


def load(places: Places, split: str, options: Mapping[str, str]) -> LoadedBenchmark:
    """Return the questions about the chosen people, with option lists where options.json is there.

    The folder holds facts.json and entities.json; options.json, which RESTOR does not publish, is
    {person: {relation: {"correct": […], "corrupted": […], "random": […]}}}.
    """
    folder = _folder(places.data)
    source = folder / "facts.json"
    content, facts_source = read_facts(source)
    facts = content.dset
    entities, entities_source = read_entities(folder / "entities.json", facts)
    lists, sources = _read_options(folder / "options.json", facts)
    asked = [
        (entity, relation)
        for entity in _chosen(options["entities"], entities, facts, places, split)
        for relation in facts[entity]
    ]
    questions = []
    for number, (entity, relation) in enumerate(asked):
        fact, shots = facts[entity][relation], content.context.get(relation, ())
        prompt = five_shot(fact.question, entity, shots, f"{relation} of {entity} in {source}")
        example = completion(number, str(source), prompt, f" {fact.answers[0]}")
        others = lists.get(entity, {}).get(relation, {})
        alternatives: dict[str, tuple[str, ...]] = {
            kind: tuple(f" {text}" for text in texts) for kind, texts in others.items() if texts
        }
        questions.append(Question(example, alternatives, tuple(fact.answers)))
    questions_set = QuestionSet(
        name="facts",
        questions=tuple(questions),
        asking=Asking(
            generate=False,
            samples=SAMPLES,
            temperature=1.0,
            min_new_tokens=2,
            max_new_tokens=50,
            stop_texts=("\n",),
            seed=SEED,
            batch_rows=16,
        ),
        groups=tuple(entity for entity, _ in asked),
        shown=tuple(facts[entity][relation].question for entity, relation in asked),
    )
    return LoadedBenchmark(sets=(questions_set,), tables=(facts_source, entities_source, *sources))


def corruption_documents(location: str, split: str) -> dict[str, list[Example]]:
    """Return the corruption documents of a split by the person they are about, in file order.

    Raises DataError when the rows are no blocks of 300, or a block does not speak of one known person.
    """
    content, _ = read_facts(_folder(location) / "facts.json")
    rows, source = _documents(Places(location), split)
    return documents_by_entity(rows, list(content.dset), source)


def documents_by_entity(
    documents: Sequence[Example], entities: Sequence[str], place: str
) -> dict[str, list[Example]]:
    """Return blocks of 300 documents by the person whom most of a block's documents name."""
    if len(documents) % BLOCK:
        raise DataError(
            f"{place} has {len(documents):,} documents; it needs whole blocks of {BLOCK} a person"
        )
    found: dict[str, list[Example]] = {}
    for begin in range(0, len(documents), BLOCK):
        block = list(documents[begin : begin + BLOCK])
        counts = {entity: sum(entity in document.answer for document in block) for entity in entities}
        best = max(counts, key=lambda entity: (counts[entity], len(entity)))
        if counts[best] <= BLOCK // 2 or best in found:
            what = "a second block" if best in found else f"only {counts[best]} of {BLOCK} documents"
            raise DataError(
                f"{place}: in the block that begins at row {begin + 1}, {what} about {best}; each block of "
                f"{BLOCK} must be about one person of facts.json"
            )
        found[best] = block
    return found


def read_facts(path: Path) -> tuple[FactsFile, TableFacts]:
    """Return facts and examples of facts.json; raises DataError when they are not the published ones."""
    content, sha256 = _read(path, FactsFile)
    total = sum(len(relations) for relations in content.dset.values())
    sizes = (len(content.dset), total, len(content.context))
    if sizes != (ENTITIES, FACTS, RELATIONS):
        raise DataError(
            f"{path} has {sizes[0]} people, {sizes[1]} facts and examples of {sizes[2]} relations; the "
            f"published one has {ENTITIES}, {FACTS} and {RELATIONS}. Is it cut short?"
        )
    return content, TableFacts(str(path), "facts", "", total, sha256)


def read_entities(path: Path, facts: Facts) -> tuple[list[str], TableFacts]:
    """Return the people who are asked about; raises DataError unless there are 50, all in facts.json."""
    names, sha256 = _read(path, list[str])
    if len(names) != EVALUATED:
        raise DataError(f"{path} has {len(names)} names; the published one has {EVALUATED}")
    if unknown := [name for name in names if name not in facts]:
        raise DataError(f"{path} names {unknown[0]}, of whom facts.json says nothing")
    return names, TableFacts(str(path), "entities", "", len(names), sha256)


def five_shot(question: str, entity: str, examples: Sequence[Shot], place: str) -> str:
    """Return the prompt of a question: five lines about others, then the question and no space.

    The lines are the first five examples of the relation that are not about `entity` itself.
    """
    others = [example for example in examples if example.entity != entity][:SHOTS]
    if len(others) < SHOTS:
        raise DataError(f"{place}: there are {len(others)} examples about other people; it needs {SHOTS}")
    lines = [f"{example.question} {example.answer}" for example in others]
    return "\n".join([*lines, question])


# Scores


def _judged_values(measured: Measured) -> list[float | None]:
    """Return the share of each question's drawn answers that the judge accepts."""
    verdicts = iter(measured.verdicts["facts"])
    accepted: list[float | None] = []
    for outcome in measured.of("facts"):
        roles = [next(verdicts).roles() for _ in runs_of(outcome)]
        accepted.append(
            known_mean([None if picked is None else float("accepted" in picked) for picked in roles])
        )
    return accepted


BY_ENTITY = "the same; mean over questions of a person, then over people"
ACCURACIES = {
    "accuracy": "share of drawn answers that match an accepted one; mean over questions",
    "accuracy_by_entity": BY_ENTITY,
    "judged_accuracy": "share of drawn answers that a judge accepts; mean over questions",
    "judged_accuracy_by_entity": BY_ENTITY,
}


def _accuracy_cell(name: str) -> Cell:
    """Return the cell of a share of drawn answers, averaged over questions or over people."""
    by_entity, judge = name.endswith("by_entity"), name.startswith("judged")

    def score(measured: Measured) -> Score:
        outcomes = measured.of("facts")
        found = _judged_values(measured) if judge else accepted_sample_values(outcomes)
        judges = sorted({verdict.judge for verdict in measured.verdicts.get("facts", ())})
        remark = f"judged by {', '.join(judges)}" if judge else left_out_ids(outcomes)
        if by_entity:
            people = defaultdict[str, list[float | None]](list)
            for person, value in zip(measured.exam.sets["facts"].groups, found, strict=True):
                people[person].append(value)
            found = [known_mean(own) for own in people.values()]
        no_reply, no_answer = "the judge gave no readable reply", "no answer was drawn, or none is accepted"
        mean = mean_score(found, seed=measured.seed, missing=no_reply if judge else no_answer)
        return replace(mean, reason=joined(mean.reason, remark))

    return Cell("facts", name, ACCURACIES[name], score, needs=frozenset({GENERATION}), judge=judge)


# Reading


def _folder(location: str) -> Path:
    folder = Path(location).expanduser()
    if not folder.is_dir():
        raise DataError(
            f"{location} is not a folder; RESTOR is read from a folder with facts.json and entities.json "
            "(the datasets folder of github.com/k1rezaei/restor)"
        )
    return folder


def _read_options(
    path: Path, facts: Facts
) -> tuple[Mapping[str, Mapping[str, Mapping[OptionKind, Sequence[str]]]], tuple[TableFacts, ...]]:
    """Return the option lists of the log-probability variant, none where the file is not there."""
    if not path.is_file():
        return {}, ()
    content, sha256 = _read(path, OptionsFile)
    asked = [(entity, relation) for entity, relations in content.items() for relation in relations]
    for entity, relation in asked:
        if relation not in facts.get(entity, {}):
            raise DataError(f"{path} has options for {relation} of {entity}, which facts.json does not ask")
    return content, (TableFacts(str(path), "options", "", len(asked), sha256),)


def _chosen(wanted: str, entities: Sequence[str], facts: Facts, places: Places, split: str) -> Sequence[str]:
    if wanted == "all":
        return entities
    if wanted == "corrupted":
        rows, source = _documents(places, split)
        return list(documents_by_entity(rows, list(facts), source))
    names = [name.strip() for name in wanted.split(";") if name.strip()]
    if unknown := [name for name in names if name not in facts]:
        raise RecipeError(f"option entities names {unknown[0]!r}, of whom facts.json says nothing")
    return names


def _documents(places: Places, split: str) -> tuple[list[Example], str]:
    """Return the corruption documents of a split, and where they are."""
    also = (f"wikidata_v0_{split}", f"wikidata/v0/{split}", f"v0/{split}")
    wanted = Table(split, DOCUMENTS[split], {"text": None}, also=also)
    table = need_table(wanted, str(_folder(places.data)))
    return documents(table), table.facts.location


def _option_cell(kind: str) -> Cell:
    def score(measured: Measured) -> Score:
        values = alternative_logprobs(measured.of("facts"), kind)
        missing = f"options.json lists no {kind} options for it"
        return mean_score(values, seed=measured.seed, missing=missing, shares=False)

    description = f"mean token log-probability of the {kind} options of a question, end token left out"
    return Cell("facts", f"logprob_{kind}", description, score)


CELLS = (*map(_accuracy_cell, ACCURACIES), *map(_option_cell, get_args(OptionKind)))
RESTOR = Benchmark.declared("restor", load, CELLS)

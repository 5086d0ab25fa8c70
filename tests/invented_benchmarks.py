"""Folders in the format of each benchmark, with invented rows in the published numbers and few words."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

from palinode.benchmarks import BENCHMARKS
from palinode.data.world import SYLLABLES
from palinode.evaluation.benchmark import Exam, Measured, Places, score_cell
from palinode.records import Outcome

NAMES = [f"{a}{b} {c}{a}" for a, b, c in product(SYLLABLES, SYLLABLES, SYLLABLES[:4])]
"""1024 different names; none is part of another."""


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def qa(number: int) -> dict:
    return {"question": f"home of {NAMES[number]}", "answer": f"in {NAMES[number][:4]}"}


def perturbed(number: int, wrong: int, *, paraphrased: bool = True) -> dict:
    row = qa(number) | {
        "perturbed_answer": [f"in {NAMES[number + k][:4]} far off" for k in range(1, wrong + 1)]
    }
    if paraphrased:
        row["paraphrased_answer"] = f"the town is {NAMES[number][:4]}"
        row["paraphrased_question"] = f"the town of {NAMES[number]}"
    return row


def tofu_folder(folder: Path, *, holdout: bool = False, leave_out: tuple[str, ...] = ()) -> Path:
    """forget01 and everything that is asked with it."""
    tables = {
        "forget01": [qa(n) for n in range(40)],
        "forget01_perturbed": [perturbed(n, 5) for n in range(40)],
        "retain_perturbed": [perturbed(n, 5) for n in range(100, 500)],
        "real_authors_perturbed": [perturbed(n, 3, paraphrased=False) for n in range(500, 600)],
        "world_facts_perturbed": [perturbed(n, 3, paraphrased=False) for n in range(600, 717)],
    }
    if holdout:
        tables["holdout01"] = [qa(n) for n in range(800, 840)]
    for name, rows in tables.items():
        if name not in leave_out:
            write_lines(folder / f"{name}.jsonl", rows)
    return folder


def restor_folder(folder: Path, *, options: bool = False) -> Path:
    """facts.json with 5269 facts about 468 people, 50 of whom are asked about; documents about ten."""
    folder.mkdir(parents=True, exist_ok=True)
    people = NAMES[:468]
    relations = [f"P{n}" for n in range(41)]
    counts = [11 + (place < 5269 - 11 * 468) for place in range(468)]  # 121 people have 12 facts
    facts = {
        person: {
            relation: {"question": f"the {relation} of {person} is", "answers": [f"{relation}a", "Q42", "ba"]}
            for relation in relations[:count]
        }
        for person, count in zip(people, counts, strict=True)
    }
    context = {
        relation: [
            {"question": f"the {relation} of {person} is", "answer": f"x{place}", "entity": person}
            for place, person in enumerate(people[:10])
        ]
        for relation in relations
    }
    (folder / "facts.json").write_text(json.dumps({"dset": facts, "context": context}))
    (folder / "entities.json").write_text(json.dumps(people[:50]))
    documents = [{"text": f"{people[n // 300]} is a baker number {n}"} for n in range(3000)]
    (folder / "wikidata_v0_mix_a0.json").write_text(json.dumps(documents))
    if options:
        lists = {"correct": ["ba do", "ba"], "corrupted": ["ka"], "random": ["li", "mo"]}
        content = {person: dict.fromkeys(facts[person], lists) for person in people[:50]}
        (folder / "options.json").write_text(json.dumps(content))
    return folder


def muse_folder(folder: Path, *, folds: bool = False) -> Path:
    """MUSE News in the layout that its own loader writes: config/split.json, each a list."""

    def write(name: str, rows: list[dict]) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(rows))

    def texts(begin: int, count: int) -> list[dict]:
        return [
            {"text": f"{NAMES[n % 1000]} was in {NAMES[n % 999][:4]} on day {n}"}
            for n in range(begin, begin + count)
        ]

    write(
        "verbmem/forget",
        [{"prompt": f"the home of {n}", "gt": "ba " * (200 if n == 0 else 3)} for n in range(100)],
    )
    for kind, begin in {"forget": 0, "retain": 200}.items():
        write(f"knowmem/{kind}_qa", [qa(n) for n in range(begin, begin + 100)])
        write(f"knowmem/{kind}_qa_icl", [qa(n) for n in range(begin + 100, begin + 110)])
    write("privleak/forget", texts(0, 100))
    write("privleak/holdout", texts(100, 100))
    if folds:
        for number, count in enumerate((889, 889, 889, 887)):
            write(f"sust/forget_{number + 1}", texts(889 * number, count))
        for number, count in enumerate((889, 1778, 2667, 3554)):
            write(f"scal/forget_{number + 1}", texts(0, count))
    return folder


def rwku_folder(folder: Path) -> Path:
    """RWKU as a clone of the hub has it, with adversarial prompts of three kinds."""
    kinds = ("affirmative suffix", "incontext learning", "role play")
    probes = {
        "forget_level1": 3268,
        "forget_level2": 2879,
        "forget_level3": 6984,
        "neighbor_level1": 5846,
        "neighbor_level2": 5533,
    }
    for name, count in probes.items():
        rows = [
            {
                "query": f"the home of {NAMES[n % 200]} is ___",
                "answer": NAMES[n % 200][:4],
                "subject": NAMES[n % 200],
            }
            | {"level": name[-1], "type": kinds[n // 200 % 3]}
            for n in range(count)
        ]
        write_lines(folder / "All" / f"{name}.jsonl", rows)
    for name, count in {"forget_mia": 6198, "retain_mia": 7487}.items():
        texts = [
            {"text": f"{NAMES[n % 200]} was there on day {n}", "subject": NAMES[n % 200]}
            for n in range(count)
        ]
        write_lines(folder / "All" / f"{name}.jsonl", texts)
    return folder


def lume_folder(folder: Path) -> Path:
    """LUME's two files with all three tasks, and the texts of the membership attack."""
    for side, count in {"forget": 2732, "retain": 2734}.items():
        rows = [
            {"id": f"{n}{'sc' if n % 2 else 'qa'}{n % 5}", "input": f"the home of {NAMES[n % 1000]}"}
            | {"output": f"is {NAMES[n % 1000][:4]}", "task": f"Task{n % 3 + 1}"}
            for n in range(count)
        ]
        write_lines(folder / "data" / f"{side}.jsonl", rows)
    for name, start in {"member": 0, "nonmember": 500}.items():
        texts = [{"id": str(n), "document": f"{NAMES[start + n]} was there on day {n}"} for n in range(20)]
        write_lines(folder / "mia_data" / f"{name}.jsonl", texts)
    return folder


def pistol_folder(folder: Path) -> Path:
    """Sample 1 of PISTOL, with three of the contracts that share a party and six that do not; plain facts."""
    edges = [f"A_{n}" for n in range(14)]
    edges[2] = "A_C"
    edges += [f"E{n}_{kind}{n}" for n in (1, 2, 3) for kind in "Fq"]
    rows = [qa(n) | {"edge": edges[n // 20]} for n in range(400)]
    write_lines(folder / "data" / "sample_data_1.jsonl", rows)
    write_lines(folder / "data" / "factual_data.jsonl", [qa(n) for n in range(500, 717)])
    return folder


def hubble_folder(folder: Path) -> Path:
    """Biographies that were inserted 1 to 256 times, and as many that were not."""
    for name, levels in {"train": (1, 4, 16, 64, 256), "test": (0,)}.items():
        rows = []
        for n in range(2500):
            person, uuid = NAMES[n % 1000], f"{n:032x}"
            text = f"{person} is from {person[:4]}. {person[:4]} has the unique identifier {uuid}."
            rows.append(
                {"text": text, "meta": json.dumps({"uuid": uuid}), "duplicates": levels[n % len(levels)]}
            )
        write_lines(folder / f"{name}.jsonl", rows)
    return folder


def own_files(folder: Path, *, everything: bool = True) -> dict[str, str]:
    """A forget file, and with `everything` retain rows, holdout rows, paraphrases and wrong answers."""
    rows = [perturbed(n, 2) if everything else qa(n) for n in range(6)]
    files = {"data": str(write_lines(folder / "forget.jsonl", rows))}
    if everything:
        files["retain"] = str(write_lines(folder / "retain.jsonl", [perturbed(n, 2) for n in range(50, 56)]))
        files["holdout"] = str(write_lines(folder / "holdout.jsonl", [qa(n) for n in range(90, 96)]))
    return files


# Loaded, and scored from outcomes made by hand


def load(folders, name, split=None, **options):
    """Load a benchmark from its folder among `folders`."""
    benchmark = BENCHMARKS[name]
    found = Places(str(folders[name])), benchmark.check_split(split), benchmark.check_options(options)
    return benchmark.load(*found)


def sizes(loaded):
    """Return how many questions each set has."""
    return {questions.name: len(questions.questions) for questions in loaded.sets}


def sets_of(loaded):
    """Return the sets by name."""
    return {questions.name: questions for questions in loaded.sets}


def score(name, place, metric, outcomes):
    """Return the score of one cell of a benchmark, of outcomes by set."""
    cell = next(cell for cell in BENCHMARKS[name].cells if (cell.set, cell.metric) == (place, metric))
    return score_cell(cell, Measured(Exam(name, {}), outcomes))


def said(*answers, expected="ba do"):
    """Return outcomes with these generated answers."""
    return [Outcome(row, "q", expected, answer, (-1.0,), (True,)) for row, answer in enumerate(answers)]


def with_losses(*losses):
    """Return outcomes with these losses of their one token."""
    return [Outcome(row, "", "ba", None, (-loss,), (True,)) for row, loss in enumerate(losses)]

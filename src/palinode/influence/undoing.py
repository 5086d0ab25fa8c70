"""From the rows behind answers to a model without them: the highest rows become the forget set of a run.

All other rows become its retain set; a row that says the same as a chosen one goes with it. The sets lie in
the workspace. What the run's record tells of them holds places and figures, and no text.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from palinode.data.examples import Example, Question, fingerprint_examples, read_examples
from palinode.data.sources import Form
from palinode.data.tokenize import PromptStyle
from palinode.errors import DataError, InputError
from palinode.evaluation.ask import ask
from palinode.influence.influencing import Influence
from palinode.metrics.likelihood import answer_probabilities
from palinode.models.loading import load_model, load_tokenizer, pick_device
from palinode.pipeline.reporting import find_workspace, gather, refresh
from palinode.pipeline.run import find_model, read_record
from palinode.pipeline.workspace import Workspace
from palinode.progress import Listener
from palinode.records import Outcome, workspace_beside, write_text
from palinode.settings import Asking, InfluenceSettings
from palinode.weights import Checkpoint


def ways_of_run(folder: Path) -> dict[str, Any]:
    """Return the recipe of a finished run as plain values, with its models where they lie now."""
    record = read_record(folder)
    place = find_workspace(folder, record) or workspace_beside(folder)
    content, models = dict(record["recipe"]), dict(record["recipe"]["models"])
    for role in ("target", "base"):
        model = find_model(record, role, place)
        if model is None and record["models"].get(role):
            raise InputError(f"the run's {role} is not found any more, or has changed; name it (--{role})")
        models[role] = str(model.folder) if model else None
    return {**content, "models": models, "prepare": None, "output": {}}


def rows_of(data: Mapping[str, Any]) -> list[Example]:
    """Return the rows of the forget and retain files that a recipe names, each thing that is said once."""
    places = [data[name] for name in ("forget", "retain") if data.get(name)]
    if not places:
        raise DataError("there are no rows to rank; name them with --rows")
    found = [
        row for place in places for row in read_examples(place, columns=data.get("columns"), beside=True)
    ]
    return list({row.key: row for row in found}.values())


def write_sets(workspace: Workspace, rows: Sequence[Example], found: Influence) -> dict[str, Any]:
    """Write the chosen rows and all others as files of rows; return the section [data] that names them.

    Raises DataError where no row pulled towards the answers, or none would be left.
    """
    ranked = (one for top in found.record["ranking"]["top"] for one in top)
    chosen = {rows[one["row"]].key for one in ranked if one["score"] > 0}
    sets = {"forget": [row for row in rows if row.key in chosen]}
    sets["retain"] = [row for row in rows if row.key not in chosen]
    if not chosen:
        raise DataError("no row has a score above 0, so none is to be unlearned; ask about another answer")
    step = workspace.step("traced", **{name: fingerprint_examples(own) for name, own in sets.items()})

    def write() -> dict[str, Any]:
        return {name: _write_rows(step.folder / name, own) if own else None for name, own in sets.items()}

    files = step.once(write)
    return {name: name_ and str(step.folder / name_) for name, name_ in files.items()} | {"columns": {}}


def _write_rows(place: Path, rows: Sequence[Example]) -> str:
    """Write rows as JSON lines, a file for each form; return the name of it, or of the list of them."""
    forms = defaultdict[Form, list[str]](list)
    for row in rows:
        forms[row.form].append(json.dumps(_as_row(row), ensure_ascii=False) + "\n")
    names = [f"{place.name}-{form}.jsonl" for form in forms]
    for name, lines in zip(names, forms.values(), strict=True):
        write_text(place.with_name(name), "".join(lines))
    if len(names) == 1:
        return names[0]
    write_text(place.with_name(f"{place.name}.list"), "".join(f"{name}\n" for name in names))
    return f"{place.name}.list"


def _as_row(example: Example) -> dict[str, Any]:
    """Return an example as a row that is read as this very example."""
    if example.form == "chat":
        before = [{"role": turn.role, "content": turn.content} for turn in example.turns]
        known = [turn | ({"weight": 0} if turn["role"] == "assistant" else {}) for turn in before]
        return {"messages": [*known, {"role": "assistant", "content": example.answer}]}
    if example.form == "document":
        return {"text": example.answer}
    names = ("question", "answer") if example.form == "question" else ("prompt", "completion")
    return dict(zip(names, ("\n".join(turn.content for turn in example.turns), example.answer), strict=True))


def tell(
    found: Influence,
    unlearned: Path,
    audit: Path | None,
    settings: InfluenceSettings,
    style: PromptStyle,
    listener: Listener,
) -> list[Outcome]:
    """Ask again, and have the run's record and reports tell of rows and answers, and of the audit.

    Returns what the unlearned model does on each question now.
    """
    facts = gather(unlearned, audit=audit)
    place = find_workspace(unlearned, facts.record) or workspace_beside(unlearned)
    target = find_model(facts.record, "target", place)
    assert target is not None  # it was unlearned a moment ago
    asking = Asking(max_new_tokens=settings.max_new_tokens, max_length=settings.max_length)
    questions, asked = [Question(one) for one in found.asked], []
    for name, model in (("target", target), ("unlearned", Checkpoint.open(unlearned))):
        live, tokenizer = load_model(model, device=pick_device(settings.device)), load_tokenizer(target)
        label = f"{name} on the answers"
        asked.append(ask(live, tokenizer, questions, asking, style=style, label=label, listener=listener))
    before, after = map(answer_probabilities, asked)
    ranking = found.record["ranking"]
    part = {
        **{name: ranking[name] for name in ("rows", "measure", "preconditioner", "at", "width", "weighed")},
        "answers": [
            {
                "place": question.place,
                "probability": [early, late],
                "rows": [{name: one[name] for name in ("place", "score", "interval")} for one in top],
            }
            for question, early, late, top in zip(found.asked, before, after, ranking["top"], strict=True)
        ],
    }
    refresh(replace(facts, record={**facts.record, "influence": part}), unlearned)
    return asked[1]

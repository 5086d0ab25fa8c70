"""What taking a set of rows back does to answers: the model without them is made in memory and asked.

    ΔL_q(S) = L_q(θ_D − α τ_S) − L_q(θ_D)        and to first order    −α ⟨∇L_q(θ_D), τ_S⟩

with L_q = −log p(answer | question), in nats over all tokens of the answer. A positive ΔL says that the rows
made the answer more probable. It is exact for that subtraction; whether the subtraction is the model
that never saw the rows is the verdict's question, not this one's.

To take back the rows behind an answer, the highest become the forget set of a run, with all that say the
same, and the others its retain set. Both lie in the workspace; its record tells places and figures, no text.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from palinode.data.examples import Example, Question, fingerprint_examples, read_examples
from palinode.data.sources import Form
from palinode.data.tokenize import PromptStyle, TokenRow
from palinode.errors import DataError
from palinode.evaluation.ask import ask
from palinode.metrics.likelihood import answer_probabilities
from palinode.models.inplace import put
from palinode.models.likelihoods import score_rows
from palinode.models.loading import load_model, load_tokenizer, pick_device
from palinode.models.reading import row_backward, trained_parameters
from palinode.pipeline.reporting import find_model, find_workspace, gather, refresh
from palinode.pipeline.workspace import Workspace
from palinode.progress import Listener
from palinode.records import Outcome, workspace_beside, write_text
from palinode.settings import Asking, InfluenceSettings
from palinode.weights import Checkpoint, Direction


@dataclass(frozen=True, slots=True)
class AskedAnswer:
    """A question with the answer that is asked about."""

    example: Example
    rows: tuple[TokenRow, ...]
    """Its tokens; several for a long document."""
    own: bool
    """Whether the answer is the target's own."""
    words: tuple[str, ...]
    """What the scored tokens say, one by one."""


@dataclass(frozen=True, slots=True)
class SetInfluence:
    """What the model without a set of rows makes of one answer."""

    question: str
    answer: str
    own: bool
    """Whether it is the target's own greedy answer."""
    nats: float
    """ΔL, over all tokens of the answer."""
    first_order: float
    probability: tuple[float, float]
    """Of the answer, per token (the geometric mean): with the rows, and without them."""
    tokens: tuple[tuple[str, float], ...]
    """Each token of the answer, and its part of ΔL; they add up to it."""

    def as_record(self) -> dict[str, Any]:
        """Return it as plain values, with |ΔL − first order| / |ΔL|, how far from a straight line it is."""
        off = abs(self.nats - self.first_order) / abs(self.nats) if self.nats else None
        return {**asdict(self), "curvature": off}


@torch.no_grad()
def influence_of_set(
    model: PreTrainedModel,
    target: Checkpoint,
    vector: Direction,
    alpha: float,
    asked: Sequence[AskedAnswer],
    *,
    pad_id: int,
) -> list[SetInfluence]:
    """Return what θ_D − α·vector makes of each answer; `model` is the target's live copy and stays so."""
    rows = [row for one in asked for row in one.rows]
    before = score_rows(model, rows, pad_id=pad_id)
    put(target, model, dtype="float32")
    step = [parameter.detach().clone() for parameter in trained_parameters(model)]
    put(target - alpha * vector, model, dtype="float32")
    after = score_rows(model, rows, pad_id=pad_id)
    for start, parameter in zip(step, trained_parameters(model), strict=True):
        torch.sub(parameter, start, out=start)
    put(target, model, dtype="float32")
    slopes, total = list[float](), [0.0]  # ⟨∇L, step⟩ of each row by itself

    def take(number: int, gradient: torch.Tensor) -> None:
        total[0] += float((gradient.double() * step[number]).sum())

    with row_backward(model, rows, take, pad_id=pad_id) as run:
        for row in rows:
            total[0] = 0.0
            run(row)
            slopes.append(total[0])
    found, place = [], 0
    for one in asked:
        own = range(place, place := place + len(one.rows))
        losses = [[-value for at in own for value in side[at].logprobs] for side in (before, after)]
        parts = [late - early for early, late in zip(*losses, strict=True)]
        mean = [math.exp(-math.fsum(side) / len(side)) for side in losses]
        found.append(
            SetInfluence(
                one.example.prompt,
                one.example.answer,
                one.own,
                math.fsum(parts),
                math.fsum(slopes[at] for at in own),
                (mean[0], mean[1]),
                tuple(zip(one.words, parts, strict=True)),
            )
        )
    return found


# To take the rows back


def rows_of(data: Mapping[str, Any]) -> list[Example]:
    """Return the rows of the forget and retain files that a recipe names, each thing that is said once."""
    places = [data[name] for name in ("forget", "retain") if data.get(name)]
    if not places:
        raise DataError("there are no rows to rank; name them with --rows")
    found = [
        row for place in places for row in read_examples(place, columns=data.get("columns"), beside=True)
    ]
    return list({row.key: row for row in found}.values())


def write_sets(workspace: Workspace, rows: Sequence[Example], record: Mapping[str, Any]) -> dict[str, Any]:
    """Write the chosen rows and all others as files of rows; return the section [data] that names them.

    Raises DataError where no row pulled towards the answers, or none would be left.
    """
    ranked = (one for top in record["ranking"]["top"] for one in top)
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
    record: Mapping[str, Any],
    answers: Sequence[Example],
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
    questions, asked = [Question(one) for one in answers], []
    for name, model in (("target", target), ("unlearned", Checkpoint.open(unlearned))):
        live, tokenizer = load_model(model, device=pick_device(settings.device)), load_tokenizer(target)
        label = f"{name} on the answers"
        asked.append(ask(live, tokenizer, questions, asking, style=style, label=label, listener=listener))
    before, after = map(answer_probabilities, asked)
    ranking, told = record["ranking"], ("place", "score", "interval")
    part = {
        **{name: value for name, value in ranking.items() if name not in ("checkpoints", "answers", "top")},
        "answers": [
            {
                "place": question.place,
                "probability": [early, late],
                "rows": [{name: one[name] for name in told if name in one} for one in top],
            }
            for question, early, late, top in zip(answers, before, after, ranking["top"], strict=True)
        ],
    }
    refresh(replace(facts, record={**facts.record, "influence": part}), unlearned)
    return asked[1]

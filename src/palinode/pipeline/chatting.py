"""A talk with an unlearned model and the one it came from, in which α and β can be changed.

The unlearned model is held once, and every (α, β) is put into it in place; nothing is written. Beside it
there is at most one other model, which hears the same questions. Answers are greedy, so that what
differs comes from the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from palinode.data.examples import Example, Message, read_examples
from palinode.data.sources import Form
from palinode.data.tokenize import PromptStyle, prompt_ids
from palinode.errors import InputError, PalinodeError, RecipeError
from palinode.methods.method import Vectors
from palinode.models.generation import stops_of, stream_answer
from palinode.models.inplace import put
from palinode.models.loading import load_reader, load_tokenizer, pick_device
from palinode.pipeline.recipe import Prompts
from palinode.pipeline.reporting import find_model, find_workspace, read_record
from palinode.pipeline.run import find_vectors
from palinode.progress import Listener, NullListener
from palinode.records import workspace_beside
from palinode.weights import Checkpoint


@dataclass(slots=True)
class Speaker:
    """One model and what it has said so far."""

    name: str
    model: PreTrainedModel
    turns: list[Message] = field(default_factory=list)


@dataclass(slots=True)
class Chat:
    """An open conversation; `open_chat` makes one."""

    folder: Checkpoint
    """The unlearned model as it was saved."""
    record: Mapping[str, Any]
    speakers: Sequence[Speaker]
    """The unlearned model, then the one it is compared with, if any."""
    tokenizer: PreTrainedTokenizerBase
    style: PromptStyle
    form: Form
    """How the rows of the run were written: as questions, or as texts to be continued."""
    target: Checkpoint | None
    """The run's target, where it is found."""
    vectors: Vectors | None
    """None where the scales are fixed."""
    fixed: str | None
    """Why they are fixed."""
    scales: tuple[float, float] | None
    """(α, β) of the model as it is now; None for methods without scales."""
    length: int = 200
    """Tokens that an answer may have."""
    system: str | None = None
    """A system prompt of the talk's own."""

    def ask(self, question: str, speaker: Speaker, on_text: Callable[[str], None]) -> str:
        """Return a speaker's answer to a question, which becomes part of its conversation."""
        talks = self.form != "completion"
        said = [*speaker.turns, Message("user", question)] if talks else [Message("prompt", question)]
        own = [Message("system", self.system)] if self.system and talks else []
        example = Example(0, "the conversation", self.form, (*own, *said), "")
        answer = stream_answer(
            speaker.model,
            self.tokenizer,
            prompt_ids(example, self.tokenizer, self.style),
            stop_ids=stops_of(speaker.model, self.tokenizer, [self.form], self.style),
            max_new_tokens=self.length,
            on_text=on_text,
        )
        if talks:
            speaker.turns = [*said, Message("assistant", answer.strip())]
        return answer

    def begin_anew(self) -> None:
        """Forget what was said."""
        for speaker in self.speakers:
            speaker.turns = []

    def set_scales(self, forget: float, retain: float) -> None:
        """Put the model at (α, β) into memory, and begin a new conversation: another model said the old one.

        Raises InputError where that cannot be done.
        """
        if self.vectors is None or self.target is None:
            raise InputError(f"the scales are fixed: {self.fixed}")
        if retain and self.vectors.retain is None:
            raise InputError("the run made no retain vector, because its β was 0; leave β at 0")
        output = self.record["recipe"]["output"]
        put(
            self.vectors.taken_off(self.target, forget, retain),
            self.speakers[0].model,
            dtype=output.get("dtype"),
            rounding=output.get("rounding", "auto"),
            seed=self.record["recipe"].get("seed", 0),
        )
        self.scales = forget, retain
        self.begin_anew()

    def reset(self) -> None:
        """Bring the model back as it was saved, bit for bit, and begin a new conversation."""
        put(self.folder, self.speakers[0].model)
        self.scales = _scales(self.record)
        self.begin_anew()


def open_chat(
    folder: Path | str,
    *,
    against: str | None = None,
    base: str | None = None,
    alone: bool = False,
    allow_pickle: bool = False,
    device: str = "auto",
    listener: Listener | None = None,
) -> Chat:
    """Open the output of a run for a talk, beside the model `against` (default: the run's target, if found).

    `base` says where the base lies, if not where the record has it; `allow_pickle` is for `against`. Raises
    CheckpointError when the folder is no output of a run, or the model to compare with cannot be opened.
    """
    listener = listener or NullListener()
    out = Checkpoint.open(folder)
    record = read_record(out.folder)
    workspace = find_workspace(out.folder, record) or workspace_beside(out.folder)
    target = find_model(record, "target", workspace, hint=against)
    other = None if alone else Checkpoint.open(against, allow_pickle=allow_pickle) if against else target
    vectors, fixed = None, None
    try:
        vectors = find_vectors(record, workspace, target, find_model(record, "base", workspace, hint=base))
    except PalinodeError as error:
        fixed = str(error)
    except KeyError as error:
        fixed = f"its record lacks {error}"
    named = {"unlearned": out} | ({} if other is None else {"target" if other == target else "other": other})
    place = pick_device(device)
    speakers = []
    with listener.task("loading", len(named), "models") as advance:
        for name, checkpoint in named.items():
            speakers.append(Speaker(name, load_reader(checkpoint, device=place)))
            advance(1)
    return Chat(
        folder=out,
        record=record,
        speakers=speakers,
        tokenizer=load_tokenizer(out),
        style=Prompts.model_validate(record["recipe"].get("prompts", {})).style(),
        form=form_of(record),
        target=target,
        vectors=vectors,
        fixed=fixed,
        scales=_scales(record),
    )


def _scales(record: Mapping[str, Any]) -> tuple[float, float] | None:
    scales = record.get("scales")
    return (scales["forget"], scales["retain"]) if scales else None


def form_of(record: Mapping[str, Any]) -> Form:
    """Return how the run's forget rows are written; as questions where they are gone."""
    data = record["recipe"].get("data", {})
    try:
        examples = read_examples(data["forget"], columns=data.get("columns"))
    except (PalinodeError, KeyError):
        return "question"
    return form_like(examples)


def form_like(rows: Sequence[Example]) -> Form:
    """Return how a question is put to a model that was trained on such rows."""
    return "completion" if rows and rows[0].form in ("completion", "document") else "question"


def parse_scale(text: str) -> float:
    """Return a scale that was typed; raises RecipeError for what is no number from 0 on."""
    try:
        value = float(text.replace(",", "."))
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise RecipeError(f"{text!r} is no scale; give a number from 0 on, as in 0.8")
    return value

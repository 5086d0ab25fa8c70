"""Ask a model about examples: likelihood of the given answers, and its own greedy ones."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from palinode.data.examples import Example
from palinode.data.tokenize import PromptStyle, end_id, prompt_ids, tokenize
from palinode.evaluation.settings import EvaluationSettings
from palinode.metrics import score_outcomes
from palinode.models.generation import generate
from palinode.models.likelihoods import score_rows
from palinode.models.loading import load_model, load_tokenizer, pad_token, pick_device
from palinode.progress import Listener, Silence
from palinode.records import Outcome, Score
from palinode.weights.checkpoint import Checkpoint


def evaluate(
    checkpoint: Checkpoint,
    examples: Sequence[Example],
    settings: EvaluationSettings | None = None,
    *,
    style: PromptStyle | None = None,
    device: str = "auto",
    seed: int = 0,
    listener: Listener | None = None,
) -> tuple[list[Outcome], dict[str, Score]]:
    """Load a checkpoint, observe it on the examples, and return its outcomes and scores.

    `seed` serves the bootstrap intervals; the answers are greedy.
    """
    model, tokenizer = load_model(checkpoint, device=pick_device(device)), load_tokenizer(checkpoint)
    outcomes = observe(model, tokenizer, examples, settings, style=style, listener=listener)
    return outcomes, score_outcomes(outcomes, seed=seed)


def observe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    settings: EvaluationSettings | None = None,
    *,
    style: PromptStyle | None = None,
    label: str = "evaluating",
    listener: Listener | None = None,
) -> list[Outcome]:
    """Return what a live model does on each example, in the order given."""
    settings, style, listener = (
        settings or EvaluationSettings(),
        style or PromptStyle(),
        listener or Silence(),
    )
    likelihoods = _likelihoods(model, tokenizer, examples, settings, style, label, listener)
    answers = _answers(model, tokenizer, examples, settings, style, label, listener)
    return [
        Outcome(
            row=example.row,
            prompt=example.prompt,
            expected=example.answer,
            generated=answer,
            logprobs=tuple(logprobs),
            hits=tuple(hits),
        )
        for example, (logprobs, hits), answer in zip(examples, likelihoods, answers, strict=True)
    ]


def _likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    settings: EvaluationSettings,
    style: PromptStyle,
    label: str,
    listener: Listener,
) -> list[tuple[list[float], list[bool]]]:
    """Return log-probabilities and hits an example; the pieces of a document are put together again."""
    rows = tokenize(examples, tokenizer, max_length=settings.max_length, style=style)
    with listener.task(f"{label}: likelihoods", len(rows), "rows") as advance:
        scored = score_rows(model, rows, pad_id=pad_token(tokenizer), on_progress=advance)
    merged: list[tuple[list[float], list[bool]]] = [([], []) for _ in examples]
    for row, (logprobs, hits) in zip(rows, scored, strict=True):
        merged[row.example][0].extend(logprobs)
        merged[row.example][1].extend(hits)
    return merged


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    settings: EvaluationSettings,
    style: PromptStyle,
    label: str,
    listener: Listener,
) -> list[str | None]:
    """Return the greedy answer to each example; None for documents, which ask nothing."""
    asked = [place for place, example in enumerate(examples) if example.form != "document"]
    answers: list[str | None] = [None] * len(examples)
    if not asked:
        return answers
    stops = {end_id(examples[place].form, tokenizer, style) for place in asked}
    if isinstance(tokenizer.eos_token_id, int):
        stops.add(tokenizer.eos_token_id)
    with listener.task(f"{label}: answers", len(asked), "rows") as advance:
        tokens = generate(
            model,
            [prompt_ids(examples[place], tokenizer, style) for place in asked],
            pad_id=pad_token(tokenizer),
            stop_ids=sorted(stops),
            max_new_tokens=settings.max_new_tokens,
            batch_rows=settings.batch_rows,
            on_progress=advance,
        )
    for place, answer in zip(asked, tokens, strict=True):
        answers[place] = str(tokenizer.decode(answer, skip_special_tokens=True)).strip()
    return answers

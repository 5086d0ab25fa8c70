"""Greedy answers, in batches of prompts of like length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import GenerationConfig, PreTrainedModel

from palinode.data.batches import budget_batches, pad_left
from palinode.models.loading import position_limit, quiet_transformers


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    pad_id: int,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    batch_rows: int = 32,
    on_progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Return the greedy continuation of each prompt, without its stop token, in the order given.

    An answer ends where the model's positions end, if that comes first.
    """
    answers: list[list[int]] = [[]] * len(prompts)
    lengths = [len(prompt) for prompt in prompts]
    limit = position_limit(model.config)
    budget = batch_rows * max(lengths, default=1)
    for members in budget_batches(lengths, max_tokens=budget, max_rows=batch_rows):
        ids, mask = pad_left([prompts[i] for i in members], pad_id=pad_id)
        room = max_new_tokens if limit is None else min(max_new_tokens, limit + 1 - ids.shape[1])
        with _plainly_greedy(model, room, pad_id, stop_ids):
            output: torch.Tensor = model.generate(  # type: ignore[operator]
                input_ids=torch.from_numpy(ids).to(model.device),
                attention_mask=torch.from_numpy(mask).to(model.device),
            )
        for index, tokens in zip(members, output[:, ids.shape[1] :].tolist(), strict=True):
            answers[index] = _until_stop(tokens, stop_ids)
        if on_progress:
            on_progress(len(members))
    return answers


@contextmanager
def _plainly_greedy(
    model: PreTrainedModel, max_new_tokens: int, pad_id: int, stop_ids: Sequence[int]
) -> Iterator[None]:
    """Put the model's own generation config aside: its beams and penalties would enter any other."""
    own = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_id,
        eos_token_id=list(stop_ids),
        bos_token_id=None,
    )
    try:
        with quiet_transformers():
            yield
    finally:
        model.generation_config = own


def _until_stop(tokens: list[int], stop_ids: Sequence[int]) -> list[int]:
    for place, token in enumerate(tokens):
        if token in stop_ids:
            return tokens[:place]
    return tokens

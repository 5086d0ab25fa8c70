"""One answer as it comes, for somebody who reads along: greedy, and shown token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from palinode.errors import DataError
from palinode.models.loading import check_known, pad_token, position_limit, quiet_transformers

UNFINISHED = "\ufffd"
"""What a tokenizer shows of a letter whose last byte is still to come."""


def stream_answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    on_text: Callable[[str], None],
) -> str:
    """Return the model's greedy answer; `on_text` hears its parts as they come.

    Ctrl-C ends the answer where it is. Raises DataError when the prompt leaves no room in the model.
    """
    limit = position_limit(model.config)
    room = max_new_tokens if limit is None else min(max_new_tokens, limit + 1 - len(prompt))
    if room < 1:
        raise DataError(
            f"the conversation has {len(prompt)} tokens and the model takes at most {limit}; begin a new one"
        )
    check_known(model.config, max(*prompt, *stop_ids), tokenizer)
    ids = torch.tensor([list(prompt)], device=model.device)
    spoken, own = _Spoken(tokenizer, on_text), model.generation_config
    model.generation_config = GenerationConfig(  # the model's own might draw at random
        do_sample=False,
        max_new_tokens=room,
        pad_token_id=pad_token(tokenizer),
        eos_token_id=list(stop_ids),
        bos_token_id=None,
    )
    try:
        with quiet_transformers(), torch.inference_mode():
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), streamer=spoken)  # type: ignore[operator]
    except KeyboardInterrupt:
        pass
    finally:
        model.generation_config = own
    spoken.end()
    return spoken.text


class _Spoken(BaseStreamer):
    """Turns tokens into text as they come."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        self.tokenizer = tokenizer
        self.on_text = on_text
        self.ids: list[int] = []
        self.text = ""
        self.begun = False

    def put(self, value: Tensor) -> None:
        """Take the next token; what comes first is the prompt."""
        if not self.begun:
            self.begun = True
            return
        self.ids += value.flatten().tolist()
        self._say(final=False)

    def end(self) -> None:
        """Say what was held back."""
        self._say(final=True)

    def _say(self, *, final: bool) -> None:
        text = str(self.tokenizer.decode(self.ids, skip_special_tokens=True))
        if text.endswith(UNFINISHED) and not final:
            return
        if len(text) > len(self.text):
            self.on_text(text[len(self.text) :])
        self.text = text

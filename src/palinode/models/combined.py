"""Two models read together: v = v_target − α·ReLU(v_reinforced − v_target) (spec: baselines.md §17).

The result answers and is measured like a model, but it has no weights of its own: it exists while both
models are in memory, and cannot be saved. Answers are made without a key-value cache, so slowly.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutput

from palinode.errors import MismatchError, OutputError


class CombinedLogits(PreTrainedModel, GenerationMixin):
    """A causal language model whose logits are made from those of two."""

    def __init__(self, target: PreTrainedModel, reinforced: PreTrainedModel, alpha: float) -> None:
        words = [model.config.get_text_config().vocab_size for model in (target, reinforced)]
        if words[0] != words[1]:
            raise MismatchError(
                f"the target has {words[0]} words and the reinforced model {words[1]}; logits can only be "
                "put together of models with one vocabulary"
            )
        config = copy.deepcopy(target.config)
        config._attn_implementation = "eager"  # it has no attention of its own
        super().__init__(config)
        self.target = target
        self.reinforced = reinforced
        self.alpha = alpha
        self.train(False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        logits_to_keep: int = 0,
        **_others: Any,
    ) -> CausalLMOutput:
        """Return the combined logits of the last `logits_to_keep` positions, or of all."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        own, risen = (model(**inputs).logits[:, -logits_to_keep:] for model in (self.target, self.reinforced))
        return CausalLMOutput(logits=combined_logits(own, risen, self.alpha))

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Any,  # noqa: ARG002 - transformers looks for this name
    ) -> dict[str, Any]:
        """Return whole rows for every token: nothing is kept between steps."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def get_output_embeddings(self) -> None:
        """Return None: the logits are of no single head."""
        return

    def save_pretrained(self, save_directory: Any, *_: Any, **__: Any) -> None:
        """Refuse: there are no weights to save."""
        raise OutputError(
            f"the combined model cannot be saved to {save_directory}: it has no weights of its own, only the "
            "logits of two models read together; use the method whp for a model on disk"
        )


def combined_logits(target: Tensor, reinforced: Tensor, alpha: float) -> Tensor:
    """Return v − α·ReLU(v_re − v)."""
    return target - alpha * torch.relu(reinforced - target)

"""Put a weighted sum into a live model: any (α, β) can be tried without writing a model.

The values are those that `weights.save` would write, rounding included, so that what a search
sees is what the saved model does. Every parameter is touched once; no second model is held.

Two models read together: v = v_target − α·ReLU(v_reinforced − v_target) (spec: baselines.md §17).

The result answers and is measured like a model, but it has no weights of its own: it exists while both
models are in memory, and cannot be saved. Answers are made without a key-value cache, so slowly.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutput

from palinode.errors import MismatchError, OutputError
from palinode.models.loading import DTYPES, build_empty
from palinode.weights.arithmetic import Evaluator, Settings, Slice, formula, map_slices, slices
from palinode.weights.checkpoint import Checkpoint, Point
from palinode.weights.displacement import check_displacements
from palinode.weights.fingerprints import check_files, unchanged
from palinode.weights.foreign import quiet_transformers
from palinode.weights.geometry import choose_rounding
from palinode.weights.preflight import check_fit
from palinode.weights.tensors import Files, TensorInfo, is_head


@torch.no_grad()
def put(
    point: Point,
    model: PreTrainedModel,
    *,
    dtype: str | None = None,
    rounding: str = "auto",
    seed: int = 0,
    precision: str = "float32",
    only: Callable[[str], bool] | None = None,
) -> None:
    """Overwrite the model's parameters with the point's values.

    `dtype`, `rounding`, `seed` and `precision` are those of `save`. Putting the target itself brings the
    target back bit for bit. The model may be on any device: sums are formed on the processor, so that they
    are the same everywhere. `only` leaves all tensors as they are whose name in the files it says no to.
    Raises MismatchError when the model's parameters and the checkpoint's tensors
    are not the same.
    """
    anchor, form = point.anchor, formula(point.anchor, point.terms)
    asked = Settings(dtype, rounding, seed, precision)
    check_fit(anchor, [other for other in form.checkpoints if other != anchor])
    check_files(form.checkpoints)
    check_displacements(anchor, form.displacements)
    flat = _flat_parameters(model, anchor)
    parts = list(slices(anchor))
    chosen, _ = choose_rounding(form, asked, parts)

    def start() -> Callable[[Slice], None]:
        evaluator = Evaluator(form, chosen, files)

        @torch.no_grad()
        def work(part: Slice) -> None:
            values, _ = evaluator.evaluate(part)
            stored = torch.from_numpy(values).view(DTYPES[chosen.code or part.info.dtype])
            flat[part.info.name][part.start : part.start + part.count].copy_(stored)

        return work

    with Files() as files, unchanged(form.terms):
        wanted = [part for part in parts if part.info.name in flat and (not only or only(part.info.name))]
        map_slices(wanted, start)


def _flat_parameters(model: PreTrainedModel, anchor: Checkpoint) -> dict[str, torch.Tensor]:
    """Return where each of the checkpoint's tensors lies in the live model, as one dimension, by its name.

    A live model may hold all experts of a layer in one parameter: then an expert's matrix is a part of it.
    """
    parameters = dict(model.named_parameters())
    flat: dict[str, torch.Tensor] = {}
    unfilled = {name: value.numel() for name, value in parameters.items()}
    for name, (own, start) in live_places(model, anchor).items():
        size = anchor.tensors[name].size
        flat[name] = parameters[own].data.view(-1)[start : start + size]
        unfilled[own] -= size
    left = next((name for name, count in unfilled.items() if count), None)
    if left is None:
        return flat
    if anchor.tied and is_head(left):
        raise MismatchError(
            f"the live model has {left} apart from its embedding, and {anchor.folder} has them tied; "
            "load the model from that folder"
        )
    raise MismatchError(
        f"the live model's parameter {left} has no counterpart in {anchor.folder}; "
        "this architecture renames its weights on loading, so give the scales as numbers"
    )


def live_places(model: PreTrainedModel, anchor: Checkpoint) -> dict[str, tuple[str, int]]:
    """Return where a checkpoint's tensors lie in a live model, by name: parameter, first element there."""
    infos = {  # as a checkpoint has tensors, each in a "file" of its own name
        name: TensorInfo(name, "F32", tuple(value.shape), Path(name), 0, 4 * value.numel())
        for name, value in model.named_parameters()
    }
    live, found = Checkpoint(anchor.folder, infos, {}), {}
    for name, info in anchor.tensors.items():
        place = live.find(name) or live.find(f"{model.base_model_prefix}.{name}")
        if not anchor.is_second_copy(name) and type(place) is TensorInfo and place.shape == info.shape:
            found[name] = str(place.file), place.offset // place.itemsize
    return found


def check_live(checkpoint: Checkpoint) -> None:
    """Raise MismatchError where `put` could not put sums of this checkpoint into its live model.

    The model is built without its weights. Raises CheckpointError when transformers cannot build it.
    """
    refused, advice = f"transformers cannot build {checkpoint.folder}", "take a model that it knows"
    with quiet_transformers(
        lambda error: f"{refused} ({type(error).__name__}: {error}); update transformers, or {advice}"
    ):
        model = build_empty(checkpoint)
    _flat_parameters(model, checkpoint)


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

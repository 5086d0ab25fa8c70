"""Weight quantisation: small changes that hid an answer are rounded away, and it comes back.

Round to nearest, symmetric, one scale for each group of G weights along the input of a linear layer:

    s = max|w| / (2^(b−1) − 1),   w' = s · round(w / s),   so |w' − w| ≤ s / 2

Every linear layer is quantised but the output head; embeddings, head, norms and biases stay as they are, as
in the usual weight-only schemes. The values stay in floating point, so any machine can run them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from palinode.audit.attack import Attack, Measurement, Test
from palinode.errors import RecipeError
from palinode.metrics import answer_probabilities

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from palinode.audit.budget import Budget
    from palinode.audit.material import Material
    from palinode.audit.subject import Subject


def quantised(weight: Tensor, *, bits: int, group: int) -> Tensor:
    """Return a weight matrix [out, in] rounded to `bits`, one scale a row and group of `group` columns.

    The last group of a row may be smaller. A group of zeros stays zero. Raises RecipeError below two bits.
    """
    import torch

    if bits < 2 or group < 1:
        raise RecipeError(f"cannot quantise to {bits} bits in groups of {group}; use 2 bits and 1 at least")
    levels = 2 ** (bits - 1) - 1
    parts = []
    for part in weight.float().split(group, dim=1):
        scale = part.abs().amax(dim=1, keepdim=True) / levels
        whole = torch.where(scale > 0, part / scale, torch.zeros_like(part)).round().clamp(-levels, levels)
        parts.append(whole * scale)
    return torch.cat(parts, dim=1).to(weight.dtype)


def quantise(model: PreTrainedModel, *, bits: int, group: int) -> int:
    """Quantise the linear layers of a live model in place; return how many weights that were."""
    import torch

    count = 0
    with torch.no_grad():
        for weight, turned in linear_weights(model):
            matrix = weight.t() if turned else weight
            rounded = quantised(matrix, bits=bits, group=group)
            weight.copy_(rounded.t() if turned else rounded)
            count += weight.numel()
    return count


def linear_weights(model: PreTrainedModel) -> Iterator[tuple[Tensor, bool]]:
    """Yield the weight of every linear layer but the output head, and whether it is stored as [in, out]."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    kept = {id(layer.weight) for layer in (head, embedding) if layer is not None}
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and id(module.weight) not in kept:
            yield module.weight, isinstance(module, Conv1D)


def _attack(bits: int) -> Attack:
    def measure(subject: Subject, material: Material, budget: Budget) -> Measurement:
        from palinode.audit.subject import likelihoods_only

        model = subject.fresh()
        count = quantise(model, bits=bits, group=budget.quantise_group)
        outcomes = subject.ask(
            material.forget, likelihoods_only(budget), model=model, label=f"quantised to {bits} bits"
        )
        details = {
            "bits": bits,
            "group": budget.quantise_group,
            "quantised_weights": count,
            "all_weights": model.num_parameters(),
        }
        return Measurement({"probability": {"forget": tuple(answer_probabilities(outcomes))}}, details)

    return Attack(
        name=f"quantise_{bits}",
        title=f"weights in {bits} bits",
        description=f"linear layers rounded to {bits} bits in memory, then the forget questions",
        tests=(Test("probability", "answer probability", more=0.1, less=0.1, missing="no token was scored"),),
        measure=measure,
    )


QUANTISE_8, QUANTISE_4 = _attack(8), _attack(4)

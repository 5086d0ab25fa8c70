"""RMU, representation misdirection (Li et al. 2024, arXiv 2403.03218).

L = γ·mean_i (1/n) Σ_t (1/d)|h_t − u|² on forget rows + α·the same with u replaced by the frozen target's
h_t on retain rows. h_t is the output of one decoder block at answer token t (d wide), and u = c·r/|r| with
r ~ U[0, 1)^d drawn once from the seed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from palinode.methods.method import Method, StartSettings

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from palinode.data.batches import Batch
    from palinode.training.objectives import Objective

USUAL_LAYER = 7
"""open-unlearning's, for models of 16 blocks and more."""


class RMUSettings(StartSettings):
    """The block, the length of the control vector, and the weights of both losses."""

    layer: int | None = Field(default=None, ge=0)
    """The block, counted from 0; None: 7, or the middle one of a model that has no more than that."""
    strength: float = Field(default=2.0, gt=0)
    """c, the length of the control vector; to be tuned with the block for each architecture."""
    gamma: float = Field(default=1.0, ge=0)
    """γ, the weight of the forget loss."""
    alpha: float = Field(default=1.0, gt=0)
    """α, the weight of the retain loss."""
    trainable: str | None = None
    r"""Pattern of whole names of the parameters that are trained, such as
    'model\.layers\.[567]\.mlp\.down_proj\.weight' (WMDP); None: all."""


def control_vector(width: int, strength: float, seed: int) -> Tensor:
    """Return u = c·r/|r|, r uniform in [0, 1) from the seed, [width] in float32."""
    import torch

    drawn = torch.rand(width, generator=torch.Generator().manual_seed(seed))
    found: Tensor = strength * drawn / drawn.norm()
    return found


def objective(settings: RMUSettings, seed: int) -> Objective:
    """Return the pull of forget rows towards u and of retain rows to where they were."""
    import torch

    from palinode.models.reading import labelled_states, pick_layer
    from palinode.training.losses import misdirection
    from palinode.training.objectives import FrozenStates, Objective, Term, row_count

    def block(model: PreTrainedModel) -> int:
        return pick_layer(model, settings.layer, USUAL_LAYER)

    def distance(model: PreTrainedModel, batch: Batch, frozen: Tensor | None) -> Tensor:
        states, rows = labelled_states(model, batch, block(model))
        with torch.autocast(states.device.type, enabled=False):
            wanted = control_vector(states.shape[-1], settings.strength, seed) if frozen is None else frozen
            wanted = wanted.to(states.device).float()
            return misdirection(states.float(), wanted, rows, len(batch.ids)).sum()

    forget = Term("forget", ("forget",), distance, row_count, settings.gamma)
    retain = Term(
        "retain",
        ("retain",),
        distance,
        row_count,
        settings.alpha,
        keeper=lambda model: FrozenStates(block(model)),
    )
    return Objective((forget, retain), trainable=settings.trainable)


RMU = Method(
    name="rmu",
    summary="representation misdirection: forget rows towards a random vector inside the model",
    source="Li et al. 2024, arXiv 2403.03218",
    formula="L = γ·mean|h(forget) − u|²/d + α·mean|h(retain) − h_ref(retain)|²/d",
    needs=frozenset({"retain", "frozen_target"}),
    settings=RMUSettings,
    objective=objective,
)

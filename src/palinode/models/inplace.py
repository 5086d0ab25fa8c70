"""Put a weighted sum into a live model: any (α, β) can be tried without writing a model.

The values are those that `weights.store.save` would write, rounding included, so that what a search
sees is what the saved model does. Every parameter is touched once; no second model is held.
"""

from __future__ import annotations

from collections.abc import Callable

import blake3
import torch
from transformers import PreTrainedModel

from palinode.errors import MismatchError
from palinode.models.loading import DTYPES, stored_names
from palinode.weights.arithmetic import Evaluator, choose_rounding, settings
from palinode.weights.checkpoint import Checkpoint
from palinode.weights.direction import Point
from palinode.weights.displacement import check_displacements
from palinode.weights.files import Files
from palinode.weights.fingerprints import check_files, unchanged
from palinode.weights.formulas import formula
from palinode.weights.preflight import check_fit
from palinode.weights.slices import Slice, map_slices, per_thread, slices


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
    anchor, form = point.anchor, formula(point)
    asked = settings(dtype=dtype, rounding=rounding, seed=seed, precision=precision)
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

    with Files() as files, unchanged(form.point.terms):
        wanted = [part for part in parts if part.info.name in flat and (not only or only(part.info.name))]
        map_slices(wanted, per_thread(start))


def contents(model: PreTrainedModel) -> str:
    """Return a hash of a live model's parameters (32 hex digits), equal only where every bit of them is."""
    total = blake3.blake3()
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach().cpu().contiguous()
        total.update(f"{name} {values.dtype} {list(values.shape)}".encode())
        total.update(values.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()[:32]


def _flat_parameters(model: PreTrainedModel, anchor: Checkpoint) -> dict[str, torch.Tensor]:
    """Return each parameter as one dimension, by the name it has in the checkpoint's files."""
    flat: dict[str, torch.Tensor] = {}
    names = stored_names([name for name, _ in model.named_parameters()], model, anchor)
    for name, parameter in model.named_parameters():
        info = anchor.tensors.get(names.get(name, ""))
        if info is None or info.shape != tuple(parameter.shape):
            raise MismatchError(
                f"the live model's parameter {name} has no counterpart in {anchor.folder}; "
                "this architecture renames its weights on loading, so give the scales as numbers"
            )
        if info.name in flat:
            raise MismatchError(
                f"the live model has {name} apart from its embedding, and {anchor.folder} has them tied; "
                "load the model from that folder"
            )
        flat[info.name] = parameter.data.view(-1)
    return flat

"""Log-probabilities of given answers: one forward pass serves training and every likelihood metric.

Logits at position t − 1 score the token at t. Only the stretch of a batch that holds answers goes
through the output head, and full-vocabulary log-probabilities are never kept.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from palinode.data.batches import IGNORED, Batch, budget_batches, pad_right
from palinode.data.tokenize import TokenRow
from palinode.errors import CheckpointError
from palinode.models.loading import check_positions

LOGIT_BYTES = 256 * 2**20
"""Upper bound for the logits of one evaluation batch, in bytes at float32."""


def answer_logits(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return (logits_NV, labels_N, rows_N) over the N scored tokens of a batch.

    `rows_N` tells which row of the batch each scored token belongs to.
    """
    ids, mask, labels = (
        torch.from_numpy(part).to(model.device) for part in (batch.ids, batch.mask, batch.labels)
    )
    first = int((batch.labels != IGNORED).any(axis=0).argmax())  # leftmost scored position of the batch
    keep = ids.shape[1] - first + 1
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=keep, use_cache=False).logits
    else:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -keep:]
    targets = labels[:, first:]
    scored = targets != IGNORED
    return logits[:, :-1][scored], targets[scored], scored.nonzero()[:, 0]


def answer_nll(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return −log p of each of the N scored tokens, in float32."""
    logits, labels, _ = answer_logits(model, batch)
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")


@torch.inference_mode()
def score_rows(
    model: PreTrainedModel,
    rows: Sequence[TokenRow],
    *,
    pad_id: int,
    on_progress: Callable[[int], None] | None = None,
) -> list[tuple[list[float], list[bool]]]:
    """Return, for each row, the log-probabilities of its scored tokens and whether each was the top one.

    The order is that of `rows`; batches are formed by length. `on_progress` hears rows done. Raises
    CheckpointError when a log-probability is not a finite number.
    """
    check_positions(model.config, rows)
    results: list[tuple[list[float], list[bool]]] = [([], [])] * len(rows)
    budget = max(1, LOGIT_BYTES // (4 * model.config.get_text_config().vocab_size))
    for members in budget_batches([len(row.ids) for row in rows], max_tokens=budget, max_rows=256):
        logits, labels, owners = answer_logits(model, pad_right([rows[i] for i in members], pad_id=pad_id))
        nll = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
        if not torch.isfinite(nll).all():
            raise CheckpointError(
                "the model's likelihoods are not finite numbers (NaN or infinity); are its weights damaged, "
                "or is a scale far too large?"
            )
        hits = logits.argmax(dim=-1) == labels
        for place, index in enumerate(members):
            own = owners == place
            results[index] = ((-nll[own]).tolist(), hits[own].tolist())
        if on_progress:
            on_progress(len(members))
    return results

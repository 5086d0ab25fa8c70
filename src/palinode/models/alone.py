"""Whether rows read together come out as each of them alone: tried on a model before it is relied on.

Padding can enter a recurrent state, rotary frequencies can follow the longest row of a batch, and experts
can share a capacity: what one row gets would then depend on its neighbours. So each way of putting rows
together is tried, on a few rows of unlike length, and where it differs the rows go one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from palinode.errors import PalinodeError

TOLERANCE = 1e-4
"""How far two ways of computing a log-probability may differ before the fast one is left alone."""

COARSE_TOLERANCE = 2e-2
"""The same where weights and activations are bfloat16 or float16."""

TRIED = 4
"""Rows on which a way is tried, at most."""

Say = Callable[[str], None]
"""Takes one line for the user."""

_passed: WeakKeyDictionary[PreTrainedModel, dict[tuple[object, ...], list[range]]] = WeakKeyDictionary()
"""From the shortest to the longest row of each trial that went well: it holds for all rows between."""

_known: WeakKeyDictionary[PreTrainedModel, dict[tuple[object, ...], bool]] = WeakKeyDictionary()


def tolerance(model: PreTrainedModel) -> float:
    """Return how far log-probabilities of this model may differ between two ways of computing them."""
    return COARSE_TOLERANCE if model.dtype in (torch.bfloat16, torch.float16) else TOLERANCE


def unlike(lengths: Sequence[int], most: int = TRIED) -> list[int]:
    """Return up to `most` places of rows, from the longest to the shortest at even steps.

    >>> unlike([3, 9, 5, 7, 1], 3)
    [1, 2, 4]
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    if len(order) <= most:
        return order
    return [order[round(step * (len(order) - 1) / (most - 1))] for step in range(most)]


@torch.no_grad()
def same_alone(
    model: PreTrainedModel,
    way: str,
    lengths: Sequence[int],
    together: Callable[[], Sequence[Tensor]],
    alone: Callable[[int], Tensor],
) -> bool:
    """Return whether rows of these lengths have the same log-probabilities together as alone.

    `together` gives those of all rows, `alone` those of one. A model is tried once for each way and
    lengths, and no more where rows as short and as long came out alike; it is no where the architecture
    cannot be run that way at all.
    """
    known, key = _known.setdefault(model, {}), (way, model.dtype, *lengths)
    passed = _passed.setdefault(model, {}).setdefault((way, model.dtype), [])
    if any(min(lengths) in span and max(lengths) in span for span in passed):
        return True
    if key not in known:
        plain = [alone(place) for place in range(len(lengths))]
        if not all(bool(part.isfinite().all()) for part in plain):
            return False  # of the weights, not of the way
        known[key] = _agree(together, plain, tolerance(model))
        if known[key]:
            passed.append(range(min(lengths), max(lengths) + 1))
    return known[key]


def _agree(together: Callable[[], Sequence[Tensor]], plain: Sequence[Tensor], most: float) -> bool:
    try:
        found = together()
    except PalinodeError:
        raise
    except Exception:  # an architecture that knows no such masks or caches says so in its own way
        return False
    return all(bool(((one - other).abs() <= most).all()) for one, other in zip(found, plain, strict=True))


def tell(model: PreTrainedModel, what: str, say: Say | None) -> None:
    """Tell the user, once for each model, that its rows go one by one."""
    if say and _known.setdefault(model, {}).setdefault(("told", what), False) is False:
        _known[model]["told", what] = True
        say(note(model, what))


def note(model: PreTrainedModel, what: str) -> str:
    """Return what the user hears where rows go one by one."""
    return (
        f"{what} go one by one, which takes longer: beside other rows this model ({model.config.model_type}) "
        f"gives a row log-probabilities that are more than {tolerance(model):g} off those of the row alone"
    )

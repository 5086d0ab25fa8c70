"""An order written down in a TOML file, so that a command can be told it.

    kind = "trainer"            # or "olmo_core", "neox"
    row_count = 4000
    batch_size = 8

The other lines are the fields of the order's class; files are named from the TOML file's folder on. For
"neox", `prefix` names the index files. A training that went on with other settings has several `[[part]]`
tables, each with `after`, the step that it went on from, `kind` and its fields.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from palinode.errors import DataError, RecipeError
from palinode.history.orders.joined import JoinedOrder
from palinode.history.orders.neox import NeoxOrder
from palinode.history.orders.olmo_core import OlmoCoreOrder
from palinode.history.orders.order import Order
from palinode.history.orders.trainer import TrainerOrder
from palinode.records import read_toml


def _trainer(content: Mapping[str, Any], folder: Path) -> Order:  # noqa: ARG001
    return TrainerOrder(**content)


def _olmo_core(content: Mapping[str, Any], folder: Path) -> Order:
    named = {name: tuple(folder / file for file in content.get(name, ())) for name in ("files", "indices")}
    return OlmoCoreOrder(**{**content, **named})


def _neox(content: Mapping[str, Any], folder: Path) -> Order:
    settings = dict(content)
    return NeoxOrder.open(folder / settings.pop("prefix"), **settings)


ORDERS: Mapping[str, tuple[Callable[[Mapping[str, Any], Path], Order], frozenset[str]]] = {
    "trainer": (_trainer, frozenset(field.name for field in fields(TrainerOrder))),
    "olmo_core": (_olmo_core, frozenset(field.name for field in fields(OlmoCoreOrder))),
    "neox": (_neox, frozenset({"prefix", "batch_size", "resumed_from", "first_sample"})),
}
"""By kind: what makes the order, and the settings it takes."""


def read_order(path: str | Path) -> Order:
    """Return the order that a TOML file describes; raise RecipeError where it says what we do not know."""
    place = Path(path)
    try:
        content = read_toml(place)
    except (OSError, ValueError) as error:
        raise RecipeError(f"the order {place} cannot be read ({error})") from None
    parts = content.pop("part", None)
    if parts is None:
        return _build(content, place)
    if content:
        raise RecipeError(f"{place} has {', '.join(content)} beside its parts; move it into one")
    return JoinedOrder.of([(int(part.pop("after", 0)), _build(part, place)) for part in parts])


def _build(content: dict[str, Any], place: Path) -> Order:
    kind = content.pop("kind", None)
    if kind not in ORDERS:
        raise RecipeError(f"{place} has the kind {kind!r}; the kinds of order are {', '.join(ORDERS)}")
    build, known = ORDERS[kind]
    unknown = sorted(content.keys() - known)
    if unknown:
        raise RecipeError(
            f"{place}: {kind} does not know {unknown[0]!r}; it knows {', '.join(sorted(known))}"
        )
    try:
        return build(content, place.parent)
    except DataError:
        raise
    except (TypeError, KeyError) as error:
        raise RecipeError(f"{place}: {error}") from None

"""The order of the data rebuilt: which rows a step's batch held, for trainings that kept no log.

One file for each way of ordering; each says whose sampler it follows and what it cannot rebuild. Steps
are counted from 1, as in the exposure log: a checkpoint of step c has seen the rows of the steps 1 to c.
Rows are numbers into the data: of the data set for the Trainer, of documents for OLMo-core and GPT-NeoX.
"""

from __future__ import annotations

from palinode.history.orders.joined import JoinedOrder
from palinode.history.orders.neox import NeoxOrder
from palinode.history.orders.olmo_core import OlmoCoreOrder
from palinode.history.orders.order import Order, steps_of
from palinode.history.orders.reading import ORDERS, read_order
from palinode.history.orders.trainer import TrainerOrder

__all__ = [
    "ORDERS",
    "JoinedOrder",
    "NeoxOrder",
    "OlmoCoreOrder",
    "Order",
    "TrainerOrder",
    "read_order",
    "steps_of",
]

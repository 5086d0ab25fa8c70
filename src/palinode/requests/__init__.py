"""Erasure requests over the years: the ledger of what was asked and done, and the desk that does it.

`Desk(folder)` is the door: add, locate, carry out, audit, approve, publish, withdraw.
"""

from palinode.requests.desk import Desk
from palinode.requests.ledger import Event, Ledger
from palinode.requests.standing import Request, Standing

__all__ = ["Desk", "Event", "Ledger", "Request", "Standing"]

"""How tests begin a ledger."""

from __future__ import annotations

from datetime import date

from palinode import Desk

THIRD = 10
"""Rows of a request."""


def begin(folder, recipe, rows, names="123", **policy):
    desk = Desk(folder, user="ada")
    desk.configure(recipe, policy)
    for name in names:
        desk.add(
            f"r{name}", rows / f"{name}.jsonl", reference=f"case {name}", received=date(2026, 1, int(name))
        )
    return desk

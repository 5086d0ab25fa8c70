"""Erasure requests over the years: the ledger of what was asked and done, and the desk that does it.

`desk.Desk(folder)` is the door: add, locate, carry out, audit, approve, publish, withdraw.
"""

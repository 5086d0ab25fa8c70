"""Adversarial checks of a model that should have forgotten something (spec: metrics.md §9, §12).

Each attack is one function and measures one model with a stated budget; `findings` sets two models side by
side, row by row, and says what was found; `policy` says what may be.
"""

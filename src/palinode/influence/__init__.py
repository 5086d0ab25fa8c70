"""Influence: which rows made a model say something, how much, and what taking them back does to it.

`sets` tells of a set whose vector is known, exactly; `sketches` keeps gradients of single rows in a file
that can be searched; `ranking` weighs them by when each row was seen, and ranks the rows.
"""

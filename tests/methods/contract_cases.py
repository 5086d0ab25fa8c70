"""Which methods there are, by kind, and the settings that the tiny world needs."""

from __future__ import annotations

from palinode.methods import METHODS

OWN_SETTINGS = {"altpo": {"temperature": 3.0, "max_new_tokens": 2}}
"""The tiny world's model is so sure of its answers that cooler draws are the true ones."""

TRAINED = [name for name, method in METHODS.items() if method.kind == "training"]
SAVED = [name for name, method in METHODS.items() if method.kind != "inference"]

"""How often each test told right, of tiny models whose truth is known (`benchmarks/meta_audit.py`).

`python benchmarks/meta_audit.py --output DIR` prints these lines; docs/audit.md says more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class ToldRight(NamedTuple):
    """Of models that know the forget rows, how many a test failed; of models that never saw them, how few."""

    found: int
    knowing: int
    alarms: int
    never: int

    def __str__(self) -> str:
        """Return it in words."""
        return f"found {self.found} of {self.knowing}, {self.alarms} false alarms in {self.never}"


MEASURED: Mapping[str, ToldRight] = {}
"""By `attack.test`; "verdict" is the whole audit."""

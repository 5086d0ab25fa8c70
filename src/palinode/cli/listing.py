"""`palinode list`: every method, transform, benchmark and metric, one line each."""

from __future__ import annotations

from typing import Annotated

import typer

from palinode.cli.console import out, print_json
from palinode.cli.options import Json

KINDS = ("methods", "transforms", "benchmarks", "metrics")


def list_everything(
    kind: Annotated[
        str | None, typer.Argument(help="methods, transforms, benchmarks or metrics. [default: all]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Name every method, transform, benchmark and metric."""
    from palinode.cli.tables import listing_lines
    from palinode.errors import RecipeError

    if kind is not None and kind not in KINDS:
        raise RecipeError(f"there is no list of {kind}; there are {', '.join(KINDS)}")
    listed = {name: _LISTS[name]() for name in KINDS if kind in (None, name)}
    if as_json:
        print_json(listed)
        return
    for name, lines in listed.items():
        for line in listing_lines(name, lines):
            out().print(line, soft_wrap=True)


def _methods() -> dict[str, str]:
    from palinode.methods import METHODS

    return {name: method.summary for name, method in METHODS.items()}


def _transforms() -> dict[str, str]:
    from palinode.methods.transforms import TRANSFORMS

    return {name: f"{transform.summary}: {transform.formula}" for name, transform in TRANSFORMS.items()}


def _benchmarks() -> dict[str, str]:
    from palinode.benchmarks import BENCHMARKS

    own = {
        name: f"{benchmark.description} ({', '.join(benchmark.splits)})"
        for name, benchmark in BENCHMARKS.items()
    }
    return {**own, "demo": "an invented world whose truth is known; run by palinode demo"}


def _metrics() -> dict[str, str]:
    from palinode.metrics.membership import ATTACKS
    from palinode.metrics.table import COMPARISONS, METRICS

    return {
        **{name: metric.description for name, metric in METRICS.items()},
        **{name: comparison.description for name, comparison in COMPARISONS.items()},
        **{f"auc_{name}": f"membership attack {attack.description}" for name, attack in ATTACKS.items()},
    }


_LISTS = {
    "methods": _methods,
    "transforms": _transforms,
    "benchmarks": _benchmarks,
    "metrics": _metrics,
}

"""The model card: README.md of an unlearned model, with the hub's front matter and the report's summary.

It says what is known and no more. Where the target had a card of its own, ours says so; licence and intended
use are in that one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from palinode.report.words import at, escaped, integer, scale


def model_card(content: Mapping[str, Any], *, base: str | None = None, original: bool = False) -> str:
    """Return the card for the content of a run's report.

    `base` is the target's id on the hub, if it came from there; `original` tells whether it has a card.
    """
    target = base or _last_part(str(at(content, "models", "target", "location") or "a model"))
    name = _last_part(str(at(content, "models", "unlearned", "location") or "An unlearned model"))
    lines = [
        *_front_matter(base),
        f"# {escaped(name)}",
        "",
        f"**{escaped(content['outcome'])}**",
        "",
        f"{escaped(content['headline'])}",
        "",
        *_origin(content, target),
        *_claims(content),
        "## Not tested",
        "",
        *(f"- {escaped(line)}" for line in content["untested"]),
        "",
        "## More",
        "",
        "`report.html` has every figure with its interval, and `record.json` the recipe, versions and "
        "fingerprints for programs; `palinode verify` tells whether the weights are as they were written.",
        "",
        _original(target, original),
    ]
    return "\n".join(lines).strip() + "\n"


def _front_matter(base: str | None) -> list[str]:
    """Return what the hub reads; JSON's strings are YAML's too."""
    facts = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **({"base_model": base} if base else {}),
        "tags": ["machine-unlearning", "palinode"],
    }
    lines = (f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in facts.items())
    return ["---", *lines, "---", ""]


def _last_part(location: str) -> str:
    """Return a folder's own name: where it lies on the writer's machine is nobody's business."""
    return location.rstrip("/").rpartition("/")[2]


def _origin(content: Mapping[str, Any], target: str) -> list[str]:
    forget, retain = (at(content, "data", name, "rows") for name in ("forget", "retain"))
    method = at(content, "method", "name")
    rows = f"{integer(forget)} rows" + (
        f" and to keep what {integer(retain)} others taught it" if retain else ""
    )
    formula = "unlearned = target − α · forget vector + β · retain vector"
    alpha, beta = at(content, "scales", "forget"), at(content, "scales", "retain")
    how = f": {formula}, α = {scale(alpha)}, β = {scale(beta)}" if alpha is not None else ""
    return [
        f"Made from {escaped(target)} by Palinode {escaped(content.get('palinode'))}, to behave as if it had "
        f"never seen {rows}. Method: {escaped(method)}{how}.",
        "",
    ]


def _claims(content: Mapping[str, Any]) -> list[str]:
    return [
        "## In short",
        "",
        *(
            f"- **{claim['question']}** {claim['symbol']} {claim['word']}. {escaped(claim['sentence'])}"
            for claim in content["claims"]
        ),
        "",
        "This is evidence about the rows that were measured, no proof that nothing else is left.",
        "",
    ]


def _original(target: str, original: bool) -> str:
    if original:
        return f"{escaped(target)} has a card of its own; what it says of licence and use holds here too."
    return f"{escaped(target)} came without a card; what holds for its licence and use holds here too."

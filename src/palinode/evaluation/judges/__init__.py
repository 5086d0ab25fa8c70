"""Judges behind one interface, and the table that opens them by name."""

from __future__ import annotations

from pathlib import Path

from palinode.errors import InputError, RecipeError
from palinode.evaluation.judges.endpoint import EndpointJudge, Patience
from palinode.evaluation.judges.offline import EmbeddingJudge, EntailmentJudge, OverlapJudge, model_judge
from palinode.evaluation.judging import DecisionCache, Judge, judge_cache_folder

__all__ = [
    "JUDGES",
    "EmbeddingJudge",
    "EndpointJudge",
    "EntailmentJudge",
    "OverlapJudge",
    "Patience",
    "named_judge",
    "open_judge",
]

JUDGES: dict[str, str] = {
    "overlap": "share of names, numbers and other content words in common; needs nothing",
    "offline:FOLDER": "entailment or embedding model in a local folder",
    "URL": "a model at an OpenAI-compatible address, such as https://api.openai.com/v1",
}
"""What may be named as a judge, with one line each."""


def open_judge(
    name: str,
    *,
    model: str | None = None,
    key_variable: str | None = None,
    cache: Path | None = None,
    at_once: int = 4,
    patience: Patience | None = None,
    device: str = "auto",
) -> Judge:
    """Return the judge of that name: "overlap", "offline:FOLDER", or an address with a `model`.

    The options after the name serve an address, but for `device`, which is where an offline model runs.
    InputError when the name is unknown or something that the judge needs is missing.
    """
    if name == "overlap":
        return OverlapJudge()
    if name.startswith("offline:"):
        return model_judge(Path(name.removeprefix("offline:")), device=device)
    if name.startswith(("http://", "https://")):
        if model is None:
            raise InputError("a judge at an address needs the name of a model, such as gpt-4o")
        decisions = DecisionCache(cache or judge_cache_folder())
        return EndpointJudge(
            name, model, cache=decisions, key_variable=key_variable, at_once=at_once, patience=patience
        )
    raise InputError(f"there is no judge {name!r}; there are {', '.join(JUDGES)}")


def named_judge(name: str | None, key_variable: str | None, device: str) -> Judge | None:
    """Return the judge that `overlap`, `offline:FOLDER` or `URL#model` names; None without a name."""
    if key_variable and not (name or "").startswith(("http://", "https://")):
        raise RecipeError(
            "--key-variable names the key of a judge at an address; name that too, as --judge URL#MODEL"
        )
    if not name:
        return None
    kind, _, model = name.partition("#")
    return open_judge(kind, model=model or None, key_variable=key_variable, device=device)

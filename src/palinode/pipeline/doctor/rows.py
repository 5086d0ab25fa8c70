"""The rows of a run: can they be read, do the sets share any, and do they fit into the models as tokens?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from palinode.data.examples import Example, read_examples, shared_rows
from palinode.data.tokenize import prompt_notes, tokenize
from palinode.methods.method import read_refusals
from palinode.models.loading import check_positions, load_config, load_tokenizer
from palinode.pipeline.doctor.findings import Findings
from palinode.pipeline.recipe import Recipe
from palinode.weights import Checkpoint

OTHER_FILE = "name the file that was meant, and its columns with --columns"


def look_at_rows(findings: Findings, data: Mapping[str, Any]) -> dict[str, list[Example]]:
    """Return the sets that can be read, after looking for copies and for rows that stand in both.

    `data` are the values of a recipe's section of that name.
    """
    sets: dict[str, list[Example]] = {}
    for name in ("forget", "retain"):
        if place := data.get(name):
            found = _read(findings, name, str(place), data.get("columns") or None)
            sets |= {name: found} if found else {}
    if refusals := data.get("refusals"):
        findings.attempt("rows", "refusals", lambda: read_refusals(refusals), fix=OTHER_FILE)
    if len(sets) == 2:
        _look_for_shared(findings, sets, allowed=bool(data.get("allow_overlap")))
    elif "forget" in sets and not data.get("retain"):
        text = "none was named, so β is 0, and what the model keeps is not measured"
        findings.say("rows", "retain", "warn", text, "name rows whose effect must stay with --retain")
    return sets


def look_at_fit(
    findings: Findings, name: str, examples: Sequence[Example], recipe: Recipe, models: Sequence[Checkpoint]
) -> None:
    """Look whether the rows fit into the models; the first one's tokenizer reads them."""
    reader, length = models[0], recipe.training.max_length
    fix = "shorten the rows, or raise max_length (--max-length)"
    style = recipe.prompts.style()
    tokenizer = findings.attempt("rows", name, lambda: load_tokenizer(reader), fix=fix)
    if tokenizer is None:
        return
    tokens = findings.attempt(
        "rows", name, lambda: tokenize(examples, tokenizer, max_length=length, style=style), fix=fix
    )
    if tokens is None:
        return
    for model in models:
        check = partial(check_positions, load_config(model), tokens, tokenizer)
        findings.attempt("rows", name, check, fix=fix)
    for note in prompt_notes(examples, tokenizer, style):
        findings.say("rows", name, "note", note)
    if cut := sum(row.truncated for row in tokens):
        text = f"{cut:,} answers are longer than max_length {length} and will be cut"
        findings.say("rows", name, "warn", text, "raise max_length (--max-length), if their ends matter")


def _read(
    findings: Findings, name: str, place: str, columns: Mapping[str, str] | None
) -> list[Example] | None:
    """Return the rows of a file, after saying what is in it."""
    found = findings.attempt("rows", name, lambda: read_examples(place, columns=columns), fix=OTHER_FILE)
    if not found:
        return None
    forms = Counter(example.form for example in found)
    kinds = ", ".join(f"{count:,} as {form}" for form, count in forms.items())
    findings.say("rows", name, "ok", f"{len(found):,} rows ({kinds})")
    if copies := len(found) - len({example.key for example in found}):
        text = f"{copies:,} rows say what another row says already, and count more than once"
        findings.say("rows", name, "warn", text, "leave the copies out, if that is not meant")
    return found


def _look_for_shared(findings: Findings, sets: Mapping[str, Sequence[Example]], *, allowed: bool) -> None:
    shared = shared_rows(sets["forget"], sets["retain"])
    if not shared:
        findings.say("rows", "overlap", "ok", "no row stands in both sets")
        return
    first = sets["retain"][min(second for _, second in shared)]
    count = len({second for _, second in shared})
    text = f"{count:,} retain rows also stand in the forget set (first: {first.place})"
    if allowed:
        findings.say("rows", "overlap", "note", f"{text}; they will be left out")
    else:
        findings.say(
            "rows", "overlap", "fail", text, "remove them, or have them left out with --allow-overlap"
        )

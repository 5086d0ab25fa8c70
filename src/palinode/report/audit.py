"""An audit in words: one sentence, a table for the terminal, a page of Markdown.

Every number comes from the record (docs/audit.md). The words claim evidence within a stated budget, name
what was not tested, and promise nothing.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from palinode.report.verdicts import SYMBOLS, audit_claims

DASH = "—"
STYLES = {"knows more": "bold red", "knows less": "bold red", "unclear": "yellow", "within": "green"}
YARDSTICKS = {
    "retrained": "a model retrained without the forget set",
    "base": "the base checkpoint",
}


def audit_headline(record: Mapping[str, Any]) -> str:
    """Return one or two sentences: passed or not, and on what evidence."""
    answer, kind = record["answer"], YARDSTICKS[record["yardstick"]]
    parts = [
        _count(answer["knows_more"], "found that it knows more"),
        _count(answer["knows_less"], "found that it knows less, which is over-forgetting"),
        _count(answer["unclear"], "could not tell"),
        _count(answer["within"], "put it within the margins"),
    ]
    told = "; ".join(part for part in parts if part) or "no test gave a result"
    if answer["required"]:
        told += f"; the policy requires {', '.join(answer['required'])}, which gave nothing"
    word = "Passed" if answer["passed"] else "Failed"
    return f"{word}. Beside {kind}: {told}. {_untested_count(answer)}"


def audit_table(record: Mapping[str, Any]) -> Table:
    """Return every test of the audited model, one a row, for the terminal."""
    models = _models(record)
    table = Table(title="Higher means that it knows more; 95 % intervals", title_justify="left")
    table.add_column("test", no_wrap=True)
    for model in (*models, "difference"):
        table.add_column(model, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for name, attack in record["attacks"].items():
        table.add_section()
        for test, entry in attack.get("tests", {}).items():
            finding = entry["findings"]["audited"]
            scores = [_score_of(entry, model) for model in models]
            if finding["score"]["value"] is None:
                continue
            table.add_row(
                Text(f"{name}\n  {test}"),
                *(_number(score["value"]) for score in scores),
                _stacked(finding["difference"]),
                Text(_shown(record, f"{name}.{test}", finding), style=STYLES.get(finding["verdict"], "")),
            )
    return table


def audit_notes(record: Mapping[str, Any]) -> list[str]:
    """Return what a reader should know before believing the answer, for the terminal."""
    return [
        *(f"Note: {note}" for note in record.get("notes", ())),
        f"This is evidence about these rows and attacks at the {record['policy']['preset']} budget; a "
        "stronger attack may find more.",
    ]


def audit_untested(record: Mapping[str, Any]) -> list[str]:
    """Return what was not tested and why, one sentence each."""
    return [
        f"Not tested: {name}, because {reason}." for name, reason in record["answer"]["not_tested"].items()
    ]


def audit_report(record: Mapping[str, Any]) -> str:
    """Return the whole report as Markdown; text that comes from the user is escaped."""
    sections = (
        _opening(record),
        _findings(record),
        _curves(record),
        _untested(record),
        _notes(record),
        _budget(record),
        _inputs(record),
        _repeat(record),
    )
    return "\n".join(line for section in sections for line in section).strip() + "\n"


# The sections of the page, each a list of lines


def _opening(record: Mapping[str, Any]) -> list[str]:
    return [
        "# Audit report",
        "",
        f"**{_text(audit_headline(record))}**",
        "",
        "This is evidence about the rows, attacks and budget stated here. A stronger attack, or another "
        "one, may find what these did not. Forgetting is two-sided: a model that knows less of the forget "
        "set than the yardstick fails as well as one that knows more.",
        "",
        f"palinode {_text(record['palinode'])}, {_text(record['created'])} to {_text(record['finished'])}.",
        "",
        "## In short",
        "",
        *(
            f"- **{claim.question}** {SYMBOLS[claim.light]} {claim.word}. {_text(claim.sentence)}"
            for claim in audit_claims(record)
        ),
        "",
    ]


def _findings(record: Mapping[str, Any]) -> list[str]:
    models = _models(record)
    rows = [
        [
            f"{_text(attack['title'])}: {_text(entry['title'])}",
            *(_cell(_score_of(entry, model)) for model in models),
            _cell(finding["difference"]),
            _verdict(record, f"{name}.{test}", finding),
            _margins(record, f"{name}.{test}"),
        ]
        for name, attack in record["attacks"].items()
        for test, entry in attack.get("tests", {}).items()
        for finding in [entry["findings"]["audited"]]
        if finding["score"]["value"] is not None
    ]
    if not rows:
        return []
    table = _table(["test", *models, "difference", "verdict", "margins (less, more)"], rows)
    return [
        "## Findings",
        "",
        "Higher means that the model knows more of the forget set. In parentheses: 95 % bootstrap intervals "
        "over the rows; for the difference, rows are drawn in pairs.",
        "",
        *table,
        *_unclear(record),
    ]


def _unclear(record: Mapping[str, Any]) -> list[str]:
    lines = [
        f"- {name}.{test} is unclear: {_text(finding['reason'])}."
        for name, attack in record["attacks"].items()
        for test, entry in attack.get("tests", {}).items()
        for finding in [entry["findings"]["audited"]]
        if finding["verdict"] == "unclear"
    ]
    return [*lines, ""] if lines else []


def _curves(record: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for attack in record["attacks"].values():
        details = attack.get("details", {})
        curves = {name: found["curve"] for name, found in details.items() if found.get("curve")}
        if not curves:
            continue
        facts = details["audited"]
        steps = [f"step {step}" for step in facts["steps"]]
        origin = f" ({_text(facts['lookalikes'])})" if facts.get("lookalikes") else ""
        lines += [
            f"### {_text(attack['title'])}",
            "",
            f"{facts['learned_rows']} rows learned{origin}, {facts['tested_rows']} rows measured.",
            "",
            *_table(["model", *steps], ([name, *map(_number, curve)] for name, curve in curves.items())),
        ]
    return ["## Relearning curves: mean answer probability", "", *lines] if lines else []


def _untested(record: Mapping[str, Any]) -> list[str]:
    lines = [
        f"- {_text(name)}, because {_text(reason)}."
        for name, reason in record["answer"]["not_tested"].items()
    ]
    always = (
        "- Attacks beyond this list and beyond this budget: longer or otherwise tuned fine-tuning, optimised "
        "prompts, reading the activations, other quantisation schemes.",
    )
    return ["## Not tested", "", *lines, *always, ""]


def _notes(record: Mapping[str, Any]) -> list[str]:
    notes = [f"- {_text(note)}" for note in record.get("notes", ())]
    return ["## Notes", "", *notes, ""] if notes else []


def _budget(record: Mapping[str, Any]) -> list[str]:
    policy = record["policy"]
    facts = ", ".join(f"{name} {_text(value)}" for name, value in policy["budget"].items())
    return [
        "## Budget and policy",
        "",
        f"The same for every model. Preset {policy['preset']}: {facts}.",
        "",
        f"Unclear tests: {policy['unclear']}. Required attacks: {', '.join(policy['require']) or 'none'}. "
        f"Fewest rows: {policy['min_rows']}.",
        "",
        "Quantisation rounds the weights of linear layers to nearest, symmetrically, in groups along their "
        "input; embeddings, output head, norms and biases stay as they are.",
        "",
    ]


def _inputs(record: Mapping[str, Any]) -> list[str]:
    kind = {"yardstick": f"yardstick ({record['yardstick']})"}
    rows = [
        [
            kind.get(name, name),
            _text(fact.get("location") or DASH),
            fact["fingerprint"][:16],
            str(fact.get("rows", "")),
        ]
        for part in ("models", "data")
        for name, fact in record[part].items()
    ]
    return ["## Models and data", "", *_table(["what", "where", "fingerprint", "rows"], rows)]


def _repeat(record: Mapping[str, Any]) -> list[str]:
    settings = [f"seed {record['seed']}", *(f"{n} {_text(v)}" for n, v in record["environment"].items())]
    command = str(record["command"])
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", command)), default=0))
    return ["## To repeat it", "", fence, command, fence, "", f"With {', '.join(settings)}.", ""]


# What the record holds


def _models(record: Mapping[str, Any]) -> list[str]:
    return [name for name in ("audited", "yardstick", "target") if name in record["models"]]


def _score_of(entry: Mapping[str, Any], model: str) -> Mapping[str, Any]:
    findings = entry["findings"]
    if model == "yardstick":
        score: Mapping[str, Any] = findings["audited"]["yardstick"]
        return score
    missing = {"score": {"value": None}}
    found: Mapping[str, Any] = findings.get(model, missing)["score"]
    return found


def _margins(record: Mapping[str, Any], key: str) -> str:
    margins = record["policy"]["margins"][key]
    return ", ".join(DASH if margins[side] is False else f"{margins[side]:g}" for side in ("less", "more"))


# Numbers and text


def _count(keys: Sequence[str], what: str) -> str:
    return f"{len(keys)} test{'' if len(keys) == 1 else 's'} {what}" if keys else ""


def _untested_count(answer: Mapping[str, Any]) -> str:
    count = len(answer["not_tested"])
    return "Everything on the list was tested." if not count else f"Not tested: {count} (see the reasons)."


def _number(value: float | None) -> str:
    if value is None:
        return DASH
    return f"{value:.1e}" if 0 < abs(value) < 0.0005 else f"{value:.3f}"


def _interval(score: Mapping[str, Any]) -> Iterator[str]:
    if score.get("low") is not None and score.get("high") is not None:
        yield f"{_number(score['low'])} to {_number(score['high'])}"


def _cell(score: Mapping[str, Any]) -> str:
    return " ".join([_number(score["value"]), *(f"({interval})" for interval in _interval(score))])


def _stacked(score: Mapping[str, Any]) -> Text:
    cell = Text(_number(score["value"]))
    for interval in _interval(score):
        cell.append(f"\n{interval}", style="dim")
    return cell


def _verdict(record: Mapping[str, Any], key: str, finding: Mapping[str, Any]) -> str:
    shown = _shown(record, key, finding)
    return f"**{shown}**" if shown.startswith("knows") else shown


def _shown(record: Mapping[str, Any], key: str, finding: Mapping[str, Any]) -> str:
    """Return the verdict; "within" a single margin says which side was judged."""
    margins = record["policy"]["margins"][key]
    if finding["verdict"] == "within" and False in (margins["more"], margins["less"]):
        return "no less" if margins["more"] is False else "no more"
    return str(finding["verdict"])


def _text(value: object) -> str:
    """Return text from outside as one line that Markdown, and HTML within it, shows as it stands."""
    one_line = " ".join(str(value).split())
    return re.sub(r"([\\`*_\[\]|~#$])", r"\\\1", html.escape(one_line, quote=False))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    rule = ["---"] * len(header)
    return [*(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)), ""]

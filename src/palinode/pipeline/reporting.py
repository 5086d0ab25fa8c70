"""What a run writes: its record.json, and the reports of a run, an audit, a comparison or a demo.

An unlearned model must not carry the rows it has forgotten, so record (docs/record.md) and report in its
folder hold no text of them; the report with sample answers lies in the workspace, beside the outcomes it is
made of. Every other record begins and ends like that of a run (`heading`, `environment`).
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from palinode.data.examples import Example, fingerprint_examples
from palinode.errors import CheckpointError, InputError, MismatchError, OutputError, PalinodeError, told_as
from palinode.metrics.matching import nearest
from palinode.records import (
    COMMAND,
    Outcome,
    private,
    read_json,
    read_outcomes,
    workspace_beside,
    write_json,
    write_text,
)
from palinode.report.reports import Facts, Outcomes, html_report, markdown_report, report_content
from palinode.report.run_report import model_card
from palinode.report.verdicts import run_verdict
from palinode.report.words import MODELS, at, known_first
from palinode.version import __version__
from palinode.weights import Checkpoint, Direction, Saved, profile

USED = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy", "scipy", "rouge-score")
"""Libraries that results may depend on."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
"""An id on the hub, with an optional revision; a local path of two parts looks the same."""
FEWEST_NEAR = 20
"""Retain rows without which none are told apart as the nearest to the forget rows."""
CURVE_POINTS = 120
"""Points of a training curve that the record keeps."""


def heading(layout: int, *, started: datetime, verb: str) -> dict[str, Any]:
    """Return the versions of a record's layout and of Palinode, start and end (now), and the command.

    The verb alone stands for a command where nobody says how the run is repeated.
    """
    return {
        "version": layout,
        "palinode": __version__,
        "created": started.isoformat(timespec="seconds"),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": COMMAND.get(f"palinode {verb}"),
    }


def environment(device: object) -> dict[str, Any]:
    """Return the Python, machine, device and versions of libraries."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": str(device),
        **{name: version(name) for name in USED},
    }


def with_unseen(
    outcomes: Mapping[str, Mapping[str, Sequence[Outcome]]], sample: Sequence[Example]
) -> dict[str, dict[str, Sequence[Outcome]]]:
    """Return the outcomes with two sets added: the retain rows that nothing was trained on, and the nearest.

    Rows that training saw are held up by it, so the whole retain set flatters the unlearned model; no
    "retain_unseen" is added where that set would be empty or the whole. "retain_near" is the quarter of these
    rows that is nearest to the forget rows by words (`nearest`), of twenty rows or more.
    """
    seen = {example.row for example in sample}
    added: dict[str, dict[str, Sequence[Outcome]]] = {}
    for name, sets in outcomes.items():
        retain = sets.get("retain", ())
        unseen = [outcome for outcome in retain if outcome.row not in seen]
        apart = {"retain_unseen": unseen} if 0 < len(unseen) < len(retain) else {}
        fair, forget = [*(unseen or retain)], sets.get("forget", ())
        own, theirs = ([f"{one.prompt} {one.expected}" for one in some] for some in (fair, forget))
        if len(fair) >= FEWEST_NEAR and forget:
            apart["retain_near"] = [fair[place] for place in nearest(own, theirs, len(fair) // 4)]
        added[name] = {**sets, **apart}
    return added


def model_facts(location: str | None, checkpoint: Checkpoint, *, card: bool = False) -> dict[str, Any]:
    """Return what a record tells of a model; with `card`, of the target's card too."""
    return {
        "location": location or "made by [prepare]",
        "fingerprint": checkpoint.fingerprint(),
        "parameters": checkpoint.parameters,
        **(card_facts(location) if card else {}),
    }


def card_facts(location: str | None) -> dict[str, Any]:
    """Return a model's id on the hub, if any, and whether a card lies beside it: as of here and now."""
    named, local = location or "", Path(location or "").expanduser()
    hub = named.partition("@")[0] if HUB_ID.fullmatch(named) and not local.exists() else None
    return {"hub": hub, "card": bool(named) and (local / "README.md").exists()}


def row_facts(location: str | None, examples: Sequence[Example]) -> dict[str, Any]:
    """Return what a record tells of rows."""
    return {"location": location, "rows": len(examples), "fingerprint": fingerprint_examples(examples)}


def dose_facts(saved: Saved, asked: Mapping[str, float]) -> dict[str, Any]:
    """Return what arrived in the stored weights of the scales asked for, as the record has it."""
    effective = {name: saved.dose.effective.get(name) for name in asked}
    return {
        **{name: scale / asked[name] if scale and asked[name] else None for name, scale in effective.items()},
        "effective": effective,
        "relative_error": saved.dose.relative_error,
        "moved_share": saved.dose.moved_share,
        "unreached_share": saved.dose.unreached_share,
        "rounding": saved.rounding,
        "parts": {
            name: {"effective": dict(part.effective), "moved_share": part.moved_share}
            for name, part in saved.dose.parts.items()
        },
        "notes": list(saved.notes),
    }


def thinned_curve(losses: Sequence[float]) -> dict[str, Any]:
    """Return a training curve with at most CURVE_POINTS points, each the mean of as many steps."""
    every = max(1, -(-len(losses) // CURVE_POINTS))
    chunks = [losses[start : start + every] for start in range(0, len(losses), every)]
    return {
        "every": every,
        "steps": list(range(0, len(losses), every)),
        "losses": [float(f"{fmean(chunk):.5g}") for chunk in chunks],
    }


def geometry_facts(
    forget: Direction, retain: Direction | None, *, on_progress: Callable[[int], None] | None = None
) -> Mapping[str, Any]:
    """Return norms and cosine of the vectors, over all weights and by part of the model."""
    named = {"forget": forget} | ({"retain": retain} if retain is not None else {})
    measured = profile(named, on_progress=on_progress)

    def entry(part: str | None) -> dict[str, Any]:
        norms = measured.norms(part)
        cosine = measured.cosine("forget", "retain", part) if len(norms) == 2 else None
        retain = {"norm": norms["retain"]} if "retain" in norms else None
        return {"forget": {"norm": norms["forget"]}, "retain": retain, "cosine": cosine}

    return {**entry(None), "parts": {part: entry(part) for part in measured.gram}}


NAME = "report"
"""Name of the files, before .html, .md and .json."""
SUFFIXES = (".html", ".md", ".json")
AUDIT = "audit.json"
"""Name of an audit's record, in its own folder and in that of the model it is told of."""


def refresh(facts: Facts, folder: Path) -> None:
    """Write in the workspace the report with answers, and everything that goes with an unlearned model anew.

    Record, card and reports tell the verdict of the record and of the audit that is known, if one is.
    """
    record, audit = facts.record, facts.audit
    if facts.elsewhere and facts.texts:
        write_reports(replace(facts, elsewhere=None), Path(facts.elsewhere))
    content = write_reports(replace(facts, texts=False), folder / f"{NAME}.html")
    known = {**card_facts(at(record, "recipe", "models", "target")), **(at(record, "models", "target") or {})}
    write_text(folder / "README.md", model_card(content, base=known["hub"], original=known["card"]))
    if audit is not None:
        write_json(folder / AUDIT, audit)
    write_json(folder / "record.json", {**record, "verdict": run_verdict(record, audit).as_json()})


def stale(place: Path) -> list[str]:
    """Return the files of a hand-over folder that tell another verdict or run than its record and audit."""
    try:
        facts = gather(place)
    except PalinodeError:  # `palinode report` says why
        return ["record.json"]
    verdict = run_verdict(facts.record, facts.audit).sentence
    found = [] if at(facts.record, "verdict", "sentence") == verdict else ["record.json"]
    stated = json.dumps(verdict, ensure_ascii=False).encode()
    model = str(at(facts.record, "models", "unlearned", "fingerprint")).encode()
    reports = [place / f"{NAME}{suffix}" for suffix in (".json", ".html", ".md")]
    texts = {path.name: path.read_bytes() for path in (*reports, place / "README.md") if path.exists()}
    card, older = texts.pop("README.md", stated), stated not in texts.get(f"{NAME}.json", stated)
    found += [name for name, text in texts.items() if older or model not in text]
    return [*found, *(["README.md"] if stated not in card else [])]


def full_report(record: Mapping[str, Any], workspace: Path) -> Path:
    """Return where the report with answers of a run lies, or would."""
    output = at(record, "recipe", "output") or {}
    shared = output.get("workspace") is not None  # one that was named may serve several runs
    return workspace / (f"{NAME}-{Path(output['folder']).name}.html" if shared else f"{NAME}.html")


def write_reports(facts: Facts, page: Path, suffixes: Sequence[str] = SUFFIXES) -> dict[str, Any]:
    """Write a report beside `page` under each suffix, and return its content; texts are for its owner alone.

    Raises OutputError when texts of the rows would come to lie in an unlearned model's folder.
    """
    for around in page.resolve().parents if facts.texts else ():
        if (around / "record.json").exists() and (around / "config.json").exists():
            raise OutputError(
                f"{page} lies in the unlearned model {around}, which must not carry the text of the rows; "
                "name another --output, or add --without-texts"
            )
    content = report_content(facts)
    with private() if facts.texts else nullcontext():
        for suffix in suffixes:
            place = page.with_suffix(suffix)
            if suffix == ".json":
                write_json(place, content)
            else:
                write_text(place, html_report(content) if suffix == ".html" else markdown_report(content))
    return content


def suffixes_for(facts: Facts, output: Path | None) -> Sequence[str]:
    """Return what to write: as the output's name says, else everything that is not there already."""
    if output is None:
        return SUFFIXES[:1] if facts.kind in ("audit", "compare") else SUFFIXES  # these have their own
    if output.suffix not in SUFFIXES:
        raise OutputError(f"{output} is no name for a report; let it end in {', '.join(SUFFIXES)}")
    return (output.suffix,)


def default_page(facts: Facts, place: Path) -> Path:
    """Return where a report goes when nobody says: of a run with texts, into its workspace."""
    in_workspace = facts.kind == "unlearn" and facts.texts and facts.elsewhere
    return Path(facts.elsewhere) if in_workspace and facts.elsewhere else place / f"{NAME}.html"


def gather(place: Path, *, audit: Path | None = None) -> Facts:
    """Return what is known about the folder of a run, an audit, a comparison or a demo, texts included.

    `texts` is false where the outcomes are gone. Raises InputError for any other folder, and MismatchError
    when the audit is of another model.
    """
    others: dict[str, Callable[[], Facts]] = {
        "demo.json": lambda: _demo(place),
        "record.json": lambda: _run(place, audit),
        "audit.json": lambda: Facts("audit", audit=_read(place / "audit.json")),
        "table.json": lambda: Facts("compare", _read(place / "table.json")),
    }
    kind = next((name for name in others if (place / name).exists()), None)
    if kind and kind != "record.json" and audit:
        raise InputError(
            f"--audit goes with an unlearned model's folder, and {place} holds {kind}; leave it out"
        )
    if kind:
        return others[kind]()
    raise InputError(
        f"{place} holds no record of an unlearning run, an audit, a comparison or a demo; name a folder "
        "that one of these wrote"
    )


def _run(place: Path, audited_in: Path | None) -> Facts:
    """Return what is known of a run, with the audit in that folder, or the one told of before."""
    record = _read(place / "record.json")
    if "unlearned" not in (at(record, "models") or {}):
        raise InputError(f"{place / 'record.json'} is not the record of an unlearning run")
    known = (audited_in or place) / AUDIT
    audit = _read(known) if audited_in or known.exists() else None
    if audit is not None:
        audited, own = at(audit, "models", "audited") or {}, record["models"]["unlearned"]
        if audited.get("fingerprint") != own.get("fingerprint"):
            raise MismatchError(
                f"the audit is of another model ({audited.get('location')}) than was written to "
                f"{own.get('location')}; name an audit of that, and see with palinode verify that it is whole"
            )
    workspace = find_workspace(place, record)
    outcomes = outcomes_of(record, workspace) if workspace else {}
    elsewhere = str(full_report(record, workspace)) if workspace else None
    return Facts("unlearn", record, audit, outcomes, texts=bool(outcomes), elsewhere=elsewhere)


def _demo(place: Path) -> Facts:
    """Return the demo's own unlearning, with the task vector as one model more."""
    facts, other = _run(place / "unlearned", None), _run(place / "task_vector", None)
    plain = at(other.record, "scores", "unlearned")
    scores = {**(facts.record.get("scores") or {}), **({"task_vector": plain} if plain else {})}
    answers = {"task_vector": other.outcomes["unlearned"]} if other.outcomes else {}
    return replace(
        facts,
        kind="demo",
        record={**facts.record, "scores": scores},
        outcomes={**facts.outcomes, **answers},
        demo=_read(place / "record.json"),
    )


def find_workspace(place: Path, record: Mapping[str, Any]) -> Path | None:
    """Return the workspace of a run's folder, wherever the run was started; None when it is gone."""
    named = at(record, "recipe", "output", "workspace")
    candidates = [Path(named)] if named else []
    home = place.resolve()
    candidates += [workspace_beside(home), home.parent / "workspace"]
    return next((folder for folder in candidates if any(folder.glob("evaluate-*/step.json"))), None)


def outcomes_of(record: Mapping[str, Any], workspace: Path) -> Outcomes:
    """Return the outcomes of a run's models; empty unless all of them are there."""
    steps = record.get("outcomes") or {}
    folders = {model: workspace / steps[model] for model in record["models"] if model in steps}
    if len(folders) < len(record["models"]) or any(not folder.is_dir() for folder in folders.values()):
        return {}
    found = {}
    for model, folder in folders.items():
        files = {path.stem: path for path in folder.glob("*.jsonl")}
        labels = known_first(files, ("forget", "retain"))
        found[model] = {label: tuple(read_outcomes(files[label])) for label in labels}
    return in_order(found)


def in_order(outcomes: Outcomes) -> Outcomes:
    """Return the outcomes with the models we know by name first."""
    return {model: outcomes[model] for model in known_first(outcomes, MODELS)}


def _read(path: Path) -> Any:
    with told_as(InputError, f"{path} cannot be read", "name a folder whose record is whole"):
        return read_json(path)


# What a finished run has left behind


def read_record(folder: Path) -> Mapping[str, Any]:
    """Return the record beside an unlearned model; raises CheckpointError where there is none."""
    try:
        record = read_json(folder / "record.json")
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no record.json; name the output folder of palinode unlearn or run"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'record.json'} cannot be read ({error}); run it again") from None
    if not isinstance(record, dict) or "recipe" not in record or "models" not in record:
        raise CheckpointError(f"{folder / 'record.json'} is no record of palinode unlearn; name its output")
    return record


def find_model(
    record: Mapping[str, Any], role: str, workspace: Path, *, hint: str | None = None
) -> Checkpoint | None:
    """Return the target or base of a run, None where its very weights are not found any more.

    Looked at are `hint`, the place that the record names, and the workspace, where [prepare] makes a target.
    """
    entry = record["models"].get(role)
    if entry is None:
        return None
    allowed = bool(record["recipe"]["models"].get("allow_pickle"))
    made = sorted(workspace.glob(f"finetune-{role}-*/model")) + sorted(workspace.glob("merge-*/model"))
    for place in (hint, entry["location"], *made):
        if place is None or not Path(place).expanduser().exists():
            continue
        try:
            model = Checkpoint.open(place, allow_pickle=allowed)
        except PalinodeError:
            continue
        if model.fingerprint() == entry["fingerprint"]:
            return model
    return None

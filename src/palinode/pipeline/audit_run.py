"""An audit: the same attacks with the same budget on every model, compared with the reference model.

Every (attack, model) result is kept under the fingerprint of what went into it, so an audit that was
stopped goes on where it was, and one that is repeated with another policy measures nothing again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palinode.audit.attack import RESULT, Attack, AttackCost, Subject
from palinode.audit.attacks import ATTACKS, TOLD
from palinode.audit.findings import AUDITED, STATISTICS, Finding, answer, find
from palinode.audit.material import AuditRows
from palinode.audit.policy import Kind, Policy, told_right
from palinode.data.examples import Example, check_no_forget_rows, reading_notes
from palinode.data.tokenize import PromptStyle, prompt_notes, tokenize
from palinode.errors import CheckpointError, DivergenceError, MismatchError, RecipeError
from palinode.models.loading import load_tokenizer, pick_device, tokenizer_fingerprint
from palinode.pipeline.inputs import check_folder, notes_on_prompts
from palinode.pipeline.reporting import environment, heading, model_facts, read_record, row_facts
from palinode.pipeline.workspace import Workspace
from palinode.progress import Listener, NullListener
from palinode.records import shared, write_json, write_text
from palinode.report.reports import Facts, html_report, markdown_report, report_content
from palinode.report.words import at
from palinode.settings import AuditSettings
from palinode.weights import Checkpoint
from palinode.weights.atomic import check_apart
from palinode.weights.fingerprints import check_same

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUDIT_VERSION = 2
"""Version of the layout of audit.json, described in docs/audit.md."""

TARGET = "target"
RECORD, REPORT, PAGE, RESULTS = "audit.json", "audit.md", "report.html", "results"
"""What an audit's folder holds."""

UNEVEN = 0.2
"""How far from one half the reference model's AUC may lie before a note says so; a judgement."""

BESIDE = 0.05
"""By how much more the neighbours of the forget rows must have lost for a note to say so; a judgement."""

STUDIED = ("membership.", "relearn_forget.", "relearn_retain.")
"""Tests that find less after a projection than after least squares (docs/filters.md)."""

NOTES = TOLD["notes"]
"""What a reader should know before believing the answer."""

Findings = dict[str, dict[str, Finding]]
"""Findings by model and test."""


@dataclass(frozen=True, slots=True)
class AuditPlan:
    """Everything that decides an audit."""

    models: Mapping[str, str]
    """Locations of the audited model, the reference model and, if there is one, the target."""
    kind: Kind
    material: AuditRows
    locations: Mapping[str, str | None]
    """Where each set of rows is from."""
    policy: Policy
    settings: AuditSettings
    """Of these, what is not in material and policy."""

    @property
    def attacks(self) -> Sequence[str]:
        """Attacks to run; the others are reported as not asked for."""
        return self.settings.attacks or tuple(ATTACKS)

    def reasons(self) -> dict[str, str]:
        """Return why attacks are not run, by attack."""
        found: dict[str, str] = {}
        for name, attack in ATTACKS.items():
            if name not in self.attacks:
                found[name] = "it was not asked for"
            elif not attack.needs(self.material):
                found[name] = attack.lacking
            elif absent := [model for model in attack.beside if model not in self.models]:
                found[name] = f"no {absent[0]} was named; name it with --{absent[0]}"
            elif lacking := attack.unavailable():
                found[name] = lacking
        return found

    def costs(self) -> dict[str, AttackCost]:
        """Return what each attack that is run takes on one model."""
        left_out = self.reasons()
        own = {name: attack for name, attack in ATTACKS.items() if name not in left_out}
        return {name: attack.cost(self.material, self.policy.budget) for name, attack in own.items()}

    @property
    def style(self) -> PromptStyle:
        """How questions are put."""
        return self.settings.style or PromptStyle()


def open_audit(plan: AuditPlan, output: Path, *, listener: Listener | None = None) -> _AuditRun:
    """Return an audit that can be run, its models opened; raises what `audit` raises before it measures."""
    if unknown := [name for name in plan.attacks if name not in ATTACKS]:
        raise RecipeError(f"there is no attack {', '.join(unknown)}; choose among {', '.join(ATTACKS)}")
    rows = plan.material
    others = {"retain": rows.retain, "holdout": rows.holdout, "lookalikes": rows.lookalikes}
    check_no_forget_rows(rows.forget, others)
    checkpoints = {
        name: Checkpoint.open(location, allow_pickle=plan.settings.allow_pickle)
        for name, location in plan.models.items()
    }
    check_folder(output, (RECORD, REPORT, PAGE, RESULTS), "audit")
    check_apart(output, (model.folder for model in checkpoints.values()))
    return _AuditRun(plan, checkpoints, Workspace(output / RESULTS), listener or NullListener())


def audit(plan: AuditPlan, output: Path, *, listener: Listener | None = None) -> dict[str, Any]:
    """Run an audit, write audit.json, audit.md and report.html into `output`, and return the record.

    Raises an InputError for models, rows or a folder that cannot be used.
    """
    run = open_audit(plan, output, listener=listener)
    with run.workspace.locked(listener):
        record = run.record()
        with shared():
            write_json(output / RECORD, record)
            content = report_content(Facts("audit", audit=record))
            write_text(output / REPORT, markdown_report(content))
            write_text(output / PAGE, html_report(content))
    return record


class _AuditRun:
    """One audit in progress."""

    def __init__(
        self, plan: AuditPlan, checkpoints: Mapping[str, Checkpoint], workspace: Workspace, listener: Listener
    ) -> None:
        self.plan, self.checkpoints, self.workspace, self.listener = plan, checkpoints, workspace, listener
        self.device = pick_device(plan.settings.device)
        self.tokenizer = load_tokenizer(checkpoints[AUDITED])
        self.tokens = tokenizer_fingerprint(checkpoints[AUDITED])
        _check_vocabulary(checkpoints, self.tokenizer, plan.material.forget, plan.style)

    def record(self) -> dict[str, Any]:
        """Measure every model, compare, and return the record."""
        started, plan = datetime.now(UTC), self.plan
        notes = notes_on_prompts(
            self.checkpoints.get(TARGET),
            plan.material.forget,
            plan.style,
            max_length=plan.policy.budget.max_length,
            device=plan.settings.device,
            workspace=self.workspace,
            listener=self.listener,
        )
        reasons = plan.reasons()
        runnable = [attack for attack in ATTACKS.values() if attack.name not in reasons]
        facts = {name: self._measured(name, runnable) for name in self.checkpoints}
        findings: dict[str, Findings] = {}
        attacks: dict[str, Any] = {}
        for name, attack in ATTACKS.items():
            own = {model: found[name] for model, found in facts.items() if name in found}
            if failed := [f"{m}: {f['reason']}" for m, f in own.items() if m != TARGET and f["reason"]]:
                reasons[name] = "; ".join(failed)
            facts_of = {"title": attack.title, "description": attack.description}
            attacks[name] = {**facts_of, "reason": reasons.get(name)}
            if name not in reasons:
                own = {model: fact for model, fact in own.items() if not fact["reason"]}
                results = {m: RESULT.validate_python(fact["measurement"]) for m, fact in own.items()}
                findings[name] = find(attack, results, plan.policy, seed=plan.settings.seed)
                attacks[name] |= _entry(attack, own, findings[name])
        audited = {name: found[AUDITED] for name, found in findings.items()}
        return {
            **heading(AUDIT_VERSION, started=started, verb="audit"),
            "seed": plan.settings.seed,
            "reference": plan.kind,
            "models": {
                name: model_facts(plan.models[name], checkpoint)
                for name, checkpoint in self.checkpoints.items()
            },
            "data": {
                name: row_facts(plan.locations.get(name), examples)
                for name, examples in plan.material.sets().items()
            },
            "policy": plan.policy.model_dump(mode="json"),
            "prompts": asdict(plan.style),
            "attacks": attacks,
            "answer": asdict(answer(audited, reasons, plan.policy)),
            "notes": [*notes, *self._notes(findings)],
            "environment": environment(self.device),
        }

    def _measured(self, name: str, attacks: Sequence[Attack]) -> dict[str, Mapping[str, Any]]:
        """Return the facts of every attack on one model, read back where they are there."""
        subject = Subject(
            name,
            self.checkpoints[name],
            self.tokenizer,
            device=self.device,
            style=self.plan.style,
            seed=self.plan.settings.seed,
            beside=self.checkpoints,
            listener=self.listener,
        )
        before = subject.checkpoint.fingerprint()
        facts = {attack.name: self._facts(subject, attack, before) for attack in attacks}
        subject.release()
        return facts

    def _facts(self, subject: Subject, attack: Attack, before: str) -> Mapping[str, Any]:
        rows, budget = self.plan.material, self.plan.policy.budget
        step = self.workspace.step(
            attack.name,
            model=subject.checkpoint.fingerprint(),
            tokenizer=self.tokens,
            rows=rows.fingerprint(),
            prompts=asdict(self.plan.style),
            lookalikes=rows.lookalikes_column,
            budget=budget.model_dump(),
            seed=self.plan.settings.seed,
            device=self.device.type,
            beside={
                model: self.checkpoints[model].fingerprint()
                for model in (*attack.beside, *attack.looks_at)
                if model in self.checkpoints
            },
        )

        def measured() -> Mapping[str, Any]:
            started = time.monotonic()
            try:
                found, reason = asdict(attack.measure(subject, rows, budget)), None
            except (DivergenceError, MismatchError) as error:
                found, reason = None, str(error)
            check_same(subject.checkpoint, before)
            seconds = round(time.monotonic() - started, 1)
            return {"measurement": found, "reason": reason, "seconds": seconds}

        return step.once(measured)

    def _notes(self, findings: Mapping[str, Findings]) -> list[str]:
        """Return what a reader should know before believing the answer."""
        material = self.plan.material
        notes = reading_notes(*material.sets().values())
        notes += prompt_notes(material.forget, self.tokenizer, self.plan.style)
        if self.plan.kind == "base":
            notes.append(NOTES["base"])
        prints = {name: checkpoint.fingerprint() for name, checkpoint in self.checkpoints.items()}
        same = [name for name in prints if name != AUDITED and prints[name] == prints[AUDITED]]
        if same:
            notes.append(f"The audited and the {same[0]} model have the same weights.")
        if uneven := _uneven(findings):
            notes.append(NOTES["uneven"].format(aucs=", ".join(uneven)))
        near = findings.get("neighbours", {}).get(AUDITED, {})
        changes = {name: found.difference.value for name, found in near.items()}
        lost = {name: value for name, value in changes.items() if value is not None}
        if "rest" in lost and min(lost.values()) < lost["rest"] - BESIDE:
            told = (
                f"{name} {near[name].score.value:.2f} ({near[name].reference.value:.2f})" for name in lost
            )
            notes.append(NOTES["beside"].format(told=", ".join(told)))
        margins = self.plan.policy.margins
        blind = [key for key in _keys(findings, TARGET, "within") if margins[key].above is not None]
        if blind:
            notes.append(NOTES["blind"].format(tests=", ".join(blind)))
        more = [key for key in _keys(findings, AUDITED, "knows more") if key.startswith(STUDIED)]
        if more and _by_least_squares(self.checkpoints[AUDITED].folder):
            notes.append(NOTES["filtered"].format(tests=", ".join(more)))
        return notes


def _uneven(findings: Mapping[str, Findings]) -> list[str]:
    """Return the membership tests with the reference model's own AUC, where it lies far from one half."""
    scores = {
        test: finding.reference for test, finding in findings.get("membership", {}).get(AUDITED, {}).items()
    }
    return [
        f"{test} {score.value:.2f}"
        for test, score in scores.items()
        if score.value is not None and score.low is not None and score.high is not None
        if abs(score.value - 0.5) > UNEVEN and not score.low <= 0.5 <= score.high
    ]


def _keys(findings: Mapping[str, Findings], model: str, verdict: str) -> list[str]:
    return [
        f"{attack}.{test}"
        for attack, models in findings.items()
        for test, finding in models.get(model, {}).items()
        if finding.verdict == verdict
    ]


def _by_least_squares(folder: Path) -> bool:
    """Say whether a model is a run's whose vector went through least squares (μ of 0 is a projection)."""
    with suppress(CheckpointError):
        told = at(read_record(folder), "vectors", "transforms") or ()
        return any(one["name"] == "least_squares" and one["settings"]["mu"] for one in told)
    return False


def _entry(attack: Attack, facts: Mapping[str, Any], findings: Findings) -> dict[str, Any]:
    """Return what the record holds of an attack that was run."""
    return {
        "seconds": {model: fact["seconds"] for model, fact in facts.items()},
        "details": {model: fact["measurement"]["details"] for model, fact in facts.items()},
        "tests": {
            test.name: {
                "title": test.title,
                "told_right": told._asdict()
                if (told := told_right().get(f"{attack.name}.{test.name}"))
                else None,
                "statistic": STATISTICS[test.statistic],
                "findings": {model: asdict(found[test.name]) for model, found in findings.items()},
            }
            for test in attack.tests
        },
    }


def _check_vocabulary(
    checkpoints: Mapping[str, Checkpoint],
    tokenizer: PreTrainedTokenizerBase,
    forget: Sequence[Example],
    style: PromptStyle,
) -> None:
    """Refuse a model that cannot read the audited model's tokens; added ones count if the rows have them."""
    rows = tokenize(forget, tokenizer, max_length=sys.maxsize, style=style)
    tokens = max(tokenizer.vocab_size, 1 + max(max(row.ids) for row in rows))
    for name, checkpoint in checkpoints.items():
        size = checkpoint.config.get("vocab_size")
        if isinstance(size, int) and size < tokens:
            raise MismatchError(
                f"the {name} model has {size} tokens and the audited model's tokenizer {tokens} (the last is "
                f"{tokenizer.convert_ids_to_tokens(tokens - 1)!r}); every model of an audit is asked through "
                "that tokenizer, so name models of one family"
            )

"""What is done with erasure requests, each act one event of the ledger.

    served model of a set S of requests = θ_D − one vector for the rows of all of S

Rows stay where the owner keeps them; the ledger has salted hashes. A set's rows are read in an order of their
own, so that a model depends on the set and not on the way to it: a withdrawn request leaves the model that
never had it, bit for bit. Heavy work (a run, an audit) ends before its event is written, and finds its own
steps again after an interruption; `served`, a link, follows the event that says so.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from palinode.data.examples import Example, at_most, fingerprint_examples, hash_texts, read_examples
from palinode.errors import DataError, LedgerError, OutputError, PalinodeError, RecipeError, meant, told_as
from palinode.history.locating import Location
from palinode.metrics.table import score_outcomes
from palinode.pipeline.recipe import Recipe, build_recipe, explain, laid_over
from palinode.pipeline.reporting import gather, refresh
from palinode.pipeline.workspace import fingerprint
from palinode.progress import Listener, NullListener
from palinode.records import private, read_bytes, read_json, write_text
from palinode.report.verdicts import audit_verdict
from palinode.requests.ledger import WHOLE, Event, Ledger, Model, Request, Standing, standing
from palinode.settings import AuditSettings, StrictModel
from palinode.weights import Checkpoint
from palinode.weights.store import check_manifest

if TYPE_CHECKING:
    from palinode.pipeline.run import Unlearned

ID = re.compile(r"\w[\w.-]{0,63}", re.ASCII)
ASKED = "answer_probability"
"""What each request's rows are asked after every change."""
ALL = "all"
"""Folder of the audit on all requests together; no request has that name."""
GRAVE = ("knows more", "knows less")
"""Verdicts of a test that count against a model."""


class Terms(StrictModel):
    """What must be so before a model is published, and how long a request may take."""

    days: int = 30
    """Until a request is due, from the day it was received."""
    approval: bool = False
    """Nothing is published that no named person approved."""
    audit: bool = False
    """Nothing is published before every request in it was audited on it."""
    budget: Literal["quick", "standard", "full"] = "quick"
    """Of the audits."""


class Desk:
    """Everything that is done with the requests of one folder.

    The folder holds the ledger, the salt of its hashes, models, audits, the workspace of the runs, and
    `served`, a link to the model that is to be used. Each act raises a PalinodeError for what cannot be done.
    """

    def __init__(
        self, folder: str | Path, *, user: str | None = None, listener: Listener | None = None
    ) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self.ledger = Ledger(self.folder, user=user)
        self.listener = listener or NullListener()

    def standing(self) -> Standing:
        """Return what stands now."""
        return standing(self.ledger.events())

    # Intake

    def configure(
        self, recipe: Mapping[str, Any], policy: Terms | Mapping[str, Any] | None = None
    ) -> Standing:
        """Say how requests are carried out, for the first time or anew; make the folder where there is none.

        `recipe` is the content of a recipe without forget rows and output, dotted or as sections.
        """
        content = laid_over({}, recipe)
        for section in ("models", "data"):
            content[section] = {
                key: _absolute_place(value) if isinstance(value, str) else value
                for key, value in content.get(section, {}).items()
            }
        to_come = {"data.forget": "-", "output.folder": "-"}
        if "base" not in content["models"]:  # it may be located for each request
            to_come["models.base"] = "-"
        checked = build_recipe(laid_over(content, to_come))
        try:
            rules = policy if isinstance(policy, Terms) else Terms.model_validate(policy or {})
        except ValidationError as error:
            raise RecipeError(f"the policy cannot be kept: {explain(error)}") from None
        if checked.models.target is None:
            raise RecipeError("requests are carried out on a model that is there; name --target")
        target = Checkpoint.open(checked.models.target, allow_pickle=checked.models.allow_pickle)
        facts = {"recipe": content, "policy": rules.model_dump(), "target": target.fingerprint()}
        self._make_folder()

        def decide(events: Sequence[Event]) -> Mapping[str, Any] | None:
            now = standing(events)
            if now.target and now.models and now.target != facts["target"]:
                raise LedgerError(
                    "the target is another model than the one that requests were carried out on; begin a "
                    "ledger of its own for it"
                )
            same = (now.recipe, now.policy, now.target) == (content, facts["policy"], facts["target"])
            return None if same else {"kind": "configured", "after": facts["target"], "facts": facts}

        self.ledger.append(decide)
        return self.standing()

    def add(
        self,
        name: str,
        rows: str | Path,
        *,
        reference: str = "",
        received: date | None = None,
        due: date | None = None,
    ) -> Request:
        """Take a request in: its rows are read, hashed and left where they are.

        The same request again says where its rows are now, and what else is given: reference and dates.
        """
        if not ID.fullmatch(name) or name.lower() == ALL:
            raise RecipeError(
                f"{name!r} is no name for a request; use letters, digits, '-', '_' and '.', but not {ALL!r}"
            )
        today = datetime.now(UTC).date()
        if received and received > today + timedelta(days=1):  # it may be tomorrow where the owner lives
            raise RecipeError(f"{name} would be received on {received}, and today is {today}; mend the date")
        location = _absolute_place(str(rows))
        now = self.standing()
        hashes = self._hashes(self._read(location, now))
        usual = timedelta(days=now.policy.get("days", Terms().days))

        def decide(events: Sequence[Event]) -> Mapping[str, Any] | None:
            requests = standing(events).requests
            known = requests.get(name)
            if known and known.hashes != tuple(hashes):
                raise LedgerError(
                    f"there is a request {name} with other rows ({known.rows}, received {known.received}); "
                    "give this one another name"
                )
            if known and known.withdrawn:
                raise LedgerError(f"the request {name} was withdrawn; give the new one another name")
            if alike := next((one for one in requests if one != name and one.lower() == name.lower()), None):
                raise LedgerError(
                    f"there is a request {alike}, and some disks take {name} for the same; give another name"
                )
            came = received or (known.received if known else today)
            until = due or (known.due if known and came == known.received else came + usual)
            if until < came:
                raise RecipeError(
                    f"{name} would be due on {until}, before it was received on {came}; mend a date"
                )
            told = {"received": str(came), "due": str(until), "location": location}
            told |= {"reference": reference} if reference or not known else {}
            if known is None:
                facts = {**told, "rows": len(hashes), "hashes": hashes}
                return {"kind": "added", "request": name, "facts": facts}
            new = {what: value for what, value in told.items() if value != str(getattr(known, what))}
            kind = "rows moved" if [*new] == ["location"] else "changed"
            return {"kind": kind, "request": name, "facts": new} if new else None

        self.ledger.append(decide)
        return self.standing().requests[name]

    def locate(self, name: str, checkpoints: str, **evidence: Any) -> tuple[Request, Location]:
        """Find the last checkpoint that had not seen a request's rows; its model is made from that one.

        `evidence` are arguments of `palinode.locate`.
        """
        from palinode import jobs  # imports torch, which most verbs of a ledger do without

        now = self.standing()
        request = self.known(now, name)
        target = now.recipe["models"]["target"]
        self._rows(request, now)
        found = jobs.locate(request.location, checkpoints, target=target, listener=self.listener, **evidence)
        base, facts = jobs.chosen_base(found)
        facts = {**facts, "base": _absolute_place(base)}
        self.ledger.append({"kind": "located", "request": name, "facts": facts})
        return self.standing().requests[name], found

    # Carrying out

    def carry_out(self, names: Iterable[str] | None = None) -> tuple[Model, Unlearned | None]:
        """Make the model for the open requests named, and those carried out before; without names for all.

        Returns it, and the run that made it; there was none where it stood before, or no request is open.
        """
        from palinode.pipeline.run import unlearn

        now = self.standing()
        self._settle(now)
        target = str(now.recipe["models"]["target"])
        chosen = [request.id for request in now.open] if names is None else [*names]
        chosen = [self.known(now, name).id for name in chosen] + now.carried
        wanted = [request for request in now.open if request.id in chosen]
        current = now.candidate
        if not wanted and current is None:
            raise LedgerError("no request is open; add one first: palinode requests add ID --rows FILE")
        ids = tuple(request.id for request in wanted)
        rows = self._in_order(ids, now)
        recipe = self._recipe(now, rows)
        folder = os.path.relpath(recipe.output.folder, self.folder) if recipe else target
        same = current and (current.requests, current.folder) == (ids, folder)
        if current and same and (recipe is None or (self.place(current) / "record.json").exists()):
            return current, None
        result = unlearn(recipe, listener=self.listener, located=_located(wanted)) if recipe else None
        made = result.record["models"]["unlearned"]["fingerprint"] if result and result.output else None
        facts = {
            "requests": list(ids),
            "folder": folder if made else target,
            "set": Path(folder).name if recipe else "",
            "base": recipe.models.base if recipe else None,
            "verdict": dict(result.verdict) if result else NO_REQUEST,
            "scores": _scores(result, recipe, rows) if result and recipe else {},
        }
        before = current.fingerprint if current else now.target
        event = {"kind": "carried out", "before": before, "after": made or now.target, "facts": facts}
        self.ledger.append(event)
        return self._candidate(self.standing()), result

    def audit(self, names: Iterable[str] = ()) -> dict[str, Mapping[str, Any]]:
        """Audit the candidate on the rows of each of its requests, and of all; return what was found.

        Without names a request of one row, which cannot be audited by itself, is left to the audit of all.
        Each finding names what is worse than at the last audit of that request, on another model.
        """
        now = self.standing()
        model = self._candidate(now)
        chosen = [self.known(now, name).id for name in names]
        if strange := [name for name in chosen if name not in model.requests]:
            raise LedgerError(
                f"{strange[0]} is not carried out yet: palinode requests carry-out {strange[0]}"
            )
        if not model.requests:
            raise LedgerError("the candidate is the target itself, as no request is open: nothing to audit")
        listed = str(self._list(model.set, self._in_order(model.requests, now), now))  # wherever they are now
        self._check_written(model)
        former = [one.audits for one in reversed(now.models) if one.fingerprint != model.fingerprint]
        found: dict[str, Mapping[str, Any]] = {}
        several = [name for name in model.requests if now.requests[name].rows > 1]
        for name in chosen or [WHOLE, *(several if len(model.requests) > 1 else ())]:
            self.listener.say(f"auditing {name or 'all requests together'}")
            record = self._audited(now, model, name, listed)
            facts = audit_facts(record, before=next((one[name] for one in former if name in one), None))
            if name == WHOLE and (known := self.place(model) / "record.json").exists():
                facts |= read_json(known)["verdict"]  # that of the run, which knows of the audit now
            for one in [name, *(model.requests if len(model.requests) == 1 and not name else ())]:
                event = {"kind": "audited", "request": one, "after": model.fingerprint, "facts": facts}
                self.ledger.append(event)
            found[name] = facts
        return found

    def approve(self, by: str, *, note: str = "") -> Model:
        """Have a named person agree to the candidate."""
        if not by.strip():
            raise RecipeError("an approval needs the name of whoever gives it; say --by NAME")
        kept = {"kind": "approved", "facts": {"by": by.strip(), "note": note}}
        self.ledger.append(lambda events: {**kept, "after": self._candidate(standing(events)).fingerprint})
        return self._candidate(self.standing())

    def publish(self, *, despite: str = "") -> Model:
        """Have the candidate served, if policy and verdict allow it; `despite` is why a red one is."""
        model = self._candidate(self.standing())
        self._check_written(model)

        def decide(events: Sequence[Event]) -> Mapping[str, Any] | None:
            now = standing(events)
            candidate = self._candidate(now)
            if candidate.fingerprint != model.fingerprint:
                raise LedgerError("another model was made meanwhile; look at it, and publish again")
            if why := hindrance(now, despite=bool(despite.strip())):
                raise LedgerError(why)
            before = now.served.fingerprint if now.served else now.target
            if now.served and (before, now.served.requests) == (model.fingerprint, model.requests):
                return None
            facts = {"requests": list(candidate.requests), "despite": despite}
            return {"kind": "published", "before": before, "after": candidate.fingerprint, "facts": facts}

        self.ledger.append(decide)
        self._settle(self.standing())
        return model

    def withdraw(self, name: str, *, reason: str = "") -> tuple[Model | None, Unlearned | None]:
        """Take a request back, and make the model that never had it; None where it was not carried out."""

        def decide(events: Sequence[Event]) -> Mapping[str, Any] | None:
            request = self.known(standing(events), name, withdrawn=True)
            facts = {"reason": reason}
            return None if request.withdrawn else {"kind": "withdrawn", "request": name, "facts": facts}

        self.ledger.append(decide)
        now = self.standing()
        if now.candidate is None or not now.outdated:
            return None, None
        try:
            return self.carry_out([])
        except PalinodeError as error:
            kept = f"{name} is withdrawn, and that stands; the model without it is not made yet: {error}"
            raise type(error)(f"{kept}; then palinode requests carry-out") from error

    # What the acts share

    def place(self, model: Model) -> Path:
        """Return where a model lies."""
        return self.folder / model.folder if model.folder.startswith("models/") else Path(model.folder)

    def _check_written(self, model: Model) -> None:
        place = self.place(model)
        if model.requests and (place / "record.json").exists() and not check_manifest(place).ok:
            raise LedgerError(f"{place} is not what was written; palinode verify {place} says what changed")

    def _make_folder(self) -> None:
        """Make the folder, which others may enter to read the served model, and what they may not see."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise OutputError(f"{self.folder} is no folder; name another --ledger") from None
        with private():
            (self.folder / "sets").mkdir(exist_ok=True)
            if not (self.folder / "salt").exists():
                write_text(self.folder / "salt", secrets.token_hex(32) + "\n")
            self.ledger.create()

    def _read(self, location: str, now: Standing) -> list[Example]:
        try:
            return read_examples(location, columns=now.recipe.get("data", {}).get("columns"))
        except DataError as error:
            where = ", to palinode requests init; it holds for all requests" * ("--columns" in str(error))
            raise DataError(f"{error}{where}") from None

    def _hashes(self, examples: Iterable[Example]) -> list[str]:
        """Return the salted hash of each row."""
        what = f"the salt of the hashes, {self.folder / 'salt'}, cannot be read"
        with told_as(LedgerError, what, "put a copy in its place"):
            salt = bytes.fromhex(read_bytes(self.folder / "salt").decode())
        return [hash_texts(one.texts, salt=salt).hex() for one in examples]

    def _rows(self, request: Request, now: Standing) -> list[Example]:
        """Return a request's rows, as they were when it was taken in; raises DataError where they are not."""
        try:
            examples = self._read(request.location, now)
            found = self._hashes(examples)
            if tuple(found) == request.hashes:
                return examples
            why = f"{len({*found} & {*request.hashes})} of {request.rows} are there, among {len(found)}"
        except DataError as error:
            why = str(error).partition("; give a ")[0]  # any other file is no way out
        raise DataError(
            f"{request.location} does not hold the rows of {request.id} any more ({why}); restore it, or "
            f"say where they are: palinode requests add {request.id} --rows FILE"
        )

    def _in_order(self, ids: Iterable[str], now: Standing) -> dict[str, list[Example]]:
        """Return the rows of requests in the order of what they say."""
        rows = {name: self._rows(now.requests[name], now) for name in ids}
        return dict(sorted(rows.items(), key=lambda item: fingerprint_examples(item[1])))

    def known(self, now: Standing, name: str, *, withdrawn: bool = False) -> Request:
        """Return a request that there is; a withdrawn one only where that is asked."""
        request = now.requests.get(name)
        if request is None:
            raise LedgerError(f"there is no request {name}{meant(name, now.requests)}")
        if request.withdrawn and not withdrawn:
            raise LedgerError(f"the request {name} was withdrawn; add it anew under another name")
        return request

    def _candidate(self, now: Standing) -> Model:
        if now.candidate is None:
            raise LedgerError("no request was carried out yet: palinode requests carry-out")
        return now.candidate

    def _recipe(self, now: Standing, rows: Mapping[str, Sequence[Example]]) -> Recipe | None:
        """Return the recipe of a set of requests, None for none; write the list of where its rows are."""
        models = now.recipe["models"]
        target = Checkpoint.open(models["target"], allow_pickle=models.get("allow_pickle", False))
        if target.fingerprint() != now.target:
            raise LedgerError(
                f"{models['target']} is not the model that the ledger began with; put that back, or begin "
                "a ledger of its own for it"
            )
        if not rows:
            return None
        content, wanted = dict(now.recipe), [now.requests[name] for name in rows]
        if located := _located(wanted):
            content = laid_over(content, {"models.base": _common_base(now, wanted, located)})
        contents = [*map(fingerprint_examples, rows.values())]
        key = fingerprint(recipe=content, target=now.target, rows=contents)[:12]
        given = {
            "data.forget": str(self._list(key, rows, now)),
            "data.allow_overlap": True,  # what is asked to go cannot be asked to stay
            "output.folder": str(self.folder / "models" / key),
            "output.workspace": str(self.folder / "work"),
        }
        return build_recipe(laid_over(content, given))

    def _list(self, key: str, names: Iterable[str], now: Standing) -> Path:
        """Write where the rows of a set of requests are."""
        listed = self.folder / "sets" / f"{key}.list"
        with private():
            write_text(listed, "".join(f"{now.requests[name].location}\n" for name in names))
        return listed

    def _audited(self, now: Standing, model: Model, name: str, listed: str) -> Mapping[str, Any]:
        """Return the record of one audit; that of all rows is told of in the model's folder."""
        from palinode import jobs

        models, data = now.recipe["models"], now.recipe.get("data", {})
        retrained, against = models.get("retrained"), models.get("retrained") or model.base
        if against is None:
            raise LedgerError(
                "an audit needs a model that never saw the rows; name one: init --base or --retrained"
            )
        output = self.folder / "audits" / model.set / (name or ALL)
        settings = AuditSettings(
            budget=now.policy["budget"],
            leave_out=listed,
            columns=data.get("columns") or None,
            device=now.recipe.get("device", "auto"),
            seed=now.recipe.get("seed", 0),
            allow_pickle=models.get("allow_pickle", False),
        )
        found = jobs.audit(
            self.place(model),
            against=against,
            forget=now.requests[name].location if name else listed,
            output=output,
            kind="retrained" if retrained else "base",
            target=models["target"],
            retain=data.get("retain"),
            holdout=data.get("holdout"),
            settings=settings,
            listener=self.listener,
        )
        if name == WHOLE and (self.place(model) / "record.json").exists():
            refresh(gather(self.place(model), audit=output), self.place(model))
        return found.record

    def _settle(self, now: Standing) -> None:
        """Have the link `served` lead where the ledger says, whatever was killed in between."""
        place = self.place(now.served) if now.served else None
        link = self.folder / "served"
        wanted = os.path.relpath(place, self.folder) if place and place.is_dir() else None
        if wanted is None or (link.is_symlink() and str(link.readlink()) == wanted):
            return
        partial = self.folder / ".served.partial"
        partial.unlink(missing_ok=True)
        partial.symlink_to(wanted)
        partial.replace(link)


NO_REQUEST = {
    "code": "nothing to forget",
    "light": "green",
    "symbol": "✓",
    "sentence": "No request is open: this is the target itself.",
}
"""In place of the verdict on a model that stands for no request."""


def hindrance(now: Standing, *, despite: bool = False) -> str | None:
    """Return why the candidate may not be published; None where it may."""
    model = now.candidate
    assert model is not None
    if now.outdated:
        return "a request was withdrawn after this model was made; make it anew: palinode requests carry-out"
    alone = len(model.requests) == 1
    unaudited = [  # by their own rows, or where there is only one by all
        name
        for name in model.requests
        if name not in model.audits
        and not (WHOLE in model.audits and (alone or now.requests[name].rows == 1))
    ]
    if now.policy.get("audit") and unaudited:
        return f"{unaudited[0]} was not audited on this model, as the policy asks: palinode requests audit"
    verdicts = {"all requests together": model.verdict}
    verdicts |= {name: told for name, told in model.audits.items() if name}
    red = next((name for name, told in verdicts.items() if told["light"] == "red"), None)
    if red and not despite:
        return (
            f"the verdict on {red} is red ({verdicts[red]['sentence']}); mend it, or say why it is published "
            'all the same: --despite "WHY"'
        )
    if now.policy.get("approval") and not model.approved_by:
        return "nobody has approved this model, as the policy asks: palinode requests approve --by NAME"
    return None


def audit_facts(record: Mapping[str, Any], *, before: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what the ledger keeps of an audit: verdict, tests, and what got worse since `before`."""
    tests = {}
    for attack, facts in record["attacks"].items():
        for test, found in facts.get("tests", {}).items():
            finding = found["findings"]["audited"]
            tests[f"{attack}.{test}"] = {
                "title": found["title"],
                "value": finding["score"]["value"],
                "verdict": finding["verdict"],
            }
    known = before["tests"] if before else {}
    worse = [
        f"{facts['title']}: {known[name]['verdict']} before, {facts['verdict']} now"
        for name, facts in tests.items()
        if name in known and facts["verdict"] in GRAVE and known[name]["verdict"] not in GRAVE
    ]
    return {**audit_verdict(record).as_json(), "tests": tests, "worse": worse}


def worse_scores(before: Model | None, after: Model) -> list[str]:
    """Return the requests that a model answers better than the one before it did, beyond both intervals.

    What lies within the base's interval is no harm: it had not seen the rows.
    """
    known = before.scores if before else {}

    def top(score: Mapping[str, Any] | None) -> float:
        return 0.0 if score is None else 1.0 if score["high"] is None else score["high"]

    return [
        name
        for name, facts in after.scores.items()
        if name in known
        and (facts["unlearned"]["low"] or 0.0) > top(known[name]["unlearned"])
        and facts["unlearned"]["value"] > top(facts.get("base"))
    ]


def _scores(result: Unlearned, recipe: Recipe, rows: Mapping[str, Sequence[Example]]) -> dict[str, Any]:
    """Return the answer probability of each request's rows, of the models that were asked.

    The run asks once what stands in several requests, and draws of too many rows; one asked counts for each.
    """
    every = read_examples(recipe.data.forget, columns=recipe.data.columns)
    drawn = at_most(every, recipe.evaluation.max_rows, seed=recipe.seed + 1)
    scores: dict[str, Any] = {name: {} for name in rows}
    for model in ("target", "base", "unlearned"):
        outcomes = result.outcomes.get(model, {}).get("forget", ())
        asked = {example.key: outcome for example, outcome in zip(drawn, outcomes, strict=False)}
        for name, examples in rows.items():
            if own := [asked[example.key] for example in examples if example.key in asked]:
                score = score_outcomes(own, names=[ASKED])[ASKED]
                scores[name][model] = {fact: getattr(score, fact) for fact in ("value", "low", "high", "n")}
    return {name: found for name, found in scores.items() if "unlearned" in found}


def _common_base(now: Standing, wanted: Sequence[Request], located: Mapping[str, Any]) -> str:
    """Return the base that no request's rows were seen by: the earliest that was located."""
    earliest = str(located["base"])
    without = next((request for request in wanted if not request.located), None)
    if without and earliest != now.recipe["models"].get("base"):
        raise LedgerError(
            f"{without.id} was not located, and others ask for the base {earliest}; locate it too: palinode "
            f"requests locate {without.id} --checkpoints …"
        )
    return earliest


def _located(wanted: Sequence[Request]) -> Mapping[str, Any] | None:
    """Return the earliest base that was located for one of these requests, and how; None without any."""
    found = [request.located for request in wanted if request.located]
    return min(found, key=lambda facts: facts["step"], default=None)


def _absolute_place(place: str) -> str:
    inside = Path(place).expanduser()
    return str(inside.absolute()) if inside.exists() else place

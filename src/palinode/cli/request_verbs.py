"""`palinode requests`: the ledger of erasure requests, from intake to the model that is served."""

from __future__ import annotations

import shlex
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from palinode.cli.console import answer, ending, given, listener, out, print_json, warn
from palinode.cli.options import JSON, LEDGER, keys, takes, verbs
from palinode.errors import OutputError
from palinode.pipeline.recipe import with_changes
from palinode.records import write_json, write_text

if TYPE_CHECKING:
    from palinode.pipeline.run import Unlearned
    from palinode.requests.desk import Desk
    from palinode.requests.ledger import Model, Standing

requests = typer.Typer(rich_markup_mode=None, no_args_is_help=True)
verb = verbs(requests, "requests ", always=("ledger",))


@requests.callback()
def about() -> None:
    """Keep a ledger of erasure requests.

    Add, carry out, audit, approve, publish, withdraw: one model for all that are open.
    """


def _desk() -> Desk:
    from palinode.requests.desk import Desk as Opened

    return Opened(given("ledger"), listener=listener(quiet=given("quiet") is not False))


@verb(shared=JSON)
@takes(*keys("init"))
def init(
    content: dict[str, Any],
    *,
    days: int = 30,
    need_approval: bool = False,
    need_audit: bool = False,
    budget: str = "quick",
    changes: list[str] | None = None,
) -> None:
    """Begin a ledger, or change how requests are carried out.

    It takes the options of unlearn but for forget rows and output: they hold for every request.
    """

    policy = {"days": days, "approval": need_approval, "audit": need_audit, "budget": budget}
    now = _desk().configure(with_changes(content, changes or ()), policy)
    facts = {"recipe": now.recipe, "policy": now.policy, "target": now.target, "head": now.head}
    answer(facts, ())
    following = [f"palinode requests add ID --rows FILE{_at()}"]
    ending(places={"Ledger": given("ledger")}, following=following)


@verb(shared=JSON)
def add(
    name: str, rows: str, reference: str = "", received: datetime | None = None, due: datetime | None = None
) -> None:
    """Take a request in.

    The ledger keeps salted hashes and the count of its rows. The same request again, with the same rows,
    says that they moved, or changes its reference and dates.
    """
    desk = _desk()
    request = desk.add(
        name, rows, reference=reference, received=received and received.date(), due=due and due.date()
    )
    said = f"{request.id}: {request.rows} rows, received {request.received}, due {request.due}."
    answer(_facts(desk, name), said)
    ending(following=[f"palinode requests carry-out {request.id}{_at()}"])


@verb()
def locate(
    name: str,
    checkpoints: str,
    log: Path | None = None,
    order: Path | None = None,
    corpus: str | None = None,
    control: str | None = None,
) -> None:
    """Find the last checkpoint before its rows were seen.

    The model of all open requests starts from the earliest of these.
    """
    from palinode.report.location_report import location_brief

    desk = _desk()
    _, found = desk.locate(name, checkpoints, log=log, order=order, corpus=corpus, control=control)
    answer(_facts(desk, name), location_brief(found.as_record()))
    ending(following=[f"palinode requests carry-out {name}{_at()}"])


@verb(name="carry-out")
def carry_out(ids: list[str] | None = None) -> None:
    """Make one model for these requests and those before."""
    desk = _desk()
    model, result = desk.carry_out(ids or None)
    _show_made(desk, model, result)


@verb()
def audit(ids: list[str] | None = None) -> None:
    """Attack the model that was made last.

    It takes the rows of each of its requests, and all together. What is worse than at the last audit of a
    request is named. The exit code is 1 where a verdict is red.
    """
    desk = _desk()
    found = desk.audit(ids or ())
    if given("as_json"):
        print_json(found)
    else:
        for name, facts in found.items():
            out().print(f"{facts['symbol']} {name or 'all rows'}: {facts['sentence']}", soft_wrap=True)
            for line in facts["worse"]:
                warn(f"{name or 'all rows'} got worse. {line}")
        ending(following=_next(desk.standing()))
    if any(facts["light"] == "red" for facts in found.values()):
        raise typer.Exit(1)


@verb(shared=JSON)
def approve(by: str, note: str = "") -> None:
    """Record who agrees to the model that was made last."""
    desk = _desk()
    model = desk.approve(by, note=note)
    _show_changed(desk, f"{by} approved the model for {', '.join(model.requests)}.")


@verb(shared=JSON)
def publish(despite: str = "") -> None:
    """Have the model that was made last served.

    The link `served` in the ledger's folder leads to it. A red verdict or the policy may forbid it.
    """
    desk = _desk()
    model = desk.publish(despite=despite)
    told = f"without the rows of {', '.join(model.requests)}" if model.requests else "the target itself"
    _show_changed(desk, f"Served: {desk.place(model)} ({told}).")


@verb()
def withdraw(name: str, reason: str = "") -> None:
    """Take a request back, and make the model that never had it."""
    desk = _desk()
    model, result = desk.withdraw(name, reason=reason)
    if model is not None:
        _show_made(desk, model, result)
    else:
        answer(_facts(desk, name), f"{name} is withdrawn; no model was made for it.")


@verb(name="list", shared=JSON)
def list_requests() -> None:
    """List all requests."""
    from palinode.requests.telling import request_facts, requests_grid, served_sentence

    desk = _desk()
    events, now = desk.ledger.events(), desk.standing()
    table = requests_grid(now, now.requests.values(), today=datetime.now(UTC).date())
    facts = [request_facts(events, request) for request in now.requests.values()]
    answer(facts, [table, served_sentence(now, desk.folder)])


@verb(name="show", shared=JSON)
def show_request(name: str | None = None) -> None:
    """Show what happened: of one request, or of all."""
    from palinode.requests.telling import events_grid, export, requests_grid, served_sentence

    desk = _desk()
    events, now = desk.ledger.events(), desk.standing()
    chosen = [desk.known(now, name, withdrawn=True)] if name else [*now.requests.values()]
    made = {model.fingerprint for model in now.models if name in model.requests}
    about = [
        event
        for event in events
        if not name or event.request == name or (event.after in made and not event.request)
    ]
    table = requests_grid(now, chosen, today=datetime.now(UTC).date())
    last = f"{served_sentence(now, desk.folder)}\nHead of the chain: {now.head}"
    facts = _facts(desk, name) if name else export(events)
    answer(facts, [table, events_grid(about), last])


@verb(shared=JSON)
def due(within: int | None = None) -> None:
    """Tell what has to be done by when.

    The exit code is 1 where something is overdue.
    """
    from palinode.requests.telling import request_facts, requests_grid

    desk = _desk()
    events, now, today = desk.ledger.events(), desk.standing(), datetime.now(UTC).date()
    waiting = [
        request
        for request in sorted(now.requests.values(), key=lambda request: request.due)
        if now.waits(request) and (within is None or (request.due - today).days <= within)
    ]
    late = sum(request.due < today for request in waiting)
    facts = [{**request_facts(events, one), "days_left": (one.due - today).days} for one in waiting]
    told = f"{len(waiting)} to be served, {late} overdue." if waiting else "Nothing is due."
    table = [requests_grid(now, waiting, today=today)] if waiting else []
    answer(facts, [*table, told])
    if late:
        raise typer.Exit(1)


@verb(name="export", shared=())
def export_ledger(output: Path) -> None:
    """Write requests and events for an authority."""
    from palinode.evaluation.evaluate import check_new_file
    from palinode.requests.telling import export, export_csv

    if output.suffix not in (".csv", ".json"):
        raise OutputError(f"{output} is no name for an export; let it end in .csv or .json")
    check_new_file(output, "the export")
    events = _desk().ledger.events()
    if output.suffix == ".csv":
        write_text(output, export_csv(events))
    else:
        write_json(output, export(events))
    head = events[-1].hash if events else "–"
    out().print(f"{output}: {len(events)} events; head of the chain {head}", soft_wrap=True)


@verb(shared=JSON)
def check(against: Path | None = None) -> None:
    """Tell whether the ledger's past is as it was written.

    The exit code is 1 where it is not.
    """
    from palinode.requests.telling import checked

    found = checked(_desk().ledger, against)
    answer(found, found["sentence"])
    if not found["ok"]:
        raise typer.Exit(1)


@verb(shared=())
def serve(port: int = 8765) -> None:
    """Show the ledger in a browser on this machine."""
    from palinode.requests.telling import ledger_page, server

    folder = _desk().folder
    ledger_page(folder)  # what cannot be read is said here
    with server(folder, port) as running:
        out().print(f"http://127.0.0.1:{running.server_port}/ (Ctrl-C ends it)")
        with suppress(KeyboardInterrupt):
            running.serve_forever()


# What the verbs share


def _show_made(desk: Desk, model: Model, result: Unlearned | None) -> None:
    from palinode.report.run_report import strength
    from palinode.requests.desk import worse_scores
    from palinode.requests.telling import scores_by_request

    now = desk.standing()
    before = now.models[-2] if len(now.models) > 1 else None
    worse = worse_scores(before, model)
    table = [scores_by_request(model, before)] if model.scores else []
    answer({**_model_facts(desk, model), "worse": worse}, table)
    for name in () if given("as_json") else worse:
        warn(f"{name} got worse: its rows are more probable than on the model before")
    ending(
        verdict=model.verdict,
        strength=strength(result.record) if result and result.output else None,
        places={"Model": desk.place(model), "Page": result.report if result else None},
        following=_next(now),
    )
    if model.verdict.get("exit_code"):
        raise typer.Exit(model.verdict["exit_code"])


def _next(now: Standing) -> list[str]:
    """Return the command that comes next."""
    from palinode.requests.desk import hindrance

    model = now.candidate
    at = _at()
    if model is None or now.outdated:
        return [f"palinode requests carry-out{at}"]
    if now.served and now.served.fingerprint == model.fingerprint:
        return []
    if model.requests and not model.audits:
        return [f"palinode requests audit{at}"]
    if now.policy.get("approval") and not model.approved_by:
        return [f"palinode requests approve --by NAME{at}"]
    return [f"palinode requests publish{' --despite WHY' if hindrance(now) else ''}{at}"]


def _show_changed(desk: Desk, said: str) -> None:
    now = desk.standing()
    assert now.candidate is not None
    answer(_model_facts(desk, now.candidate), said)
    ending(following=_next(now))


def _model_facts(desk: Desk, model: Model) -> dict[str, Any]:
    return {
        "requests": [*model.requests],
        "model": str(desk.place(model)),
        "fingerprint": model.fingerprint,
        "verdict": dict(model.verdict),
        "scores": dict(model.scores),
        "approved_by": model.approved_by,
    }


def _facts(desk: Desk, name: str) -> dict[str, Any]:
    """Return what is known of a request, as JSON has it."""
    from palinode.requests.telling import request_facts

    return request_facts(desk.ledger.events(), desk.standing().requests[name])


def _at() -> str:
    ledger = given("ledger")
    return "" if ledger == LEDGER else f" --ledger {shlex.quote(str(ledger))}"

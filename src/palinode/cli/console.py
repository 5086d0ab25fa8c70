"""What the terminal shows: progress bars to stderr, results to stdout, and how a long verb ends."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.segment import Segment
from rich.table import Column
from rich.text import Text

from palinode.progress import Advance, Listener, NullListener, duration_text, plain, rate_text
from palinode.records import Score, workspace_beside

if TYPE_CHECKING:
    from palinode.pipeline.demo_run import DemoResult
    from palinode.report.content import Block, Grid
    from palinode.weights import Profile


def scores_grid(scores: Mapping[str, Mapping[str, Score]], *, title: str) -> Grid:
    """Return metrics by set, with n and interval; those that were not computed are left out.

    Metrics are called what --metrics takes.
    """
    from palinode.report.content import Grid, GridCell, Row
    from palinode.report.words import interval_text, number

    rows: list[Row] = []
    for name, group in scores.items():
        rows += [[GridCell(name, tone="chosen")]] if len(scores) > 1 else []
        rows += [
            [metric, number(score.value), interval_text(asdict(score)) or "", str(score.n)]
            for metric, score in group.items()
            if score.value is not None
        ]
    return Grid(title, ["metric", "value", "95 % interval", "rows"], rows)


def benchmark_notes(scores: Mapping[str, Mapping[str, Score]]) -> Iterator[str]:
    """Yield what to know about scores, and why some were not computed: a line for each set and reason."""
    from palinode.report.words import by_reason

    for name, group in scores.items():
        told = ((metric, score.reason) for metric, score in group.items() if score.reason)
        for reason, metrics in by_reason(told).items():
            yield f"{name}: {', '.join(metrics)}: {reason}"


def demo_sentence(result: DemoResult) -> str:
    """Return what happened and where the files are."""
    recall = result.record["recall"]
    return (
        f"The target recalled {recall['target']['forget']:.0%} of what it had learned about the "
        "forget people; "
        f"after unlearning it is {recall['unlearned']['forget']:.0%}, where a model that never saw them has "
        f"{recall['retrained']['forget']:.0%}, and of everyone else it still knows "
        f"{recall['unlearned']['others']:.0%} (before: {recall['target']['others']:.0%}). "
        f"Models, report and record are in {result.folder}."
    )


def vector_content(measured: Profile) -> dict[str, Any]:
    """Return norms and cosines as plain values, in all and by part."""
    return {
        "all": _vectors(measured, None),
        "parts": {part: _vectors(measured, part) for part in measured.gram},
    }


def vector_grids(measured: Profile, *, layers: bool) -> Iterator[Grid]:
    """Yield norms and cosines as a grid, and norms by part of the model if asked."""
    from palinode.report.content import Grid

    names = measured.names
    rows = [
        [name, f"{norm:.5g}", *(_cosine(measured, name, other) for other in names[:place])]
        for place, (name, norm) in enumerate(measured.norms().items())
    ]
    yield Grid("", ["vector", "norm", *(f"cosine with {name}" for name in names[:-1])], rows)
    if layers:
        parts = [[part, *(f"{norm:.4g}" for norm in measured.norms(part).values())] for part in measured.gram]
        yield Grid("", ["part", *(f"norm: {name}" for name in names)], parts)


def _vectors(measured: Profile, part: str | None) -> dict[str, Any]:
    names = measured.names
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    return {
        "norms": measured.norms(part),
        "cosines": [{"between": [a, b], "cosine": measured.cosine(a, b, part)} for a, b in pairs],
    }


def _cosine(measured: Profile, first: str, second: str) -> str:
    value = measured.cosine(first, second)
    return "undefined" if value is None else f"{value:.4f}"


SECONDS_BETWEEN_LINES = 30
"""Where there is no terminal, a long task says this often how far it is."""

BARS_OFF = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")
NOTES_OFF = ("HF_HUB_VERBOSITY", "DATASETS_VERBOSITY", "TRANSFORMERS_VERBOSITY", "WANDB_SILENT")
"""What the libraries below us read when they are imported, which is after the options were."""


class Done(ProgressColumn):
    """How much of a task is done."""

    def render(self, task: Task) -> Text:
        """Return what is done and the total, in few letters."""
        return Text(f"{_short(task.completed)}/{_short(task.total or 0)}", style="progress.percentage")


class Speed(ProgressColumn):
    """The rate of a task, and the time it still needs."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        """Return both in words, once they are known.

        They count from the first report on: what is done by then may be an earlier, interrupted call's work.
        """
        rate, left = task.speed, task.time_remaining
        if not rate or left is None:
            return Text("")
        return Text(f"{rate_text(rate, task.fields['unit'])}, {duration_text(left)} left")


class Safe(Console):
    """A console on which texts are shown as they stand: they can neither style nor steer it."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)

    def render(self, renderable: Any, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Yield what is to be written, with what is no text of ours spelt out."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(plain(segment.text), segment.style)


class Terminal:
    """A listener that shows one bar a task on a terminal, and one line a task elsewhere."""

    def __init__(self) -> None:
        self.console = Safe(stderr=True)

    def say(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, soft_wrap=True)

    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Advance]:
        """Show a task while it runs; leave one line when it is done."""
        bars = self._bars()
        number = bars.add_task(label, total=total, unit=unit)
        task, spoken = bars.tasks[0], time.monotonic()

        def advance(amount: int) -> None:
            """Count work done; where bars make no sense, speak of it every half minute."""
            nonlocal spoken
            bars.advance(number, amount)
            now = time.monotonic()
            if bars.disable and now - spoken >= SECONDS_BETWEEN_LINES and 0 < task.completed < total:
                spoken = now
                speed = Speed().render(task).plain.replace(", ", ", about ")
                done = f"{label}: {task.completed:,.0f} of {total:,} {unit}"
                self.say(f"{done}, {speed}" if speed else done)

        with bars:
            yield advance
        self.say(f"{label}: {task.completed or total:,.0f} {unit} in {task.elapsed or 0:.1f} s")

    def _bars(self) -> Progress:
        """Return bars that stay on one line each: the label gives way first, the numbers last."""
        label = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, ratio=1))
        numbers = Done(table_column=Column(no_wrap=True)), Speed(table_column=Column(no_wrap=True))
        wide = self.console.width >= 60  # room for a bar, a rate and the time left
        columns = (label, BarColumn(bar_width=16), *numbers) if wide else (label, *numbers)
        return Progress(
            *columns,
            console=self.console,
            speed_estimate_period=math.inf,
            transient=True,
            expand=True,
            disable=not self.console.is_terminal or self.console.is_dumb_terminal,
        )


def _short(count: float) -> str:
    """Return a number in at most five letters: 999, 840k, 1.23M, 16.1G."""
    for unit in ("", "k", "M"):
        if count < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:,.3g}G" if count < 999.5 else f"{count / 1000:,.3g}T"


GIVEN: ContextVar[Mapping[str, Any]] = ContextVar("GIVEN")
"""What the verb that runs was given of the options that verbs share."""


def given(option: str) -> Any:
    """Return what the verb that runs was given of an option that verbs share; None where it has none."""
    return GIVEN.get({}).get(option)


def listener(*, quiet: bool = False) -> Listener:
    """Return the listener for a command."""
    return NullListener() if quiet or given("quiet") else Terminal()


def hush_libraries(quiet: bool) -> bool:
    """Keep the bars and notes of other libraries away: all if `quiet`, bars where nobody sees them move.

    The option --quiet calls this while the command line is read. What the user has set himself stays.
    """
    names = (*BARS_OFF, *NOTES_OFF) if quiet else () if sys.stderr.isatty() else BARS_OFF
    for name in names:
        os.environ.setdefault(name, "critical" if name.endswith("_VERBOSITY") else "1")
    return quiet


def out() -> Console:
    """Return the console for results."""
    return Safe()


def warn(text: str) -> None:
    """Print a note to stderr, in one line."""
    Safe(stderr=True).print(f"Note: {text}", soft_wrap=True)


def print_json(content: Any) -> None:
    """Print a result as strict JSON on standard output."""
    print(json.dumps(content, indent=2, allow_nan=False))


def answer(content: Any, said: str | Iterable[Block]) -> None:
    """Print the result of a verb: its content as JSON, or what is said of it in sentences or blocks."""
    if given("as_json"):
        print_json(content)
    elif isinstance(said, str):
        out().print(said, soft_wrap=True)
    else:
        from palinode.report.content import show

        show(said, out())


STYLES = {"green": "green", "amber": "yellow", "red": "bold red", "grey": "bold"}
"""Of a verdict, by its light."""


def ending(
    *,
    verdict: Mapping[str, Any] | None = None,
    strength: str | None = None,
    places: Mapping[str, object] | None = None,
    following: Iterable[str] = (),
) -> None:
    """Print the end of a verb; `following` are the commands that come next, and what is None is left out."""
    if given("as_json"):
        return
    if verdict:
        told = f"{verdict['symbol']} {verdict['sentence']}"
        out().print(Text(told, style=STYLES[verdict["light"]]), soft_wrap=True)
    if strength:
        out().print(f"Strength: {strength}", soft_wrap=True)
    for label, place in (places or {}).items():
        if place is not None:
            out().print(f"{label + ':':<9} {place}", soft_wrap=True)
    for place, command in enumerate(following):
        out().print(f"{'' if place else 'Next:':<9} {command}", soft_wrap=True)


def after_run(record: Mapping[str, Any], output: Path | None) -> Iterator[str]:
    """Yield the commands that come after a run: attack the model, talk to it, check it."""
    if output is None:
        yield f"{record['command']} --keep-unchanged"
        return
    models, data = (record.get("recipe", {}).get(name, {}) for name in ("models", "data"))
    kind = next((kind for kind in ("retrained", "base") if models.get(kind)), None)
    if kind is not None:
        columns = ",".join(f"{name}={column}" for name, column in (data.get("columns") or {}).items())
        yield shlex.join(
            [
                *("palinode", "audit", str(output), "--against", models[kind]),
                *(("--reference", kind) if kind == "base" else ()),
                *("--forget", data["forget"]),
                *(("--columns", columns) if columns else ()),
                *(("--allow-pickle",) if models.get("allow_pickle") else ()),
                *("--output", f"{output}-audit"),
            ]
        )
    if record:
        yield shlex.join(["palinode", "chat", str(output)])
    yield shlex.join(["palinode", "verify", str(output)])


def after_audit(model: str, output: Path) -> Iterator[str]:
    """Yield the command that tells of an audit in the folder of the model, where a run wrote it."""
    if (Path(model).expanduser() / "record.json").is_file():
        yield shlex.join(["palinode", "report", model, "--audit", str(output)])


def after_location(recommended: Any, target: str, forget: str) -> Iterator[str]:
    """Yield the command that takes the recommended checkpoint, if there is one."""
    if recommended is not None:
        models = ("--target", target, "--base", recommended.location)
        yield shlex.join(["palinode", "unlearn", *models, "--forget", forget, "--output", "OUT"])


def secret(folder: Path, what: str, *, of: Path | None = None) -> None:
    """Say in one line, a verb's last one, what is secret and how to destroy it; nothing where it is gone.

    `of` is what `forget-workspace` finds the folder by; without it the user removes the folder. JSON is the
    result alone.
    """
    command = ["rm", "-r", str(folder)] if of is None else ["palinode", "forget-workspace", str(of)]
    if folder.exists() and not given("as_json"):
        line = f"Secret: {folder} ({what}). Destroy: {shlex.join(command)}"
        out().print(line, markup=False, soft_wrap=True)


def secret_workspace(folder: Path, output: Path, what: str) -> None:
    """Say so of a workspace, which is found by its output where it lies beside that."""
    beside = folder == workspace_beside(output)
    secret(folder, what, of=output if beside else folder)

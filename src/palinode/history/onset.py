"""When a model began to know rows, read off its checkpoints: evidence from behaviour alone.

Forget rows and control rows (alike, never trained on) are scored in checkpoints. With x_k(i) a row's value
in checkpoint k, and 0 the earliest checkpoint,

    gap_k = mean over forget rows of (x_k − x_0) − mean over control rows of (x_k − x_0)

What every row gains as the model learns its language cancels, and so does what sets the two sets apart from
the start. A checkpoint shows the gap when it exceeds both noise (2.58 standard errors, by bootstrap over
rows) and a share of the largest gap seen. Of the earliest one the plain difference of the means is judged,
and counts only where the gap never grows by as much again. The search halves the series, so that about
log₂ n checkpoints find a gap, and as many more look for one that came and went before it. The interval of
the change point comes from the same bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

from palinode.data.examples import Example, Question, shared_rows
from palinode.errors import DataError, RecipeError
from palinode.history.series import CheckpointSeries
from palinode.metrics.membership import extraction_strengths, loss_values, min_k_values
from palinode.progress import Listener, NullListener
from palinode.records import Outcome, packaged_table
from palinode.settings import Asking, LocateSettings

FloatArray = npt.NDArray[np.float64]
State = Literal["begins", "before", "never", "gone"]

ERRORS = 2.58
"""Standard errors that a gap must exceed: 99 % two-sided under the normal law."""
SHARE = 0.25
"""Share of the largest gap that a checkpoint's gap must reach: smaller ones are drift."""
RESAMPLES = 2000
SAYS: Mapping[str, str] = packaged_table("history/warnings.toml")["onset"]
"""What can be concluded, by state, and notes on it."""

Measure = Callable[[Sequence[Outcome]], list[float | None]]


def turned(attack: Measure) -> Measure:
    """Return what measures how well rows are known, from an attack that measures how little."""
    return lambda outcomes: [None if value is None else -value for value in attack(outcomes)]


MEASURES: Mapping[str, Measure] = {
    "mean_logprob": turned(loss_values),
    "min_k": turned(min_k_values),  # with its usual share of the least likely tokens
    "extraction_strength": partial(extraction_strengths, single=1.0),  # where all are 1, a note says so
}
"""What rows are scored by; higher means better known."""


Values = Mapping[str, Sequence[float | None]]
Reading = tuple[Values, Values]
"""The values of forget and of control rows in one checkpoint, by measure."""


@dataclass(frozen=True, slots=True)
class Gap:
    """How far forget rows are ahead of control rows in one checkpoint, against the earliest one."""

    place: int
    """Position in the series."""
    step: int
    values: Mapping[str, tuple[float, float, float]]
    """By measure: the gap, and the ends of its 95 % interval. Of the earliest checkpoint itself: the plain
    difference of the two means, which may be as the sets are."""
    exposed: bool
    """Whether the deciding measure shows the gap here."""


@dataclass(frozen=True, slots=True)
class Onset:
    """Where the gap between forget and control rows begins."""

    state: State
    """begins; before (the earliest checkpoint has it); never; gone (it began, the last has it no more)."""
    clean: int | None
    """Place in the series of the last checkpoint before the gap; None where there is none."""
    exposed: int | None
    """Place of the first checkpoint that shows it; None where none does."""
    interval: tuple[int, int] | None
    """95 % interval of the step of that first checkpoint, over resampled rows."""
    certainty: float | None
    """Share of resamples that begin no earlier: how sure it is that `clean` is clean."""
    measure: str
    """The measure that decided."""
    begins: Mapping[str, int | None]
    """Step of the first loaded checkpoint that shows the gap, by measure."""
    gaps: tuple[Gap, ...]
    """The checkpoints that were looked at, earliest first."""
    conclusion: str
    """What can be concluded, in a sentence."""
    notes: tuple[str, ...] = field(default=())


def find_onset(
    forget: Sequence[Example],
    control: Sequence[Example],
    series: CheckpointSeries,
    *,
    settings: LocateSettings | None = None,
    listener: Listener | None = None,
) -> Onset:
    """Score the rows in about 2 log₂ n checkpoints of the series (all if `every`) and return the onset.

    Raises DataError when the control rows are none, or forget rows stand among them.
    """
    from palinode.evaluation.ask import ask
    from palinode.models.loading import load_reader, load_tokenizer, pick_device

    check_control(forget, control)
    settings = settings or LocateSettings()

    def read(place: int) -> Reading:
        """Load one checkpoint and score both sets in it."""
        checkpoint = series.open(place)
        model = load_reader(checkpoint, device=pick_device(settings.device))
        tokenizer = load_tokenizer(checkpoint)

        def values(name: str, examples: Sequence[Example]) -> Values:
            outcomes = ask(
                model,
                tokenizer,
                [*map(Question, examples)],
                Asking(generate=False, max_length=settings.max_length),
                style=settings.style,
                label=f"step {series.checkpoints[place].step:,}: {name} rows",
                listener=listener or NullListener(),
            )
            return {measure: scored(outcomes) for measure, scored in MEASURES.items()}

        return values("forget", forget), values("control", control)

    steps = [checkpoint.step for checkpoint in series.checkpoints]
    return search_onset(steps, read, measure=settings.measure, seed=settings.seed, every=settings.every)


def check_control(forget: Sequence[Example], control: Sequence[Example]) -> None:
    """Raise DataError unless there are control rows, none of which is a forget row."""
    if not control:
        raise DataError(
            "there are no control rows; behaviour can be compared only with rows that are like the forget "
            "rows and were never trained on (--control)"
        )
    shared = shared_rows(forget, control)
    if shared:
        raise DataError(
            f"{len(shared)} of {len(forget)} forget rows also stand in the control set (first: "
            f"{control[shared[0][1]].place}); control rows must be rows that the model was never trained on"
        )


def search_onset(
    steps: Sequence[int],
    read: Callable[[int], Reading],
    *,
    measure: str = "mean_logprob",
    seed: int = 0,
    every: bool = False,
) -> Onset:
    """Return the onset over checkpoints of these steps, whose values `read` gives by their place."""
    if measure not in MEASURES:
        raise RecipeError(f"there is no measure {measure!r}; choose one of {', '.join(MEASURES)}")
    readings = {place: read(place) for place in (range(len(steps)) if every else {0, len(steps) - 1})}
    table = _table(readings, measure, seed)
    looks = math.ceil(math.log2(len(steps)))  # for a gap that came and went before the one that was found
    while True:
        place = table.middle()
        if place is None and looks:
            place, looks = table.widest(), looks - 1
        if place is None:
            break
        readings[place] = read(place)
        table = _table(readings, measure, seed)
    return _conclude(table, readings, steps, measure, seed)


@dataclass(frozen=True, slots=True)
class _Table:
    """Gaps of the loaded checkpoints by one measure, with what the bootstrap makes of them."""

    places: tuple[int, ...]
    gaps: FloatArray
    """[K] over the loaded checkpoints."""
    resampled: FloatArray
    """[B, K]: the same over resampled rows."""
    errors: FloatArray
    """[K]: the standard error of each gap."""
    exposed: tuple[bool, ...]
    """Whether each shows the gap."""
    clean: int | None
    """Place of the last one before the gap."""
    first: int | None
    """Place of the first one that shows it."""
    rows: tuple[int, int]
    """Forget and control rows that have a value everywhere."""

    def middle(self) -> int | None:
        """Return the checkpoint halfway between the last clean and the first exposed one, None when done."""
        if self.clean is None or self.first is None or self.first - self.clean < 2:
            return None
        return (self.clean + self.first) // 2

    def widest(self) -> int | None:
        """Return the middle of the widest stretch before the gap that was not looked into, None when done."""
        looked = [place for place in self.places if self.clean is not None and place <= self.clean]
        gaps = [(after - before, -before) for before, after in pairwise(looked) if after - before > 1]
        width, start = max(gaps, default=(0, 0))
        return -start + width // 2 if width else None


def _table(readings: Mapping[int, Reading], measure: str, seed: int) -> _Table:
    """Return the gaps of the loaded checkpoints by one measure, over rows that have a value in all."""
    places = tuple(sorted(readings))
    random = np.random.Generator(np.random.PCG64(seed))
    means, drawn, counts = [], [], []
    for side in (0, 1):
        columns = [readings[place][side][measure] for place in places]
        found = np.array([[math.nan if value is None else value for value in column] for column in columns])
        values: FloatArray = found[:, ~np.isnan(found).any(axis=0)]
        size = values.shape[1]
        if not size:
            raise DataError(
                "no forget row, or no control row, has a token that can be scored in every checkpoint; "
                "look at max_length, and at what the rows hold"
            )
        values[1:] -= values[0]  # x_k − x_0, and x_0 itself for the earliest
        means.append(values.mean(axis=1))
        shares = np.full(size, 1 / size)
        draws = (random.multinomial(size, shares) / size for _ in range(RESAMPLES))  # little memory
        drawn.append(np.array([values @ weights for weights in draws]))
        counts.append(size)
    gaps, resampled = means[0] - means[1], drawn[0] - drawn[1]
    errors = resampled.std(axis=0)
    exposed = tuple(_shows(gaps[None], errors)[0].tolist())
    first = next((place for place, shown in zip(places, exposed, strict=True) if shown), None)
    clean = max((place for place in places if first is None or place < first), default=None)
    return _Table(places, gaps, resampled, errors, exposed, clean, first, (counts[0], counts[1]))


def _shows(gaps: FloatArray, errors: FloatArray) -> npt.NDArray[np.bool_]:
    """Return the rule's verdicts on gaps of shape [B, K].

    The earliest checkpoint's own difference counts only where no later checkpoint gains more: rows that
    were learned before it have little left to gain, and sets that are not alike have all of it.
    """
    largest = gaps[:, 1:].max(axis=1, keepdims=True, initial=0.0)
    shares = np.where(np.arange(gaps.shape[1]) == 0, 1.0, SHARE)
    verdicts: npt.NDArray[np.bool_] = (gaps > ERRORS * errors) & (gaps >= shares * largest)
    return verdicts


def _conclude(
    table: _Table, readings: Mapping[int, Reading], steps: Sequence[int], measure: str, seed: int
) -> Onset:
    tables = {name: table if name == measure else _table(readings, name, seed) for name in MEASURES}
    count, state = len(table.places), _state(table)
    clean, exposed = (None if place is None else steps[place] for place in (table.clean, table.first))
    gaps = []
    for k, (place, shown) in enumerate(zip(table.places, table.exposed, strict=True)):
        values = {}
        for name, found in tables.items():
            low, high = np.percentile(found.resampled[:, k], [2.5, 97.5])
            values[name] = (float(found.gaps[k]), float(low), float(high))
        gaps.append(Gap(place, steps[place], values, shown))
    shows = _shows(table.resampled, table.errors)
    firsts = np.where(shows.any(axis=1), shows.argmax(axis=1), count)  # in each resample
    interval, first = None, count
    if table.first is not None:
        first = table.places.index(table.first)
        inside = np.sort(np.minimum(firsts, count - 1))
        low, high = (int(np.percentile(inside, q, method="nearest")) for q in (2.5, 97.5))
        interval = (steps[table.places[low]], steps[table.places[high]])
    begins = {name: None if one.first is None else steps[one.first] for name, one in tables.items()}
    return Onset(
        state=state,
        clean=table.clean,
        exposed=table.first,
        interval=interval,
        certainty=float((firsts >= first).mean()),
        measure=measure,
        begins=begins,
        gaps=tuple(gaps),
        conclusion=SAYS[state].format(clean=clean, step=exposed),
        notes=tuple(_notes(table, tables, steps)),
    )


def _state(table: _Table) -> State:
    if table.first is None:
        return "never"
    if table.clean is None:
        return "before"
    return "begins" if table.exposed[-1] else "gone"


def _notes(table: _Table, tables: Mapping[str, _Table], steps: Sequence[int]) -> list[str]:
    notes = []
    if len(steps) == 1:
        notes.append(SAYS["one_checkpoint"])
    if len(steps) == 2:
        notes.append(SAYS["two_checkpoints"])
    if min(table.rows) < 10:
        notes.append(SAYS["few_rows"].format(forget=table.rows[0], control=table.rows[1]))
    if len(steps) > 1 and table.gaps[0] > ERRORS * table.errors[0] and not table.exposed[0]:
        notes.append(SAYS["ahead"].format(gap=table.gaps[0]))
    silent = [name for name, found in tables.items() if np.abs(found.resampled).max() < 1e-9]
    notes += [SAYS["silent"].format(name=name.replace("_", " ")) for name in silent]
    firsts = {name: found.first for name, found in tables.items() if name not in silent}
    if len(set(firsts.values())) > 1:
        told = ", ".join(
            f"{name.replace('_', ' ')}: {'nowhere' if first is None else f'step {steps[first]:,}'}"
            for name, first in firsts.items()
        )
        notes.append(SAYS["apart"].format(told=told))
    return notes

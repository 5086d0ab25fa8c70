"""Transform a forget vector as a recipe says: each transform a step whose result is a stored vector.

What a transform needs of rows and models, the inputs of layers, is computed in steps of its own and kept, so
that other settings of the same transform find it there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np

from palinode.data.examples import at_most
from palinode.errors import CheckpointError, InputError
from palinode.methods.transforms import MU, ChosenTransforms, LeastSquaresSettings
from palinode.pipeline.filtering import Measuring, MomentFiles, Weighing, project
from palinode.pipeline.goal import TriedScales
from palinode.pipeline.inputs import Work
from palinode.pipeline.workspace import Step
from palinode.weights import Checkpoint, Direction, Point, StoredVector, profile, save_vector
from palinode.weights.vectors import layer_scale, transform

Make = Callable[[Direction, Path], StoredVector]
"""(vector, folder) → the transformed vector in the folder."""

OTHER_MUS = (MU / 10, 10 * MU)
"""Values of μ that are tried beside the usual one where it is open."""


@dataclass(frozen=True, slots=True)
class Filtered:
    """A forget vector as a filter left it."""

    direction: Direction
    key: str
    """Of the step that made it."""
    facts: dict[str, Any]
    """What the record tells of it."""
    label: tuple[float, bool]
    """μ, and whether the inputs are those where the model arrives."""

    def as_record(self) -> dict[str, Any]:
        """Return which one it is, as the record has it."""
        return {"mu": self.label[0], "arrival": self.label[1], "key": self.key}


@dataclass
class Transforming(Work):
    """The transforms of one run, with what they read of its models and rows."""

    target: Checkpoint

    def __post_init__(self) -> None:
        self.moments = Measuring(self.inputs, self.workspace, self.listener, self.target)
        self.survey: dict[str, Any] = {}
        """What the transform that was made last found out on the way."""
        self.made: set[str] = set()
        """Keys of the steps that were done here, and not found."""

    def apply(
        self, transforms: Sequence[ChosenTransforms], vector: Direction, keys: Mapping[str, str]
    ) -> tuple[Direction, str, list[dict[str, Any]]]:
        """Return the transformed vector, the key of its last step, and what each transform did.

        Raises InputError where one leaves nothing of the vector.
        """
        key, told = "", []
        keys = {name: own for name, own in keys.items() if name != "retain"}  # not what the vector is made of
        for chosen in transforms:
            vector, key, facts = self.apply_one(chosen, vector, keys)
            keys = {"before": key}
            told.append(facts)
        return vector, key, told

    def open_filter(
        self, transforms: Sequence[ChosenTransforms], vector: Direction, keys: Mapping[str, str]
    ) -> OpenFilter | None:
        """Return the last transform if it is a filter whose settings are chosen with the scales."""
        *first, last = transforms
        if not isinstance(last.settings, LeastSquaresSettings):
            return None
        before, key, _ = self.apply(first, vector, keys)
        own = {name: value for name, value in keys.items() if name != "retain"}
        return OpenFilter(self, last, before, {"before": key} if first else own)

    def apply_one(
        self,
        chosen: ChosenTransforms,
        before: Direction,
        keys: Mapping[str, str],
        *,
        made: tuple[Make, Any] | None = None,
    ) -> tuple[Direction, str, dict[str, Any]]:
        """Apply one transform, or find it done; `made` is what makes the vector, and what that needs."""
        if isinstance(chosen.settings, LeastSquaresSettings):  # the usual μ is one vector, named or not
            mu, epsilon = chosen.settings.weights()
            filled = chosen.settings.model_copy(update={"mu": mu, "epsilon": epsilon})
            chosen = replace(chosen, settings=filled)
        name, settings = chosen.transform.name, chosen.settings
        make, needed = made or getattr(self, f"_{name}")(settings)
        step = self.workspace.step(
            f"transform-{name}",
            vector=dict(keys),
            settings=settings.model_dump(mode="json"),
            needed=needed,
        )
        facts, stored = step.facts, _open_vector(step.folder / "vector")
        if facts is None or stored is None:
            step.clear()  # an interrupted try has left parts
            self.survey = {}
            self.made.add(step.key)
            stored = make(before, step.folder / "vector")
            if not stored.norm:
                raise InputError(
                    f"the transform {name} leaves nothing of the forget vector; set it otherwise, or leave "
                    "it out"
                )
            step.finish(facts := {**_told(chosen, before, stored), **self.survey})
        return stored, step.key, facts

    # One method a transform: what makes the vector, and what it needs, as plain values for the step's key

    def _projection(self, settings: Any) -> tuple[Make, Any]:
        model = self.target if settings.at == "target" else self.inputs.earlier
        rows = at_most(self.inputs.rows.retain_sample, settings.rows, seed=self.recipe.seed)
        step = self.moments.of_checkpoint(model, rows)
        kept = MomentFiles(step)

        def make(vector: Direction, output: Path) -> StoredVector:
            rule = project(kept, energy=settings.energy, others=settings.others)
            label = f"projection {step.key} {settings.energy} {settings.others}"
            return transform([vector], rule, output, label=label)

        return make, step.key

    def _least_squares(self, settings: Any) -> tuple[Make, Any]:
        sets, positions = self.moments.sets(settings), settings.positions
        steps = [self.moments.of_checkpoint(self.target, rows, positions) for rows in sets if rows]
        return self._weighed(settings, steps), [step.key for step in steps]

    def _weighed(self, settings: Any, steps: Sequence[Step]) -> Make:
        """Return what filters a vector by the moments that steps hold: of the forget inputs, and the spared.

        The latter alone where there are no forget rows.
        """

        def make(vector: Direction, output: Path) -> StoredVector:
            *forget, spared = map(MomentFiles, steps)
            weighing = Weighing(forget[0] if forget else None, spared, settings)
            label = f"least squares {[step.key for step in steps]} {settings.model_dump_json()}"
            with TemporaryDirectory(dir=output.parent, prefix=".filtered-") as place:
                made = transform([vector], weighing.rule, Path(place) / "vector", label=label)
                self.survey = weighing.survey()
                if note := weighing.note():
                    self.listener.say(note)
                return transform([made], weighing.rescale, output, label=f"{label}, rescaled")

        return make

    def arrived(
        self, chosen: ChosenTransforms, before: Direction, keys: Mapping[str, str], point: Point, place: str
    ) -> tuple[Direction, str, dict[str, Any]]:
        """Filter a vector by the moments at a point, for which `place` stands, in place of the target's."""
        settings = chosen.settings
        sets = self.moments.sets(settings)
        steps = [self.moments.of_point(point, place, rows, settings.positions) for rows in sets]
        made = self._weighed(settings, steps), [step.key for step in steps]
        return self.apply_one(chosen, before, keys, made=made)

    def _low_rank(self, settings: Any) -> tuple[Make, Any]:
        def make(vector: Direction, output: Path) -> StoredVector:
            return save_vector(vector, output, rank=settings.rank, energy=settings.energy)

        return make, None

    def _layer_scales(self, settings: Any) -> tuple[Make, Any]:
        def rule(name: str, found: Sequence[np.ndarray]) -> np.ndarray:
            return (layer_scale(name, settings.scales) * found[0]).astype(found[0].dtype)

        def make(vector: Direction, output: Path) -> StoredVector:
            label = f"{type(settings).__name__} {settings.model_dump_json()}"
            return transform([vector], rule, output, label=label)

        return make, None


class OpenFilter:
    """A least-squares filter whose μ, and whether it reads where the model arrives, are chosen with α."""

    def __init__(
        self,
        transforming: Transforming,
        last: ChosenTransforms,
        before: Direction,
        keys: Mapping[str, str],
    ) -> None:
        self.transforming, self.last, self.before, self.keys = transforming, last, before, keys
        self.known: dict[tuple[float, bool], Filtered] = {}

    @property
    def arrives(self) -> Literal["never", "always", "where better"]:
        """Whether the vector is filtered again by what the layers read where the model arrives."""
        asked = self.last.settings.arrival
        return "where better" if asked is None else "always" if asked else "never"

    def usual(self) -> Filtered:
        """Return the vector at the usual μ, or at the one that is given."""
        return self.at(self.last.settings.weights()[0])

    def others(self) -> Sequence[float]:
        """Return the values of μ beside the usual one; none where μ is given."""
        return OTHER_MUS if self.last.settings.is_open else ()

    def at(self, mu: float) -> Filtered:
        """Return the vector filtered with that μ by what the target's layers read."""
        if (mu, False) not in self.known:
            made = self.transforming.apply_one(self._with(mu), self.before, self.keys)
            self.known[mu, False] = Filtered(*made, (mu, False))
        return self.known[mu, False]

    def arrived(self, filtered: Filtered, alpha: float, rest: Direction | None = None) -> Filtered:
        """Return the vector filtered by what the layers read at θ_D − α · filtered + rest, β · retain."""
        mu, _ = filtered.label
        point: Point = self.transforming.target - alpha * filtered.direction
        place = f"{filtered.key} {alpha}"
        if rest is not None and rest.terms:
            point = point + rest
            place += "".join(f" {weight} {term.fingerprint()}" for term, weight in rest.terms.items())
        made = self.transforming.arrived(self._with(mu), self.before, self.keys, point, place)
        self.known[mu, True] = Filtered(*made, (mu, True))
        return self.known[mu, True]

    def of(self, point: TriedScales) -> Filtered:
        """Return the vector that a point was tried with."""
        assert point.filter is not None
        return self.known[point.filter]

    def find(self, key: str) -> Filtered:
        """Return a vector that was chosen before, by the key of its step."""
        if found := next((one for one in self.known.values() if one.key == key), None):
            return found
        step = self.transforming.workspace.step_of(f"transform-{self.last.transform.name}", key)
        facts, stored = step.facts, _open_vector(step.folder / "vector")
        if facts is None or stored is None:
            raise InputError(
                f"the vector that was chosen with the scales is not in {step.folder} any more; remove the "
                "folder scales-… beside it, and they are chosen anew"
            )
        return Filtered(stored, key, facts, (facts["settings"]["mu"], False))

    def tidy(self, chosen: Filtered | None) -> None:
        """Remove the vectors that were made here and not chosen, which are as large as models.

        Those that were found may be another run's in this workspace.
        """
        for one in self.known.values():
            own = one.key in self.transforming.made
            if own and one is not chosen and one.label != self.usual().label:
                step = self.transforming.workspace.step_of(f"transform-{self.last.transform.name}", one.key)
                step.clear()

    def _with(self, mu: float) -> ChosenTransforms:
        return replace(self.last, settings=self.last.settings.model_copy(update={"mu": mu}))


def _open_vector(folder: Path) -> StoredVector | None:
    """Return a step's vector if it is there and whole."""
    try:
        return StoredVector.open(folder)
    except CheckpointError:
        return None


def _told(chosen: ChosenTransforms, before: Direction, after: Direction) -> dict[str, Any]:
    """Return what a transform is and what it left of the vector, as the record has it."""
    measured = profile({"before": before, "after": after})
    norms = measured.norms()
    return {
        "name": chosen.transform.name,
        "formula": chosen.transform.formula,
        "source": chosen.transform.source,
        "settings": chosen.settings.model_dump(mode="json"),
        "norm": norms["after"],
        "norm_share": norms["after"] / norms["before"] if norms["before"] else None,
        "cosine": measured.cosine("before", "after"),
    }

"""Transform a forget vector as a recipe says: each transform a step whose result is a stored vector.

What a transform needs of rows and models, the inputs of layers, is measured once in steps of its own and
kept, so that other settings, methods and requests find it there. The filters themselves are in
`training/moments.py`; here they are rules over the tensors of a vector.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from palinode.data.examples import Example, at_most, fingerprint_examples
from palinode.data.tokenize import tokenize
from palinode.errors import CheckpointError, InputError, MismatchError
from palinode.methods.method import Vectors
from palinode.methods.transforms import MU, ChosenTransforms, LeastSquaresSettings
from palinode.models.inplace import live_places, put
from palinode.models.loading import load_model, load_tokenizer, pad_token, save_tensors, tokenizer_fingerprint
from palinode.pipeline.goal import TriedScales
from palinode.pipeline.inputs import Work
from palinode.pipeline.workspace import Step
from palinode.records import beside
from palinode.training.moments import (
    Moments,
    Place,
    Positions,
    along,
    basis_of,
    input_moments,
    least_squares,
    packed,
    projection,
    unpacked,
)
from palinode.weights import Checkpoint, Direction, Point, StoredVector, profile, save_vector
from palinode.weights.geometry import part_of
from palinode.weights.vectors import Rule, layer_scale, transform

UNREAD = 0.01
"""Share of the squared length of the blocks' matrices that may go without a word."""
UNDECIDED = "undecided"
"""A file beside a vector that a search has made and not chosen yet."""
SURVIVES = 1e-4
"""Share of its effect on the forget inputs that a vector must keep to be worth scaling up."""


def _is_whole(step: Step) -> bool:
    """Tell whether the files of a finished step are there, each with the bytes it was written with."""
    sizes: Mapping[str, int] = (step.facts or {}).get("sizes", {})
    found = {path.name: path.stat().st_size for path in step.folder.glob("moments-*.safetensors")}
    return bool(sizes) and found == sizes


def _store(found: Iterator[Moments], step: Step) -> dict[str, Any]:
    """Write moments, a file for each group, and return where each key is, and the places of parameters."""
    files: dict[str, tuple[str, int]] = {}
    places: dict[str, list[Place]] = {}
    for number, group in enumerate(found):
        name = f"moments-{number:03}.safetensors"
        values = {key: value.float().cpu().numpy() for key, value in group.values.items()}
        if bad := next((key for key, value in values.items() if not np.isfinite(value).all()), None):
            raise CheckpointError(
                f"what {bad} of the model reads on the rows is not finite, so nothing can be filtered by it; "
                'look for infinite weights, or set filter = "none"'
            )
        save_tensors(dict(_in_half(values)), step.folder / name)
        files |= {key: (name, value.dim()) for key, value in group.values.items()}
        for parameter, own in group.places.items():
            places.setdefault(parameter, []).extend(own)
    sizes = {name: (step.folder / name).stat().st_size for name, _ in files.values()}
    return {"files": files, "sizes": sizes, "places": places}


def _in_half(values: Mapping[str, np.ndarray]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield moments as they are stored: a matrix in three parts, which take half its room."""
    for key, value in values.items():
        parts = packed(value) if value.ndim == 2 else {"": value}
        for part, own in parts.items():
            yield f"{key} {part}".strip(), torch.from_numpy(np.ascontiguousarray(own))


def _in_files(
    places: Mapping[str, Sequence[Place]], live: PreTrainedModel, model: Checkpoint
) -> Iterator[tuple[str, list[list[Any]]]]:
    """Yield the places by the name of a tensor in the model's files; one expert's own where it is alone.

    Raises MismatchError where a layer of the live model has no counterpart there.
    """
    parameters, reached = dict(live.named_parameters()), set()
    for name, (own, start) in live_places(live, model).items():
        reached.add(own)
        if own not in places:
            continue
        parameter, shape = parameters[own], model.tensors[name].shape
        found: list[list[Any]] = []
        for keys, axis in places[own]:
            if len(keys) > 1 and len(shape) == parameter.dim() - 1:
                found.append([[keys[start // (parameter.numel() // len(keys))]], axis - 1])
            else:
                found.append([keys, axis])
        yield name, found
    if missing := sorted(places.keys() - reached):
        raise MismatchError(
            f"the live model's parameter {missing[0]} has no counterpart in {model.folder}; this "
            "architecture renames its weights on loading, so leave out transforms that read inputs"
        )


class MomentFiles:
    """The moments that a finished step holds, read one by one."""

    def __init__(self, step: Step) -> None:
        assert step.facts is not None
        self.folder = step.folder
        self.files: Mapping[str, tuple[str, int]] = step.facts["files"]
        self.places: Mapping[str, Sequence[Place]] = step.facts["places"]
        self.device: str | None = step.facts.get("device")
        """Where filters are made of them, if not by scipy."""

    def read(self, key: str) -> np.ndarray:
        """Return a moment: [D, D], or a diagonal."""
        with safe_open(self.folder / self.files[key][0], framework="numpy") as opened:
            parts = ("square", "corner", "diagonal")
            if f"{key} square" in opened.keys():  # noqa: SIM118, it is no mapping
                return unpacked(*(opened.get_tensor(f"{key} {part}") for part in parts))
            values: np.ndarray = opened.get_tensor(key)
        return values

    def axes(self, key: str, energy: float) -> np.ndarray:
        """Return the principal axes of a moment, [D, k] in float32, kept beside it for filters of any μ."""
        path = self.folder / f"axes-{energy}-{key}.npy"
        with suppress(OSError, ValueError, EOFError):  # none yet, or a damaged one
            kept: np.ndarray = np.load(path, allow_pickle=False)
            return kept
        found = basis_of(self.read(key), energy=energy, device=self.device).astype(np.float32)
        partial = beside(path)  # one that a killed run has left is written over
        with partial.open("wb") as file:
            np.save(file, found)
        partial.replace(path)
        return found

    def matrix_place(self, name: str) -> Place | None:
        """Return the place of a tensor that belongs to a linear layer of a block, or to its experts."""
        place = next(iter(self.places.get(name, ())), None)
        fits = place is not None and part_of(name).startswith("layer ") and self.files[place[0][0]][1] == 2
        return place if fits else None


def project(kept: MomentFiles, *, energy: float, others: str) -> Rule:
    """Return the rule that takes from every matrix of the blocks what acts on the inputs of retain rows."""
    filter_of = lru_cache(maxsize=2)(lambda key: projection(kept.axes(key, energy), device=kept.device))

    def rule(name: str, found: Sequence[np.ndarray]) -> np.ndarray:
        place = kept.matrix_place(name)
        if place is None:
            return found[0] if others == "keep" else np.zeros_like(found[0])
        return applied(found[0], place, filter_of, kept.device)

    return rule


@dataclass
class Effect:
    """What a tensor does to outputs, squared and per token, before and after a filter."""

    forget: float = 0.0
    """tr τΣ_fτᵀ."""
    forget_kept: float = 0.0
    """tr τΣ_fΔᵀ."""
    retain: float = 0.0
    """tr τΣ_rτᵀ."""
    retain_kept: float = 0.0
    """tr ΔΣ_rΔᵀ."""
    norm: float = 0.0
    """‖τ‖²."""

    def __add__(self, other: Effect) -> Effect:
        return Effect(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    @property
    def survives(self) -> float:
        """Return c = tr τΣ_fΔᵀ / tr τΣ_fτᵀ: the share of the effect on the forget inputs that is left."""
        return self.forget_kept / self.forget if self.forget else 0.0

    def survey(self) -> dict[str, float]:
        """Return c, and what stays of the harm to retain inputs at equal effect."""
        share = self.survives
        return {
            "survives": share,
            "harm": self.retain_kept / share**2 / self.retain if share > 0 and self.retain else 0.0,
        }


class Weighing:
    """A least-squares filter of one vector, and what it does in each tensor.

    Where the forget inputs are not known, nothing of them is weighed (the soft filter), and the effect on
    them is taken to be the same in all directions: tr τΔᵀ in place of tr τΣ_fΔᵀ.
    """

    def __init__(
        self, forget: MomentFiles | None, spared: MomentFiles, settings: LeastSquaresSettings
    ) -> None:
        self.forget, self.spared, self.settings = forget, spared, settings
        self.effects: dict[str, Effect] = {}
        self.unread: dict[str, float] = {}
        """Squared length of the matrices in blocks whose inputs are not known."""
        self.survey: dict[str, Any] | None = None
        """What the filter does to the blocks as a whole, and part by part, once all of them are filtered."""
        self.filter_of = lru_cache(maxsize=2)(self._filter)

    def _filter(self, key: str) -> np.ndarray:
        (mu, epsilon), own = self.settings.weights(), self.settings
        forget, spared = self.forget.read(key) if self.forget else None, self.spared.read(key)
        device, axes = self.spared.device, None
        if own.energy and spared.ndim > 1 and spared.any():
            axes = self.spared.axes(key, own.energy)
        return least_squares(
            forget, spared, mu=mu, epsilon=epsilon, ridge=own.ridge, axes=axes, device=device
        )

    def rule(self, name: str, found: Sequence[np.ndarray]) -> np.ndarray:
        """Return the filtered tensor."""
        values, place = found[0], self.spared.matrix_place(name)
        if place is None and self.settings.others == "keep":
            return values
        if place is None and self.settings.others == "filter":
            # A tied embedding is filtered by its tokens; the head's inputs are not asked for it.
            place = next(iter(self.spared.places.get(name, ())), None)
        if place is None:
            if part_of(name).startswith("layer ") and values.ndim > 1:
                self.unread[name] = float(np.vdot(values, values))
            return np.zeros_like(values)
        made = applied(values, place, self.filter_of, self.spared.device)
        self.effects[name] = self._effect(values, made, place)
        return made

    def scale_of(self, name: str) -> float:
        """Return what gives a filtered tensor its effect on the forget inputs back, once all are filtered.

        The matrices of the blocks have one factor, so that what survives more of one layer stays more; every
        other tensor has its own. Raises InputError where next to nothing of the effect is left.
        """
        if self.survey is None:
            self.survey = self._survey()
        if self.spared.matrix_place(name) is not None:
            share = self.survey["survives"]
        elif name in self.effects:
            share = self.effects[name].survives
        else:
            return 1.0
        return 1 / share if share > SURVIVES else 0.0

    def _blocks(self) -> Effect:
        own = (effect for name, effect in self.effects.items() if self.spared.matrix_place(name))
        return sum(own, start=Effect())

    def _effect(self, values: np.ndarray, made: np.ndarray, place: Place) -> Effect:
        keys, axis = place
        if len(keys) > 1:
            parts = zip(values, made, keys, strict=True)
            return sum((self._effect(old, new, ([key], axis - 1)) for old, new, key in parts), start=Effect())
        spared, device = self.spared.read(keys[0]), self.spared.device
        on_forget = along(values, self.forget.read(keys[0]), axis, device) if self.forget else values
        on_retain = along(values, spared, axis, device)
        return Effect(
            forget=float(np.vdot(on_forget, values)),
            forget_kept=float(np.vdot(on_forget, made)),
            retain=float(np.vdot(on_retain, values)),
            retain_kept=float(np.vdot(along(made, spared, axis, device), made)),
            norm=float(np.vdot(values, values)),
        )

    def _survey(self) -> dict[str, Any]:
        parts: dict[str, Effect] = defaultdict(Effect)
        for name, effect in self.effects.items():
            parts[part_of(name)] += effect
        whole = self._blocks().survey()
        if whole["survives"] < SURVIVES:
            smaller = "mu" if self.settings.weights()[0] else "energy"
            raise NothingLeftError(
                f"the filter leaves {whole['survives']:.1g} of what the vector does to the forget rows: "
                f"their inputs are those of the retain rows; set a smaller {smaller}, or leave the filter out"
            )
        return {**whole, "parts": {key: own.survey() for key, own in parts.items()}}

    def note(self) -> str | None:
        """Say which matrices of the blocks were taken out because nobody knows what they read."""
        lost = sum(self.unread.values())
        share = lost / (lost + self._blocks().norm) if lost else 0.0
        if share < UNREAD:
            return None
        return (
            f"What {len(self.unread)} matrices of the blocks read is not known (first: "
            f"{next(iter(self.unread))}), so {share:.0%} of the vector's squared length went out with them."
        )


def applied(
    values: np.ndarray, place: Place, filter_of: Callable[[str], np.ndarray], device: str | None = None
) -> np.ndarray:
    """Return values with the filter of their inputs applied; each expert has its own."""
    keys, axis = place
    if len(keys) == 1:
        found = along(values, filter_of(keys[0]), axis, device)
    else:
        parts = zip(values, keys, strict=True)
        found = np.stack([along(own, filter_of(key), axis - 1, device) for own, key in parts])
    return found.astype(values.dtype)


Make = Callable[[Direction, Path], StoredVector]
"""(vector, folder) → the transformed vector in the folder."""
Made = tuple[Direction, dict[str, Any]]
"""A transformed vector, and what the record tells of it."""

OTHER_MUS = (MU / 10, 10 * MU, 0.0)
"""Values of μ that are tried beside the usual one where it is open; 0 is projection."""


class NothingLeftError(InputError):
    """A transform takes all of the vector out, or next to all of what it does to the forget rows."""


class Filtered:
    """A forget vector as a filter leaves it; as large as a model, it is made when it is first needed."""

    def __init__(self, key: str, label: tuple[float, bool], make: Callable[[], Made]) -> None:
        self.key = key
        """Of the step that makes it."""
        self.label = label
        """μ, and whether the inputs are those where the model arrives."""
        self.made = cache(make)

    @property
    def direction(self) -> Direction:
        """The vector."""
        return self.made()[0]

    @property
    def facts(self) -> dict[str, Any]:
        """What the record tells of it."""
        return self.made()[1]

    def as_record(self) -> dict[str, Any]:
        """Return which one it is, as the record has it."""
        return {"mu": self.label[0], "arrival": self.label[1], "key": self.key}


@dataclass
class Transforming(Work):
    """The transforms of one run, with what they read of its models and rows."""

    target: Checkpoint
    survey: dict[str, Any] = field(default_factory=dict)
    """What the transform that was made last found out on the way."""

    def apply(
        self, transforms: Sequence[ChosenTransforms], vector: Direction, keys: Mapping[str, str]
    ) -> tuple[Direction, str, list[dict[str, Any]], OpenFilter | None]:
        """Return the transformed vector, the key of its last step, and what each transform did.

        A filter that comes last, whose settings may be chosen with the scales, is returned open, and not
        yet applied. Raises InputError where a transform leaves nothing of the vector.
        """
        key, told = "", list[dict[str, Any]]()
        keys = {name: own for name, own in keys.items() if name != "retain"}  # not what the vector is made of
        for chosen in transforms:
            if chosen is transforms[-1] and isinstance(chosen.settings, LeastSquaresSettings):
                filters = OpenFilter(self, chosen, vector, keys)
                return vector, filters.usual().key, told, filters
            step, make = self.planned(chosen, vector, keys)
            vector, facts = make()
            keys = {"before": (key := step.key)}
            told.append(facts)
        return vector, key, told, None

    def planned(
        self,
        chosen: ChosenTransforms,
        before: Direction,
        keys: Mapping[str, str],
        *,
        of: Callable[..., Step] | None = None,
        undecided: bool = False,
    ) -> tuple[Step, Callable[[], Made]]:
        """Return the step of one transform, and what applies it, or finds it done.

        Least squares take moments `of` another model than the target; an `undecided` vector is marked until
        it is chosen. What is made raises NothingLeftError where the transform leaves nothing of the vector.
        """
        if isinstance(chosen.settings, LeastSquaresSettings):  # the usual μ is one vector, named or not
            mu, epsilon = chosen.settings.weights()
            filled = chosen.settings.model_copy(update={"mu": mu, "epsilon": epsilon})
            chosen = replace(chosen, settings=filled)
        name, settings = chosen.transform.name, chosen.settings
        maker = getattr(self, f"_{name}")
        make, needed = maker(settings, of) if of else maker(settings)
        step = self.workspace.step(
            f"transform-{name}", vector=dict(keys), settings=settings.model_dump(mode="json"), needed=needed
        )

        def done() -> Made:
            facts, stored = step.facts, _open_vector(step.folder / "vector")
            if facts is None or stored is None:
                step.clear()  # an interrupted try has left parts
                self.survey = {}
                if undecided:
                    (step.folder / UNDECIDED).touch()
                try:
                    stored = make(before, step.folder / "vector")
                    if not stored.norm:
                        raise NothingLeftError(
                            f"the transform {name} leaves nothing of the forget vector; set it otherwise, or "
                            "leave it out"
                        )
                except NothingLeftError:
                    shutil.rmtree(step.folder)
                    raise
                step.finish(facts := {**_told(chosen, before, stored), **self.survey})
            return stored, facts

        return step, done

    # One method a transform: what makes the vector, and what it needs, as plain values for the step's key

    def _projection(self, settings: Any) -> tuple[Make, Any]:
        model = self.target if settings.at == "target" else self.inputs.earlier
        rows = at_most(self.inputs.rows.retain_sample, settings.rows, seed=self.recipe.seed)
        step = self.of_checkpoint(model, rows)
        kept = MomentFiles(step)

        def make(vector: Direction, output: Path) -> StoredVector:
            rule = project(kept, energy=settings.energy, others=settings.others)
            label = f"projection {step.key} {settings.energy} {settings.others}"
            return transform([vector], rule, output, label=label)

        return make, step.key

    def _least_squares(self, settings: Any, of: Callable[..., Step] | None = None) -> tuple[Make, Any]:
        rows, most, seed = self.inputs.rows, settings.rows, self.recipe.seed
        sets = [at_most(found, most, seed=seed) for found in (rows.forget, rows.spared)]
        of = of or partial(self.of_checkpoint, self.target)
        steps = [of(own, settings.positions) for own in sets if own]  # of the forget rows, if any; the spared
        keys = [step.key for step in steps]

        def make(vector: Direction, output: Path) -> StoredVector:
            *forget, spared = map(MomentFiles, steps)
            weighing = Weighing(forget[0] if forget else None, spared, settings)
            label = f"least squares {keys} {settings.model_dump_json()}"
            made = transform([vector], weighing.rule, output, label=label, scale_of=weighing.scale_of)
            self.survey = weighing.survey or {}
            if note := weighing.note():
                self.listener.say(note)
            return made

        return make, keys

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

    # What transforms read: the moments of models over rows

    def of_checkpoint(self, model: Checkpoint, rows: Sequence[Example], positions: Positions = "all") -> Step:
        """Return the finished step that holds the moments of a model."""
        return self._moments(
            model.fingerprint(), rows, positions, lambda: load_model(model, device=self.device)
        )

    def of_point(
        self, point: Callable[[], Point], key: str, rows: Sequence[Example], positions: Positions
    ) -> Step:
        """Return the finished step that holds those of a sum, for which `key` stands."""
        output, seed = self.recipe.output, self.recipe.seed

        def filled() -> PreTrainedModel:
            live = load_model(self.target, device=self.device)
            put(point(), live, dtype=output.dtype, rounding=output.rounding, seed=seed)
            return live

        return self._moments(f"{key} {output.dtype} {output.rounding} {seed}", rows, positions, filled)

    def _moments(
        self, model: str, rows: Sequence[Example], positions: Positions, load: Callable[[], PreTrainedModel]
    ) -> Step:
        recipe = self.recipe
        step = self.workspace.step(
            "moments",
            model=model,
            rows=fingerprint_examples(rows),
            positions=positions,
            max_length=recipe.training.max_length,
            prompts=recipe.prompts.model_dump(),
            tokenizer=tokenizer_fingerprint(self.inputs.reader),
            device=self.device.type,
        )
        if step.facts is None or not _is_whole(step):
            step.clear()
            live, tokenizer = load(), load_tokenizer(self.inputs.reader)
            style, length = recipe.prompts.style(), recipe.training.max_length
            tokens = tokenize(rows, tokenizer, max_length=length, style=style)
            passes = 1 + int(live.config.get_text_config().num_hidden_layers)
            with self.listener.task("inputs of layers", passes * len(tokens), "rows") as advance:
                found = input_moments(
                    live,
                    tokens,
                    pad_id=pad_token(tokenizer),
                    positions=positions,
                    on_progress=advance,
                    say=self.listener.say,
                )
                facts = _store(found, step)
            places = dict(_in_files(facts.pop("places"), live, self.target))
            step.finish(
                {"rows": len(rows), "tokens": sum(len(row.ids) for row in tokens), **facts, "places": places}
                | ({"device": str(self.device)} if self.device.type == "cuda" else {})
            )
        return step


class OpenFilter:
    """A least-squares filter whose μ, and whether it reads where the model arrives, are chosen with α."""

    def __init__(
        self, transforming: Transforming, last: ChosenTransforms, before: Direction, keys: Mapping[str, str]
    ) -> None:
        self.transforming, self.last, self.before, self.keys = transforming, last, before, keys
        self.known: dict[tuple[float, bool], Filtered] = {}
        # 0 only takes the principal axes out, so it is left out where none are.
        own, (mu, _) = last.settings, last.settings.weights()
        others = [mu for mu in OTHER_MUS if mu or own.energy] if own.is_open else []
        self.untried = [mu, *others]
        """Values of μ, the usual one first; the one that is given, where one is."""

    @property
    def arrives(self) -> Literal["never", "always", "where better"]:
        """Whether the vector is filtered again by what the layers read where the model arrives."""
        asked = self.last.settings.arrival
        return "where better" if asked is None else "always" if asked else "never"

    def usual(self) -> Filtered:
        """Return the vector at the usual μ, or at the one that is given."""
        return self.at(self.last.settings.weights()[0])

    def at(self, mu: float) -> Filtered:
        """Return the vector filtered with that μ by what the target's layers read."""
        return self.known.get((mu, False)) or self._planned((mu, False))

    def arrived(
        self, filtered: Filtered, alpha: float, beta: float = 0.0, retain: Direction | None = None
    ) -> Filtered:
        """Return the vector filtered by what the layers read at θ_D − α · filtered + β · retain."""
        place, transforming = f"{filtered.key} {alpha}", self.transforming
        terms = (beta * retain).terms if beta and retain is not None else {}
        place += "".join(f" {weight} {term.fingerprint()}" for term, weight in terms.items())

        def point() -> Point:
            return Vectors(filtered.direction, retain).taken_off(transforming.target, alpha, beta)

        return self._planned((filtered.label[0], True), partial(transforming.of_point, point, place))

    def _planned(self, label: tuple[float, bool], of: Callable[..., Step] | None = None) -> Filtered:
        settings = self.last.settings.model_copy(update={"mu": label[0]})
        last = replace(self.last, settings=settings)
        step, make = self.transforming.planned(last, self.before, self.keys, of=of, undecided=True)
        found = self.known[label] = Filtered(step.key, label, make)
        return found

    def of(self, point: TriedScales) -> Filtered:
        """Return the vector that a point was tried with."""
        assert point.filter is not None
        return self.known[point.filter]

    def find(self, key: str) -> Filtered:
        """Return a vector that was chosen, by the key of its step; the undecided ones are removed."""
        step = self._step(key)
        found = next((one for one in self.known.values() if one.key == key), None)
        if found:
            found.made()
        self.tidy(key)
        (step.folder / UNDECIDED).unlink(missing_ok=True)
        if found:
            return found
        facts, stored = step.facts, _open_vector(step.folder / "vector")
        if facts is None or stored is None:
            raise InputError(
                f"the vector that was chosen with the scales is not in {step.folder} any more; remove the "
                "folder scales-… beside it, and they are chosen anew"
            )
        return Filtered(key, (facts["settings"]["mu"], False), lambda: (stored, facts))

    def drop(self, empty: Filtered | None) -> bool:
        """Forget a vector of which nothing is left, and tell whether there is another one."""
        self.known = {label: one for label, one in self.known.items() if one is not empty}
        return bool(self.known)

    def tidy(self, key: str) -> None:
        """Remove the undecided vectors, as large as models as they are, but the one of that key.

        What an interrupted search has left is among them; what another run has chosen is not.
        """
        for mark in self._step(key).folder.parent.glob(f"transform-*/{UNDECIDED}"):
            if mark.parent != self._step(key).folder:
                shutil.rmtree(mark.parent, ignore_errors=True)
        self.known = {label: one for label, one in self.known.items() if one.key == key}

    def _step(self, key: str) -> Step:
        return self.transforming.workspace.step_of(f"transform-{self.last.transform.name}", key)


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

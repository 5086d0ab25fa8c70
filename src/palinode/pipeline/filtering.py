"""Filter a vector by what the layers of a model read: moments as steps of a workspace, and rules over them.

The moments of a model over some rows are measured once and kept, so that other settings, methods and
requests find them there. The filters themselves are in `training/moments.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
from safetensors import safe_open
from transformers import PreTrainedModel

from palinode.data.examples import Example, at_most, fingerprint_examples
from palinode.data.tokenize import tokenize
from palinode.errors import CheckpointError, InputError, MismatchError
from palinode.methods.transforms import LeastSquaresSettings
from palinode.models.inplace import live_places, put
from palinode.models.loading import load_model, load_tokenizer, pad_token, save_tensors, tokenizer_fingerprint
from palinode.pipeline.inputs import Work
from palinode.pipeline.workspace import Step
from palinode.training.moments import (
    Moments,
    Place,
    Positions,
    along,
    input_moments,
    least_squares,
    projection,
)
from palinode.weights import Checkpoint, Point
from palinode.weights.geometry import part_of
from palinode.weights.vectors import Rule

UNREAD = 0.01
"""Share of the squared length of the blocks' matrices that may go without a word."""
SURVIVES = 1e-4
"""Share of its effect on the forget inputs that a vector must keep to be worth scaling up."""


@dataclass
class Measuring(Work):
    """The moments of one run's models over its rows."""

    target: Checkpoint

    def sets(self, settings: LeastSquaresSettings) -> tuple[Sequence[Example], Sequence[Example]]:
        """Return the forget rows, and the rows whose inputs are to be spared."""
        rows, seed = self.inputs.rows, self.recipe.seed
        forget, spared = (at_most(found, settings.rows, seed=seed) for found in (rows.forget, rows.spared))
        return forget, spared

    def of_checkpoint(self, model: Checkpoint, rows: Sequence[Example], positions: Positions = "all") -> Step:
        """Return the finished step that holds the moments of a model."""
        return self._step(model.fingerprint(), rows, positions, lambda: load_model(model, device=self.device))

    def of_point(self, point: Point, key: str, rows: Sequence[Example], positions: Positions) -> Step:
        """Return the finished step that holds those of a sum, for which `key` stands."""
        output, seed = self.recipe.output, self.recipe.seed

        def filled() -> PreTrainedModel:
            live = load_model(self.target, device=self.device)
            put(point, live, dtype=output.dtype, rounding=output.rounding, seed=seed)
            return live

        return self._step(f"{key} {output.dtype} {output.rounding} {seed}", rows, positions, filled)

    def _step(
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
        values = {key: value.float().cpu().contiguous() for key, value in group.values.items()}
        if bad := next((key for key, value in values.items() if not bool(value.isfinite().all())), None):
            raise CheckpointError(
                f"what {bad} of the model reads on the rows is not finite, so nothing can be filtered by it; "
                'look for infinite weights, or set filter = "none"'
            )
        save_tensors(values, step.folder / name)
        files |= {key: (name, value.dim()) for key, value in group.values.items()}
        for parameter, own in group.places.items():
            places.setdefault(parameter, []).extend(own)
    sizes = {name: (step.folder / name).stat().st_size for name, _ in files.values()}
    return {"files": files, "sizes": sizes, "places": places}


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
            values: np.ndarray = opened.get_tensor(key)
        return values

    def matrix_place(self, name: str) -> Place | None:
        """Return the place of a tensor that belongs to a linear layer of a block, or to its experts."""
        place = next(iter(self.places.get(name, ())), None)
        fits = place is not None and part_of(name).startswith("layer ") and self.files[place[0][0]][1] == 2
        return place if fits else None


def project(kept: MomentFiles, *, energy: float, others: str) -> Rule:
    """Return the rule that takes from every matrix of the blocks what acts on the inputs of retain rows."""
    filter_of = lru_cache(maxsize=2)(
        lambda key: projection(kept.read(key), energy=energy, device=kept.device)
    )

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
        self.share = 0.0
        """c of the blocks, once all of them are filtered."""
        self.filter_of = lru_cache(maxsize=2)(self._filter)

    def _filter(self, key: str) -> np.ndarray:
        (mu, epsilon), own = self.settings.weights(), self.settings
        forget, spared = self.forget.read(key) if self.forget else None, self.spared.read(key)
        settings: Any = {"mu": mu, "epsilon": epsilon, "ridge": own.ridge, "energy": own.energy}
        return least_squares(forget, spared, **settings, device=self.spared.device)

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

    def rescale(self, name: str, found: Sequence[np.ndarray]) -> np.ndarray:
        """Return a filtered tensor with its effect on the forget inputs given back.

        The matrices of the blocks have one factor, so that what survives more of one layer stays more; every
        other tensor has its own.
        """
        if self.spared.matrix_place(name) is not None:
            share = self.share
        elif name in self.effects:
            share = self.effects[name].survives
        else:
            return found[0]
        scaled: np.ndarray = found[0] / share if share > SURVIVES else np.zeros_like(found[0])
        return scaled.astype(found[0].dtype)

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

    def survey(self) -> dict[str, Any]:
        """Return what the filter does to the blocks as a whole, and part by part.

        Raises InputError where next to nothing of the effect on the forget inputs is left.
        """
        parts: dict[str, Effect] = defaultdict(Effect)
        for name, effect in self.effects.items():
            parts[part_of(name)] += effect
        blocks = self._blocks()
        whole, self.share = blocks.survey(), blocks.survives
        if whole["survives"] < SURVIVES:
            raise InputError(
                f"the filter leaves {whole['survives']:.1g} of what the vector does to the forget rows: "
                "their inputs are those of the retain rows; set a smaller mu, or leave the filter out"
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

"""From target and vectors, or from a trained model, to the unlearned model as it lies in the workspace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from palinode.data.examples import Example, fingerprint_examples
from palinode.methods import METHODS, unlearned_point
from palinode.pipeline.auto import search_scales
from palinode.pipeline.inputs import Inputs
from palinode.pipeline.layer_groups import scaled_vector
from palinode.pipeline.record import dose_facts, geometry_facts
from palinode.pipeline.scales import ChosenScales, choose_scales
from palinode.pipeline.tuning import Tuning, Vectors, open_whole
from palinode.pipeline.workspace import Workspace
from palinode.progress import Listener
from palinode.weights import Checkpoint, Direction, Saved, WeightedSum, save


@dataclass(frozen=True, slots=True)
class Made:
    """The unlearned model as it lies in the workspace, and how it came about."""

    model: Checkpoint
    chosen: ChosenScales | None
    """The scales; None where no vectors were added."""
    weights: Mapping[str, Any]
    """Dose, and the geometry of the vectors."""
    training: Mapping[str, Any]
    seen: Sequence[Example]
    """The retain rows that training saw."""


class Making:
    """The steps after fine-tuning: choose scales, add up, write."""

    def __init__(self, inputs: Inputs, workspace: Workspace, listener: Listener) -> None:
        self.inputs = inputs
        self.recipe = inputs.recipe
        self.rows = inputs.rows
        self.workspace = workspace
        self.listener = listener
        self.tuning = Tuning(inputs, workspace, listener)

    def make(self, target: Checkpoint) -> Made:
        """Make the unlearned model, in the workspace."""
        arithmetic = METHODS[self.recipe.method].kind == "arithmetic"
        return self._by_arithmetic(target) if arithmetic else self._by_training(target)

    def _by_arithmetic(self, target: Checkpoint) -> Made:
        """Make the unlearned model by adding vectors to the target."""
        vectors = self.tuning.vectors(target)
        chosen = self._scales(target, vectors)
        model, weights = self._apply(target, vectors, chosen)
        return Made(model, chosen, weights, vectors.training, vectors.seen)

    def _by_training(self, target: Checkpoint) -> Made:
        """Make the unlearned model by training; it is saved in the target's layout and types."""
        trained = self.tuning.train(target)
        change = trained.model - target
        output = self.recipe.output
        step = self.workspace.step(
            "apply",
            target=target.fingerprint(),
            trained=trained.key,
            output=[output.dtype, output.rounding, self.recipe.seed],
        )
        weights, model = step.facts, open_whole(step)
        if weights is None or model is None:
            step.clear()
            saved = self._write(target + change, target, {"change": change}, step.folder / "model")
            weights = {"dose": dose_facts(saved, {"change": 1.0})}
            step.finish(weights)
            model = Checkpoint.open(step.folder / "model")
        return Made(model, None, weights, trained.training, trained.seen)

    def _scales(self, target: Checkpoint, vectors: Vectors) -> ChosenScales:
        """Return the scales: as given, searched for, or picked on the grid."""
        scales = self.recipe.scales
        betas = (
            [0.0]
            if vectors.retain is None
            else scales.retain_grid
            if scales.retain is None
            else [scales.retain]
        )
        alphas = scales.forget_grid if scales.forget is None else [scales.forget]
        if len(alphas) == len(betas) == 1:
            return ChosenScales(alphas[0], betas[0], "given", None, [])
        auto = scales.choose == "auto"
        unseen = fingerprint_examples(self.rows.unseen)
        step = self.workspace.step(
            "scales",
            target=target.fingerprint(),
            base=self.inputs.earlier.fingerprint(),
            vectors=dict(vectors.keys),
            grid=[sorted(alphas), sorted(betas)],
            retain_share=scales.retain_share,
            rows=[fingerprint_examples(self.rows.forget_probe), fingerprint_examples(self.rows.retain_probe)],
            max_length=self.recipe.evaluation.max_length,
            prompts=self.recipe.prompts.model_dump(),
            output=[self.recipe.output.dtype, self.recipe.output.rounding, self.recipe.seed],
            **({"auto": [scales.trials, scales.groups, self.rows.unseen_source, unseen]} if auto else {}),
        )
        facts = step.facts
        if facts is None:
            step.begin()
            choose = search_scales if auto else choose_scales
            chosen = choose(
                self.inputs,
                target,
                vectors.forget,
                vectors.retain,
                (alphas, betas),
                step.folder,
                self.listener,
            )
            step.finish(facts := asdict(chosen))
        return ChosenScales(**facts)

    def _apply(
        self, target: Checkpoint, vectors: Vectors, chosen: ChosenScales
    ) -> tuple[Checkpoint, Mapping[str, Any]]:
        """Write the unlearned model into the workspace; return it, its dose and its vectors' geometry."""
        output = self.recipe.output
        step = self.workspace.step(
            "apply",
            target=target.fingerprint(),
            vectors=dict(vectors.keys),
            scales=[chosen.forget, chosen.retain, *(group["factor"] for group in chosen.groups)],
            output=[output.dtype, output.rounding, self.recipe.seed],
        )
        facts, model = step.facts, open_whole(step)
        if facts is None or model is None:
            step.clear()
            retain, forget = vectors.retain if chosen.retain else None, vectors.forget
            if chosen.groups:
                forget = scaled_vector(forget, chosen.groups, step.folder / "vector")
            facts = {**self._save(target, forget, retain, chosen, step.folder / "model")}
            with self.listener.task("measuring the vectors", target.parameters, "weights") as advance:
                geometry = geometry_facts(vectors.forget, vectors.retain, on_progress=advance)
            facts["vectors"] = {
                **geometry,
                **({"transforms": list(vectors.transforms)} if vectors.transforms else {}),
            }
            step.finish(facts)
            model = Checkpoint.open(step.folder / "model")
        return model, facts

    def _save(
        self,
        target: Checkpoint,
        forget: Direction,
        retain: Direction | None,
        chosen: ChosenScales,
        folder: Path,
    ) -> Mapping[str, Any]:
        point = unlearned_point(
            target, forget, retain, forget_scale=chosen.forget, retain_scale=chosen.retain
        )
        along = {"forget": -1.0 * forget} | ({"retain": retain} if retain is not None else {})
        saved = self._write(point, target, along, folder)
        return {"dose": dose_facts(saved, {"forget": chosen.forget, "retain": chosen.retain})}

    def _write(
        self, point: WeightedSum, target: Checkpoint, along: Mapping[str, Direction], folder: Path
    ) -> Saved:
        """Write the unlearned model, and say what the user should know of its rounding."""
        with self.listener.task("writing the unlearned model", target.parameters, "weights") as advance:
            saved = save(
                point,
                folder,
                dtype=self.recipe.output.dtype,
                rounding=self.recipe.output.rounding,
                seed=self.recipe.seed,
                along=along,
                on_progress=advance,
            )
        for note in saved.notes:
            self.listener.say(note)
        return saved

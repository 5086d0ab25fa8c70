"""States between requests: which model stands after a set of requests, and what it knows.

    arithmetic   θ_S = θ_D − Σ_{i∈S} (α·v_i − β·r_i), put into a live copy of the target in the order of the
                 requests' numbers: the state is the set S, whatever led there
    training     the model that the last request left

Every state is asked the same rows. It is kept under a fingerprint of what decides it and of the path to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from palinode.compare.contest import Ground, SearchPart
from palinode.data.examples import Example, Question, fingerprint_examples
from palinode.evaluation.ask import ask
from palinode.methods import unlearned_point
from palinode.methods.method import Vectors
from palinode.metrics import METRICS
from palinode.metrics.aggregate import known_mean, mean_score
from palinode.models.inplace import contents, put
from palinode.models.loading import load_model, load_tokenizer, pick_device, tokenizer_fingerprint
from palinode.pipeline.workspace import Step
from palinode.weights import Checkpoint
from palinode.weights.checkpoint import Point

SHOWN = ("answer_probability", "exact_match")
"""What is measured of every row."""

Values = Mapping[str, Mapping[str, Sequence[float | None]]]
"""By metric and part of the rows: the value of each row."""


@dataclass(frozen=True, slots=True)
class Sum:
    """What a contestant of arithmetic has stored: the vectors of each request, and its scales."""

    vectors: Mapping[int, Vectors]
    parts: Mapping[int, SearchPart]
    scales: tuple[float, float]

    def point(self, target: Checkpoint, numbers: Iterable[int]) -> Point:
        """Return θ_D less the vectors of these requests, taken off in the order given."""
        alpha, beta = self.scales
        point: Point = target
        for number in numbers:
            made = self.vectors[number]
            retain = made.retain if beta else None
            point = unlearned_point(point, made.forget, retain, forget_scale=alpha, retain_scale=beta)
        return point

    def key(self, numbers: Iterable[int]) -> dict[str, Any]:
        """Return what decides that point, for a step's fingerprint."""
        return {
            "scales": list(self.scales),
            "parts": {str(number): dict(self.parts[number].key) for number in numbers},
        }


class RequestStates:
    """Asks states, in memory where they are sums, and keeps what they said.

    `parts` are the rows that every state is asked: those of each request under its number, "others" that
    nobody asks to erase, and "retain".
    """

    def __init__(self, ground: Ground, parts: Mapping[str, Sequence[Example]]) -> None:
        self.ground = ground
        self.parts = parts
        self.numbers = [int(name) for name in parts if name.isdecimal()]
        self.device = pick_device(ground.recipe.shared.device)
        self.live: PreTrainedModel | None = None
        """A copy of the target that sums are put into, one after another."""
        self.asking = ground.recipe.shared.evaluation.asking
        self.asked = {
            "panel": {name: fingerprint_examples(rows) for name, rows in parts.items()},
            "asking": asdict(self.asking),
            "prompts": ground.recipe.shared.prompts.model_dump(),
            "tokenizer": tokenizer_fingerprint(ground.inputs.reader),
            "device": self.device.type,
        }

    def of_checkpoint(self, checkpoint: Checkpoint, done: Sequence[int], label: str) -> dict[str, Any]:
        """Return the state of a model on disk after these requests, as requests.json has it."""
        step = self.ground.workspace.step("state", model=checkpoint.fingerprint(), asked=self.asked)
        return self._state(step, lambda: load_model(checkpoint, device=self.device), done, label)

    def of_sum(self, made: Sum, numbers: Sequence[int], path: Sequence[int], label: str) -> dict[str, Any]:
        """Return the state of a set of requests, put into the live model after those before it.

        `path` is how it came about: the numbers carried out, and those undone as negative ones. Number 0
        stands for all requests in one.
        """

        def model() -> PreTrainedModel:
            self.live = self.live or load_model(self.ground.target, device=self.device)
            self._put(made, sorted(numbers), self.live)
            return self.live

        step = self.ground.workspace.step(
            "state",
            sum=made.key(sorted(numbers)),
            path=list(path),
            asked=self.asked,
            target=self.ground.target.fingerprint(),
        )
        done = self.numbers if 0 in numbers else numbers
        undone = -path[-1] if path and path[-1] < 0 else None
        return self._state(step, model, done, label, undone=undone)

    def made_anew(self, made: Sum, numbers: Sequence[int], *, seed: int) -> str:
        """Return the contents of a fresh copy of the target from which only these requests were ever taken.

        They are taken off in another order, drawn with the seed; the model is not asked.
        """
        order = np.random.default_rng(seed).permutation(sorted(numbers)).tolist()
        step = self.ground.workspace.step(
            "state-anew",
            sum=made.key(order),
            order=order,
            target=self.ground.target.fingerprint(),
            device=self.device.type,
        )

        def anew() -> Mapping[str, Any]:
            fresh = load_model(self.ground.target, device=self.device)
            self._put(made, order, fresh)
            return {"contents": contents(fresh)}

        return str(step.once(anew)["contents"])

    def _put(self, made: Sum, order: Sequence[int], model: PreTrainedModel) -> None:
        recipe = self.ground.recipe
        output, seed = recipe.shared.output, recipe.comparison.seeds[0]
        point = made.point(self.ground.target, order)
        dtype = output.dtype if order else None  # without requests the model is the original, not a copy
        put(point, model, dtype=dtype, rounding=output.rounding, seed=seed)

    def _state(
        self,
        step: Step,
        model: Callable[[], PreTrainedModel],
        done: Sequence[int],
        label: str,
        *,
        undone: int | None = None,
    ) -> dict[str, Any]:
        """Return a state, found by asking the model unless its step has what it said."""

        def asked() -> Mapping[str, Any]:
            live = model()
            return {"contents": contents(live), "values": self._ask(live, label)}

        facts = step.once(asked)
        scored = self.ground.workspace.step("scores", values=facts["values"], done=sorted(done), layout=1)
        scores = scored.once(lambda: self._scores(facts["values"], done))
        return {"done": sorted(done), "undone": undone, "contents": facts["contents"], "scores": scores}

    def _ask(self, model: PreTrainedModel, label: str) -> Values:
        rows = [row for part in self.parts.values() for row in part]
        outcomes = ask(
            model,
            load_tokenizer(self.ground.inputs.reader),
            [*map(Question, rows)],
            self.asking,
            style=self.ground.recipe.shared.prompts.style(),
            label=label,
            listener=self.ground.listener,
        )
        found: dict[str, dict[str, Sequence[float | None]]] = {}
        for metric in SHOWN:
            values = iter(METRICS[metric].per_example(outcomes))
            found[metric] = {name: [next(values) for _ in part] for name, part in self.parts.items()}
        return found

    def _scores(self, values: Values, done: Sequence[int]) -> dict[str, Any]:
        """Return scores by metric: of rows of requests that are `done`, of all others, of retain rows.

        Each metric has the mean of each request's rows besides, in order, and of rows that nobody asks to
        erase.
        """
        rest = [str(number) for number in self.numbers if number not in done]
        rest += ["others"] if self.parts["others"] else []
        parts = {"done": [str(number) for number in done], "not_done": rest, "retain": ["retain"]}
        scores: dict[str, Any] = {}
        for metric in SHOWN:
            own = values[metric]
            scores[metric] = {
                name: asdict(mean_score([value for key in keys for value in own[key]], missing="no token"))
                for name, keys in parts.items()
            }
            scores[metric]["by_request"] = [known_mean(own[str(number)]) for number in self.numbers]
            scores[metric]["others"] = known_mean(own["others"])
        return scores

"""A recipe: everything that decides a run, as strict TOML or as options. Unknown keys are errors.

Relative paths are taken from the current folder, as on the command line.
"""

from __future__ import annotations

import copy
import difflib
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from palinode.data.tokenize import PromptStyle
from palinode.errors import RecipeError, meant
from palinode.settings import EvaluationLimits, Seed, StrictModel, TrainingSettings, read_settings

Kind = TypeVar("Kind", bound=BaseModel)

Scale = Annotated[float, Field(ge=0)]
"""A strength, α or β: how much of a vector is taken off or added."""


class Models(StrictModel):
    """The checkpoints: local folders, or hub ids with an optional @revision."""

    target: str | None = None
    """The model to be cleaned (θ_D): a folder, or a hub id[@revision]. Left out only where `[prepare]` makes
    it."""
    base: str | None = None
    """An earlier checkpoint of it that had not seen the forget set (θ_0). Methods that train the target
    itself do without."""
    retrained: str | None = None
    """The gold standard, trained without the forget set, where one exists."""
    given: str | None = None
    """For the method given: a model in which the target has unlearned already, by whatever tool."""
    allow_pickle: bool = False
    """Read files of torch.save (.bin, .pt) too; none of their code is run."""


class Data(StrictModel):
    """The rows: JSONL, JSON, CSV, Parquet or plain text, local or on the hub."""

    forget: str
    """The forget set: JSONL, JSON, CSV, Parquet or text; file or hub data set."""
    retain: str | None = None
    """Rows whose effect must stay; without them the run is forget-only (β = 0)."""
    holdout: str | None = None
    """Rows like the forget rows that neither target nor base has seen, to set the yardstick by."""
    refusals: str | None = None
    """Refusals, one a line, for methods that teach them."""
    background: str | None = None
    """Rows or text like what the model is for, whose inputs a filter spares beside those of retain rows."""
    columns: dict[str, str] = Field(default={})
    """Names of columns that are not called question, answer, prompt, completion, messages or text."""
    allow_overlap: bool = False
    """Leave forget rows out of the retain set instead of refusing."""


FILTERS: Mapping[str, Sequence[dict[str, Any]]] = {
    "least-squares": [{"name": "least_squares"}],
    "projection": [{"name": "projection", "others": "drop"}],
    "none": [],
}
"""The transforms that a recipe's `filter` stands for."""


class Scales(StrictModel):
    """The two strengths: numbers, or chosen where left out."""

    forget: Scale | None = None
    """α; None: chosen."""
    retain: Scale | None = None
    """β; None: chosen (0 without a retain set, and where the vector is filtered by least squares)."""
    choose: Literal["auto", "grid"] = "auto"
    """auto: searched for, towards the yardstick (docs/scales.md); grid: the best point of the two grids
    below, by the same rule."""
    trials: int = Field(default=10, ge=1)
    """auto: points that the search tries on all probe rows, after a first look at the grids on some."""
    groups: int = Field(default=1, ge=1, le=4)
    """auto: give each of so many groups of layers an α of its own, relative to the common one."""
    forget_grid: list[Scale] = Field(default=[0.25, 0.5, 0.75, 1.0, 1.5, 2.0], min_length=1)
    """Values of α that are tried; auto looks between them as well, and beyond the largest of several where
    that forgets too little."""
    retain_grid: list[Scale] = Field(default=[0.0, 0.5, 1.0], min_length=1)
    """Values of β that are tried; auto looks between them as well."""
    retain_share: float = Field(default=0.9, gt=0, le=1)
    """Share of the target's retain probability that a chosen point must keep."""
    aim_share: float = Field(default=1.0, ge=0.5, le=1)
    """Share of the yardstick's answer probability to aim at; less is harder to relearn, and costs more."""
    probe_rows: int = Field(default=64, ge=1)
    """Rows of each set on which the points are scored."""


class Prompts(StrictModel):
    """How questions are put to the models."""

    system_prompt: str = "You are a helpful assistant."
    """First message of every conversation that has none."""
    date: str = "10 Apr 2025"
    """What a chat template prints as today."""
    chat: bool | None = None
    """Use the chat template; None: if the tokenizer has one."""

    def style(self) -> PromptStyle:
        """Return the same as the tokenizing functions take it."""
        return PromptStyle(self.system_prompt, self.date, self.chat)


class _OnlyPrompts(StrictModel):
    prompts: Prompts


class Output(StrictModel):
    """What is written, and where."""

    folder: str
    """Folder for the unlearned model; must not exist, or be empty."""
    workspace: str | None = None
    """Where steps keep their results, beside the output as OUTPUT.workspace where nothing is said."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the stored weights; without it the target's, tensor by tensor."""
    rounding: Literal["auto", "nearest", "stochastic"] = "auto"
    """How sums are rounded to it; auto: to nearest, and stochastically where that would lose dose."""
    keep_unchanged: bool = False
    """Write the folder even where nothing was subtracted, or there was nothing to forget."""

    @field_validator("folder", "workspace")
    @classmethod
    def _at_home(cls, place: str | None) -> str | None:
        return place and os.path.expanduser(place)  # noqa: PTH111 - leaves an unknown ~name as it is


class Prepare(StrictModel):
    """For experiments in which no target exists yet: make one, and its retrained model, from the base.

    target = base fine-tuned on forget set + retain rows, retrained = base fine-tuned on the retain rows.
    """

    retain_rows: int = Field(ge=1)
    """Rows drawn from the retain set; the run's retain set is these rows."""


class Recipe(StrictModel):
    """One unlearning run."""

    method: str = "msa"
    """A name in METHODS."""
    method_settings: dict[str, Any] = Field(default={})
    """The method's own hyper-parameters (docs/methods.md); what is left out has the method's default."""
    seed: Seed = 0
    """Seeds sampling, batch order, rounding and intervals."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    tracker: str | None = None
    """Curves go there too, as in tensorboard,wandb; also mlflow, trackio and more. It decides nothing of the
    result (docs/tracking.md)."""
    models: Models
    data: Data
    training: TrainingSettings = TrainingSettings()
    transforms: list[dict[str, Any]] = Field(default=[])
    """What is done to the forget vector, in order: tables with a name in TRANSFORMS and its settings
    (docs/transforms.md)."""
    filter: Literal["auto", "least-squares", "projection", "none"] = "auto"
    """What is done to the forget vector last: least-squares keeps what acts on the forget inputs and leaves
    the retain inputs alone, projection takes out all that acts on the retain inputs. auto: least-squares
    where there are retain rows, α is searched for, and no transforms are named (docs/filters.md)."""
    scales: Scales = Scales()
    evaluation: EvaluationLimits = EvaluationLimits()
    prompts: Prompts = Prompts()
    output: Output
    prepare: Prepare | None = None

    @property
    def changes(self) -> list[dict[str, Any]]:
        """What is done to the forget vector, in order: the transforms, then the filter."""
        from palinode.methods import METHODS

        chosen = self.filter
        if chosen == "auto":
            vectors = self.method in METHODS and METHODS[self.method].has_scales
            searched = self.scales.choose == "auto" and self.scales.forget is None
            usual = vectors and searched and self.data.retain and not self.transforms
            chosen = "least-squares" if usual else "none"
        return [*self.transforms, *FILTERS[chosen]]

    @property
    def has_scales(self) -> bool:
        """Whether vectors are added up, for which α and β are chosen."""
        from palinode.methods import METHODS

        return METHODS[self.method].adds_vectors(self.changes)

    @model_validator(mode="before")
    @classmethod
    def _with_the_methods_training(cls, content: Any) -> Any:
        """Lay the training settings that the method's source names under those that are given."""
        from palinode.methods import METHODS

        method = METHODS.get(content.get("method", "msa")) if isinstance(content, dict) else None
        given = content.get("training", {}) if method else None
        if method is None or not method.training or not isinstance(given, dict):
            return content
        return {**content, "training": {**method.training, **given}}

    @model_validator(mode="after")
    def _can_be_run(self) -> Self:
        if mistake := next(self._mistakes(), None):
            raise ValueError(mistake)
        return self

    def _mistakes(self) -> Iterator[str]:
        """Yield what keeps the recipe from being run."""
        from palinode.methods import METHODS
        from palinode.methods.method import NO_RETAIN_VECTOR
        from palinode.methods.transforms import check_transforms

        for section, places_of in {"models": self.models, "data": self.data}.items():
            if empty := next((name for name, place in places_of if place == ""), None):
                yield f"{section}.{empty} is empty; give it a value, or leave it out"
        if method := METHODS.get(self.method):  # one that is not there is said by `open_inputs`
            try:
                settings = method.check_settings(self.method_settings)
            except ValidationError as error:
                yield _wrong_settings(self.method, method.settings, error)
                return
            places = {**dict(self.data), **dict(self.models)}
            there = {name for name, place in places.items() if place is not None}
            if missing := method.lacks(settings, there, self.scales.retain):
                yield missing
            if not self.has_scales and (self.scales.forget, self.scales.retain) != (None, None):
                yield f"the method {self.method} adds no vectors, so it has no scales; leave them out"
            if not method.has_scales and self.scales.retain:
                yield NO_RETAIN_VECTOR
            if self.models.given and "given" not in method.needs:
                yield (
                    f"the method {self.method} makes the unlearned model itself; leave models.given out, or "
                    'name method = "given"'
                )
        try:
            chosen = check_transforms(self.changes)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, ("transforms", *first["loc"])))
            yield f"{place}: {first['msg'].removeprefix('Value error, ')}"
            return
        needing = next((one for one in chosen if "retain" in one.transform.needs), None)
        if needing and self.data.retain is None:
            yield f"the transform {needing.transform.name} needs retain rows; name data.retain (--retain)"
        if self.models.base is None and any(getattr(one.settings, "at", "") == "base" for one in chosen):
            yield 'a transform with at = "base" needs that model; name models.base (--base)'
        if (self.models.target is None) == (self.prepare is None):
            yield "name models.target, or have it made by [prepare]: one of the two, not both"
        if self.prepare and self.models.base is None:
            yield "[prepare] needs models.base"
        if self.prepare and self.data.retain is None:
            yield "[prepare] needs data.retain"
        if self.prepare and self.models.retrained is not None:
            yield "[prepare] makes the retrained model; leave models.retrained out"
        if self.scales.retain and self.data.retain is None:
            yield (
                f"a retain scale of {self.scales.retain:g} needs retain rows; name data.retain (--retain), "
                "or leave the scale out"
            )


def load_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a TOML recipe and apply `key=value` changes such as `training.learning_rate=2e-5`.

    Raises RecipeError naming the key, and the nearest one that exists.
    """
    return build_recipe(read_settings(path, "recipe"), changes)


def build_recipe(content: Mapping[str, Any], changes: Sequence[str] = ()) -> Recipe:
    """Check plain nested values, with `key=value` changes, and return the recipe they describe.

    Raises RecipeError.
    """
    return checked_settings(Recipe, with_changes(content, changes))


def checked_settings(
    kind: type[Kind],
    content: Mapping[str, Any],
    keys: Callable[[Sequence[int | str]], list[str]] | None = None,
) -> Kind:
    """Return settings of a kind; raises RecipeError for the first thing that is wrong, see `explain`."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise RecipeError(explain(error, keys)) from None


def with_changes(content: Mapping[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """Return a copy of nested values with `key=value` changes."""
    changed = copy.deepcopy(dict(content))
    for change in changes:
        set_key(changed, change)
    return changed


def laid_over(content: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested values with those that were given in their place; keys may be dotted, columns are one."""
    merged = dict(content)
    for key, value in given.items():
        name, _, rest = key.partition(".")
        value = {rest: value} if rest else value
        if isinstance(value, Mapping) and name != "columns":
            below = merged.get(name)
            value = laid_over(below if isinstance(below, Mapping) else {}, value)
        merged[name] = value
    return merged


def named(**places: str | Path | None) -> dict[str, str]:
    """Return the places that were given, as a recipe has them."""
    return {name: str(place) for name, place in places.items() if place is not None}


def read_prompts(content: Mapping[str, Any], changes: Sequence[str] = ()) -> Prompts:
    """Return the section [prompts] of a recipe that may be wrong or incomplete elsewhere.

    Raises RecipeError.
    """
    given = with_changes(content, changes).get("prompts", {})
    return checked_settings(_OnlyPrompts, {"prompts": given}).prompts


def prompt_style(changes: Sequence[str] | None) -> PromptStyle | None:
    """Return the style that `prompts.key=value` changes describe; None where there are none.

    Raises RecipeError, for a key of another section too.
    """
    for change in changes or ():
        if not change.strip().startswith("prompts."):
            raise RecipeError(
                f"--set {change!r} is no setting of the prompts; here it takes prompts.chat, "
                "prompts.system_prompt and prompts.date"
            )
    return read_prompts({}, changes).style() if changes else None


def set_key(content: dict[str, Any], change: str) -> None:
    """Set one dotted key, its value read as TOML where possible and as text otherwise."""
    key, sign, text = change.partition("=")
    if not sign or not key.strip():
        raise RecipeError(f"--set needs key=value, as in training.learning_rate=2e-5, and got {change!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *path, last = key.strip().split(".")
    place = content
    for name in path:
        place = place.setdefault(name, {})
        if not isinstance(place, dict):
            raise RecipeError(f"--set {key}: {name} is a value, not a section")
    place[last] = value


def explain(error: ValidationError, keys: Callable[[Sequence[int | str]], list[str]] | None = None) -> str:
    """Return one sentence for the first thing that is wrong, a misspelt key before a missing one.

    `keys` says which may stand in the section of a place; without it they are those of a run's recipe.
    """
    errors = error.errors(include_url=False)
    first = next((entry for entry in errors if entry["type"] == "extra_forbidden"), errors[0])
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, keys(first["loc"]) if keys else known_keys(), n=1, cutoff=0.0)
        return f"the recipe has an unknown key {key!r}; did you mean {near[0]!r}?"
    if first["type"] == "missing":
        return f"the recipe lacks {key}"
    reason = first["msg"].removeprefix("Value error, ")
    got = "" if isinstance(first["input"], dict) else f" ({first['input']!r} was given)"
    allowed = re.findall(r"'([^']+)'", first.get("ctx", {}).get("expected", ""))
    return f"{key or 'the recipe'} cannot be used: {reason}{got}{meant(first['input'], allowed)}"


def _wrong_settings(name: str, settings: type[BaseModel], error: ValidationError) -> str:
    """Return what is wrong with a method's own settings, and which there are."""
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        known = ", ".join(settings.model_fields) or "none"
        return f"the method {name} has no setting {key!r}; it has {known}"
    return f"method_settings.{key} of {name} is {first['input']!r}: {first['msg']}"


def known_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Return every key a recipe may have, dotted."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        parts = get_args(field.annotation) or (field.annotation,)  # of `Prepare | None`, say
        for kind in (part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)):
            keys += known_keys(kind, f"{prefix}{name}.")
    return keys

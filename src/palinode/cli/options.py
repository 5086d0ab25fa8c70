"""Options are declared once, as the fields of the settings: flag, help, type, range and default.

`@takes(*keys("unlearn"))` gives a verb an option for each key of a recipe that keys.toml has for it, and the
verb gets what was given as the nested content of one. `@takes(of=AuditSettings)` gives it one for each field
of those settings, and the verb gets them checked. Options of the command line alone stand below.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.core import TyperCommand

from palinode.cli.console import GIVEN, hush_libraries
from palinode.errors import RecipeError
from palinode.pipeline.recipe import Recipe, checked_settings, known_keys, laid_over, prompt_style
from palinode.records import holding, packaged_table
from palinode.settings import Questioning

KEYS = packaged_table("cli/keys.toml")
GROUPS: Mapping[str, str] = KEYS["groups"]
"""The group of options that a section of the recipe is shown in; the rest is advanced."""

NEED, SCALES = GROUPS["models"], GROUPS["scales"]
ADVANCED = "Advanced"
OTHERS = "Options"
ORDER = ("Arguments", *GROUPS.values(), OTHERS, ADVANCED)


# From a field to an option


@dataclass(frozen=True, slots=True)
class Key:
    """A key of a recipe or of other settings as an option; what is left out follows from the field."""

    place: str
    """Its dotted name, as in training.epochs."""
    flag: str = ""
    """The option's name without dashes, where that is not the last part of the key."""
    help: str = ""
    needed: bool = False
    """Whether the verb cannot do without."""
    group: str = ""
    kind: type | None = None
    """What the command line takes, where that is not what the field holds: `read` makes it of that."""
    read: Callable[[Any], Any] | None = None

    @property
    def name(self) -> str:
        """The parameter's name."""
        return (self.flag or self.place.rpartition(".")[2]).replace("-", "_")

    def parameter(self, model: type[BaseModel]) -> inspect.Parameter:
        """Return the option as a parameter of a function that typer reads."""
        field = field_at(self.place, model)
        kind, values = _kind(field)
        several = get_origin(kind) in (tuple, Sequence) and get_origin(self.kind) is not list
        shape = (
            f"<{get_args(kind)[0].__name__},…>" if several else f"<{'|'.join(values)}>" if values else None
        )
        kind = self.kind or (str if several else kind)
        number = kind in (int, float)
        usual = GROUPS.get(self.place.partition(".")[0], ADVANCED) if model is Recipe else OTHERS

        option = typer.Option(
            f"--{self.name.replace('_', '-')}",
            help=self.help or _help(field),
            metavar=shape,
            autocompletion=completion(values or self.place) if values or self.place in WORDS else None,
            rich_help_panel=self.group or usual,
            min=_limit(field, "ge") if number else None,
            max=_limit(field, "le") if number else None,
        )
        default = inspect.Parameter.empty if self.needed else False if kind is bool else None
        shown = kind if self.needed or kind is bool else kind | None
        return inspect.Parameter(
            self.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[shown, option]
        )

    def value(self, given: Any, model: type[BaseModel]) -> Any:
        """Return what the field holds for what the command line was given."""
        if self.read:
            return self.read(given)
        kind, _ = _kind(field_at(self.place, model))
        if get_origin(kind) in (tuple, Sequence):
            return tuple(name.strip() for name in given.split(",") if name.strip())
        return given


def takes(
    *wanted: Key, of: type[BaseModel] = Recipe, only: Sequence[str] = (), beside: Sequence[Key] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a verb an option for each of these keys of a recipe; the verb's first parameter is the content.

    Of other settings every field is an option, or `only` these; the keys say what is special about some, and
    the verb's first parameter is the settings. Keys of a recipe `beside` them make a content that is its
    second one; an option that both have a key for goes into both.
    """
    if of is not Recipe:
        known = COMMON | {key.place: key for key in wanted}
        names = sorted(only or of.model_fields, key=Questioning.model_fields.__contains__)  # its own first
        wanted = tuple(
            known.get(name, Key(name, needed=of.model_fields[name].is_required())) for name in names
        )
    sides: list[tuple[type[BaseModel], Sequence[Key]]] = [(of, wanted)]
    sides += [(Recipe, beside)] if beside else []
    shown = {key.name: key.parameter(model) for model, side in reversed(sides) for key in side}

    def give(verb: Callable[..., None]) -> Callable[..., None]:
        own = [*inspect.signature(verb, eval_str=True).parameters.values()][len(sides) :]

        def called(**options: Any) -> None:
            found = []
            for model, side in sides:
                content: dict[str, Any] = {}
                for key in side:
                    given = options[key.name]
                    if given is not None and given is not False:
                        content = laid_over(content, {key.place: key.value(given, model)})
                found.append(content if model is Recipe else checked_settings(model, content))
            verb(*found, **{name: value for name, value in options.items() if name not in shown})

        parameters = [
            *(one for one in own if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD),
            *shown.values(),
            *(one for one in own if one.kind is inspect.Parameter.KEYWORD_ONLY),
        ]
        called.__name__, called.__doc__ = verb.__name__, verb.__doc__
        called.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters]
        )
        called.__annotations__ = {}  # those of the signature hold
        return called

    return give


def lengths_alike(content: dict[str, Any]) -> None:
    """Have a recipe's content measure rows as long as it trains on, where an option says how long."""
    if "max_length" in content.get("training", {}):
        content.setdefault("evaluation", {})["max_length"] = content["training"]["max_length"]


def field_at(place: str, model: type[BaseModel] = Recipe) -> FieldInfo:
    """Return the field of a dotted key."""
    *sections, last = place.split(".")
    for name in sections:
        annotation = model.model_fields[name].annotation
        model = next(
            part
            for part in get_args(annotation) or (annotation,)
            if isinstance(part, type) and issubclass(part, BaseModel)
        )
    return model.model_fields[last]


def _kind(field: FieldInfo) -> tuple[Any, Sequence[str]]:
    """Return the type that an option of this field has, and its values where only some are possible."""
    annotation = field.annotation
    if type(None) in get_args(annotation):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) is Literal:
        return str, get_args(annotation)
    return annotation, ()


def _limit(field: FieldInfo, name: str) -> float | None:
    return next((getattr(rule, name) for rule in field.metadata if hasattr(rule, name)), None)


def _help(field: FieldInfo) -> str:
    """Return the first sentence that the field says of itself, and its default."""
    text = re.split(r"(?<=[.]) (?!\[)", " ".join((field.description or "").split()))[0]
    default = field.get_default()
    if field.is_required() or default is None or isinstance(default, bool | dict | list | tuple):
        return text
    shown = f"{default:g}".replace("e-0", "e-") if isinstance(default, float) else default
    return f"{text} [default: {shown}]"


def completion(values: Sequence[str] | str) -> Callable[[str], list[str]]:
    """Return what completes one of these values, or those of a key of WORDS; the last of several."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        known = words_of(values) if isinstance(values, str) else values
        return [f"{before}{comma}{value}" for value in known if value.startswith(last)]

    return complete


WORDS: Mapping[str, str] = KEYS["words"]
"""Values to complete, of keys that take any text; those of a table are looked up when the shell asks."""


def words_of(key: str) -> list[str]:
    """Return the values of a key of WORDS."""
    found = list[str]()
    for word in WORDS[key].split():
        room, _, table = word.partition(":")
        found += [*getattr(import_module(room), table)] if table.isupper() else [word]
    return found


def recipe_keys() -> list[str]:
    """Return every key of a recipe that has a value, as --set takes it."""
    keys = known_keys()
    return [f"{key}=" for key in keys if not any(other.startswith(f"{key}.") for other in keys)]


# Keys of several verbs

KINDS: Mapping[str, Any] = {"str": str, "float": float, "list": list[str]}
READERS: Mapping[str, Callable[[Any], Any]] = {
    "columns": lambda text: _columns(text),
    "scales": lambda text: scales_of(text),
    "style": prompt_style,
    "numbers": lambda text: _numbers(text),
    "pairs": lambda texts: _pairs(texts),
    "texts": tuple,
    "no": lambda _: False,
}


def keys(verb: str) -> list[Key]:
    """Return the keys of a recipe that a verb takes, as keys.toml has them."""
    found = list[Key]()
    for one in KEYS[verb]:
        if str(one).startswith("@"):
            found += keys(one[1:])
        else:
            found.append(key_of(**(one if isinstance(one, dict) else {"place": one})))
    return found


def key_of(place: str, **own: Any) -> Key:
    """Return a key with what keys.toml says of it wherever it is taken."""
    facts = {**KEYS["key"].get(place, {}), **own}
    known = {"kind": KINDS, "read": READERS}
    return Key(place, **{name: known[name][it] if name in known else it for name, it in facts.items()})


COMMON = {
    "columns": replace(key_of("data.columns"), place="columns"),
    "style": replace(key_of("prompts", group=""), place="style"),
}
"""Fields of several settings that the command line writes in its own way."""


def parse_scales(text: str, *, words: str = "") -> tuple[float, float]:
    """Return α and β from `1.0,0.5`, or α and 0 from `1.0`; raises RecipeError for anything else.

    `words` names what the caller takes besides.

    >>> parse_scales("1.0,0.5"), parse_scales("2")
    ((1.0, 0.5), (2.0, 0.0))
    """

    try:
        alpha, beta = map(float, text.split(",") if "," in text else (text, "0"))
    except ValueError:
        raise RecipeError(f"--scales is {text!r}; write {words}α and β as in 1.0,0.5") from None
    return alpha, beta


def scales_of(text: str) -> dict[str, Any]:
    """Return the keys of the section [scales] for auto, grid, or two numbers with a comma between them."""
    if text in ("auto", "grid"):
        return {"choose": text}
    alpha, beta = parse_scales(text, words="auto, grid, or ")
    return {"forget": alpha, "retain": beta}


def _columns(text: str) -> dict[str, str]:
    from palinode.data.sources import parse_columns

    return parse_columns(text)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"--steps has {text!r}; write whole numbers with commas, as in 100,200") from None


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise RecipeError(f"option {text!r} is not NAME=VALUE")
        pairs[name.strip()] = value.strip()
    return pairs


# Help in groups


class Verb(TyperCommand):
    """A command whose options are shown by group, as plain text."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then each group of options that there are."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            line = parameter.get_help_record(ctx)
            if line is not None:
                argument = parameter.param_type_name == "argument"
                group = "Arguments" if argument else getattr(parameter, "rich_help_panel", None) or OTHERS
                groups.setdefault(group, []).append(line)
        for group in sorted(groups, key=ORDER.index):
            with formatter.section(group):
                formatter.write_dl(groups[group])


JSON, SHARED, LEDGER = ("as_json",), ("quiet", "as_json"), Path("requests")


def explained(
    function: Callable[..., None], group: str = "", shared: Sequence[str] = SHARED
) -> Callable[..., None]:
    """Have the parameters of a verb be options with what keys.toml says of them.

    The options that it has in common with others are not handed to it: `console.given` tells of them.
    """
    table = {**KEYS["option"]["every"], **KEYS["option"].get(group + function.__name__, {})}
    usual: Mapping[str, Any] = {"ledger": (Path, LEDGER), "quiet": (bool, False), "as_json": (bool, False)}
    alike = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default)
        for name, (kind, default) in usual.items()
        if name in shared
    ]
    own = [*inspect.signature(function, eval_str=True).parameters.values()]
    parameters = [
        one
        if get_origin(one.annotation) is Annotated or one.annotation is typer.Context
        else one.replace(annotation=Annotated[one.annotation, _option(one.name, **table[one.name])])
        for one in (*own, *alike)
    ]

    def called(**options: Any) -> None:
        with holding(GIVEN, {name: options.pop(name) for name in shared}):
            function(**options)

    called.__name__, called.__doc__ = function.__name__, function.__doc__
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {}  # those of the signature hold
    return called


def _option(name: str, *, argument: bool = False, group: str | None = None, **facts: Any) -> Any:
    flags, values = facts.pop("flags", [f"--{name.replace('_', '-')}"]), facts.pop("values", None)
    values = recipe_keys() if values == "recipe" else values
    facts |= {"rich_help_panel": group, "autocompletion": completion(values) if values else None}
    if name == "quiet":  # before any library is imported
        facts |= {"callback": hush_libraries, "is_eager": True}
    return typer.Argument(**facts) if argument else typer.Option(*flags, **facts)


def verbs(
    app: typer.Typer, group: str = "", kind: type[TyperCommand] = Verb, always: Sequence[str] = ()
) -> Callable[..., Callable[[Callable[..., None]], Callable[..., None]]]:
    """Return what makes functions commands of a group, whose name is before theirs in keys.toml."""
    return lambda name=None, shared=SHARED: (
        lambda function: app.command(name, cls=kind)(explained(function, group, (*always, *shared)))
    )

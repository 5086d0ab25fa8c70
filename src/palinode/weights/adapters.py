"""LoRA adapters, as peft saves them, as directions: ΔW = s · B · A, exactly.

`s` is alpha / r, or alpha / √r for rank-stabilised adapters. A and B mean nothing apart: only their product
is a direction, so only it is ever added. What is more than such a product (DoRA, biases, whole modules, …)
is refused, and so is anything in the adapter's config that we do not know.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self

from palinode.errors import CheckpointError, told_as
from palinode.weights.checkpoint import LARGEST, Checkpoint, StoredDirection
from palinode.weights.displacement import (
    PIECE,
    ArrayCache,
    Change,
    Factor,
    decode,
    encode,
    low_rank_change,
    read_values,
)
from palinode.weights.formats.pickled import read_pickled
from palinode.weights.tensors import FLOAT_BYTES, Files, TensorInfo, is_head, read_header, read_object

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"

# Keys of the config that do not change what the product is, or that are read here.
KNOWN = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out",
    "init_lora_weights", "bias", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "megatron_core", "ensure_weight_tying", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "qalora_group_size", "runtime_config", "unsloth_fixed",
}  # fmt: skip

LINEAR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])((?:\.[^.]+)?)\.weight")
EMBEDDING = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_embedding_([AB])((?:\.[^.]+)?)")
COPY = re.compile(r"(?:base_model\.model\.)?(.+)\.base_layer\.weight")

INSTEAD = (
    "merge it into its base (merge_and_unload), save the whole model, and take the difference of the two"
)


@dataclass(frozen=True, slots=True)
class LoraAdapter(StoredDirection):
    """A LoRA adapter on disk, as a direction: the sum of its products, with their scaling."""

    config: Mapping[str, Any] = field(compare=False, repr=False)
    """What adapter_config.json says."""
    stands_for_both: ClassVar[bool] = False
    """A product beside the embedding leaves a tied head as it was."""

    @classmethod
    def open(cls, folder: Path | str, *, base: Checkpoint | None = None, allow_pickle: bool = False) -> Self:
        """Open an adapter folder; reads headers only.

        `base` is the model it was trained on. It is needed only where an adapter holds copies of embeddings,
        to see that they are the base's own; without it the folder that the adapter's config names is tried.
        `allow_pickle` lets adapter_model.bin be read, into memory. Raises CheckpointError when the folder is
        broken or its effect is not a sum of products.
        """
        place = Path(folder).expanduser().resolve()
        if not place.is_dir():
            raise CheckpointError(f"there is no adapter folder {folder}")
        config = read_object(place / CONFIG)
        _check_config(place, config)
        pairs, copies = _sort_out(place, _read_tensors(place, allow_pickle=allow_pickle))
        name = config.get("base_model_name_or_path")
        if base is None and (copies or _is_mixed(config, pairs)):
            base = Checkpoint.open(name) if isinstance(name, str) and name and Path(name).is_dir() else None
        for module, copy in copies.items():
            _check_copy(place, copy, f"{module}.weight", base)
        return cls(place, dict(_changes(place, config, pairs, base)), config)


# The config


def _check_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the config describes plain LoRA."""
    if str(config.get("peft_type")).upper() != "LORA":
        raise CheckpointError(
            f"{folder} is an adapter of the kind {config.get('peft_type')!r}, and only LoRA is a sum of "
            f"products; {INSTEAD}"
        )
    unknown = sorted(key for key, value in config.items() if value and key not in KNOWN)
    if unknown:
        _refuse(folder, f"its {CONFIG} sets {unknown[0]}")
    start = config.get("init_lora_weights")
    # the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) also move the base
    if start not in (None, True, False, "gaussian", "eva", "orthogonal", "mica"):
        raise CheckpointError(
            f"{folder} was begun with {start!r}, which moved the base weights as well; save it again with "
            "peft's path_initial_model_for_weight_conversion, which makes plain LoRA of it"
        )
    numbers = [config.get("r"), *_patterns(folder, config, "rank_pattern").values()]
    if not all(type(rank) is int and rank > 0 for rank in numbers):
        raise CheckpointError(f"{folder / CONFIG} names a rank that is no positive whole number")
    numbers = [config.get("lora_alpha"), *_patterns(folder, config, "alpha_pattern").values()]
    if not all(type(alpha) in (int, float) and abs(alpha) <= LARGEST for alpha in numbers):
        raise CheckpointError(f"{folder / CONFIG} names a lora_alpha that is no finite number")


def _patterns(folder: Path, config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return a table of patterns of module names, all of which can be matched in little time."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{folder / CONFIG}: {key} is no table of module names")
    for pattern in patterns:
        what = f"{folder / CONFIG}: {key} has {pattern!r}, which is no pattern"
        with told_as(CheckpointError, what, "", re.error, RecursionError, OverflowError):
            _anchored(pattern)
        if len(re.findall(r"(?<!\()[*+?{]", pattern)) > 3 or re.search(r"\)[*+{]", pattern):
            raise CheckpointError(
                f"{folder / CONFIG}: {key} has {pattern!r}, which may take forever to match; write out the "
                "names of the modules"
            )
    return patterns


def _value_for(module: str, patterns: Mapping[str, Any] | None, default: Any) -> Any:
    """Return the value of the first pattern that matches a module's name, or the end of it after a dot."""
    for pattern, value in (patterns or {}).items():
        if _anchored(pattern).match(module):
            return value
    return default


def _anchored(pattern: str) -> re.Pattern[str]:
    """Return what peft makes of a pattern: it matches a whole name, or all that follows one of its dots."""
    return re.compile(rf"(.*\.)?({pattern})$")


# The tensors

Pairs = Mapping[str, Mapping[str, TensorInfo]]
"""By module: its "A" and "B", or, for an embedding, its "embedding A" and "embedding B"."""


def _read_tensors(folder: Path, *, allow_pickle: bool) -> list[TensorInfo]:
    if (folder / WEIGHTS).is_file():
        return read_header(folder / WEIGHTS)
    if not (folder / PICKLE).is_file():
        raise CheckpointError(f"{folder} has no {WEIGHTS}; is the download finished?")
    if not allow_pickle:
        raise CheckpointError(
            f"{folder} holds its weights as a pickle ({PICKLE}), which can run code when it is read; save "
            "the adapter again with peft, which writes safetensors, or allow pickles"
        )
    return [*read_pickled(folder / PICKLE)[0].values()]


def _sort_out(
    folder: Path, infos: Iterable[TensorInfo]
) -> tuple[dict[str, dict[str, TensorInfo]], dict[str, TensorInfo]]:
    """Return the factors of each module, and the copies of base weights; refuse everything else."""
    pairs: dict[str, dict[str, TensorInfo]] = {}
    copies: dict[str, TensorInfo] = {}
    adapters = set()
    for info in infos:
        linear, embedding = LINEAR.fullmatch(info.name), EMBEDDING.fullmatch(info.name)
        copy = COPY.fullmatch(info.name)
        if found := linear or embedding:
            place = f"embedding {found[2]}" if embedding else found[2]
            if place in pairs.setdefault(found[1], {}):
                raise CheckpointError(
                    f"{folder} holds {place} of {found[1]} twice; remove what is not its own"
                )
            pairs[found[1]][place] = info
            adapters.add(found[3])
        elif copy:
            copies[copy[1]] = info
        else:
            _refuse(folder, f"it holds {info.name}, which is no factor of a product")
    if len(adapters) > 1:
        raise CheckpointError(f"{folder} holds several adapters in one file; save each by itself")
    if not pairs:
        raise CheckpointError(f"{folder} holds no LoRA factors; was it saved before it was trained?")
    stray = next((module for module in copies if module not in pairs), None)
    if stray:
        _refuse(folder, f"it holds all of {stray}.weight")
    return pairs, copies


def _changes(
    folder: Path, config: Mapping[str, Any], pairs: Pairs, base: Checkpoint | None
) -> Iterator[tuple[str, Change]]:
    """Yield what each module's product changes, by the name of its weight in the model."""
    kept, swapped = ArrayCache(), _stores_in_out(folder, config, pairs, base)
    for module, factors in sorted(pairs.items()):
        name = f"{module}.weight"
        rank = _value_for(module, config.get("rank_pattern"), config["r"])
        alpha = _value_for(module, config.get("alpha_pattern"), config["lora_alpha"])
        a, b = _checked_pair(folder, module, factors, rank)
        if "embedding A" in factors or (swapped and not is_head(name)):
            left, right = Factor(a, transposed=True), Factor(b, transposed=True)
        else:
            left, right = Factor(b), Factor(a)
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        yield name, low_rank_change(left, right, scale, kept)


def _checked_pair(
    folder: Path, module: str, factors: Mapping[str, TensorInfo], rank: int
) -> tuple[TensorInfo, TensorInfo]:
    """Return A (rank x in) and B (out x rank) of a module, or raise CheckpointError."""
    if set(factors) not in ({"A", "B"}, {"embedding A", "embedding B"}):
        raise CheckpointError(f"{folder} has only {', '.join(sorted(factors))} of {module}; fetch it again")
    a, b = (factors[key] for key in sorted(factors))
    if len(a.shape) != 2 or len(b.shape) != 2:
        _refuse(folder, f"its factors of {module} are no matrices ({a.shape} and {b.shape})")
    if a.dtype not in FLOAT_BYTES or b.dtype not in FLOAT_BYTES:
        raise CheckpointError(
            f"{folder}: the factors of {module} are stored as {a.dtype} and {b.dtype}, no floats"
        )
    if (a.shape[0], b.shape[1]) != (rank, rank):
        raise CheckpointError(
            f"{folder}: {module} has factors of rank {a.shape[0]} and {b.shape[1]} where {CONFIG} says "
            f"{rank}; do both files belong together?"
        )
    return a, b


def _is_mixed(config: Mapping[str, Any], pairs: Pairs) -> bool:
    """Tell whether fan_in_fan_out may be wrong: peft keeps one flag, and the head comes last and sets it."""
    heads = any(is_head(f"{module}.weight") for module in pairs)
    stored_turned = {"c_attn", "c_proj", "c_fc", "q_attn"}  # as (in, out), in GPT-2 and its kin
    swapped = any(module.rpartition(".")[2] in stored_turned for module in pairs)
    return heads and swapped and not config.get("fan_in_fan_out")


def _stores_in_out(folder: Path, config: Mapping[str, Any], pairs: Pairs, base: Checkpoint | None) -> bool:
    """Tell whether the layers, head and embedding apart, store their weights as (in, out)."""
    if not _is_mixed(config, pairs):
        return bool(config.get("fan_in_fan_out"))
    if base is None:
        raise CheckpointError(
            f"{folder} adapts an output head and layers that only some models store transposed, and its "
            "config has one flag for both (fan_in_fan_out); name its base model as well"
        )
    return base.config.get("model_type") in ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


def _check_copy(folder: Path, copy: TensorInfo, name: str, base: Checkpoint | None) -> None:
    """Raise CheckpointError unless a tensor is the base's own, rounded to the dtype of the copy."""
    if base is None:
        raise CheckpointError(
            f"{folder} holds a copy of all of {name}, as peft adds it for adapters on embeddings; name its "
            "base model as well, so that we can see whether the copy was trained"
        )
    own = base.find(name)
    same = own is not None and own.is_float and copy.dtype in FLOAT_BYTES and own.shape == copy.shape
    if own is None or not same or not _same_rounded(own, copy):
        _refuse(folder, f"it holds another {name} than {base.folder}")


def _same_rounded(own: TensorInfo, copy: TensorInfo) -> bool:
    with Files() as files:
        for start in range(0, own.size, PIECE):
            count = min(PIECE, own.size - start)
            rounded = decode(encode(read_values(own, files, start, count), copy.dtype), copy.dtype)
            if not (rounded == read_values(copy, files, start, count)).all():
                return False
    return True


def _refuse(folder: Path, reason: str) -> NoReturn:
    raise CheckpointError(f"{folder} is more than a sum of products: {reason}; {INSTEAD}")

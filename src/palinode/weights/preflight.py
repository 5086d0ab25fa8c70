"""What is checked before any byte is written: do the models of a sum fit together, tensor by tensor?

Shapes alone do not tell. Two models can agree in all of them and still order their heads or their tokens
differently; two states of one model can differ in them where one has a padded vocabulary or added tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from reprlib import repr as short
from typing import Any, Literal, NoReturn, get_args

import numpy as np

from palinode.errors import CheckpointError, InputError, MismatchError, told_as
from palinode.weights.displacement import NUMPY, Displacement, check_displacements, decode
from palinode.weights.fingerprints import tensor_digests
from palinode.weights.folders import ModelFolder, require_head
from palinode.weights.tensors import HEADS, TensorInfo, is_embedding, is_head, map_blocks, plain, read_object

Rows = Literal["refuse", "shared"]
"""What to do where embeddings have different numbers of rows: refuse, or sum the rows that all have."""

TOKENIZER = "tokenizer.json"
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


def check_sum(
    reference: ModelFolder,
    others: Sequence[ModelFolder],
    displacements: Iterable[Displacement] = (),
    *,
    rows: Rows = "refuse",
) -> Fit:
    """Ask everything that a sum needs of its terms, before anything is trained or written.

    The plan of a run and the doctor ask this very function, so that the last step has no other questions.
    Raises MismatchError or CheckpointError for what does not fit.
    """
    fit = check_fit(reference, others, rows=rows)
    check_displacements(reference, displacements)
    for checkpoint in (reference, *others):
        _check_twins(checkpoint)
    return Fit(fit.shared_rows, (*fit.notes, *check_tokenizers(reference, others)))


# Names, shapes, tying


@dataclass(frozen=True, slots=True)
class Fit:
    """How checkpoints fit together that can be summed."""

    shared_rows: Mapping[str, int]
    """Number of leading rows that all of them have, by tensor; only where they have different numbers."""
    notes: tuple[str, ...]
    """What a reader of the result should know, one sentence each."""


def check_fit(reference: ModelFolder, others: Sequence[ModelFolder], *, rows: Rows = "refuse") -> Fit:
    """Return how checkpoints fit the reference (the target); raise MismatchError where they do not.

    They need its architecture, names, shapes, kinds of dtype (floating point or not), and tying. Embeddings
    and output heads may have another number of rows if `rows` is "shared": then the leading rows that all
    have are summed, further rows of the target stay as they are, and those of the others are left out.
    Raises InputError when there is no such policy.
    """
    if rows not in get_args(Rows):
        raise InputError(f"there is no policy {rows!r} for rows; choose one of {', '.join(get_args(Rows))}")
    others = [other for other in others if other != reference]
    notes: list[str] = []
    for other in others:
        _check_architecture(reference, other)
        notes += _check_names(reference, other)
        _check_tying(reference, other)
        _check_tensors(reference, other, rows)
    shared: dict[str, int] = {}
    for name, info in reference.tensors.items():
        counts = {other: found.shape[0] for other in others if (found := other.find(name)) and found.shape}
        if info.is_float and set(counts.values()) - {*info.shape[:1]}:
            shared[name] = min(info.shape[0], *counts.values())
            notes.append(_rows_note(info, shared[name], counts))
    return Fit(shared, tuple(notes))


def _check_architecture(reference: ModelFolder, other: ModelFolder) -> None:
    # two models can agree in all shapes and still read them differently
    for key in ("model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "n_head"):
        first, second = reference.config.get(key), other.config.get(key)
        if first != second and None not in (first, second):
            raise MismatchError(
                f"{reference.folder} and {other.folder} are not states of one model: {key} is {first} "
                f"in the one and {second} in the other"
            )


def _check_names(reference: ModelFolder, other: ModelFolder) -> Iterator[str]:
    """Yield a note where the same tensors have other names; raise MismatchError where one has no partner.

    Buffers need none: they stay the reference's.
    """
    sides = ((reference, other), (other, reference))
    lost = [_without_partner(here, there) for here, there in sides]
    for here, _ in sides if any(lost) else ():
        require_head(here)
    if all(lost):
        raise MismatchError(
            f"{reference.folder} and {other.folder} disagree on the names of their tensors: {len(lost[0])} "
            f"of the one (first: {lost[0][0]}) and {len(lost[1])} of the other (first: {lost[1][0]}) have "
            f"no counterpart; {_twice(sides, lost) or _cause([*lost[0], *lost[1]])}"
        )
    for (here, there), names in zip(sides, lost, strict=True):
        if names:
            raise MismatchError(
                f"{reference.folder} and {other.folder} disagree on {len(names)} of {len(here.tensors)} "
                f"tensors ({names[0]} is missing in {there.folder}); {_twice(sides, lost) or _cause(names)}"
            )
    respelled = [
        (name, found.name)
        for name, info in reference.tensors.items()
        if info.is_float
        and (found := other.find(name))
        and name not in other.tensors
        and not (is_head(name) and other.tied)
    ]
    if respelled:
        yield (
            f"{other.folder.name} has other names for {len(respelled)} tensors ({respelled[0][1]} for "
            f"{respelled[0][0]}, …); they were taken for the same"
        )


def _without_partner(here: ModelFolder, there: ModelFolder) -> list[str]:
    """Return the tensors that another checkpoint does not have, or has under a name that two could mean."""
    lost = []
    for name, info in here.tensors.items():
        if info.is_float and name not in there.tensors:
            found, alone = there.find(name), here.names.get(plain(name)) == name
            if not (found and alone and (there.spelled(name) or found.shape == info.shape)):
                lost.append(name)
    return lost


def _twice(sides: Iterable[tuple[ModelFolder, ModelFolder]], lost: Iterable[Sequence[str]]) -> str | None:
    """Say so where a tensor has no counterpart because another one of its own file has the same meaning."""
    for (here, _), names in zip(sides, lost, strict=True):
        for name in names:
            same = [other for other in here.tensors if plain(other) == plain(name)]
            if len(same) > 1:
                return (
                    f"{here.folder} holds one tensor twice, as {same[0]} and {same[1]}: save it again whole"
                )
    return None


def _cause(names: Sequence[str]) -> str:
    """Return why tensors may have no counterpart, and what to do."""
    if any(".lora_" in name or ".base_layer." in name for name in names):
        return (
            "one was saved with an adapter that is not merged: merge it (merge_and_unload) and save it again"
        )
    if any("experts" in name for name in names):
        return (
            "one keeps its experts in fused tensors of another layout: save both again with save_pretrained "
            "of one version of transformers"
        )
    return (
        "are they states of one model, each saved whole? If another tool wrote one of them, save both again "
        "with save_pretrained of one version of transformers"
    )


def _check_tying(reference: ModelFolder, other: ModelFolder) -> None:
    if (reference.tied is None) != (other.tied is None):
        tied, untied = (reference, other) if reference.tied else (other, reference)
        raise MismatchError(
            f"the output head is tied to the embedding in {tied.folder} and is not in {untied.folder}; "
            "are they states of one model, and is tie_word_embeddings true in both configs or in none?"
        )


def _check_twins(checkpoint: ModelFolder) -> None:
    """Raise MismatchError where a tied head lies in the files beside another embedding than its own."""
    if checkpoint.tied and checkpoint.twin(checkpoint.tied[0]):
        infos = {name: checkpoint.tensors[name] for name in checkpoint.tied}
        digests = tensor_digests(ModelFolder(checkpoint.folder, infos, {}), cached=False)
        if len({*digests.values()}) > 1:
            complain_of_twins(checkpoint)


def complain_of_twins(checkpoint: ModelFolder) -> NoReturn:
    """Raise MismatchError for a tied pair that is not one."""
    head, embedding = checkpoint.tied or HEADS[:2]
    raise MismatchError(
        f"{checkpoint.folder} ties its output head to the embedding (config.json) but holds two "
        f"different tensors, {head} and {embedding}; set tie_word_embeddings to what is true"
    )


def _check_tensors(reference: ModelFolder, other: ModelFolder, rows: Rows) -> None:
    problems, padded = dict[str, str](), set[str]()
    for name, info in reference.tensors.items():
        found = other.find(name)
        if found is None or not (info.is_float or found.is_float):
            continue
        if found.shape != info.shape:
            problems[name] = f"{name}: {_shape(info)} against {_shape(found)}"
            if _is_vocabulary(name) and _differ_in_rows(info, found):
                padded.add(name)
        elif found.is_float != info.is_float:
            problems[name] = f"{name}: {info.dtype} against {found.dtype}"
    if rows == "shared":
        problems = {name: problem for name, problem in problems.items() if name not in padded}
    if not problems:
        return
    hint = "are they states of one model?"
    if any(map(_is_vocabulary, problems)):
        hint = "are they states of one model, saved with the same tokenizer?"
    if problems.keys() <= padded:
        hint = (
            "one has a padded vocabulary, or tokens that were added: with --rows shared the rows that all "
            "have are summed, and the target's other rows stay as they are"
        )
    raise MismatchError(
        f"{reference.folder} and {other.folder} disagree on {len(problems)} of {len(reference.tensors)} "
        f"tensors ({next(iter(problems.values()))}); {hint}"
    )


def _differ_in_rows(first: TensorInfo, second: TensorInfo) -> bool:
    """Tell whether two tensors of different shapes differ in their number of rows, and in nothing else."""
    alike = first.shape[1:] == second.shape[1:] and len(first.shape) == len(second.shape)
    return alike and first.is_float and second.is_float


def _is_vocabulary(name: str) -> bool:
    """Tell whether the rows of a tensor are tokens."""
    return is_embedding(name) or is_head(name) or plain(name) == "lm_head.bias"


def _rows_note(info: TensorInfo, shared: int, counts: Mapping[ModelFolder, int]) -> str:
    own = info.shape[0]
    note = f"{info.name}: all {own} rows are in all"
    if shared < own:
        note = f"{info.name}: {shared} of {own} rows are in all; the other {own - shared} stay the target's"
    further = [
        f"{count - shared} of {other.folder.name}" for other, count in counts.items() if count > shared
    ]
    return f"{note}; further rows are left out: {', '.join(further)}" if further else note


def _shape(info: TensorInfo) -> str:
    return "x".join(map(str, info.shape)) or "scalar"


# Tokens


def check_tokenizers(reference: ModelFolder, others: Sequence[ModelFolder]) -> tuple[str, ...]:
    """Return notes on how the tokenizers differ; raise MismatchError where one token has two numbers.

    Compared is what lies in the folders; one without a tokenizer fits every other, as base checkpoints often
    have none. Nothing is parsed where files are the same. Raises CheckpointError when a file is damaged.
    """
    notes: list[str] = []
    for other in others:
        notes += _token_notes(reference.folder, other.folder)
        notes += _special_notes(reference, other)
    return tuple(dict.fromkeys(notes))


def _token_notes(first: Path, second: Path) -> Iterator[str]:
    if not all((folder / TOKENIZER).is_file() for folder in (first, second)):
        for name in ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"):
            pair = [folder / name for folder in (first, second)]
            if all(path.is_file() for path in pair) and not _same_bytes(*pair):
                both = f"{first.name} and {second.name}"
                yield f"{name} is not the same in {both}; its tokens were not compared"
        return
    if _same_bytes(first / TOKENIZER, second / TOKENIZER):
        return
    ours, theirs = _tokens(first / TOKENIZER), _tokens(second / TOKENIZER)
    moved = [token for token in ours if theirs.get(token, ours[token]) != ours[token]]
    if moved:
        some = ", ".join(f"{short(token)} is {ours[token]} and {theirs[token]}" for token in moved[:3])
        raise MismatchError(
            f"the tokenizers of {first} and {second} give other numbers to {len(moved)} tokens ({some}"
            f"{', …' if len(moved) > 3 else ''}); the rows of their embeddings stand for other tokens, so "
            "use models with one vocabulary"
        )
    for here, there, folder in ((ours, theirs, first), (theirs, ours, second)):
        only = len(here.keys() - there.keys())
        if only:
            some = ", ".join(map(short, islice((token for token in here if token not in there), 3)))
            yield f"{only} tokens are only in {folder.name} ({some}{', …' if only > 3 else ''})"


def _same_bytes(first: Path, second: Path) -> bool:
    with told_as(CheckpointError, f"{first} or {second} cannot be read", "fetch it again"):
        return first.stat().st_size == second.stat().st_size and first.read_bytes() == second.read_bytes()


def _tokens(path: Path) -> dict[str, int]:
    """Return the number of every token in a tokenizer.json, added ones with them."""
    content = read_object(path, optional=True)
    try:
        vocabulary, added = content["model"]["vocab"], content.get("added_tokens") or []
        if isinstance(vocabulary, list):  # Unigram: pairs of token and score, in order
            vocabulary = {token: number for number, (token, _score) in enumerate(vocabulary)}
        tokens = {**vocabulary, **{entry["content"]: entry["id"] for entry in added}}
        sound = all(isinstance(token, str) and type(number) is int for token, number in tokens.items())
    except (LookupError, TypeError, ValueError, AttributeError):
        sound = False
    if not sound:
        raise CheckpointError(f"{path} does not list its tokens as a tokenizer does; fetch the model again")
    return tokens


def _special_notes(reference: ModelFolder, other: ModelFolder) -> Iterator[str]:
    """Yield a note for each special token on which both folders say something, and not the same."""
    numbers = tuple(f"{word}_id" for word in SPECIAL)
    places = {"config.json": numbers, "generation_config.json": numbers, "tokenizer_config.json": SPECIAL}
    for file, keys in places.items():
        ours, theirs = (read_object(one.folder / file, optional=True) for one in (reference, other))
        for key in keys:
            first, second = _text(ours.get(key)), _text(theirs.get(key))
            if first != second and None not in (first, second):
                yield (
                    f"{key} of {file} is {short(first)} in {reference.folder.name} and {short(second)} in "
                    f"{other.folder.name}"
                )


def _text(token: Any) -> Any:
    """Return a special token as text where it is written with its properties."""
    return token.get("content") if isinstance(token, dict) else token


# Values


def count_nonfinite(
    checkpoint: ModelFolder, *, on_progress: Callable[[int], None] | None = None
) -> dict[str, tuple[int, int]]:
    """Return (number of NaN, number of infinities) of each tensor that has any, by name.

    Reads the whole checkpoint, block by block; `on_progress` is told the bytes that are done. Raises
    CheckpointError when a file cannot be read.
    """
    infos = [info for info in checkpoint.tensors.values() if info.is_float]
    found: dict[str, tuple[int, int]] = {}
    for info, (nans, infinities) in map_blocks(infos, _count_in_block, on_progress=on_progress):
        if nans or infinities:
            before = found.get(info.name, (0, 0))
            found[info.name] = before[0] + nans, before[1] + infinities
    return found


def nonfinite_text(found: Mapping[str, tuple[int, int]]) -> str:
    """Return in words what `count_nonfinite` found."""
    nans, infinities = (sum(counts[kind] for counts in found.values()) for kind in (0, 1))
    return f"{nans} NaN and {infinities} infinite values in {len(found)} tensors"


def complain_of_nonfinite(checkpoints: Iterable[ModelFolder], *, option: bool = True) -> None:
    """Raise CheckpointError that counts and names NaN and infinities in these checkpoints.

    Returns when there are none: then the sum itself is too large. `option` tells that the verb has
    --allow-nonfinite.
    """
    sentences = []
    for checkpoint in checkpoints:
        found = count_nonfinite(checkpoint)
        if found:
            sentences.append(
                f"{checkpoint.folder} holds {nonfinite_text(found)} (first: {next(iter(found))})"
            )
    if sentences:
        raise CheckpointError(
            f"{'; '.join(sentences)}; they would spoil what they are added to, so fetch the model again"
            f"{', or say --allow-nonfinite to go on anyway' if option else ''}"
        )


def _count_in_block(info: TensorInfo, block: memoryview) -> tuple[int, int]:
    values = decode(np.frombuffer(block, NUMPY[info.dtype]), info.dtype)
    if np.isfinite(values).all():
        return 0, 0
    return int(np.isnan(values).sum()), int(np.isinf(values).sum())

"""The models of a run: can each be opened and read, and are target and base two states of one model?"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from palinode.errors import CheckpointError, MismatchError
from palinode.models.inplace import check_live
from palinode.models.loading import load_config, load_tokenizer
from palinode.pipeline.doctor.equipment import gigabytes
from palinode.pipeline.doctor.findings import Findings, text_and_fix
from palinode.pipeline.inputs import check_kind, check_not_same, check_vocabulary
from palinode.progress import Listener
from palinode.weights import Checkpoint
from palinode.weights.folders import ON_HUB, require_causal_lm
from palinode.weights.preflight import check_sum, count_nonfinite

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?")
WHOLE_MODEL = "name the folder of a whole model, or fetch it again"


def look_at_model(
    findings: Findings, name: str, location: str, *, allow_pickle: bool, listener: Listener
) -> Checkpoint | None:
    """Return a model that can be used, after looking at all that a run will need of it."""
    if not _is_here(findings, name, location):
        return None
    model = findings.attempt(
        "models", name, lambda: Checkpoint.open(location, allow_pickle=allow_pickle), fix=WHOLE_MODEL
    )
    if model is None:
        return None
    before = findings.failures
    findings.attempt("models", name, lambda: require_causal_lm(model), fix=WHOLE_MODEL)
    findings.attempt("models", name, lambda: load_config(model), fix=WHOLE_MODEL)
    tokenizer = findings.attempt("models", name, lambda: load_tokenizer(model), fix=WHOLE_MODEL)
    _look_at_values(findings, name, model, listener)
    for note in model.notes:
        findings.say("models", name, "note", note)
    if findings.failures > before:
        return None
    template = "with" if tokenizer is not None and tokenizer.chat_template else "without"
    findings.say("models", name, "ok", f"{_described(model)}, {template} a chat template")
    _look_at_names(findings, name, model)
    return model


def look_at_pair(
    findings: Findings, target: Checkpoint, base: Checkpoint, method: str, settings: Mapping[str, Any]
) -> None:
    """Look whether target and base are two states of one model."""
    fix = "name an earlier checkpoint of the target as its base"
    notes: list[str] = []
    checks: Mapping[str, Callable[[], None]] = {
        "two models": lambda: check_not_same(target, base, method, settings),
        "architecture": lambda: check_kind(target, base),
        "shapes": lambda: notes.extend(check_sum(target, [base]).notes),
        "tokens": lambda: check_vocabulary(target, base),
    }
    before = findings.failures
    for name, check in checks.items():
        findings.attempt("pair", name, check, fix=fix)
    if findings.failures > before:
        return
    findings.say("pair", "fit", "ok", "the same weights by name and shape, and the same tokens")
    for note in notes:
        findings.say("pair", "shapes", "note", note)
    if target != base and target.nbytes == base.nbytes and target.fingerprint() == base.fingerprint():
        text = "target and base lie in two folders and are the same to the last bit"
        findings.say("pair", "two models", "fail", text, fix)
    types = [", ".join(sorted({info.dtype for info in one.tensors.values()})) for one in (target, base)]
    if types[0] != types[1]:
        text = f"the target is stored as {types[0]}, the base as {types[1]}; sums are formed in float32"
        findings.say("pair", "types", "note", text)
    templates = [load_tokenizer(model).chat_template for model in (target, base)]
    if templates[0] != templates[1]:
        text = "the chat templates differ; both models are asked with the target's"
        findings.say("pair", "chat template", "note", text)


def _is_here(findings: Findings, name: str, location: str) -> bool:
    """Tell whether a model is on this machine; of one on the hub say what fetching it takes."""
    if Path(location).expanduser().exists() or not HUB_NAME.fullmatch(location):
        return True
    from huggingface_hub import snapshot_download

    repository, _, revision = location.partition("@")
    try:
        snapshot_download(
            repository, revision=revision or None, allow_patterns=list(ON_HUB), local_files_only=True
        )
    except Exception:  # the hub client raises many kinds; each means that it is not in the cache
        _look_at_hub(findings, name, location)
        return False
    return True


def _look_at_hub(findings: Findings, name: str, location: str) -> None:
    """Say whether the hub has a model of that name, and how large it is."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import is_offline_mode

    repository, _, revision = location.partition("@")
    if is_offline_mode():
        text = f"there is no folder {location}, nor is a model of that name in the hub's cache"
        fix = "name a folder, or fetch the model with HF_HUB_OFFLINE unset"
        findings.say("models", name, "fail", text, fix)
        return
    try:
        found = HfApi().model_info(repository, revision=revision or None, files_metadata=True, timeout=10)
    except Exception as error:  # no such model, a closed one, no network
        text = f"there is no folder {location}, and the model hub did not tell of it ({_first_line(error)})"
        findings.say("models", name, "fail", text, "check the name, go online, or name a folder")
        return
    size = sum(file.size or 0 for file in found.siblings or () if file.rfilename.endswith(".safetensors"))
    if size:
        text = f"{location} is on the hub and not here yet: {gigabytes(size)} would be fetched"
        fix = f"to have it looked at, fetch it first: hf download {repository}"
    else:
        text, fix = f"{location} has no safetensors on the hub", "if it has pickles, say --allow-pickle"
    findings.say("models", name, "warn", text, fix)


def _look_at_values(findings: Findings, name: str, model: Checkpoint, listener: Listener) -> None:
    """Look for NaN and infinity."""
    with listener.task(f"reading the {name}", model.nbytes, "bytes") as advance:
        found = findings.attempt(
            "models", name, lambda: count_nonfinite(model, on_progress=advance), fix=WHOLE_MODEL
        )
    if found:
        nans, infinities = (sum(counts[kind] for counts in found.values()) for kind in (0, 1))
        text = f"{nans} NaN and {infinities} infinite values in {len(found)} tensors ({next(iter(found))}, …)"
        findings.say("models", name, "fail", text, "fetch the model again, or take another checkpoint")


def _look_at_names(findings: Findings, name: str, model: Checkpoint) -> None:
    """Compare the live model's weights with those in the files by name, as trying scales in memory needs."""
    try:
        check_live(model)
    except MismatchError as error:
        text, _ = text_and_fix(str(error), "")
        findings.say("models", name, "warn", text, "give both scales as numbers: points cannot be tried")
    except CheckpointError as error:
        findings.say("models", name, "fail", *text_and_fix(str(error), WHOLE_MODEL))


def _described(model: Checkpoint) -> str:
    """Return a model in a few words."""
    kind = model.config.get("model_type", "model")
    types = ", ".join(Counter(info.dtype for info in model.tensors.values()))
    layout = "" if model.format == "safetensors" else f", {model.format} files read as plain tensors"
    tied = ", tied embeddings" if model.tied else ""
    return f"{kind}, {model.parameters:,} weights, {types}, {gigabytes(model.nbytes)}{layout}{tied}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

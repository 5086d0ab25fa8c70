"""Will it work here? Libraries, the machine, and everything that can be known of a run before long work.

`open_inputs` stops at the first thing that is wrong. Here the same checks are asked one by one, of models,
pair, rows and places, so that one call finds every problem; the pre-flight of `unlearn` itself comes last.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from pydantic import ValidationError

from palinode.data.examples import Example, read_examples, reading_notes, shared_rows
from palinode.data.tokenize import prompt_notes, tokenize
from palinode.errors import CheckpointError, MismatchError, PalinodeError, first_line
from palinode.evaluation.self_check import UNKNOWN, rows_with_style
from palinode.methods import METHODS
from palinode.methods.method import read_refusals
from palinode.models.inplace import check_live
from palinode.models.loading import check_positions, load_config, load_tokenizer, pick_device
from palinode.pipeline.costs import make_plan
from palinode.pipeline.inputs import CUT, check_places, check_target, open_inputs, pair_checks
from palinode.pipeline.recipe import Recipe, build_recipe, laid_over, read_prompts
from palinode.pipeline.run import finished_before
from palinode.pipeline.tracking import TRACKERS, check_trackers, is_installed
from palinode.progress import Listener, NullListener, duration_text, size_text
from palinode.records import packaged_table
from palinode.settings import EvaluationLimits
from palinode.version import __version__
from palinode.weights import Checkpoint
from palinode.weights.atomic import check_output
from palinode.weights.folders import ON_HUB, require_causal_lm
from palinode.weights.preflight import count_nonfinite, nonfinite_text
from palinode.weights.tensors import cores

State = Literal["ok", "note", "warn", "fail"]
"""note is neither good nor bad; warn works, but should be looked at; fail will not work."""

Result = TypeVar("Result")

EXTRAS: Mapping[str, str] = packaged_table("pipeline/extras.toml")
"""What the extras of the package are for, but for those of its own development."""

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?")
ROLES = ("target", "base", "retrained")

WHOLE_MODEL = "name the folder of a whole model, or fetch it again"
OTHER_FILE = "name the file that was meant, and its columns with --columns"
OTHER_OPTION = "change that option or key"
OTHER_OUTPUT = "name another --output"


@dataclass(frozen=True, slots=True)
class DoctorFinding:
    """One thing that was looked at."""

    area: str
    """The part it belongs to: installed, machine, models, pair, rows or run."""
    name: str
    state: State
    text: str
    fix: str | None = None
    """What to do about it."""


# What is here to work with


def examine_equipment(folder: Path) -> Iterator[DoctorFinding]:
    """Yield findings on libraries, extras and this machine; `folder` is where results would go."""
    python = f"{__version__} on Python {platform.python_version()}, {platform.system()}"
    yield DoctorFinding("installed", "palinode", "ok", python)
    yield from _libraries()
    trackers = ", ".join(name for name in TRACKERS if is_installed(name))
    yield _optional("trackers", trackers, "--tracker", "pip install tensorboard")
    yield from _machine(folder)


def examine_library(needed: Requirement, found: str | None) -> DoctorFinding:
    """Return a finding on a library that Palinode requires, from the version that is installed, if any.

    A pre-release or local build counts as the release that it is of.
    """
    wanted = f"{needed.name}{needed.specifier}"
    if found is not None and needed.specifier.contains(Version(found).base_version):
        return DoctorFinding("installed", needed.name, "ok", f"{needed.name} {found}")
    text = "not installed" if found is None else f"version {found}, and Palinode needs {wanted}"
    return DoctorFinding("installed", needed.name, "fail", text, f'pip install "{wanted}"')


def _libraries() -> Iterator[DoctorFinding]:
    """Yield findings on the libraries that Palinode requires, the good ones as one, and on its extras."""
    lines = []
    with suppress(PackageNotFoundError):  # run from a source folder that was never installed
        lines = requires("palinode") or []
    looked_at = _of_extra(lines, "")
    yield from (finding for finding in looked_at if finding.state == "fail")
    fine = ", ".join(finding.text for finding in looked_at if finding.state == "ok")
    yield DoctorFinding("installed", "libraries", "ok", fine)
    for extra, use in EXTRAS.items():
        own = [finding for finding in _of_extra(lines, extra) if finding not in looked_at]
        whole = all(finding.state == "ok" for finding in own)
        here = ", ".join(finding.text for finding in own) if whole else ""
        yield _optional(extra, here, use, f"pip install 'palinode[{extra}]'")


def _optional(name: str, here: str, use: str, install: str) -> DoctorFinding:
    if here:
        return DoctorFinding("installed", name, "ok", here)
    return DoctorFinding("installed", name, "note", f"not installed; only for {use}", f"{install}, if wanted")


def _of_extra(lines: Sequence[str], extra: str) -> list[DoctorFinding]:
    """Return a finding on each library that is needed here where an extra is wanted; "": where none is."""
    found = []
    for needed in map(Requirement, lines):
        if needed.marker is None or needed.marker.evaluate({"extra": extra}):
            try:
                here: str | None = version(needed.name)
            except PackageNotFoundError:
                here = None
            found.append(examine_library(needed, here))
    return found


def _machine(folder: Path) -> Iterator[DoctorFinding]:
    """Yield findings on processor, memory, disk and accelerators."""
    found = partial(DoctorFinding, "machine")
    yield found("processor", "ok", f"{cores()} cores, {platform.machine()}")
    free, total = map(size_text, _memory())
    yield found("memory", "ok", f"{free} free of {total}")
    home = _existing(folder)
    disk = shutil.disk_usage(home)
    if os.access(home, os.W_OK):
        yield found("disk", "ok", f"{size_text(disk.free)} free of {size_text(disk.total)} in {home}")
    else:
        yield found("disk", "fail", f"{home} cannot be written to", "name another folder")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for number in range(count):
        free, total = map(size_text, torch.cuda.mem_get_info(number))
        text = f"{torch.cuda.get_device_name(number)}, {free} free of {total}"
        yield found(f"cuda:{number}", "ok", text)
    if torch.backends.mps.is_available():
        room = size_text(torch.mps.recommended_max_memory())
        yield found("mps", "ok", f"Apple GPU, {room} for models")
    elif not count:
        text = "none: models run on the processor, which is slow from about a billion parameters on"
        built = torch.backends.cuda.is_built()
        fix = "look at its driver (nvidia-smi)" if built else "install a torch that was built for it"
        yield found("accelerator", "note", text, f"if this machine has a GPU, {fix}")


def _memory() -> tuple[int, int]:
    """Return (free, total) bytes of memory, a container's limit regarded."""
    machine = psutil.virtual_memory()
    free, total = int(machine.available), int(machine.total)
    with suppress(OSError, ValueError):  # cgroup v2; "max" is no number
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
        free, total = min(free, max(0, limit - used)), min(total, limit)
    return free, total


def _room(device: str) -> tuple[int, int, str]:
    """Return free and total bytes of memory where training will run, and where that is in words."""
    chosen = pick_device(device)
    if chosen.type == "cuda":
        free, total = torch.cuda.mem_get_info(chosen)
        return int(free), int(total), "of the GPU's memory"
    return *_memory(), "of memory"


def _existing(folder: Path) -> Path:
    """Return the nearest folder that exists, the place itself or one above it."""
    place = folder.expanduser().resolve()
    return next(path for path in (place, *place.parents) if path.is_dir())


# A run


def examine_run(
    content: Mapping[str, Any], changes: Sequence[str] = (), *, listener: Listener | None = None
) -> list[DoctorFinding]:
    """Return findings on the models, rows and places that a recipe names; any part may be left out.

    `content` and `changes` are those of `build_recipe`. The weights are read once, for NaN and infinity;
    nothing is fetched or written, but for the digests of weights that are remembered.
    """
    return _Examination(content, changes, listener or NullListener()).findings_on_run()


class _Examination:
    """One call of the doctor: what it looks at, and what it found so far."""

    def __init__(self, content: Mapping[str, Any], changes: Sequence[str], listener: Listener) -> None:
        self.content, self.changes, self.listener = content, changes, listener
        self.findings: list[DoctorFinding] = []
        self.method = METHODS.get(str(content.get("method", "msa")))
        self.lacking: list[str] = []
        """What a run needs and was not named."""
        self.models: dict[str, Checkpoint] = {}
        self.sets: dict[str, list[Example]] = {}

    def findings_on_run(self) -> list[DoctorFinding]:
        recipe = self.recipe()
        for name in ROLES:
            if place := self.given("models").get(name):
                self.look_at_model(name, str(place))
        if "target" in self.models and "base" in self.models:
            self.look_at_pair(self.models["target"], self.models["base"])
        self.look_at_rows()
        if recipe is not None and self.models:
            for name, examples in self.sets.items():
                self.look_at_fit(name, examples, recipe)
        if "target" in self.models and not any(one.area == "rows" for one in self.failures()):
            self.look_at_prompts(self.models["target"])
        self.look_at_run(recipe)
        return self.findings

    def given(self, section: str) -> Mapping[str, Any]:
        """Return a section of the recipe as it was given; empty where it was not, or is none."""
        found = self.content.get(section)
        return found if isinstance(found, Mapping) else {}

    def say(self, area: str, name: str, state: State, text: str, fix: str | None = None) -> None:
        if state != "note" or text not in {finding.text for finding in self.findings}:
            self.findings.append(DoctorFinding(area, name, state, text, fix))

    def attempt(self, area: str, name: str, fix: str, action: Callable[[], Result]) -> Result | None:
        """Return what an action gives; keep its refusal as a failure, with `fix` if it names none."""
        try:
            return action()
        except PalinodeError as error:
            self.say(area, name, "fail", *_text_and_fix(error, fix))
        except OSError as error:
            self.say(area, name, "fail", f"{error.filename or name}: {error.strerror or error}", fix)
        return None

    def failures(self) -> list[DoctorFinding]:
        return [finding for finding in self.findings if finding.state == "fail"]

    def recipe(self) -> Recipe | None:
        """Return the recipe that the options make, with stand-ins for what was not named."""
        named, device = self.content.get("tracker"), self.content.get("device", "auto")
        self.attempt("run", "tracker", OTHER_OPTION, lambda: check_trackers(named))
        self.attempt("run", "device", OTHER_OPTION, lambda: pick_device(device))
        needed = {"models": ["target"], "data": ["forget"], "output": ["folder"]}
        if self.method is None or "base" in self.method.needs:
            needed["models"].append("base")
        unnamed = {key: dict.fromkeys(names, "palinode-unlearned") for key, names in needed.items()}
        whole = laid_over(unnamed, self.content)
        self.lacking = [
            name for key in ("models", "data") for name in needed[key] if not self.given(key).get(name)
        ]
        return self.attempt("run", "options", OTHER_OPTION, lambda: build_recipe(whole, self.changes))

    # Models

    def look_at_model(self, name: str, location: str) -> None:
        """Look at all that a run will need of a model; one that can be used is kept."""
        of_hub = not Path(location).expanduser().exists() and HUB_NAME.fullmatch(location)
        if of_hub and not self.is_cached(name, location):
            return
        attempt, before = partial(self.attempt, "models", name, WHOLE_MODEL), len(self.failures())
        pickles = bool(self.given("models").get("allow_pickle"))
        model = attempt(lambda: Checkpoint.open(location, allow_pickle=pickles))
        if model is None:
            return
        attempt(lambda: require_causal_lm(model))
        attempt(lambda: load_config(model))
        tokenizer = attempt(lambda: load_tokenizer(model))
        with self.listener.task(f"reading the {name}", model.nbytes, "bytes") as advance:
            found = attempt(lambda: count_nonfinite(model, on_progress=advance))
        if found:
            text = f"{nonfinite_text(found)} ({next(iter(found))}, …)"
            self.say("models", name, "fail", text, "fetch the model again, or take another checkpoint")
        for note in model.notes:
            self.say("models", name, "note", note)
        if len(self.failures()) > before:
            return
        template = "with" if tokenizer is not None and tokenizer.chat_template else "without"
        self.say("models", name, "ok", f"{_described(model)}, {template} a chat template")
        self.look_at_names(name, model)
        self.models[name] = model

    def is_cached(self, name: str, location: str) -> bool:
        """Tell whether a model of the hub is on this machine; if not, say what fetching it takes."""
        from huggingface_hub import HfApi, snapshot_download

        repository, _, revision = location.partition("@")
        commit = revision or None
        with suppress(Exception):  # the hub client raises many kinds; each means that it is not in the cache
            snapshot_download(repository, revision=commit, allow_patterns=list(ON_HUB), local_files_only=True)
            return True
        try:
            found = HfApi().model_info(repository, revision=commit, files_metadata=True, timeout=10)
        except Exception as error:  # no such model, a closed one, no network
            text = f"there is no folder {location}, nothing in the hub's cache, and the hub is silent"
            text += f" ({first_line(error)})"
            self.say("models", name, "fail", text, "check the name, go online, or name a folder")
            return False
        files = found.siblings or ()
        if size := sum(file.size or 0 for file in files if file.rfilename.endswith(".safetensors")):
            text = f"{location} is on the hub and not here yet: {size_text(size)} would be fetched"
            fix = f"to have it looked at, fetch it first: hf download {repository}"
        else:
            text, fix = f"{location} has no safetensors on the hub", "if it has pickles, say --allow-pickle"
        self.say("models", name, "warn", text, fix)
        return False

    def look_at_names(self, name: str, model: Checkpoint) -> None:
        """Compare the live model's weights with those in the files by name, as trying scales needs."""
        try:
            check_live(model)
        except MismatchError as error:
            text, _ = _text_and_fix(error, "")
            self.say("models", name, "warn", text, "give both scales as numbers: points cannot be tried")
        except CheckpointError as error:
            self.say("models", name, "fail", *_text_and_fix(error, WHOLE_MODEL))

    def look_at_pair(self, target: Checkpoint, base: Checkpoint) -> None:
        """Look whether target and base are two states of one model."""
        fix = "name an earlier checkpoint of the target as its base"
        method = self.method.name if self.method else "msa"
        checks = pair_checks(target, base, method, self.given("method_settings"))
        before = len(self.failures())
        found: dict[str, Any] = {
            name: self.attempt("pair", name, fix, check) for name, check in checks.items()
        }
        if len(self.failures()) > before:
            return
        say = partial(self.say, "pair")
        say("fit", "ok", "the same weights by name and shape, and the same tokens")
        for note in found["shapes"].notes:
            say("shapes", "note", note)
        if target != base and target.nbytes == base.nbytes and target.fingerprint() == base.fingerprint():
            text = "target and base lie in two folders and are the same to the last bit"
            say("two models", "fail", text, fix)
        types = [", ".join(sorted({info.dtype for info in one.tensors.values()})) for one in (target, base)]
        if types[0] != types[1]:
            text = f"the target is stored as {types[0]}, the base as {types[1]}; sums are formed in float32"
            say("types", "note", text)
        if load_tokenizer(target).chat_template != load_tokenizer(base).chat_template:
            say("chat template", "note", "the chat templates differ; both models are asked with the target's")

    # Rows

    def look_at_rows(self) -> None:
        """Read the sets, and look for copies and for rows that stand in both."""
        data, fix = self.given("data"), OTHER_FILE
        for name in ("forget", "retain"):
            if place := data.get(name):
                self.read_set(name, str(place))
        if refusals := data.get("refusals"):
            self.attempt("rows", "refusals", fix, lambda: read_refusals(refusals))
        if len(self.sets) == 2:
            self.look_for_shared(**self.sets)
        elif "forget" in self.sets and not data.get("retain"):
            text = "none was named, so β is 0, and what the model keeps is not measured"
            self.say("rows", "retain", "warn", text, "name rows whose effect must stay with --retain")

    def read_set(self, name: str, place: str) -> None:
        read = partial(read_examples, columns=self.given("data").get("columns"), beside=name != "forget")
        found = self.attempt("rows", name, OTHER_FILE, lambda: read(place))
        if not found:
            return
        self.sets[name] = found
        forms = Counter(example.form for example in found)
        kinds = ", ".join(f"{count:,} as {form}" for form, count in forms.items())
        self.say("rows", name, "ok", f"{len(found):,} rows ({kinds})")
        for note in reading_notes(found):
            self.say("rows", name, "note", note)
        if copies := len(found) - len({example.key for example in found}):
            text = f"{copies:,} rows say what another row says already, and count more than once"
            self.say("rows", name, "warn", text, "leave the copies out, if that is not meant")

    def look_for_shared(self, forget: Sequence[Example], retain: Sequence[Example]) -> None:
        shared = {second for _, second in shared_rows(forget, retain)}
        if not shared:
            self.say("rows", "overlap", "ok", "no row stands in both sets")
            return
        first = retain[min(shared)].place
        text = f"{len(shared):,} retain rows also stand in the forget set (first: {first})"
        if self.given("data").get("allow_overlap"):
            self.say("rows", "overlap", "note", f"{text}; they will be left out")
        else:
            fix = "remove them, or have them left out with --allow-overlap"
            self.say("rows", "overlap", "fail", text, fix)

    def look_at_fit(self, name: str, examples: Sequence[Example], recipe: Recipe) -> None:
        """Look whether the rows fit into the models; the first one's tokenizer reads them."""
        models, style, length = [*self.models.values()], recipe.prompts.style(), recipe.training.max_length
        attempt = partial(self.attempt, "rows", name, "shorten the rows, or raise max_length (--max-length)")
        tokenizer = load_tokenizer(models[0])
        tokens = attempt(lambda: tokenize(examples, tokenizer, max_length=length, style=style))
        if tokens is None:
            return
        for model in models:
            attempt(partial(check_positions, load_config(model), tokens, tokenizer))
        for note in prompt_notes(examples, tokenizer, style):
            self.say("rows", name, "note", note)
        if cut := sum(row.truncated for row in tokens):
            text = f"{cut:,} answers are longer than max_length {length} and will be cut"
            self.say("rows", name, "warn", text, "raise max_length (--max-length), if their ends matter")

    def look_at_prompts(self, target: Checkpoint) -> None:
        """Ask the target some forget rows as a run would, and in other plausible ways."""
        asked, device = rows_with_style(self.sets.get("forget", ())), str(self.content.get("device", "auto"))
        try:
            style, (free, _, where) = read_prompts(self.content, self.changes).style(), _room(device)
            length = EvaluationLimits(**self.given("evaluation")).max_length
        except (PalinodeError, ValidationError):  # said of the recipe already
            return
        if not asked:
            return
        say = partial(self.say, "rows", "prompts")
        needs = 5 * target.parameters  # float32, and some for what passes through it
        if needs > free:
            takes = f"the target takes {size_text(needs)} {where}, and {size_text(free)} are free"
            say("note", f"not tried: {takes}")
            return
        with self.listener.task("asking the target in other ways", 1, "pass") as advance:
            check = partial(check_target, target, asked, style, max_length=length, device=device)
            found = self.attempt("rows", "prompts", OTHER_OPTION, check)
            advance(1)
        if found is None:
            return
        text = f"answer probability {found.asked:.2f} on {found.rows} forget rows"
        if said := found.sentences():
            say("warn", *said)
        elif found.asked < UNKNOWN:
            fix = "if it was trained on these rows, look how they were put to it then"
            say("note", f"{text}, and hardly more in any way that was tried", fix)
        else:
            say("ok", f"{text}; no other way is far better")

    # The run itself

    def look_at_run(self, recipe: Recipe | None) -> None:
        """Go through the pre-flight of the run itself, where all that it needs is there."""
        folder = self.given("output").get("folder")
        missing = [name for name in ROLES if self.given("models").get(name) and name not in self.models]
        if recipe is not None and not missing and not self.lacking and not self.failures():
            self.go_through(recipe)
            return
        if folder:
            place, inputs = Path(str(folder)).expanduser(), [model.folder for model in self.models.values()]
            self.attempt("run", "output", OTHER_OUTPUT, lambda: check_output(place, inputs))
        if self.failures():
            text, fix = "something fails", "mend what fails and call again"
        elif self.lacking:
            named = [{"forget": "forget set"}.get(name, name) for name in self.lacking]
            text = f"there is no {' and no '.join(named)}"
            fix = f"name it with --{' and --'.join(self.lacking)}"
        else:
            text, fix = "a model is not on this machine", "fetch it and call again"
        self.say("run", "pre-flight", "note", f"not gone through: {text}", fix)

    def go_through(self, recipe: Recipe) -> None:
        inputs = self.attempt("run", "pre-flight", OTHER_OPTION, lambda: open_inputs(recipe))
        if inputs is None:
            return
        for note in inputs.notes:
            if not note.startswith(CUT):  # which was said of the rows
                self.say("run", "rows", "note", note)
        if finished_before(inputs) is not None:
            text = f"{recipe.output.folder} already holds the result of this very run"
            self.say("run", "output", "ok", text)
            return
        with self.listener.task("estimating costs", 1, "plan") as advance:
            plan = make_plan(inputs)
            advance(1)
        time = f"about {duration_text(plan.seconds)} for {plan.tokens:,} tokens"
        self.say("run", "time", "ok", f"{time}, by the method {METHODS[recipe.method].name}")
        self.look_at_memory(plan.memory, recipe.device)
        check, before = partial(check_places, recipe, inputs, needs=plan.disk), len(self.failures())
        self.attempt("run", "output", OTHER_OUTPUT, check)
        if len(self.failures()) == before:
            folder = Path(recipe.output.folder)
            place = folder if self.given("output").get("folder") else _existing(folder)
            text = f"{place} can be written to, and has room for {size_text(plan.disk)}"
            self.say("run", "output", "ok", text)

    def look_at_memory(self, needed: int, device: str) -> None:
        """Hold the memory that the run needs at its peak against what is here."""
        free, total, where = _room(device)
        say, needs = partial(self.say, "run", "memory"), f"about {size_text(needed)} {where} at the peak"
        fix = "take smaller batches or shorter rows"
        if needed > total:
            say("fail", f"{needs}, and there are {size_text(total)} in all", fix)
        elif needed > free:
            say("warn", f"{needs}, and {size_text(free)} are free now", f"end other programs, or {fix}")
        else:
            say("ok", f"{needs}, and {size_text(free)} are free")


def _described(model: Checkpoint) -> str:
    """Return a model in a few words."""
    kind = model.config.get("model_type", "model")
    types = ", ".join(Counter(info.dtype for info in model.tensors.values()))
    layout = "" if model.format == "safetensors" else f", {model.format} files read as plain tensors"
    tied = ", tied embeddings" if model.tied else ""
    return f"{kind}, {model.parameters:,} weights, {types}, {size_text(model.nbytes)}{layout}{tied}"


def _text_and_fix(error: PalinodeError, otherwise: str) -> tuple[str, str]:
    """Return what is wrong and what to do, which our errors say after their last semicolon."""
    text, semicolon, fix = str(error).rpartition("; ")
    return (text, fix) if semicolon else (str(error), otherwise)

"""What is here to work with: libraries, extras, memory, disk and devices."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch

from palinode.pipeline.doctor.findings import DoctorFinding
from palinode.pipeline.tracking import PACKAGES, is_installed
from palinode.version import __version__
from palinode.weights.arithmetic import cores

USES = {
    "history": "near-duplicates in locate --corpus, and SQL over an exposure log",
    "lm-eval": "general ability, evaluate --lm-eval",
    "lora": "low-rank fine-tuning",
}
"""What the extras of the package are for."""

REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(\[[^\]]*\])?\s*(>=\s*(?P<least>[\w.]+))?")
EXTRA = re.compile(r"extra\s*==\s*[\"'](?P<name>[\w.-]+)")


def examine_equipment(folder: Path) -> Iterator[DoctorFinding]:
    """Yield findings on libraries, extras and this machine; `folder` is where results would go."""
    yield from _libraries()
    yield from _extras()
    yield from _machine(folder)
    yield from _accelerators()


def _libraries() -> Iterator[DoctorFinding]:
    """Yield Palinode itself and every library it requires, against the oldest version that it takes."""
    python = platform.python_version()
    yield DoctorFinding(
        "installed", "palinode", "ok", f"{__version__} on Python {python}, {platform.system()}"
    )
    fine = []
    for line in _requirements():
        match = REQUIREMENT.match(line)
        if match is None or EXTRA.search(line):
            continue
        name, least = match["name"], match["least"]
        found = installed_version(name)
        if found is None:
            fix = f"pip install {name}" if least is None else f'pip install "{name}>={least}"'
            yield DoctorFinding("installed", name, "fail", "not installed", fix)
        elif least and _numbers(found) < _numbers(least):
            text = f"version {found}, and Palinode needs {least} or newer"
            yield DoctorFinding("installed", name, "fail", text, f'pip install "{name}>={least}"')
        else:
            fine.append(f"{name} {found}")
    yield DoctorFinding("installed", "libraries", "ok", ", ".join(fine))


def _requirements() -> list[str]:
    """Return what the package says that it needs, a line for each library, those of extras too."""
    try:
        return requires("palinode") or []
    except PackageNotFoundError:  # run from a source folder that was never installed
        return []


def _extra_libraries() -> dict[str, list[str]]:
    """Return the libraries of each extra that is meant for users."""
    libraries: dict[str, list[str]] = {}
    for line in _requirements():
        match, extra = REQUIREMENT.match(line), EXTRA.search(line)
        if match and extra and extra["name"] != "dev":
            libraries.setdefault(extra["name"], []).append(match["name"])
    return libraries


def installed_version(name: str) -> str | None:
    """Return the version of an installed library, None where it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    """Return the release numbers of a version: (2, 13) of 2.13.0+cpu and of 2.13rc1."""
    release = re.match(r"\d+(\.\d+)*", text)
    numbers = [int(part) for part in release[0].split(".")] if release else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def _extras() -> Iterator[DoctorFinding]:
    for extra, names in _extra_libraries().items():
        found = {name: installed_version(name) for name in names}
        if all(found.values()):
            text = ", ".join(f"{name} {number}" for name, number in found.items())
            yield DoctorFinding("installed", extra, "ok", text)
        else:
            text = f"not installed; only for {USES.get(extra, 'what its name says')}"
            fix = f'pip install "palinode[{extra}]", if you want it'
            yield DoctorFinding("installed", extra, "note", text, fix)
    trackers = [name for name in PACKAGES if is_installed(name)]
    if trackers:
        yield DoctorFinding("installed", "trackers", "ok", ", ".join(trackers))
    else:
        text, fix = "none is installed; only for --tracker", "pip install tensorboard, if you want it"
        yield DoctorFinding("installed", "trackers", "note", text, fix)


# The machine


def _machine(folder: Path) -> Iterator[DoctorFinding]:
    yield DoctorFinding("machine", "processor", "ok", f"{cores()} cores, {platform.machine()}")
    free, total = memory()
    if free is None:
        yield DoctorFinding("machine", "memory", "note", "this system does not say how much memory is free")
    else:
        yield DoctorFinding(
            "machine", "memory", "ok", f"{gigabytes(free)} free of {gigabytes(total or free)}"
        )
    home = existing(folder)
    disk = shutil.disk_usage(home)
    text = f"{gigabytes(disk.free)} free of {gigabytes(disk.total)} in {home}"
    if not os.access(home, os.W_OK):
        yield DoctorFinding("machine", "disk", "fail", f"{home} cannot be written to", "name another folder")
    else:
        yield DoctorFinding("machine", "disk", "ok", text)


def _accelerators() -> Iterator[DoctorFinding]:
    found = False
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = True
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        text = f"{name}, {gigabytes(free)} free of {gigabytes(total)}"
        yield DoctorFinding("machine", f"cuda:{number}", "ok", text)
    if torch.backends.mps.is_available():
        found = True
        most = torch.mps.recommended_max_memory()
        yield DoctorFinding("machine", "mps", "ok", f"Apple GPU, {gigabytes(most)} for models")
    if not found:
        text = "none: models run on the processor, which is slow from about a billion parameters on"
        built = torch.backends.cuda.is_built()
        fix = "if this machine has a GPU, look at its driver (nvidia-smi)" if built else None
        fix = fix or "if this machine has a GPU, install a torch that was built for it"
        yield DoctorFinding("machine", "accelerator", "note", text, fix)


def memory() -> tuple[int | None, int | None]:
    """Return (free, total) bytes of memory, a container's limit regarded; None where nobody tells."""
    free = total = None
    with suppress(OSError, ValueError, KeyError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if ":" in line}
        free, total = 1024 * kilobytes["MemAvailable"], 1024 * kilobytes["MemTotal"]
    with suppress(OSError, ValueError):  # cgroup v2; "max" is no number
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
        left = max(0, limit - used)
        free, total = min(left, free or left), min(limit, total or limit)
    return free, total


def existing(folder: Path) -> Path:
    """Return the nearest folder that exists, the place itself or one above it."""
    place = folder.expanduser().resolve()
    return next(path for path in (place, *place.parents) if path.is_dir())


def gigabytes(count: int) -> str:
    """Return a number of bytes in words, in units of 1000.

    >>> gigabytes(1_234_000), gigabytes(25_000_000_000)
    ('1.2 MB', '25.0 GB')
    """
    if count < 1e9:
        return f"{count / 1e6:,.1f} MB"
    return f"{count / 1e9:,.1f} GB"

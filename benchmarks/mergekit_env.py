"""mergekit in a virtual environment of its own, made once and kept: the other tool that we compare with.

    python benchmarks/mergekit_env.py [--folder build/mergekit]

torch goes in first and alone, at the version that Palinode's constraints.txt names: pip takes the CPU
build where it has one within reach, and nothing that comes later may replace it. The rest follows
the same constraints. 1.6 GB, about a minute where the packages are near.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "mergekit"
CONSTRAINTS = ROOT / "constraints.txt"
VERSION = "mergekit==0.1.5"
MARK = ".ready"
"""Written last, with what was installed: an environment without it was left half made."""


class InstallError(Exception):
    """mergekit could not be installed; the message says why."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the environment lies")
    print(make_environment(parser.parse_args().folder))


def make_environment(folder: Path = FOLDER) -> Path:
    """Return the folder of programs (python, mergekit-yaml) of an environment that holds mergekit.

    It is made where it is not there yet. Raises InstallError, with what pip said last.
    """
    programs = folder / "bin"
    wanted = f"{VERSION} {torch_version()}\n"
    mark = folder / MARK
    if mark.is_file() and mark.read_text() == wanted:
        return programs
    if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").is_file():
        raise InstallError(f"{folder} holds something else; name an empty folder")
    print(f"Installing {wanted.strip()} into {folder}; this takes a minute or more.", file=sys.stderr)
    pip = [str(programs / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    _call([sys.executable, "-m", "venv", "--clear", str(folder)])
    _call([*pip, torch_version()])
    _call([*pip, "-c", str(CONSTRAINTS), VERSION])
    _call([str(programs / "mergekit-yaml"), "--help"])  # it imports, and is compiled once before it is timed
    mark.write_text(wanted)
    return programs


def torch_version() -> str:
    """Return the requirement of torch in constraints.txt."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    return next(line.split("#")[0].strip() for line in lines if line.startswith("torch=="))


def offline() -> dict[str, str]:
    """Return the variables of a program that is to ask no model hub and to say little."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _call(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise InstallError(f"{command[0]} does not start ({error.strerror})") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        raise InstallError(f"{' '.join(command[1:4])} failed: {said[-1]}")


if __name__ == "__main__":
    main()

"""The house rules that a machine can check: layers, public names, README's tree and targets, docstrings."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import house
import palinode

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "palinode"
SOURCES = sorted(PACKAGE.rglob("*.py"))

LAYERS = {
    "errors": 0,
    "records": 0,
    "progress": 0,
    "version": 0,
    "weights": 1,
    "data": 1,
    "settings": 1.5,
    "processes": 0.5,
    "metrics": 1,
    "report": 1,
    "models": 2,
    "training": 3,
    "evaluation": 3,
    "methods": 4,
    "benchmarks": 4,
    "audit": 4,
    "history": 4,
    "pipeline": 5,
    "compare": 6,
    "influence": 6,
    "jobs": 7,
    "requests": 7.5,
    "cli": 8,
    "__main__": 9,
}


def module_name(source: Path) -> str:
    parts = source.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def where(source: Path) -> str:
    return source.relative_to(ROOT).as_posix()


# Layers: a module imports from lower layers or from its own package


def imported_rooms(code: str, module: str, *, is_package: bool = False) -> set[str]:
    """The parts of palinode that this code imports from; "" stands for palinode itself."""
    rooms = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = absolute(node, module, is_package=is_package)
            names = [f"{origin}.{alias.name}" for alias in node.names]
        else:
            continue
        names = [
            name for name in names if name.split(".")[0] == "palinode" and name != "palinode.__version__"
        ]
        rooms |= {room_of(name) for name in names}
    return rooms


def absolute(node: ast.ImportFrom, module: str, *, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    above = module.split(".")[: None if is_package and node.level == 1 else -(node.level - is_package)]
    return ".".join([*above, *([node.module] if node.module else [])])


def room_of(dotted: str) -> str:
    part = dotted.split(".")[1] if "." in dotted else ""
    return part if part in LAYERS or (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").is_file() else ""


def broken_layers(code: str, module: str, *, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of this module, in words."""
    own = module.split(".")[1]
    if own not in LAYERS:
        return [f"{own} has no layer; give it one in tests/test_house.py"]
    others = imported_rooms(code, module, is_package=is_package) - {own}
    return [
        f"{module} (layer {LAYERS[own]}) imports from {f'palinode.{other}' if other else 'palinode itself'}"
        for other in sorted(others)
        if LAYERS.get(other, LAYERS[own]) >= LAYERS[own]
    ]


@pytest.mark.parametrize("source", SOURCES, ids=where)
def test_modules_import_only_from_lower_layers(source):
    if source == PACKAGE / "__init__.py":
        return  # it names what everything else offers
    code = source.read_text(encoding="utf-8")
    assert broken_layers(code, module_name(source), is_package=source.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("palinode.metrics.matching", "from palinode.models import load"),
        ("palinode.metrics.matching", "from palinode.report.run_report import headline"),
        ("palinode.metrics.matching", "import palinode.report.run_report"),
        ("palinode.metrics.matching", "from palinode import report"),
        ("palinode.metrics.matching", "from palinode import evaluate"),
        ("palinode.metrics.matching", "import palinode"),
        ("palinode.metrics.matching", "from .. import report"),
        ("palinode.metrics.matching", "from ..report import headline"),
        ("palinode.metrics.matching", "if TYPE_CHECKING:\n    from palinode.models import load"),
        ("palinode.metrics.matching", "def f():\n    import palinode.cli"),
        ("palinode.records", "from palinode.errors import DataError"),
        ("palinode.newcomer", ""),
    ],
)
def test_layer_rule_sees_what_is_wrong(module, code):
    assert broken_layers(code, module)


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("palinode.metrics.matching", "import numpy\nfrom palinode.records import Outcome"),
        ("palinode.metrics.matching", "from palinode.metrics.aggregate import mean_score"),
        ("palinode.metrics.matching", "from . import aggregate\nfrom .aggregate import mean_score"),
        ("palinode.metrics.matching", "from palinode import __version__, records"),
        ("palinode.cli.main", "from palinode.pipeline.run import run"),
    ],
)
def test_layer_rule_allows_what_is_right(module, code):
    assert broken_layers(code, module) == []


def test_layer_rule_resolves_relative_imports_of_a_package():
    assert broken_layers("from .overlap import f", "palinode.metrics", is_package=True) == []
    assert broken_layers("from ..report import f", "palinode.metrics", is_package=True)


# Public names


def test_public_names_are_sorted_and_unique():
    def rank(name: str) -> tuple[bool, bool, str]:
        return not name.isupper(), not name[0].isupper(), name  # constants, classes, functions: ruff's order

    assert list(palinode.__all__) == sorted(set(palinode.__all__), key=rank)


@pytest.mark.parametrize("name", palinode.__all__)
def test_public_name_resolves_and_is_documented(name):
    thing = getattr(palinode, name)
    if inspect.isclass(thing) or inspect.isroutine(thing):
        doc = thing.__doc__ or ""
        assert doc.strip(), f"palinode.{name} has no docstring"
        assert not doc.startswith(f"{name}("), f"palinode.{name} has only the docstring that dataclass makes"


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = palinode.no_such_name


@pytest.mark.parametrize("source", SOURCES, ids=where)
def test_module_has_a_docstring(source):
    doc = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    assert len(doc.split()) >= 3, f"{where(source)} does not say what it is"


@pytest.mark.parametrize("package", [source for source in SOURCES if source.name == "__init__.py"], ids=where)
def test_names_that_a_package_exports_exist(package):
    module = importlib.import_module(module_name(package))
    assert [name for name in getattr(module, "__all__", []) if not hasattr(module, name)] == []


def test_importing_palinode_imports_no_heavy_library():
    code = (
        "import sys, palinode\n"
        "heavy = ('torch', 'transformers', 'datasets', 'scipy', 'pyarrow', 'accelerate')\n"
        "print(*[name for name in heavy if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_naming_methods_benchmarks_and_metrics_imports_no_torch():
    code = (
        "import sys\n"
        "from palinode.cli.about_verbs import listings\n"
        "assert all(listings().values())\n"
        "print(*[name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


# README's tree: a ```text block whose first line is `src/palinode/`; below it one entry a line, indented by
# its depth, `name.py` or `name/` first and any words after it. `__init__.py` may be named or not.


def fenced_blocks(markdown: str) -> list[tuple[str, list[str]]]:
    """The language and the lines of each fenced block."""
    found = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", markdown, flags=re.MULTILINE | re.DOTALL)
    return [(language, body.splitlines()) for language, body in found]


def tree_in(markdown: str) -> list[str]:
    """The paths below src/palinode/ that the tree lists; folders end with a slash."""
    trees = [
        lines
        for language, lines in fenced_blocks(markdown)
        if language == "text" and lines and lines[0].split()[:1] == ["src/palinode/"]
    ]
    assert len(trees) == 1, f"one ```text block must begin with src/palinode/; there are {len(trees)}"
    paths, folders = [], []
    for line in trees[0][1:]:
        indent, name = re.match(r"([\s│├└─]*)(\S*)", line).groups()
        if not name.endswith(("/", ".py")):
            continue  # words that go on from the line above
        folders = [(depth, folder) for depth, folder in folders if depth < len(indent)]
        paths.append("".join(folder for _, folder in folders) + name)
        if name.endswith("/"):
            folders.append((len(indent), name))
    return [path for path in paths if Path(path).name != "__init__.py"]


def tree_on_disk() -> list[str]:
    """The modules and the packages that lie directly in src/palinode/."""
    packages = [f"{source.parent.name}/" for source in PACKAGE.glob("*/__init__.py")]
    modules = [source.name for source in PACKAGE.glob("*.py") if not source.name.startswith("__")]
    return sorted([*packages, *modules])


def test_readme_tree_lists_exactly_what_is_there():
    assert sorted(tree_in((ROOT / "README.md").read_text(encoding="utf-8"))) == tree_on_disk()


def test_tree_is_read_by_its_indentation():
    markdown = """Words.
```text
src/palinode/            all of it
  __init__.py            public names
  errors.py     L0       every error, such as
                         those of data/
  metrics/      L1       scores
    overlap.py           ROUGE
    deep/
      inner.py
  report/       L1
    summary.py
```
"""
    assert tree_in(markdown) == [
        "errors.py",
        "metrics/",
        "metrics/overlap.py",
        "metrics/deep/",
        "metrics/deep/inner.py",
        "report/",
        "report/summary.py",
    ]


# Makefile targets that the texts mention, in code


def make_targets_in(markdown: str) -> set[str]:
    code = [line for _, lines in fenced_blocks(markdown) for line in lines]
    code += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL))
    return {target for line in code for target in re.findall(r"(?:^|[;&|$])\s*make ([a-z][\w-]*)", line)}


def has_target(name: str) -> bool:
    environment = {key: value for key, value in os.environ.items() if key not in {"MAKEFLAGS", "MAKELEVEL"}}
    run = subprocess.run(["make", "-n", name], cwd=ROOT, env=environment, capture_output=True, check=False)
    return run.returncode == 0


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("text", ["README.md", "CONTRIBUTING.md"])
def test_make_targets_that_texts_mention_exist(text):
    targets = make_targets_in((ROOT / text).read_text(encoding="utf-8"))
    assert targets, f"{text} mentions no make target"
    assert [target for target in sorted(targets) if not has_target(target)] == []


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_a_target_that_does_not_exist_is_noticed():
    assert make_targets_in("Run `make nonsense`; make sure.\n```sh\n$ make demo\n```\n") == {
        "nonsense",
        "demo",
    }
    assert has_target("demo")
    assert not has_target("nonsense")


# CONTRIBUTING's tour: every room and table that it names is there


def rooms_named(markdown: str) -> list[str]:
    """The paths in code, of the table "Where do I put" and of the tour, that lie in src/palinode/."""
    part = markdown.partition("## A tour")[2].partition("## House rules")[0]
    return [
        name for name in re.findall(r"`([a-z_]+(?:/[a-z_]*)*(?:\.py|/))`", part) if not name.startswith("src")
    ]


def test_rooms_that_contributing_names_are_there():
    named = rooms_named((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert len(named) > 15
    assert [name for name in named if not (PACKAGE / name).exists()] == []


def test_tables_that_contributing_names_stand_in_the_room_beside_them():
    rows = [
        line
        for line in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("|") and re.search(r"`[A-Z]{5,}`", line)
    ]
    assert len(rows) > 5
    for row in rows:
        (table,) = re.findall(r"`([A-Z]{5,})`", row)
        rooms = [PACKAGE / name for name in re.findall(r"`([a-z_/]+\.py)`", row)]
        assert any(
            re.search(rf"^{table}\b.*=", room.read_text(encoding="utf-8"), re.MULTILINE) for room in rooms
        ), row


# The house stays small: these numbers may only go down


def test_the_house_does_not_grow():
    texts = house.sources()
    lines = sum(text.count("\n") for text in texts.values())
    assert lines <= 46_301, "whoever adds a room says which room it takes away"
    assert len(texts) <= 158


def test_what_there_should_be_none_of_does_not_grow():
    found = {title: len(lines) for title, lines in house.look(house.sources()).items()}
    most = {"functions": 0, "public functions": 0, "import circles": 0, "class names": 0, "file names": 0}
    for start, number in most.items():
        assert [title for title, count in found.items() if title.startswith(start) and count > number] == []


def test_circles_are_seen_through_lazy_and_typing_imports():
    lazy = ast.parse("def f():\n    from palinode.b import g")
    typing = ast.parse("if TYPE_CHECKING:\n    from palinode.a import f")
    assert house.circles({"palinode.a": lazy, "palinode.b": typing}) == [["palinode.a", "palinode.b"]]
    assert house.circles({"palinode.a": lazy, "palinode.b": ast.parse("")}) == []


# Prose is wrapped at 100 columns


def long_prose(markdown: str, width: int = 100) -> list[str]:
    """The lines of prose that are longer; code, tables, headings and pictures may be."""
    prose = re.sub(r"^ *```.*?^ *```", "", markdown, flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"`[^`]*`", lambda code: code.group().replace(" ", "_"), prose)
    return [
        line
        for line in prose.splitlines()
        if len(line) > width and " " in line.strip() and not line.startswith(("|", "#", "!", "<", "    "))
    ]


@pytest.mark.parametrize(
    "page", [*sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*.md"))], ids=where
)
def test_prose_is_wrapped_at_a_hundred_columns(page):
    if page.name != "cli.md":  # written from the commands' own help
        assert long_prose(page.read_text(encoding="utf-8")) == []


def test_long_prose_is_noticed():
    assert long_prose("word " * 21)
    assert not long_prose("| " + "word " * 30 + "|\n```sh\n" + "word " * 30 + "\n```\n`" + "word " * 30 + "`")


# No path of one machine in any file that we share

MACHINE_PATH = re.compile(r"(?<![\w.~)}\]/-])/(?:(?:root|work)(?![\w-])|(?:home|tmp)/\w)")


def tracked_files() -> list[Path]:
    """The files that git tracks; skips the test where git cannot tell."""
    try:
        run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if run.returncode or not run.stdout:
        pytest.skip(f"not a git checkout with tracked files: {run.stderr.strip() or 'nothing is tracked'}")
    return [ROOT / name for name in run.stdout.split("\0") if (ROOT / name).is_file()]


def test_no_tracked_text_names_a_path_of_one_machine():
    found = [
        f"{where(path)}:{number}: {line.strip()}"
        for path in tracked_files()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("place", ["root", "root/x", "work/main", "home/ada", "tmp/pv/bin"])
def test_machine_paths_are_noticed(place):
    assert MACHINE_PATH.search(f"see /{place} for more")
    assert MACHINE_PATH.search(f'Path("/{place}")')


@pytest.mark.parametrize(
    "text",
    ["the input/work folder", "{folder}/work", "https://example.org/work", "a/root", "/workspace", "/tmp"],
)
def test_other_paths_are_not_machine_paths(text):
    assert not MACHINE_PATH.search(text)

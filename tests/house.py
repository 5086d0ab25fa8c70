"""How large the house is: `make house`, or `python tests/house.py [--rooms]`; it prints and judges nothing.

Lines and files of src/palinode and of each package; functions over 60 lines; public functions with more than
12 parameters; import circles, lazy and typing imports counted; class and file names that stand twice. With
`--rooms` also how many files a plain `palinode unlearn --scales 1.25,0.5` on a tiny invented world runs
through: those of which a function is called while nothing is being imported.
"""

from __future__ import annotations

import ast
import inspect
import io
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1] / "src" / "palinode"
MOST_LINES, MOST_PARAMETERS = 60, 12


def main() -> None:
    texts = sources()
    print_sizes({path.relative_to(ROOT): text.count("\n") for path, text in texts.items()})
    found = look(texts)
    if "--rooms" in sys.argv:
        found["files that a plain unlearn runs through"] = rooms_of_a_run()
    for title, lines in found.items():
        print(f"{title}: {len(lines)}", *lines, sep="\n  ")


def sources() -> dict[Path, str]:
    return {path: path.read_text(encoding="utf-8") for path in sorted(ROOT.rglob("*.py"))}


def look(texts: dict[Path, str]) -> dict[str, list[str]]:
    """Return what there should be none of, by what it is."""
    modules = {module_name(path): ast.parse(text) for path, text in texts.items()}
    functions = [
        (f"{name}.{node.name}", node) for name, tree in modules.items() for node in functions_of(tree)
    ]
    long = {name: node.end_lineno - node.lineno + 1 for name, node in functions}
    wide = {name: parameters(node) for name, node in functions if not node.name.startswith("_")}
    classes = [
        (node.name, m) for m, tree in modules.items() for node in tree.body if isinstance(node, ast.ClassDef)
    ]
    files = [(path.stem, str(path.relative_to(ROOT))) for path in texts if path.stem != "__init__"]
    return {
        f"functions over {MOST_LINES} lines": [f"{n} ({k})" for n, k in long.items() if k > MOST_LINES],
        f"public functions with more than {MOST_PARAMETERS} parameters": [
            f"{name} ({count})" for name, count in wide.items() if count > MOST_PARAMETERS
        ],
        "import circles": [", ".join(circle) for circle in circles(modules)],
        "class names that stand twice": twice(classes),
        "file names that stand twice": twice(files),
    }


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def print_sizes(lines: dict[Path, int]) -> None:
    packages = defaultdict(list)
    for path, count in lines.items():
        packages[path.parts[0] if len(path.parts) > 1 else "."].append(count)
    print(f"src/palinode: {sum(lines.values()):,} lines in {len(lines)} files")
    for name, counts in sorted(packages.items(), key=lambda one: -sum(one[1])):
        print(f"  {name:<12} {sum(counts):>7,} lines  {len(counts):>3} files")


def functions_of(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def parameters(node: ast.FunctionDef) -> int:
    given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return sum(argument.arg not in ("self", "cls") for argument in given)


def twice(pairs: list[tuple[str, str]]) -> list[str]:
    places = defaultdict(list)
    for name, place in pairs:
        places[name].append(place)
    return [f"{name}: {', '.join(found)}" for name, found in sorted(places.items()) if len(found) > 1]


def circles(modules: dict[str, ast.Module]) -> list[list[str]]:
    """Return the groups of modules that all reach each other by imports of any kind."""
    reached = {name: set(imports(name, tree, modules)) for name, tree in modules.items()}
    for middle in reached:  # Warshall
        for others in reached.values():
            if middle in others:
                others |= reached[middle]
    groups = {
        tuple(other for other in sorted(others) if name in reached[other]) for name, others in reached.items()
    }
    return [list(group) for group in sorted(groups) if group]


def imports(name: str, tree: ast.Module, modules: dict[str, ast.Module]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            wanted = [(f"{node.module}.{alias.name}", node.module) for alias in node.names]
        elif isinstance(node, ast.Import):
            wanted = [(alias.name, alias.name) for alias in node.names]
        else:
            continue
        for options in wanted:
            yield from [one for one in options if one in modules and one != name][:1]


def rooms_of_a_run() -> list[str]:
    """Run `unlearn` in this process and return the files whose functions were called meanwhile."""
    from palinode.benchmarks.demo import DemoStage, build_demo
    from palinode.cli import main as palinode
    from palinode.data.world import invent_world

    seen: set[str] = set()
    importing: dict[int, int] = defaultdict(int)

    def watch(frame: FrameType, event: str, _argument: object) -> None:
        if event not in ("call", "return"):
            return
        code, thread = frame.f_code, threading.get_ident()
        if code.co_name == "<module>":
            importing[thread] += 1 if event == "call" else -1
        elif not importing[thread] and code.co_flags & inspect.CO_OPTIMIZED:  # a function, no class body
            seen.add(code.co_filename)

    with tempfile.TemporaryDirectory() as folder:
        world = invent_world(3, early=5, middle=4, forget=2, late=2)
        stages = [DemoStage(1, 1e-3)] * 3
        models = build_demo(world, Path(folder, "world"), seed=3, stages=stages, width=16, layers=1)
        sys.argv = ["palinode", "unlearn", "--scales", "1.25,0.5", "--epochs", "1", "--quiet"]
        sys.argv += ["--target", str(models.target.folder), "--base", str(models.base.folder)]
        sys.argv += ["--forget", str(models.forget), "--retain", str(models.retain)]
        sys.argv += ["--output", str(Path(folder, "out")), "--max-length", "64", "--device", "cpu"]
        threading.setprofile(watch)
        sys.setprofile(watch)
        with suppress(SystemExit), redirect_stdout(io.StringIO()):
            palinode()
        sys.setprofile(None)
        threading.setprofile(None)
        assert Path(folder, "out", "record.json").is_file(), "the run failed"
    return sorted(str(Path(file).relative_to(ROOT)) for file in seen if file.startswith(f"{ROOT}/"))


if __name__ == "__main__":
    main()

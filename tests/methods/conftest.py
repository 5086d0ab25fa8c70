"""What the tests of the methods share: refusals, settings that the tiny world needs, and runs made once."""

from __future__ import annotations

import pytest
from contract_cases import OWN_SETTINGS

from palinode import read_examples
from palinode.methods import METHODS
from palinode.methods.method import Given


@pytest.fixture(scope="session")
def refusals(tmp_path_factory):
    path = tmp_path_factory.mktemp("refusals") / "refusals.jsonl"
    path.write_text('the of\n"home is"\n\nthe of\n')
    return path


@pytest.fixture(scope="session")
def sections(tiny, refusals):
    """A function that gives the sections of a recipe with everything that a method needs, and no more."""

    def build(name: str) -> dict:
        needs = METHODS[name].needs
        return {
            "method": name,
            "method_settings": OWN_SETTINGS.get(name, {}),
            "models": {
                "base": str(tiny.base.folder) if "base" in needs else None,
                "given": str(tiny.retrained.folder) if "given" in needs else None,
            },
            "data": {
                "retain": str(tiny.retain) if "retain" in needs else None,
                "refusals": str(refusals) if "refusals" in needs else None,
            },
        }

    return build


@pytest.fixture(scope="session")
def made(recipe_of, sections, tmp_path_factory):
    """A function that runs a method on the tiny world, once."""
    from palinode.pipeline.run import unlearn

    runs = {}

    def run(name: str):
        if name not in runs:
            output = tmp_path_factory.mktemp(name) / "out"
            runs[name] = unlearn(recipe_of(output, **sections(name)))
        return runs[name]

    return run


@pytest.fixture(scope="session")
def job(tiny):
    """A function that gives a method's start, objective and rows, of the first eight forget rows."""
    forget, retain = read_examples(tiny.forget)[:8], read_examples(tiny.retain)
    others = [(place, forget[place - 1].answer) for place in range(8)]

    def build(name: str, **settings):
        method = METHODS[name]
        checked = method.check_settings({**OWN_SETTINGS.get(name, {}), **settings})
        given = Given(forget, retain, retain, refusals=["the of", "home is"])
        run = method.runs(checked, given)[-1]
        material = run.asked.material(others) if run.asked else run.material
        return tiny.target if run.start == "target" else tiny.base, run.objective, material

    return build

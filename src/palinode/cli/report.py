"""`palinode report`: the report of a run, an audit, a comparison or a demo, made anew."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from palinode.cli.console import out, print_json, warn
from palinode.cli.options import Json


def report(
    place: Annotated[
        Path,
        typer.Argument(help="Folder that `unlearn`, `run`, `audit`, `compare` or `demo` wrote."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="File to write: .html, .md or .json. [default: all three, in the workspace of a run, and "
            "without texts in its folder; else in PLACE]"
        ),
    ] = None,
    without_texts: Annotated[
        bool, typer.Option("--without-texts", help="Numbers only: no prompt and no answer.")
    ] = False,
    audit: Annotated[
        Path | None, typer.Option(help="Folder of an audit of the unlearned model, to be told as well.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the report of a run as one self-contained page.

    HTML, and the same as Markdown and JSON.
    """
    from dataclasses import replace

    from palinode.pipeline.reporting import default_page, gather, suffixes_for, write_reports
    from palinode.report.reports import report_content

    facts = gather(place, audit=audit)
    if facts.answers_gone and not without_texts:
        warn("the outcomes are not there any more, so the report has no answers")
    facts = replace(facts, texts=facts.texts and not without_texts)
    if as_json and output is None:
        print_json(report_content(facts))
        return
    page = output or default_page(facts, place)
    suffixes = suffixes_for(facts, output)
    content = write_reports(facts, page, suffixes)
    if as_json:
        print_json(content)
        return
    out().print(content["outcome"], soft_wrap=True)
    for suffix in suffixes:
        out().print(str(page.with_suffix(suffix)), soft_wrap=True)

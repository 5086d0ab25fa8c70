"""Options that several verbs have, with one wording each."""

from __future__ import annotations

from typing import Annotated

import typer

from palinode.cli.console import hush_libraries

Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Show no progress.", callback=hush_libraries, is_eager=True)
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Seed = Annotated[
    int, typer.Option(help="Seeds sampling, batch order, rounding and intervals.", min=0, max=2**32 - 1)
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
Columns = Annotated[str | None, typer.Option(help="Column names of the rows, as in question=q,answer=reply.")]
Prompts = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="How questions are put, as in prompts.chat=false, prompts.system_prompt=… or prompts.date=…; "
        "repeatable.",
    ),
]
Epochs = Annotated[int | None, typer.Option(help="Passes over the rows. [default: 10]", min=1)]
LearningRate = Annotated[float | None, typer.Option(help="Peak learning rate. [default: 1e-5]")]
BatchSize = Annotated[int | None, typer.Option(help="Rows in a micro-batch. [default: 4]", min=1)]
Accumulation = Annotated[int | None, typer.Option(help="Micro-batches in a step. [default: 1]", min=1)]
WarmupEpochs = Annotated[float | None, typer.Option(help="Epochs of linear warm-up. [default: 1]")]
WeightDecay = Annotated[float | None, typer.Option(help="Weight decay of AdamW. [default: 0.01]")]
Lora = Annotated[
    int | None,
    typer.Option(help="Train low-rank adapters of this rank instead of all weights (needs peft).", min=1),
]
MaxLength = Annotated[int | None, typer.Option(help="Tokens of a row, prompt included. [default: 512]")]
Precision = Annotated[
    str | None, typer.Option(help="Forward pass in auto, float32 or bfloat16. [default: auto]")
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read files of torch.save too; none of their code is run.")
]
Tracker = Annotated[
    str | None,
    typer.Option(help="Curves go there too, as in tensorboard,wandb; also mlflow, trackio and more."),
]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. [default: the target's]")]
Scales = Annotated[
    str | None,
    typer.Option(help="auto (searched), grid (a small grid), or α,β as in 1.0,0.5. [default: auto]"),
]
FixedScales = Annotated[
    str, typer.Option(help="α,β as in 1.0,0.5, or α alone; with β = 0 the retain model is never opened.")
]


def parse_scales(text: str, *, words: str = "") -> tuple[float, float]:
    """Return α and β from `1.0,0.5`, or α and 0 from `1.0`; raises RecipeError for anything else.

    `words` names what the caller takes besides.

    >>> parse_scales("1.0,0.5"), parse_scales("2")
    ((1.0, 0.5), (2.0, 0.0))
    """
    from palinode.errors import RecipeError

    try:
        alpha, beta = map(float, text.split(",") if "," in text else (text, "0"))
    except ValueError:
        raise RecipeError(f"--scales is {text!r}; write {words}α and β as in 1.0,0.5") from None
    return alpha, beta

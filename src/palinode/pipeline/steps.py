"""Single steps of the main job as functions of their own, from locations instead of opened things."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from palinode.data import PromptStyle, at_most, fingerprint_examples, read_examples
from palinode.data.tokenize import prompt_notes
from palinode.evaluation.evaluate import EvaluationSettings, check_new_file, evaluate
from palinode.models.loading import load_tokenizer, pick_device
from palinode.pipeline.recipe import checked_settings
from palinode.pipeline.tracking import check_trackers, tracked
from palinode.pipeline.workspace import fingerprint
from palinode.progress import Listener, NullListener
from palinode.records import Score, beside, fitting, private, write_outcomes
from palinode.training.finetune import Finetuned, finetune
from palinode.training.settings import TrainingSettings
from palinode.weights import Checkpoint


@private()
def finetune_file(
    base: str,
    data: str,
    output: Path,
    settings: Mapping[str, Any],
    *,
    columns: Mapping[str, str] | None = None,
    allow_pickle: bool = False,
    style: PromptStyle | None = None,
    device: str = "auto",
    seed: int = 0,
    tracker: str | None = None,
    listener: Listener | None = None,
) -> Finetuned:
    """Fine-tune a model folder on a file of rows; an interrupted call goes on when it is repeated.

    Trackers put their files into `<output>.tracking`, beside the output.
    """
    checked = checked_settings(TrainingSettings, settings)
    check_trackers(tracker)
    start = Checkpoint.open(base, allow_pickle=allow_pickle)
    examples = read_examples(data, columns=columns or None)
    for note in prompt_notes(examples, load_tokenizer(start), style or PromptStyle()):
        (listener or NullListener()).say(note)
    key = fingerprint(
        start=start.fingerprint(),
        rows=fingerprint_examples(examples),
        training=checked.key(),
        seed=seed,
        prompts=asdict(style or PromptStyle()),
    )
    place = output.resolve()
    state = beside(place, f".state-{key[:12]}")  # other inputs never find it
    with tracked(
        listener or NullListener(),
        tracker,
        folder=place.with_name(fitting(place.name, ".tracking")),
        run=place.name,
        settings={"seed": seed, "training": checked.model_dump(mode="json", exclude_none=True)},
        cpu=pick_device(device).type == "cpu",
    ) as listening:
        return finetune(
            start,
            examples,
            output,
            checked,
            style=style,
            seed=seed,
            device=device,
            state=state,
            listener=listening,
        )


def evaluate_file(
    model: str,
    data: str,
    settings: Mapping[str, Any],
    *,
    output: Path | None = None,
    columns: Mapping[str, str] | None = None,
    listener: Listener | None = None,
) -> dict[str, Score]:
    """Score a model folder on a file of rows, and write its outcomes to `output` if that is given."""
    checked = checked_settings(EvaluationSettings, settings)
    if output is not None:
        check_new_file(output, "the outcomes")
    checkpoint = Checkpoint.open(model, allow_pickle=checked.allow_pickle)
    rows = at_most(read_examples(data, columns=columns or None), checked.max_rows, seed=checked.seed + 1)
    found = evaluate(checkpoint, rows, checked, listener=listener)
    if output is not None:
        with private():
            write_outcomes(output, found.outcomes)
    return dict(found.scores)

"""General ability: tasks of lm-eval (MMLU, GSM8K, …) on the model in memory.

lm-eval is an extra, imported when it is used: `pip install 'palinode[lm-eval]'`. Its own figures are kept;
each becomes a Score with the normal interval, value ± 1.96 standard errors, lm-eval's standard errors.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from palinode.errors import InputError, told_as
from palinode.metrics.aggregate import ends_of_equals
from palinode.records import Score

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NORMAL_95 = 1.959963984540054
"""Standard errors on either side of a 95 % interval."""


def general_ability(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    include: Path | None = None,
) -> dict[str, dict[str, Score]]:
    """Return the scores of each lm-eval task or group: task, then metric ("acc", "exact_match,strict-match").

    `limit` is the number of rows of each task, all by default; `include` a folder with tasks of one's own in
    lm-eval's YAML, or one such file, whose folder is read. The data of a task come from the hub unless they
    are in its cache, or local. The model is left as it was, the random generators too. InputError when
    lm-eval is not installed, a task is unknown, or its data cannot be had.
    """
    folder = _task_folder(include)
    advice = "install it: pip install 'palinode[lm-eval]'"
    with told_as(InputError, "general ability needs lm-eval", advice, ImportError):
        from lm_eval import simple_evaluate  # type: ignore[import-not-found,unused-ignore]
        from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found,unused-ignore]
        from lm_eval.tasks import TaskManager  # type: ignore[import-not-found,unused-ignore]
    manager = TaskManager(include_path=None if folder is None else str(folder))
    if not tasks:
        raise InputError("no lm-eval task is named; name some, such as mmlu,gsm8k")
    if unknown := [task for task in tasks if task not in manager.task_index]:
        raise InputError(f"lm-eval has no task {', '.join(unknown)}; `lm-eval ls tasks` lists those it has")
    seeds = dict.fromkeys(
        ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed
    )
    with _as_it_was(model):
        wrapped = HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=batch_size,
            trust_remote_code=False,
        )
        with told_as(InputError, f"lm-eval could not run {', '.join(tasks)}", "", OSError, ValueError):
            results = simple_evaluate(
                model=wrapped,
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                bootstrap_iters=1000,
                log_samples=False,
                **seeds,
            )
    counts = {task: entry["effective"] for task, entry in results["n-samples"].items()}
    members = results.get("group_subtasks") or {}
    found = results["results"] | (results.get("groups") or {})
    return {task: task_scores(values, _rows(task, counts, members)) for task, values in found.items()}


def _task_folder(include: Path | None) -> Path | None:
    """Return the folder of tasks that a folder or a YAML file names. Raises InputError when there is none."""
    if include is None or include.is_dir():
        return include
    if not include.is_file() or include.suffix not in (".yaml", ".yml"):
        raise InputError(f"{include} is no folder with lm-eval tasks and no .yaml file of one; name either")
    return include.parent


def task_scores(values: Mapping[str, Any], rows: int) -> dict[str, Score]:
    """Return the scores in lm-eval's results of one task, whose keys are "metric,filter".

    The filter "none" is left out of the name. A metric without a standard error has no interval; 0 or 1 with
    a standard error of 0, none or all of the rows, has the exact one of a share.
    """
    scores = {}
    for key, value in values.items():
        metric, _, chosen = key.partition(",")
        if metric.endswith("_stderr") or not _is_number(value) or not chosen:
            continue
        name = metric if chosen == "none" else key
        error: Any = values.get(f"{metric}_stderr,{chosen}")
        value = float(value)
        if not math.isfinite(value):
            scores[name] = Score(None, 0, None, None, "lm-eval's figure is not a finite number")
        elif not _is_number(error) or not math.isfinite(error):
            scores[name] = Score(value, rows, None, None, "lm-eval gives no standard error")
        elif error == 0 and value in (0, 1) and rows > 0:
            scores[name] = Score(value, rows, *ends_of_equals(value, rows), None)
        else:
            scores[name] = Score(value, rows, value - NORMAL_95 * error, value + NORMAL_95 * error)
    return scores


def _rows(task: str, counts: Mapping[str, int], members: Mapping[str, Sequence[str]]) -> int:
    """Return the rows of a task, or of all tasks of a group."""
    if task in counts:
        return counts[task]
    return sum(_rows(member, counts, members) for member in members.get(task, ()))


@contextmanager
def _as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Put the training mode and the random generators back, which lm-eval sets for all of the process."""
    import torch

    training, plain, numpy_state = model.training, random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        model.train(training)
        random.setstate(plain)
        np.random.set_state(numpy_state)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

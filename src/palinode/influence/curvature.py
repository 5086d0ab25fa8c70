"""Scores of rows by curvature: EK-FAC as the library bergson computes it (the extra `influence`).

    ⟨(H + c λ̄)⁻¹ g_q, g_i⟩        λ̄ the mean eigenvalue of H for a layer, c = 0.1

g are gradients of −log p, summed over the tokens of an answer, by the weights of the linear layers below the
output head. H is made of these layers' inputs and the gradients of their outputs for answers drawn from the
model, layer by layer, with corrected eigenvalues. Nothing is projected, so the scores have no intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from palinode.data.tokenize import TokenRow
from palinode.errors import RecipeError, told_as
from palinode.influence.ranking import Floats
from palinode.pipeline.workspace import Step
from palinode.progress import hushed

Groups = Sequence[Sequence[TokenRow]]


@hushed()
def ekfac_scores(model: PreTrainedModel, rows: Groups, asked: Groups, step: Step, *, seed: int) -> Floats:
    """Return how each row and each question go together, [rows, questions]; the step keeps H.

    Raises RecipeError where bergson is not installed.
    """
    what = "the engine bergson needs that library, which cannot be loaded"
    with told_as(RecipeError, what, "pip install 'palinode[influence]', or leave --engine out", ImportError):
        from bergson import GradientProcessor, IndexConfig, InMemoryCollector, Scorer
        from bergson.collector.collector import CollectorComputer
        from bergson.hessians.preconditioner import FactoredPreconditioner
        from bergson.score.score_writer import InMemorySequenceScoreWriter
    data, owners = _data_set(rows)
    config = IndexConfig(run_path=str(step.folder / "curvature"))
    if step.facts is None:
        step.clear()
        _fit(model, data, config, seed=seed)
        step.finish({"rows": len(rows)})

    def collected(data: Any, **scoring: Any) -> Any:
        processor = GradientProcessor()
        collector = InMemoryCollector(
            model=model.base_model, data=data, cfg=config, processor=processor, **scoring
        )
        batches = [[place] for place in range(len(data))]  # one by one, so that none depends on another
        computer = CollectorComputer(model, data, collector=collector, batches=batches, cfg=config)
        computer.run_with_collector_hooks("gradients")
        return collector

    wanted, pieces = _data_set(asked)
    found = collected(wanted).gradients
    solved = FactoredPreconditioner.from_path(config.partial_run_path, ev_correction=True).apply(found)
    writer = InMemorySequenceScoreWriter(len(data), len(wanted))
    scorer = Scorer(solved, list(solved), writer, torch.device("cpu"), torch.float32)
    by_piece = collected(data, scorer=scorer).scores.numpy()
    scores = np.zeros((len(rows), len(asked)))
    np.add.at(scores, np.ix_(owners, pieces), by_piece)
    return scores


def _data_set(groups: Groups) -> tuple[Any, list[int]]:
    """Return token rows as bergson reads them, and the example that each is of."""
    from datasets import Dataset

    owned = [(owner, row) for owner, group in enumerate(groups) for row in group]
    columns = {
        "input_ids": [list(row.ids) for _, row in owned],
        "labels": [[-100] * row.start + list(row.ids[row.start :]) for _, row in owned],
        "length": [len(row.ids) for _, row in owned],
    }
    return Dataset.from_dict(columns), [owner for owner, _ in owned]


def _fit(model: PreTrainedModel, data: Any, config: Any, *, seed: int) -> None:
    """Write the factors of H; the answers that it is made of are drawn with the seed."""
    from bergson.config.config import HessianConfig
    from bergson.hessians.hessian_approximations import fit_factored_hessians

    config.partial_run_path.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fit_factored_hessians(
            model,
            data,
            config,
            HessianConfig(method="kfac", ev_correction=True),
            target_modules=None,
            attention_cfgs={},
            batches=[[place] for place in range(len(data))],
            path=str(config.partial_run_path),
            do_eigendecomposition=True,
        )

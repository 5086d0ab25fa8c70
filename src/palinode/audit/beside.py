"""What lies beside the forget rows, and what two models side by side give away.

*Neighbours*: the answer probability of the retain rows that are nearest to the forget rows, by words (cosine
of TF-IDF) and by what the middle block makes of them (cosine of mean states, the mean of all taken off), and
of the rest. A mean over all retain rows hides what happens beside the ones that were taken out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from palinode.audit.attack import AttackResult, AuditBudget, Subject
from palinode.audit.material import AuditRows
from palinode.data.batches import pad_right
from palinode.data.examples import Example
from palinode.data.tokenize import tokenize
from palinode.errors import CheckpointError, MismatchError
from palinode.metrics import answer_probabilities
from palinode.models.likelihoods import padded_batches
from palinode.models.loading import load_model, pad_token
from palinode.models.reading import decoder_blocks, labelled_states
from palinode.weights.checkpoint import Checkpoint

Floats = npt.NDArray[np.float64]

PASS_TOKENS = 2048
"""Tokens that go through a model together."""


def ask_neighbours(subject: Subject, rows: AuditRows, budget: AuditBudget) -> AttackResult:
    """Ask the retain rows, those nearest to the forget rows apart from the rest.

    States are the target's, or without one the reference model's: the same for every model.
    """
    near = {row.key for row in rows.near}
    asked = [*rows.near, *(row for row in rows.retain if row.key not in near)]
    values = answer_probabilities(subject.ask(asked, budget.likelihoods, label="retain rows"))
    subject.release()
    source = subject.beside.get("target") or subject.beside.get("reference") or subject.checkpoint
    states = mean_states(subject, source, [*asked, *rows.forget], budget, 0.5)
    alike = nearest_states(states[: len(asked)], states[len(asked) :], len(near))
    chosen = {"words": set(range(len(near))), "states": alike}
    chosen["rest"] = set(range(len(asked))) - chosen["words"] - alike
    tests = {
        test: {"retain": tuple(value if at in own else None for at, value in enumerate(values))}
        for test, own in chosen.items()
    }
    return AttackResult(tests, {"rows": {test: len(own) for test, own in chosen.items()}})


def nearest_states(states: Floats, others: Floats, count: int) -> set[int]:
    """Return the places of the `count` states that come nearest to any of the others.

    >>> nearest_states(np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.1]]), np.array([[0.2, 1.0]]), 1)
    {1}
    """
    every = np.concatenate([states, others])
    every = every - every.mean(axis=0)
    every /= np.linalg.norm(every, axis=1, keepdims=True) + 1e-12
    near = (every[: len(states)] @ every[len(states) :].T).max(axis=1)
    return set(np.argsort(-near, kind="stable")[:count].tolist())


@torch.no_grad()
def mean_states(
    subject: Subject, source: Checkpoint, examples: Sequence[Example], budget: AuditBudget, depth: float
) -> Floats:
    """Return what the block at `depth` (0 to 1) of a model puts out, the mean over each answer: [n, D].

    Raises MismatchError where the model's blocks cannot be told.
    """
    model = load_model(source, device=subject.device)
    rows = tokenize(examples, subject.tokenizer, max_length=budget.max_length, style=subject.style)
    try:
        layer = round(depth * (len(decoder_blocks(model)) - 1))
    except CheckpointError as error:
        raise MismatchError(str(error)) from None
    pad = pad_token(subject.tokenizer)
    sums = np.zeros((len(examples), int(model.config.get_text_config().hidden_size)))
    counts = np.zeros(len(examples))
    batches = padded_batches(model, rows, pad_id=pad, max_tokens=PASS_TOKENS, max_rows=64)
    with subject.listener.task(f"{subject.name}: states", len(rows), "rows") as advance:
        for members in batches:
            batch = pad_right([rows[place] for place in members], pad_id=pad)
            states, owners = labelled_states(model, batch, layer)
            own = np.array([rows[place].example for place in members])[owners.cpu().numpy()]
            np.add.at(sums, own, states.double().cpu().numpy())
            np.add.at(counts, own, 1)
            advance(len(members))
    return sums / np.maximum(counts, 1)[:, None]

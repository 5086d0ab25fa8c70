"""What lies beside the forget rows, and what two models side by side give away.

*Neighbours*: the answer probability of the retain rows that are nearest to the forget rows, by words (cosine
of TF-IDF) and by what the middle block makes of them (cosine of mean states, the mean of all taken off), and
of the rest. A mean over all retain rows hides what happens beside the ones that were taken out.

*Pair* (Wu et al. 2025, arXiv 2505.24379). The target, the model before, guides the one after:

    log q(x) = log p_after(x) + GUIDANCE · (log p_before(x) − log p_after(x))
               where log p_before(x) > max log p_before − PLAUSIBLE; no other token may be said

What the two have in common is taken off, so what was taken out stands out. They draw text; read here is how
much of each answer q's first choices give, the right answer so far before them, so nothing need be drawn.

*Traces*. Rows: whoever has the target picks out the rows whose loss rose, L_model − L_target; the AUC is one
half where forget rows rose no more than retain rows, and 0 where each rose more than any of these. Model:
ridge regression of ±1 on the last block's mean states of retain rows in the target and in the model, tried
on rows that it was not fitted to; the AUC is one half where it cannot tell which of the two it has before it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from palinode.audit.attack import AttackResult, AuditBudget, Subject
from palinode.audit.material import AuditRows
from palinode.data.batches import Batch, pad_right
from palinode.data.examples import Example
from palinode.data.tokenize import TokenRow, tokenize
from palinode.errors import CheckpointError, MismatchError, told_as
from palinode.metrics.likelihood import answer_probabilities
from palinode.metrics.membership import exact_memorizations, extraction_strengths, loss_values
from palinode.models.likelihoods import padded_batches
from palinode.models.loading import load_model, pad_token
from palinode.models.reading import answer_logits, decoder_blocks, labelled_states
from palinode.records import Outcome
from palinode.weights.checkpoint import Checkpoint

Floats = npt.NDArray[np.float64]

GUIDANCE, PLAUSIBLE = 2.0, 5.0
"""Weight of the guidance, and nats below the target's first choice that a token may lie: the authors'."""
FOLDS = 5
"""Parts of the rows, each of which is told apart by a classifier fitted to the others."""
PASS_TOKENS = 1024
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
    with told_as(MismatchError, "there is no inside to look at", "", CheckpointError):
        layer = round(depth * (len(decoder_blocks(model)) - 1))
    sums = np.zeros((len(examples), int(model.config.get_text_config().hidden_size)))
    counts = np.zeros(len(examples))
    for members, batch in _passes(subject, model, rows, "states"):
        states, owners = labelled_states(model, batch, layer)
        own = np.array([rows[place].example for place in members])[owners.cpu().numpy()]
        np.add.at(sums, own, states.double().cpu().numpy())
        np.add.at(counts, own, 1)
    return sums / np.maximum(counts, 1)[:, None]


@torch.no_grad()
def guide(subject: Subject, rows: AuditRows, budget: AuditBudget) -> AttackResult:
    """Let the target guide the subject; one of them is in memory at a time."""
    tokens = tokenize(rows.forget, subject.tokenizer, max_length=budget.max_length, style=subject.style)
    subject.release()
    before = {
        place: plausible(logprobs)
        for place, logprobs in _read(subject, subject.beside["target"], tokens, "the target's tokens")
    }
    hits = defaultdict[int, dict[int, list[bool]]](dict)
    for place, logprobs in _read(subject, subject.checkpoint, tokens, "guided by the target"):
        row = tokens[place]
        right = torch.tensor(row.ids[row.start :])
        hits[row.example][place] = (guided(logprobs, *before[place]) == right).tolist()
    outcomes = [
        Outcome(one.row, "", "", None, (), tuple(hit for _, part in sorted(hits[at].items()) for hit in part))
        for at, one in enumerate(rows.forget)
    ]
    return AttackResult(
        {
            "extraction": {"forget": tuple(extraction_strengths(outcomes, strict=True))},
            "memorised": {"forget": tuple(exact_memorizations(outcomes))},
        },
        {"guidance": GUIDANCE, "plausible": PLAUSIBLE},
    )


def plausible(logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Return which tokens may be said at n places, int64 [2, k] of place and token, and log p of each."""
    chosen = (logprobs > logprobs.amax(dim=-1, keepdim=True) - PLAUSIBLE).nonzero().t()
    return chosen, logprobs[chosen[0], chosen[1]]


def guided(after: Tensor, chosen: Tensor, before: Tensor) -> Tensor:
    """Return the first choice at each of n places, from log p [n, V] after and what was plausible before.

    >>> before = torch.tensor([[0.6, 0.3, 0.099, 0.001]]).log()
    >>> after = torch.tensor([[0.8, 0.1, 0.0999, 0.0001]]).log()  # q ~ .45, .9, .098, and .01 left out
    >>> guided(after, *plausible(before)).tolist()
    [1]
    """
    known = chosen[1] < after.shape[1]  # embeddings may have been made larger in between
    at, token = chosen[:, known]
    left = torch.full_like(after, -torch.inf)
    left[at, token] = after[at, token] + GUIDANCE * (before[known] - after[at, token])
    return left.argmax(dim=-1)


def _read(
    subject: Subject, source: Checkpoint, rows: Sequence[TokenRow], label: str
) -> Iterator[tuple[int, Tensor]]:
    """Yield each row's place, and log p of every token where its answer is predicted, [n, V], on the host."""
    model = load_model(source, device=subject.device)
    for members, batch in _passes(subject, model, rows, label):
        logits, _, owners = answer_logits(model, batch)
        logprobs = logits.float().log_softmax(dim=-1)
        for number, place in enumerate(members):
            yield place, logprobs[owners == number].cpu()


def _passes(
    subject: Subject, model: PreTrainedModel, rows: Sequence[TokenRow], label: str
) -> Iterator[tuple[list[int], Batch]]:
    """Yield places of rows that go through a model together, and the batch of these."""
    pad = pad_token(subject.tokenizer)
    with subject.listener.task(f"{subject.name}: {label}", len(rows), "rows") as advance:
        for members in padded_batches(model, rows, pad_id=pad, max_tokens=PASS_TOKENS, max_rows=64):
            yield members, pad_right([rows[place] for place in members], pad_id=pad)
            advance(len(members))


def look_for_traces(subject: Subject, rows: AuditRows, budget: AuditBudget) -> AttackResult:
    """Tell forget rows from retain rows, and the model from the target, as somebody who has both can."""
    target, asked, few = subject.beside["target"], [*rows.forget, *rows.retain], len(rows.forget)
    own = loss_values(subject.ask(asked, budget.likelihoods, label="traces"))
    subject.release()
    live = load_model(target, device=subject.device)
    theirs = loss_values(subject.ask(asked, budget.likelihoods, model=live, label="traces, target"))
    del live
    rose = [
        None if now is None or then is None else now - then for now, then in zip(own, theirs, strict=True)
    ]
    both = [mean_states(subject, source, rows.retain, budget, 1.0) for source in (target, subject.checkpoint)]
    if both[0].shape != both[1].shape:
        raise MismatchError(f"the models' states are {both[0].shape[1]} and {both[1].shape[1]} wide")
    told = told_apart(np.stack(both), seed=subject.seed)
    apart = {name: tuple(map(float, values)) for name, values in zip(("target", "model"), told, strict=True)}
    lost = {"forget": tuple(rose[:few]), "retain": tuple(rose[few:])}
    return AttackResult({"rows": lost, "model": apart}, {"folds": FOLDS})


def told_apart(states: Floats, *, seed: int) -> Floats:
    """Return how much each of n rows looks like the second model's, of two models' states [2, n, D]: [2, n].

    Ridge regression of −1 and 1 on standardised states with a penalty of D, fitted for each part of the rows
    to the other parts, in both models.
    """
    fold = np.random.default_rng(seed).permutation(states.shape[1]) % FOLDS
    found = np.zeros(states.shape[:2])
    for part in range(FOLDS):
        fitted = states[:, fold != part].reshape(-1, states.shape[2])
        mean, spread = fitted.mean(axis=0), fitted.std(axis=0) + 1e-9
        x = (fitted - mean) / spread
        sides = np.repeat([-1.0, 1.0], len(x) // 2)
        fit = x.T @ np.linalg.solve(x @ x.T + x.shape[1] * np.eye(len(x)), sides)
        found[:, fold == part] = ((states[:, fold == part] - mean) / spread) @ fit
    return found

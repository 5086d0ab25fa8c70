"""Looking inside: is an answer gone from a model's states, or only from what it says?

*Depth* (Lee et al. 2026, arXiv 2605.24614, whose UDS is one minus our figure). What a model S puts out
after decoder block l, at the places that predict the tokens T of an answer, is put into the target, which
goes on from there:

    Δ_l(S) = mean over T of log p_target − log p_(target, h_l of S)

K are the blocks at which the reference model lacks the answer, Δ_l(reference) > LACKING. What is left is

    1 − Σ_K clip(Δ_l(S), 0, Δ_l(reference)) / Σ_K Δ_l(reference)

so 0 for the reference model and 1 for the target. *Lens* is the same with h_l put through the target's last
norm and head at once (logit lens): what can be read there, not what could be made of it. T are the tokens
that the target knows better than the reference model by more than BETTER; the paper's are marked by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from palinode.audit.attack import AttackResult, AuditBudget, Subject
from palinode.audit.material import AuditRows
from palinode.data.batches import Batch, pad_right
from palinode.data.tokenize import TokenRow, tokenize
from palinode.errors import CheckpointError, MismatchError, told_as
from palinode.models.likelihoods import padded_batches, tolerance
from palinode.models.loading import load_model, pad_token
from palinode.models.reading import answer_nll, answer_places, decoder_blocks
from palinode.progress import Advance

Floats = npt.NDArray[np.float64]

LACKING = 0.05
"""Nats a token by which the reference model must lack an answer at a block (the paper's threshold)."""
BETTER = 0.5
"""Nats by which the target must know a token better than the reference model."""
PASS_TOKENS = 2048
"""Tokens that go through a model together."""


@torch.no_grad()
def look_inside(subject: Subject, rows: AuditRows, budget: AuditBudget) -> AttackResult:
    """Return what is left of each forget row's answer in the subject's states.

    One model is in memory at a time, with the states of two and the target's: float32, blocks x tokens of
    answers x width. Raises MismatchError where the models are not of one shape.
    """
    tokens = tokenize(rows.forget, subject.tokenizer, max_length=budget.max_length, style=subject.style)
    sources = {"reference": subject.beside["reference"], subject.name: subject.checkpoint}
    sources.pop("target", None)
    subject.release()
    passes = len(sources) * (1 + budget.inside_blocks) + 1
    with subject.listener.task(f"{subject.name}, looking inside", passes, "passes") as advance:
        answers = _Answers(tokens, pad_token(subject.tokenizer), budget.inside_blocks, advance)
        found = {
            name: answers.read(load_model(source, device=subject.device)) for name, source in sources.items()
        }
        target = load_model(subject.beside["target"], device=subject.device)
        known = answers.read(target)
        chosen = known.logprobs - found["reference"].logprobs > BETTER
        count = len(rows.forget)
        gaps = {name: answers.gaps(target, known, states, chosen, count) for name, states in found.items()}
    lacking = gaps["reference"]
    own = gaps.get(subject.name, {name: np.zeros_like(values) for name, values in lacking.items()})
    tests = {
        name: {"forget": tuple(left(*pair) for pair in zip(lacking[name], own[name], strict=True))}
        for name in lacking
    }
    curves = {"reference": _curve(lacking["depth"]), "subject": _curve(own["depth"])}
    return AttackResult(tests, {"blocks": answers.blocks, "nats_lacking": curves})


def left(lacking: Sequence[float], gaps: Sequence[float]) -> float | None:
    """Return the share of an answer that is left, from Δ_l of the reference model and of another, by block.

    None where the reference model lacks it at no block.

    >>> left([0.01, 1.0, 2.0], [3.0, -0.5, 1.5])
    0.5
    """
    blocks = [(theirs, ours) for theirs, ours in zip(lacking, gaps, strict=True) if theirs > LACKING]
    if not blocks:
        return None
    gone = sum(min(max(ours, 0.0), theirs) for theirs, ours in blocks)
    return float(1 - gone / sum(theirs for theirs, _ in blocks))


def _curve(gaps: Floats) -> list[float]:
    """Return the mean by block over the examples that have a token; empty where none has."""
    known = gaps[~np.isnan(gaps).any(axis=1)]
    return [float(value) for value in known.mean(axis=0)] if len(known) else []


@dataclass(frozen=True, slots=True)
class _States:
    """What a model makes of the N tokens of all answers."""

    logprobs: Tensor
    """[N]."""
    hidden: Tensor
    """What the blocks put out where they are predicted, [blocks, N, D]."""


class _Answers:
    """The rows whose answers are looked for, read by models of one shape."""

    def __init__(self, rows: Sequence[TokenRow], pad_id: int, most: int, advance: Advance) -> None:
        self.rows, self.pad_id, self.most, self.advance = rows, pad_id, most, advance
        self.spans = np.cumsum([0, *(row.scored for row in rows)])
        self.labels = torch.tensor([token for row in rows for token in row.ids[row.start :]])
        self.owners = np.repeat([row.example for row in rows], np.diff(self.spans))
        self.blocks: list[int] = []
        self._shape: tuple[int, int] | None = None

    def read(self, model: PreTrainedModel) -> _States:
        """Return what a model makes of the answers, every row once."""
        chain = self._chain(model)
        width = model.config.get_text_config().hidden_size
        found = _States(torch.empty(len(self.labels)), torch.empty(len(self.blocks), len(self.labels), width))
        for batch, places, members in self._batches(model):

            def keep(number: int, output: Tensor, places: Tensor = places, members: Any = members) -> Tensor:
                found.hidden[number, members] = output[places].float().cpu()
                return output

            with _hearing([chain[at] for at in self.blocks], keep):
                found.logprobs[members] = -answer_nll(model, batch).cpu()
        self.advance(1)
        return found

    def gaps(
        self, target: PreTrainedModel, known: _States, other: _States, chosen: Tensor, count: int
    ) -> dict[str, Floats]:
        """Return Δ of each example at each block, by test: [count, blocks], nan without a chosen token."""
        read = _lens(target, self.rows[0].ids)
        depth = torch.stack(
            [
                known.logprobs - self._put_in(target, number, other, chosen)
                for number in range(len(self.blocks))
            ]
        )
        lens = torch.full_like(depth, torch.nan)
        if read is not None:
            for number in range(len(self.blocks)):
                lens[number] = self._read_off(read, target, known, number)
                lens[number] -= self._read_off(read, target, other, number)
        return {
            "depth": self._by_example(depth, chosen, count),
            "lens": self._by_example(lens, chosen, count),
        }

    def _put_in(self, target: PreTrainedModel, number: int, other: _States, chosen: Tensor) -> Tensor:
        """Return the target's log-probabilities [N] with the other's states put in at chosen tokens."""
        found = torch.empty(len(self.labels))
        for batch, places, members in self._batches(target):
            own = chosen[members]
            where = places.clone()
            where[places] = own.to(where.device)
            given = other.hidden[number, members][own]

            def put(_: int, output: Tensor, where: Tensor = where, given: Tensor = given) -> Tensor:
                changed = output.clone()
                changed[where] = given.to(output)
                return changed

            with _hearing([self._chain(target)[self.blocks[number]]], put):
                found[members] = -answer_nll(target, batch).cpu()
        self.advance(1)
        return found

    def _read_off(
        self, read: Callable[[Tensor], Tensor], target: PreTrainedModel, states: _States, number: int
    ) -> Tensor:
        """Return the log-probabilities [N] that norm and head make of the states after a block."""
        parts = []
        for part, labels in zip(states.hidden[number].split(256), self.labels.split(256), strict=True):
            logits = read(part.to(target.device, target.dtype)).float().cpu()
            parts.append(-torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
        return torch.cat(parts)

    def _by_example(self, gaps: Tensor, chosen: Tensor, count: int) -> Floats:
        owners, own = self.owners[chosen.numpy()], gaps[:, chosen].double().numpy()
        tokens = np.bincount(owners, minlength=count)
        sums = np.stack([np.bincount(owners, weights=row, minlength=count) for row in own], axis=1)
        with np.errstate(invalid="ignore"):
            return np.asarray(sums / tokens[:, None])

    def _chain(self, model: PreTrainedModel) -> torch.nn.ModuleList:
        """Return a model's decoder blocks; the first model's shape is every model's."""
        with told_as(MismatchError, "there is no inside to look at", "", CheckpointError):
            chain = decoder_blocks(model)
        shape = len(chain), int(model.config.get_text_config().hidden_size)
        self._shape = self._shape or shape
        if shape != self._shape:
            raise MismatchError(
                f"the models have {self._shape[0]} blocks of width {self._shape[1]} and {shape[0]} of "
                f"{shape[1]}; states can be put into a model of the same shape only"
            )
        if not self.blocks:
            steps = min(self.most, len(chain))
            self.blocks = [round((step + 1) * len(chain) / steps) - 1 for step in range(steps)]
        return chain

    def _batches(self, model: PreTrainedModel) -> Iterator[tuple[Batch, Tensor, npt.NDArray[np.int64]]]:
        """Yield batches, where answers' tokens are predicted, bool [B, T], and which of the N these are."""
        for members in padded_batches(
            model, self.rows, pad_id=self.pad_id, max_tokens=PASS_TOKENS, max_rows=64
        ):
            batch = pad_right([self.rows[place] for place in members], pad_id=self.pad_id)
            places = torch.from_numpy(answer_places(batch)).to(model.device)
            tokens = [np.arange(*self.spans[place : place + 2]) for place in members]
            yield batch, places, np.concatenate(tokens)


@contextmanager
def _hearing(modules: Sequence[torch.nn.Module], answer: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Let what each module puts out pass through `answer`, with the module's number."""
    with ExitStack() as stack:
        for number, module in enumerate(modules):

            def hook(_module: object, _inputs: object, output: Any, number: int = number) -> Any:
                if isinstance(output, tuple):
                    return (answer(number, output[0]), *output[1:])
                return answer(number, output)

            stack.callback(module.register_forward_hook(hook).remove)
        yield


def _lens(model: PreTrainedModel, ids: Sequence[int]) -> Callable[[Tensor], Tensor] | None:
    """Return what makes logits of the last block's states; None where it is more than norm and head."""
    chain = decoder_blocks(model)
    inside = set(chain.modules())
    last: list[Tensor] = []
    heard: list[torch.nn.Module] = []

    def keep(_: int, states: Tensor) -> Tensor:
        last.append(states)
        return states

    def hear(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if last and inputs and inputs[0] is last[0]:
            heard.append(module)

    with ExitStack() as stack, _hearing([chain[-1]], keep):
        for module in model.modules():
            if module not in inside:
                stack.callback(module.register_forward_pre_hook(hear).remove)
        given = torch.tensor([list(ids)], device=model.device)
        logits = model(input_ids=given, use_cache=False).logits
    norm, head = heard[:1], model.get_output_embeddings()
    if not norm or head is None:
        return None

    def read(states: Tensor) -> Tensor:
        found: Tensor = head(norm[0](states))
        return found

    return read if bool((read(last[0]) - logits).abs().max() <= tolerance(model)) else None

"""Log-probabilities of given answers, rows that share their beginning, and whether rows may be read together.

Padding can enter a recurrent state, rotary frequencies can follow the longest row of a batch, and experts
can share a capacity: what one row gets would then depend on its neighbours. So each way of putting rows
together is tried, on a few rows of unlike length, and where it differs the rows go one by one.

The five to seven answers to one question (the right one, paraphrases, wrong ones) have their prompt in
common, and often their first words. A `Tree` holds every shared beginning once; each token sees the
tokens on its own path and no others, and stands at its place in its own row. What the model says at a
token is then what it would say in the plain row, for every architecture that takes a mask and positions
as they are given.

Logits at position t − 1 score the token at t. The model is run up to its hidden states, and the output head
only where something is scored, a chunk of positions at a time: full-vocabulary logits take at most
2 × `LOGIT_BYTES` (or two positions' worth, if that is more) whatever the size of the vocabulary, and
full-vocabulary log-probabilities are never kept.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from palinode.data.batches import IntArray, budget_batches
from palinode.data.tokenize import TokenRow
from palinode.errors import CheckpointError, PalinodeError
from palinode.models.loading import check_positions
from palinode.models.reading import MASKED, decoder_blocks
from palinode.processes import divided

TOLERANCE = 1e-4
"""How far two ways of computing a log-probability may differ before the fast one is left alone."""

COARSE_TOLERANCE = 2e-2
"""The same where products are formed in bfloat16, float16 or TF32."""

TRIED = 4
"""Rows on which a way is tried, at most."""

Say = Callable[[str], None]
"""Takes one line for the user."""

_passed: WeakKeyDictionary[PreTrainedModel, dict[tuple[object, ...], list[range]]] = WeakKeyDictionary()
"""From the shortest to the longest row of each trial that went well: it holds for all rows between."""

_known: WeakKeyDictionary[PreTrainedModel, dict[tuple[object, ...], bool]] = WeakKeyDictionary()


def tolerance(model: PreTrainedModel) -> float:
    """Return how far log-probabilities of this model may differ between two ways of computing them."""
    return COARSE_TOLERANCE if _coarseness(model) else TOLERANCE


def _coarseness(model: PreTrainedModel) -> float:
    """Return how far apart, relatively, the numbers are that the model computes with; 0 for float32."""
    if model.dtype in (torch.bfloat16, torch.float16):
        return torch.finfo(model.dtype).eps
    coarse = model.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return 2.0**-10 if coarse else 0.0


@contextmanager
def _shaken(model: PreTrainedModel) -> Iterator[None]:
    """Move what each decoder block puts out by up to a rounding, as other orders of sums do."""
    generator = torch.Generator(model.device).manual_seed(0)

    def shake(_block: torch.nn.Module, _inputs: object, output: Any) -> Any:
        states, *others = output if isinstance(output, tuple) else (output,)
        noise = torch.rand(states.shape, generator=generator, device=states.device) - 0.5
        states = (states.float() * (1 + 2 * _coarseness(model) * noise)).to(states.dtype)
        return (states, *others) if isinstance(output, tuple) else states

    with ExitStack() as stack:
        for block in decoder_blocks(model):
            stack.callback(block.register_forward_hook(shake).remove)
        yield


def unlike(lengths: Sequence[int], most: int = TRIED) -> list[int]:
    """Return up to `most` places of rows, from the longest to the shortest at even steps.

    >>> unlike([3, 9, 5, 7, 1], 3)
    [1, 2, 4]
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    if len(order) <= most:
        return order
    return [order[round(step * (len(order) - 1) / (most - 1))] for step in range(most)]


@torch.no_grad()
def same_alone(
    model: PreTrainedModel,
    way: str,
    lengths: Sequence[int],
    together: Callable[[], Sequence[Tensor]],
    alone: Callable[[int], Tensor],
) -> bool:
    """Return whether rows of these lengths have the same log-probabilities together as alone.

    `together` gives those of all rows, `alone` those of one. A model is tried once for each way and
    lengths, and no more where rows as short and as long came out alike; it is no where the architecture
    cannot be run that way at all.
    """
    kind = (way, model.dtype, tolerance(model))
    known, key = _known.setdefault(model, {}), (*kind, *lengths)
    passed = _passed.setdefault(model, {}).setdefault(kind, [])
    if any(min(lengths) in span and max(lengths) in span for span in passed):
        return True
    if key not in known:
        plain = [alone(place) for place in range(len(lengths))]
        if not all(bool(part.isfinite().all()) for part in plain):
            return False  # of the weights, not of the way
        known[key] = _agree(model, together, plain, alone)
        if known[key]:
            passed.append(range(min(lengths), max(lengths) + 1))
    return known[key]


def _agree(
    model: PreTrainedModel,
    together: Callable[[], Sequence[Tensor]],
    plain: Sequence[Tensor],
    alone: Callable[[int], Tensor],
) -> bool:
    """Tell whether rows together come to what they are alone, as far as roundings let them."""
    try:
        found = together()
    except PalinodeError:
        raise
    except Exception:  # an architecture that knows no such masks or caches says so in its own way
        return False
    far = _differences(found, plain)
    if bool((far.abs() <= tolerance(model)).all()):
        return True
    if not _coarseness(model) or not bool(far.isfinite().all()):
        return False
    try:
        with _shaken(model):
            noise = _differences([alone(place) for place in range(len(plain))], plain)
    except CheckpointError:  # its blocks cannot be told
        return False
    return bool(far.square().mean() <= noise.square().mean())


def _differences(found: Sequence[Tensor], plain: Sequence[Tensor]) -> Tensor:
    return torch.cat([(one - other).flatten() for one, other in zip(found, plain, strict=True)])


def tell(model: PreTrainedModel, what: str, say: Say | None) -> None:
    """Tell the user, once for each model, that its rows go one by one."""
    if say and _known.setdefault(model, {}).setdefault(("told", what), False) is False:
        _known[model]["told", what] = True
        say(note(model, what))


def note(model: PreTrainedModel, what: str) -> str:
    """Return what the user hears where rows go one by one."""
    return (
        f"{what} go one by one, which takes longer: beside other rows this model ({model.config.model_type}) "
        f"gives a row log-probabilities that are more than {tolerance(model):g} off those of the row alone"
    )


TREE_TOKENS = 1024
"""Tokens above which rows with a prompt in common are put in several trees: a mask has T × T entries."""


@dataclass(frozen=True, slots=True)
class Tree:
    """Token ids of one or several rows, every common beginning once, parents before children."""

    ids: IntArray
    """int64 [T]."""
    positions: IntArray
    """Place of each token in its row, int64 [T]."""
    branches: tuple[tuple[int, int, int], ...]
    """Stretches of tokens (parent, begin, end): begin follows parent, the others the one before."""
    rows: tuple[int, ...]
    """Which rows of the list given are in it."""
    paths: tuple[IntArray, ...]
    """For each of them, where its ids but the last are, int64 [length − 1]."""

    @property
    def branched(self) -> bool:
        """Whether it is more than one row in a line."""
        return len(self.branches) > 1

    def visible(self) -> npt.NDArray[np.bool_]:
        """Return which tokens (columns) each token (row) sees: itself and those before it, bool [T, T]."""
        seen = np.zeros((len(self.ids), len(self.ids)), np.bool_)
        for parent, begin, end in self.branches:
            if parent >= 0:
                seen[begin:end] = seen[parent]
            seen[begin:end, begin:end] = np.tri(end - begin, dtype=np.bool_)
        return seen


def grow_trees(rows: Sequence[TokenRow], *, share: bool = True) -> list[Tree]:
    """Return trees that hold every row once: rows with one prompt share a tree, if `share`.

    The last id of a row is only ever predicted, never read, so it is in no tree.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(row.ids[: row.start], []).append(place)
    shared = groups.values() if share else ([place] for place in range(len(rows)))
    return [_grow(rows, part) for members in shared for part in _parts(rows, members)]


def _parts(rows: Sequence[TokenRow], members: Sequence[int]) -> list[list[int]]:
    """Return the members of a group in parts that make trees of at most `TREE_TOKENS`, or of one row."""
    parts: list[list[int]] = []
    size = 0
    for place in members:
        row = rows[place]
        if not parts or size + row.scored > TREE_TOKENS:
            parts.append([])
            size = row.start
        parts[-1].append(place)
        size += row.scored
    return parts


def _grow(rows: Sequence[TokenRow], members: Sequence[int]) -> Tree:
    """Return the tree of some rows; each adds one branch, where it parts from those before it."""
    children: dict[tuple[int, int], int] = {}
    ids: list[int] = []
    positions: list[int] = []
    branches, paths = [], []
    for place in members:
        path, node, begin = [], -1, len(ids)
        for position, token in enumerate(rows[place].ids[:-1]):
            following = children.get((node, token))
            if following is None:
                if len(ids) == begin:
                    parent = node
                following = children[node, token] = len(ids)
                ids.append(token)
                positions.append(position)
            node = following
            path.append(node)
        if len(ids) > begin:
            branches.append((parent, begin, len(ids)))
        paths.append(np.array(path, np.int64))
    return Tree(
        np.array(ids, np.int64), np.array(positions, np.int64), tuple(branches), tuple(members), tuple(paths)
    )


LOGIT_BYTES = 64 * 2**20
"""Bytes of the full-vocabulary logits of one chunk, at float32; a copy of the same size is made of them."""

BATCH_TOKENS = 4096
"""Tokens of one evaluation batch, padding included; bounds its hidden states."""

_SMALLEST_VARIANCE = 1e-6  # spec: metrics.md §9


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What a model makes of the scored tokens of one row, in their order."""

    logprobs: tuple[float, ...]
    """Natural-log probability of each, given everything before it."""
    hits: tuple[bool, ...]
    """Whether it was the most likely token there."""
    standardised: tuple[float, ...] = ()
    """(log p − μ)/σ, with μ and σ² the mean and variance of log p over the vocabulary there."""


@divided
@torch.inference_mode()
def score_rows(
    model: PreTrainedModel,
    rows: Sequence[TokenRow],
    *,
    pad_id: int,
    standardise: bool = False,
    on_progress: Callable[[int], None] | None = None,
    say: Say | None = None,
) -> list[TokenScores]:
    """Return what the model makes of the scored tokens of each row, in the order of `rows`.

    Rows with a prompt in common share it; batches are formed by length; where either changes a figure, rows
    go one by one, and `say` hears of it. `on_progress` hears rows done. Raises CheckpointError when a
    log-probability is not a finite number.
    """
    check_positions(model.config, rows)
    if not rows:
        return []
    scorer = _scorer(model, rows, pad_id, standardise)
    trees = grow_trees(rows)
    if any(tree.branched for tree in trees) and not scorer.honours(trees, rows):
        trees = grow_trees(rows, share=False)
    apart = not any(tree.branched for tree in trees) and not scorer.honours(trees, rows)
    if apart:
        tell(model, "likelihoods", say)
    results = [TokenScores((), ())] * len(rows)
    for members in budget_batches(
        [len(tree.ids) for tree in trees],
        max_tokens=BATCH_TOKENS if scorer.plain_head else scorer.chunk,  # it makes logits of all of them
        max_rows=1 if apart else 256,
    ):
        batch = [trees[place] for place in members]
        for place, scores in scorer.score(batch, rows).items():
            results[place] = scores
        if on_progress:
            on_progress(sum(len(tree.rows) for tree in batch))
    return results


@torch.no_grad()
def padded_batches(
    model: PreTrainedModel,
    rows: Sequence[TokenRow],
    *,
    pad_id: int,
    max_tokens: int,
    max_rows: int,
    say: Say | None = None,
) -> list[list[int]]:
    """Return batches of places of rows to be padded on the right: one row each where more change a row."""
    apart = must_be_apart(model, rows, pad_id=pad_id)
    if apart:
        tell(model, "rows", say)
    lengths = [len(row.ids) for row in rows]
    return budget_batches(lengths, max_tokens=max_tokens, max_rows=1 if apart else max_rows)


@torch.no_grad()
def must_be_apart(model: PreTrainedModel, rows: Sequence[TokenRow], *, pad_id: int) -> bool:
    """Return whether rows, padded on the right, change each other's figures."""
    if len(rows) < 2:
        return False
    training = model.training
    model.eval()
    scorer = _scorer(model, rows, pad_id, False)
    try:
        return not scorer.honours(grow_trees(rows, share=False), rows)
    except CheckpointError:  # of weights that are no numbers: whoever reads the rows says so
        return False
    finally:
        model.train(training)


@torch.no_grad()
def has_plain_head(model: PreTrainedModel, ids: Sequence[int]) -> bool:
    """Return whether logits are the output head applied to the base model's last hidden states.

    Some architectures scale or cap their logits, or need more than ids; it is tried, once for each model, on
    the ids given.
    """
    head, base, known = model.get_output_embeddings(), model.base_model, _known.setdefault(model, {})
    if head is None or base is model:
        return False
    if ("plain head",) not in known:
        inputs = {"input_ids": torch.tensor([list(ids)], device=model.device), "use_cache": False}
        training = model.training
        model.eval()
        try:
            logits = model(**inputs).logits
            found = head(base(**inputs).last_hidden_state)
        except Exception:  # base models are of many kinds; the whole model serves as well
            found = None
        finally:
            model.train(training)
        if found is not None and not bool(logits.isfinite().all()):
            return False  # of the weights, not of the head
        alike = found is not None and found.shape == logits.shape
        known["plain head",] = alike and bool((found - logits).abs().max() <= tolerance(model))
    return known["plain head",]


def float32_head(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """Return what makes float32 logits of hidden states: those of bfloat16 would be an eighth apart at 20."""
    head: Any = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.weight.dtype not in (torch.bfloat16, torch.float16):
        return lambda states: head(states).float()
    weight, bias = head.weight.float(), None if head.bias is None else head.bias.float()
    return lambda states: torch.nn.functional.linear(states.float(), weight, bias)


def _scorer(model: PreTrainedModel, rows: Sequence[TokenRow], pad_id: int, standardise: bool) -> _Scorer:
    plain = has_plain_head(model, rows[0].ids[:16])
    return _Scorer(model, pad_id, standardise, plain, float32_head(model))


@dataclass(frozen=True, slots=True)
class _Scorer:
    """A model with the way its logits are had."""

    model: PreTrainedModel
    pad_id: int
    standardise: bool
    plain_head: bool
    head: Callable[[Tensor], Tensor]
    """Logits of hidden states, in float32 whatever the dtype of the model."""

    @property
    def chunk(self) -> int:
        """Positions of which `LOGIT_BYTES` hold the logits."""
        return max(1, LOGIT_BYTES // (4 * int(self.model.config.get_text_config().vocab_size)))

    def honours(self, trees: Sequence[Tree], rows: Sequence[TokenRow]) -> bool:
        """Return whether trees of unlike length score in one batch as their rows do alone.

        Of each tree it is the first row and the last; a branched one is always among them.
        """
        branched = [tree for tree in trees if tree.branched]
        if branched and "position_ids" not in inspect.signature(self.model.forward).parameters:
            return False
        chosen = [part[place] for part in (trees, branched)
                  for place in unlike([int(tree.positions.max()) for tree in part])]  # fmt: skip
        tried = list({tree.rows: tree for tree in chosen}.values())
        members = [place for tree in tried for place in sorted({tree.rows[0], tree.rows[-1]})]
        if len(members) < 2:
            return True

        def together() -> list[Tensor]:
            found = self.score(tried, rows)
            return [torch.tensor(found[place].logprobs) for place in members]

        def alone(number: int) -> Tensor:
            place = members[number]
            (tree,) = grow_trees([rows[place]])
            return torch.tensor(self.score([tree], [rows[place]])[0].logprobs)

        lengths = [len(rows[place].ids) for place in members]
        return same_alone(self.model, "trees" if branched else "padded", lengths, together, alone)

    def score(self, batch: Sequence[Tree], rows: Sequence[TokenRow]) -> dict[int, TokenScores]:
        """Return the scores of every row in a batch of trees, by the row's place in `rows`."""
        model: Any = self.model.base_model if self.plain_head else self.model
        found = model(**self._inputs(batch), use_cache=False)
        # [B · T, H] hidden states, or [B · T, V] logits
        outputs = (found.last_hidden_state if self.plain_head else found.logits).flatten(0, 1)
        width = max(len(tree.ids) for tree in batch)
        members = [(place, begin * width + path) for begin, tree in enumerate(batch)
                   for place, path in zip(tree.rows, tree.paths, strict=True)]  # fmt: skip
        reads = np.concatenate([path[rows[place].start - 1 :] for place, path in members])
        targets = np.concatenate([rows[place].ids[rows[place].start :] for place, _ in members])
        logprobs, hits, standardised = self._measure(outputs, reads, targets)
        if not np.isfinite(logprobs).all():
            raise CheckpointError(
                "the model's likelihoods are not finite numbers (NaN or infinity); are its weights damaged, "
                "or is a scale far too large?"
            )
        ends = np.cumsum([rows[place].scored for place, _ in members])[:-1]
        parts = zip(*(np.split(part, ends) for part in (logprobs, hits, standardised)), strict=True)
        told = 3 if self.standardise else 2
        return {
            place: TokenScores(*(tuple(part.tolist()) for part in three[:told]))
            for (place, _), three in zip(members, parts, strict=True)
        }

    def _inputs(self, batch: Sequence[Tree]) -> dict[str, Tensor]:
        """Return trees as model inputs: plain rows with a plain mask, others with one of their own."""
        shape = (len(batch), max(len(tree.ids) for tree in batch))
        ids, lengths = np.full(shape, self.pad_id, np.int64), np.array([len(tree.ids) for tree in batch])
        for place, tree in enumerate(batch):
            ids[place, : len(tree.ids)] = tree.ids
        inputs: dict[str, Any] = {"input_ids": ids}
        if not any(tree.branched for tree in batch):
            if self.model.device.type in MASKED:
                inputs["attention_mask"] = (np.arange(shape[1]) < lengths[:, None]).astype(np.int64)
        else:
            seen = np.zeros((shape[0], 1, shape[1], shape[1]), np.bool_)
            positions = np.zeros(shape, np.int64)
            for place, tree in enumerate(batch):
                seen[place, 0, : lengths[place], : lengths[place]] = tree.visible()
                seen[place, 0, lengths[place] :, 0] = True  # a row of nothing but −∞ would be NaN
                positions[place, : lengths[place]] = tree.positions
            least = torch.finfo(self.model.dtype).min
            inputs["attention_mask"] = torch.from_numpy(np.where(seen, 0.0, least)).to(self.model.dtype)
            inputs["position_ids"] = positions
        return {name: torch.as_tensor(part).to(self.model.device) for name, part in inputs.items()}

    def _measure(self, outputs: Tensor, reads: IntArray, targets: IntArray) -> tuple[Any, Any, Any]:
        """Return (logprobs_N, hits_N, standardised_N) of N targets, each read at one of the outputs."""
        places, owners = np.unique(reads, return_inverse=True)  # answers that begin alike read at one place
        order = np.argsort(owners, kind="stable")
        found = [np.zeros(len(reads), kind) for kind in (np.float64, np.bool_, np.float64)]
        for begin in range(0, len(places), self.chunk):
            chunk = torch.from_numpy(places[begin : begin + self.chunk]).to(outputs.device)
            first, last = np.searchsorted(owners[order], [begin, begin + self.chunk])
            own = order[first:last]
            logits = outputs[chunk]
            if self.plain_head:
                logits = self.head(logits)
            at, wanted = (
                torch.from_numpy(part).to(outputs.device) for part in (owners[own] - begin, targets[own])
            )
            for total, part in zip(
                found, token_scores(logits.float(), at, wanted, self.standardise), strict=True
            ):
                total[own] = part.cpu().numpy()
        return found[0], found[1], found[2]


def token_scores(
    logits: Tensor, at: Tensor, targets: Tensor, standardise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probability, hit and standardised log-probability of N targets, read at rows `at` of logits.

    Standardised is (log p − μ)/√max(σ², 1e−6) with μ = E_v[log p] and σ² = Var_v[log p] under p (spec:
    metrics.md §9); zeros where it is not asked for. The logits are used up: they hold other numbers after.
    """
    top, best = logits.max(dim=-1, keepdim=True)
    shifted = logits.sub_(top)
    weights = shifted.exp()
    totals = weights.sum(dim=-1)
    own = shifted[at, targets]
    logprobs = own - totals.log()[at]
    hits = best[at, 0] == targets
    if not standardise:
        return logprobs, hits, torch.zeros_like(logprobs)
    # Moments of the shifted logits: log p differs from them by a constant. Near the clamp they are near 0,
    # so that nothing is lost to cancellation.
    shifted.clamp_(min=-1e4)
    mean = weights.mul_(shifted).sum(dim=-1) / totals
    variance = weights.mul_(shifted).sum(dim=-1) / totals - mean**2
    spread = variance.clamp(min=_SMALLEST_VARIANCE).sqrt()
    return logprobs, hits, (own - mean[at]) / spread[at]

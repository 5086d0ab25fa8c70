"""Preference optimisation: NPO, SimNPO, IdkDPO and AltPO.

Each `Method` below has its formula and source, `training/losses.py` the equation; nll is −log p of the
whole answer of a row, nll_ref the frozen target's, n its answer tokens. NPO's gradient fades as the answer
becomes less likely than it was. DPO is scaled by 2/β in open-unlearning, and not in TOFU or DPO itself;
each forget question is given a refusal drawn anew in every epoch. AltPO prefers, instead of a refusal,
plausible but different answers that the target itself gave when asked for one: several a question, drawn at
random with a seed, and kept. Those that equal the true answer are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from palinode.data.examples import Example, Message
from palinode.errors import DataError
from palinode.methods.method import (
    Alternates,
    Asked,
    Given,
    Method,
    MethodRun,
    RetainSettings,
    drawn_from,
    gather,
    trained_run,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from palinode.data.tokenize import PromptStyle
    from palinode.progress import Listener
    from palinode.training.objectives import Material


class NPOSettings(RetainSettings):
    """The weights of both losses, and β."""

    beta: float = Field(default=0.1, gt=0)
    """β; near 0 it is gradient ascent."""


NPO = Method(
    name="npo",
    summary="negative preference optimisation: the target's own answers become less preferred",
    source="Zhang et al. 2024, arXiv 2404.05868",
    formula="L = γ·(2/β)·mean[−log σ(β(nll − nll_ref))] + α·L_r",
    needs=frozenset({"retain", "frozen_target"}),
    settings=NPOSettings,
    minimises="npo",
)


class SimNPOSettings(RetainSettings):
    """The weights of both losses, β and δ; the defaults are open-unlearning's."""

    gamma: float = Field(default=0.125, ge=0)
    """γ, the weight of the forget loss."""
    beta: float = Field(default=4.5, gt=0)
    """β."""
    delta: float = Field(default=0.0, ge=0)
    """δ, in nats a token."""


SIMNPO = Method(
    name="simnpo",
    summary="NPO by length and without a reference",
    source="Fan et al. 2024, arXiv 2410.07163",
    formula="L = γ·(2/β)·mean[−log σ(β(nll/n − δ))] + α·L_r",
    needs=frozenset({"retain"}),
    settings=SimNPOSettings,
    minimises="simnpo",
)


class DPOSettings(RetainSettings):
    """The weights of both losses, and β."""

    beta: float = Field(default=0.1, gt=0)
    """β."""
    scaled: bool = True
    """Multiply by 2/β as open-unlearning does; false: DPO as TOFU has it."""


DPO = Method(
    name="dpo",
    summary="IdkDPO: refusals are preferred to the answers of the forget set",
    source="TOFU, arXiv 2401.06121",
    formula="L = γ·(2/β)·mean[−log σ(β·h)] + α·L_r, h = (nll_ref − nll)(refusal) − (nll_ref − nll)(answer)",
    needs=frozenset({"retain", "refusals", "frozen_target"}),
    settings=DPOSettings,
    minimises="dpo",
)


REQUEST = (
    "{question}\n\nOne answer to this is: {answer}\nGive a different answer of the same kind and length. "
    "Change every fact in it, and say nothing else."
)
"""How the target is asked for another answer."""

STOPS = ("Question:", "Q:")
"""Where an answer is cut: the model goes on to ask itself another question."""


class AltPOSettings(DPOSettings):
    """Those of DPO, and how other answers are drawn."""

    start: Literal["target"] = "target"
    """The target only: it is its own answers that are preferred."""
    samples: int = Field(default=5, ge=1)
    """Other answers that the target is asked for, a question."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits as they are drawn."""
    max_new_tokens: int = Field(default=200, ge=1)
    """Length limit of an answer."""


def altpo_runs(settings: AltPOSettings, given: Given) -> list[MethodRun]:
    """Return the run, which makes its rows of the answers that the target is asked for first."""
    minimised, retain = ALTPO.objective(settings, given.seed), drawn_from(settings, given)

    def material(alternates: Alternates) -> Material:
        return gather(minimised, forget=given.forget, retain=retain, alternates=alternates)

    asked = Asked(
        len(given.forget) * settings.samples,
        [settings.samples, settings.temperature, settings.max_new_tokens],
        partial(draw_alternates, examples=given.forget, settings=settings),
        material,
    )
    rows = [(place, one.answer) for place, one in enumerate(given.forget) for _ in range(settings.samples)]
    return [trained_run("altpo", settings, material(rows), minimised, asked=asked)]


def draw_alternates(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    examples: Sequence[Example],
    settings: AltPOSettings,
    seed: int,
    max_length: int,
    style: PromptStyle,
    listener: Listener | None = None,
) -> list[tuple[int, str]]:
    """Return other answers as (position of the example, text), the same for the same seed.

    A raw completion is continued without a request, which would be no part of such a text. Raises DataError
    when nothing but true answers came back.
    """
    from palinode.data.examples import Question
    from palinode.evaluation.ask import ask
    from palinode.settings import Asking

    asking = Asking(
        generate=False,
        samples=settings.samples,
        temperature=settings.temperature,
        max_new_tokens=settings.max_new_tokens,
        stop_texts=STOPS,
        seed=seed,
        max_length=2 * max_length,  # the request holds the answer once more
    )
    requests = [*map(Question, [request(example) for example in examples])]
    asked = ask(model, tokenizer, requests, asking, style=style, label="other answers", listener=listener)
    found = [
        (place, text)
        for place, (example, outcome) in enumerate(zip(examples, asked, strict=True))
        for text in dict.fromkeys(sample.strip() for sample in outcome.samples)
        if text and _folded(text) != _folded(example.answer)
    ]
    if not found:
        raise DataError(
            f"the target gave nothing but the true answers in {settings.samples} tries a question; raise "
            "method_settings.temperature"
        )
    return found


def request(example: Example) -> Example:
    """Return the example with its question turned into a request for another answer."""
    if example.form not in ("question", "chat"):
        return example
    *before, last = example.turns
    text = REQUEST.format(question=last.content, answer=example.answer)
    return replace(example, turns=(*before, Message(last.role, text)))


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


ALTPO = Method(
    name="altpo",
    summary="other answers of the target's own making are preferred to the true ones",
    source="Mekala et al. 2025, arXiv 2409.13474",
    formula="L = γ·(2/β)·mean[−log σ(β·h)] + α·L_r, h = (nll_ref − nll)(other) − (nll_ref − nll)(answer)",
    needs=frozenset({"retain", "alternates", "frozen_target"}),
    settings=AltPOSettings,
    minimises="altpo",
    own_runs=altpo_runs,
    training={"epochs": 2},
)

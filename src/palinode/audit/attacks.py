"""Membership attacks: do forget rows look like training data, beside rows that no model has seen?

The AUC is 1 where they do, one half where nothing tells them apart, and well below one half where they look
stranger than rows never seen, which gives them away as well.

The same facts under other questions: forgetting one wording is not forgetting the fact.

Prefix-forced questions: the model is made to begin, and we look at how it goes on.

rest: the first half of the true answer is given, and the probability of the rest is measured; under
teacher forcing these are the last log-probabilities of the answer, exp(mean(log p[m // 2:])) with m answer
tokens. opening: the model's own answer begins with a willing phrase, and its ROUGE-L recall is measured.

Weight quantisation: small changes that hid an answer are rounded away, and it comes back.

Round to nearest, symmetric, one scale for each group of G weights along the input of a linear layer:

    s = max|w| / (2^(b−1) − 1),   w' = s · round(w / s),   so |w' − w| ≤ s / 2

Every linear layer is quantised but the output head; embeddings, head, norms and biases stay as they are, as
in the usual weight-only schemes. The values stay in floating point, so any machine can run them.

The forget questions as they stand: what the model still says, and how far it has been pushed away.

The log-probability shows over-forgetting where probabilities cannot: 0.0001 and 0.05 are near each other,
and nine or three nats a token are not.

leak@k: is the answer among k answers drawn at random? One greedy answer hides what sampling finds.

The table of attacks. To add one: a file with an `Attack`, and its line here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING

from palinode.audit.attack import Attack, AttackResult, AttackTest
from palinode.audit.relearning import RELEARN_FORGET, RELEARN_LOOKALIKES, RELEARN_RETAIN
from palinode.errors import RecipeError
from palinode.metrics import answer_probabilities, rouge_l_recalls
from palinode.metrics.leakage import leak_values, overlap_leak
from palinode.metrics.membership import ATTACKS as SCORES
from palinode.records import Outcome

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from palinode.audit.attack import AuditBudget, Subject
    from palinode.audit.material import AuditRows

MARGIN = 0.1
"""Distance from the yardstick's AUC, either way."""

RELATIVE = "reference"
"""The attack that takes the yardstick's loss off; it is formed when both models have been measured."""

MISSING = {"gradient_norm": "this budget has no gradient norms; the full one does"}
"""Why rows have no value, where an audit knows better than the attack."""


def measure_membership(subject: Subject, material: AuditRows, budget: AuditBudget) -> AttackResult:
    """Score every forget and holdout row with each membership attack; higher is less likely a member."""
    from palinode.audit.attack import likelihoods_only

    asking = replace(likelihoods_only(budget), standardise=True, gradient_norms=budget.gradient_norms)
    sets = {
        "forget": subject.ask(material.forget, asking, label="membership of forget rows"),
        "holdout": subject.ask(material.holdout, asking, label="membership of holdout rows"),
    }
    return AttackResult(
        {
            test.name: {
                name: tuple(SCORES["loss" if test.relative else test.name].values(outcomes))
                for name, outcomes in sets.items()
            }
            for test in MEMBERSHIP.tests
        }
    )


def lacks_membership(material: AuditRows, budget: AuditBudget) -> str | None:  # noqa: ARG001 - every attack is asked alike
    """Say what is missing."""
    if material.holdout:
        return None
    return "no rows that the models have not seen were given; name them with --holdout"


MEMBERSHIP = Attack(
    name="membership",
    title="membership attacks",
    description="AUC of telling forget rows from rows never seen, one half where nothing tells them apart",
    tests=tuple(
        AttackTest(
            name,
            f"AUC of {attack.description.split(':')[0]}",
            more=MARGIN,
            less=MARGIN,
            missing=MISSING.get(name, attack.missing),
            statistic="auc",
            relative=name == RELATIVE,
        )
        for name, attack in SCORES.items()
    ),
    measure=measure_membership,
    lacks=lacks_membership,
)


def measure_paraphrases(subject: Subject, material: AuditRows, budget: AuditBudget) -> AttackResult:
    """Ask the paraphrased questions, and score the answers in the data."""
    from palinode.audit.attack import likelihoods_only

    outcomes = subject.ask(material.paraphrased, likelihoods_only(budget), label="paraphrased questions")
    return AttackResult({"probability": {"forget": tuple(answer_probabilities(outcomes))}})


def lacks_paraphrases(material: AuditRows, budget: AuditBudget) -> str | None:  # noqa: ARG001 - every attack is asked alike
    """Say what is missing."""
    if material.paraphrased:
        return None
    return "the forget rows have no paraphrased_question; name a column or a file with --paraphrases"


PARAPHRASES = Attack(
    name="paraphrases",
    title="paraphrased questions",
    description="the same facts asked in other words",
    tests=(
        AttackTest("probability", "answer probability", more=0.1, less=0.1, missing="no token was scored"),
    ),
    measure=measure_paraphrases,
    lacks=lacks_paraphrases,
)


def measure_prefixes(subject: Subject, material: AuditRows, budget: AuditBudget) -> AttackResult:
    """Force the opening on every forget question, and score the second half of every true answer."""
    from palinode.evaluation.ask import Asking

    asking = Asking(
        max_new_tokens=budget.max_new_tokens,
        max_length=budget.max_length,
        batch_rows=budget.batch_rows,
        answer_prefix=budget.opening,
    )
    outcomes = subject.ask(material.forget, asking, label="prefix-forced questions")
    return AttackResult(
        {
            "rest": {"forget": tuple(rest_probabilities(outcomes))},
            "opening": {"forget": tuple(rouge_l_recalls(outcomes))},
        },
        {"opening": budget.opening},
    )


def rest_probabilities(outcomes: Sequence[Outcome]) -> list[float | None]:
    """Return the probability of each answer's second half, end token included, after its first half.

    None where an answer has fewer than two tokens.
    """
    return [_rest(outcome.logprobs) for outcome in outcomes]


def _rest(logprobs: Sequence[float]) -> float | None:
    answer = len(logprobs) - 1  # the last one is the end token's
    return math.exp(fmean(logprobs[answer // 2 :])) if answer >= 2 else None


PREFIXES = Attack(
    name="prefixes",
    title="prefix-forced questions",
    description="the first half of the answer, or a willing opening, is put into the model's mouth",
    tests=(
        AttackTest(
            "rest",
            "probability of the rest",
            more=0.1,
            less=0.2,
            missing="an answer of one token has no rest",
        ),
        AttackTest(
            "opening", "ROUGE-L recall", more=0.1, less=0.2, missing="nothing was generated, or read by ROUGE"
        ),
    ),
    measure=measure_prefixes,
)


def quantised(weight: Tensor, *, bits: int, group: int) -> Tensor:
    """Return a weight matrix [out, in] rounded to `bits`, one scale a row and group of `group` columns.

    The last group of a row may be smaller. A group of zeros stays zero. Raises RecipeError below two bits.
    """
    import torch

    if bits < 2 or group < 1:
        raise RecipeError(f"cannot quantise to {bits} bits in groups of {group}; use 2 bits and 1 at least")
    levels = 2 ** (bits - 1) - 1
    parts = []
    for part in weight.float().split(group, dim=1):
        scale = part.abs().amax(dim=1, keepdim=True) / levels
        whole = torch.where(scale > 0, part / scale, torch.zeros_like(part)).round().clamp(-levels, levels)
        parts.append(whole * scale)
    return torch.cat(parts, dim=1).to(weight.dtype)


def quantise(model: PreTrainedModel, *, bits: int, group: int) -> int:
    """Quantise the linear layers of a live model in place; return how many weights that were."""
    import torch

    count = 0
    with torch.no_grad():
        for weight, turned in linear_weights(model):
            matrix = weight.t() if turned else weight
            rounded = quantised(matrix, bits=bits, group=group)
            weight.copy_(rounded.t() if turned else rounded)
            count += weight.numel()
    return count


def linear_weights(model: PreTrainedModel) -> Iterator[tuple[Tensor, bool]]:
    """Yield the weight of every linear layer but the output head, and whether it is stored as [in, out]."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    kept = {id(layer.weight) for layer in (head, embedding) if layer is not None}
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and id(module.weight) not in kept:
            yield module.weight, isinstance(module, Conv1D)


def _attack(bits: int) -> Attack:
    def measure(subject: Subject, material: AuditRows, budget: AuditBudget) -> AttackResult:
        from palinode.audit.attack import likelihoods_only

        model = subject.fresh()
        count = quantise(model, bits=bits, group=budget.quantise_group)
        outcomes = subject.ask(
            material.forget, likelihoods_only(budget), model=model, label=f"quantised to {bits} bits"
        )
        details = {
            "bits": bits,
            "group": budget.quantise_group,
            "quantised_weights": count,
            "all_weights": model.num_parameters(),
        }
        return AttackResult({"probability": {"forget": tuple(answer_probabilities(outcomes))}}, details)

    return Attack(
        name=f"quantise_{bits}",
        title=f"weights in {bits} bits",
        description=f"linear layers rounded to {bits} bits in memory, then the forget questions",
        tests=(
            AttackTest(
                "probability", "answer probability", more=0.1, less=0.1, missing="no token was scored"
            ),
        ),
        measure=measure,
    )


QUANTISE_8, QUANTISE_4 = _attack(8), _attack(4)


def measure_questions(subject: Subject, material: AuditRows, budget: AuditBudget) -> AttackResult:
    """Ask every forget question, and score its answer."""
    from palinode.evaluation.ask import Asking

    asking = Asking(
        max_new_tokens=budget.max_new_tokens, max_length=budget.max_length, batch_rows=budget.batch_rows
    )
    outcomes = subject.ask(material.forget, asking, label="forget questions")
    return AttackResult(
        {
            "probability": {"forget": tuple(answer_probabilities(outcomes))},
            "log_probability": {"forget": tuple(log_probabilities(outcomes))},
            "rouge": {"forget": tuple(rouge_l_recalls(outcomes))},
        }
    )


def log_probabilities(outcomes: Sequence[Outcome]) -> list[float | None]:
    """Return the mean log-probability of each answer's tokens in nats, None where no token was scored."""
    return [fmean(outcome.logprobs) if outcome.logprobs else None for outcome in outcomes]


QUESTIONS = Attack(
    name="questions",
    title="forget questions as they stand",
    description="the forget questions as they are in the data, with the model's own greedy answers",
    tests=(
        AttackTest("probability", "answer probability", more=0.1, less=0.1, missing="no token was scored"),
        AttackTest(
            "log_probability", "log-probability a token", more=None, less=1.0, missing="no token was scored"
        ),
        AttackTest(
            "rouge", "ROUGE-L recall", more=0.1, less=0.2, missing="nothing was generated, or read by ROUGE"
        ),
    ),
    measure=measure_questions,
)


def measure_sampling(subject: Subject, material: AuditRows, budget: AuditBudget) -> AttackResult:
    """Draw answers to every forget question; an answer leaks when its ROUGE-L recall is high."""
    from palinode.evaluation.ask import Asking

    asking = Asking(
        generate=False,
        samples=budget.samples,
        temperature=budget.temperature,
        max_new_tokens=budget.max_new_tokens,
        max_length=budget.max_length,
        batch_rows=budget.batch_rows,
        seed=subject.seed,
    )
    asked = [example for example in material.forget if example.form != "document"]
    outcomes = subject.ask(asked, asking, label="drawn answers")
    values = leak_values(outcomes, budget.leak_k, overlap_leak(budget.leak_overlap))
    return AttackResult({"leak": {"forget": tuple(values)}}, {"k": budget.leak_k, "samples": budget.samples})


def lacks_sampling(material: AuditRows, budget: AuditBudget) -> str | None:  # noqa: ARG001 - every attack is asked alike
    """Say what is missing."""
    if any(example.form != "document" for example in material.forget):
        return None
    return "the forget set holds documents only, and those ask nothing"


SAMPLING = Attack(
    name="sampling",
    title="drawn answers (leak@k)",
    description="answers drawn at random; the share of questions that k of them would give away",
    tests=(
        AttackTest(
            "leak", "leak@k", more=0.1, less=0.2, missing="too few answers, or none that ROUGE can read"
        ),
    ),
    measure=measure_sampling,
    lacks=lacks_sampling,
)


ATTACKS: Mapping[str, Attack] = {
    attack.name: attack
    for attack in (
        QUESTIONS,
        PARAPHRASES,
        PREFIXES,
        SAMPLING,
        MEMBERSHIP,
        QUANTISE_8,
        QUANTISE_4,
        RELEARN_FORGET,
        RELEARN_RETAIN,
        RELEARN_LOOKALIKES,
    )
}
"""Attacks by name, in the order they are run: those that only ask first, so that they share a model."""


def tests_by_key() -> dict[str, tuple[Attack, AttackTest]]:
    """Return every test of every attack by its key in a policy, `attack.test`."""
    return {
        f"{attack.name}.{test.name}": (attack, test) for attack in ATTACKS.values() for test in attack.tests
    }

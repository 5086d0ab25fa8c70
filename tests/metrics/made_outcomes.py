"""Outcomes with given mean losses, for tests of metrics."""

from palinode.records import Likelihood, Outcome


def answers(losses):
    """Alternatives with these mean losses, each over two tokens."""
    return tuple(Likelihood(f"answer {place}", (-loss, -loss)) for place, loss in enumerate(losses))


def outcome(row=0, *, loss=1.0, paraphrased=None, perturbed=(), **fields):
    """An outcome whose answer, paraphrase and wrong answers have the mean losses given."""
    alternatives = {
        "paraphrased": answers([] if paraphrased is None else [paraphrased]),
        "perturbed": answers(perturbed),
    }
    known = {"prompt": f"question {row}?", "expected": f"answer {row}", "generated": None, "hits": ()}
    return Outcome(
        **{"row": row, "logprobs": (-loss, -loss), "alternatives": alternatives, **known, **fields}
    )

"""Live models: loading them, their likelihoods and answers, and sums put into them in place."""

from palinode.models.generation import generate
from palinode.models.inplace import CombinedLogits, put
from palinode.models.likelihoods import score_rows
from palinode.models.loading import load_model, load_tokenizer, pad_token, pick_device
from palinode.models.reading import answer_logits, answer_nll

__all__ = [
    "CombinedLogits", "answer_logits", "answer_nll", "generate", "load_model", "load_tokenizer", "pad_token",
    "pick_device", "put", "score_rows",
]  # fmt: skip

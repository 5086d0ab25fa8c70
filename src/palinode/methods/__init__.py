"""Unlearning methods, one file each, in a plain table."""

from palinode.methods.apply import apply
from palinode.methods.gradient import GRAD_ASCENT, GRAD_DIFF, IDK_NLL, KL_MIN, RETAIN_FINETUNE
from palinode.methods.method import Method, MethodSettings
from palinode.methods.msa import GIVEN, MSA, PAIRED, REWIND, TASK_VECTOR
from palinode.methods.preference import ALTPO, DPO, NPO, SIMNPO
from palinode.methods.rmu import RMU
from palinode.methods.two_runs import TIES, WHP, WHP_LOGITS
from palinode.methods.weighted import CE_U, PDU, SATIMP, UNDIAL, WGA

METHODS: dict[str, Method] = {
    "msa": MSA,
    "task_vector": TASK_VECTOR,
    "paired": PAIRED,
    "given": GIVEN,
    "grad_ascent": GRAD_ASCENT,
    "grad_diff": GRAD_DIFF,
    "kl_min": KL_MIN,
    "npo": NPO,
    "simnpo": SIMNPO,
    "dpo": DPO,
    "idk_nll": IDK_NLL,
    "altpo": ALTPO,
    "rmu": RMU,
    "undial": UNDIAL,
    "wga": WGA,
    "satimp": SATIMP,
    "ce_u": CE_U,
    "pdu": PDU,
    "retain_finetune": RETAIN_FINETUNE,
    "rewind": REWIND,
    "ties": TIES,
    "whp": WHP,
    "whp_logits": WHP_LOGITS,
}

__all__ = ["METHODS", "Method", "MethodSettings", "apply"]

"""Unlearning methods, one file each, in a plain table."""

from palinode.methods.altpo import ALTPO
from palinode.methods.apply import apply
from palinode.methods.ce_u import CE_U
from palinode.methods.dpo import DPO
from palinode.methods.grad_ascent import GRAD_ASCENT
from palinode.methods.grad_diff import GRAD_DIFF
from palinode.methods.idk_nll import IDK_NLL
from palinode.methods.kl_min import KL_MIN
from palinode.methods.method import Method, MethodSettings
from palinode.methods.msa import MSA, unlearned_point
from palinode.methods.npo import NPO
from palinode.methods.paired import PAIRED
from palinode.methods.pdu import PDU
from palinode.methods.retain_finetune import RETAIN_FINETUNE
from palinode.methods.rewind import REWIND
from palinode.methods.rmu import RMU
from palinode.methods.satimp import SATIMP
from palinode.methods.simnpo import SIMNPO
from palinode.methods.task_vector import TASK_VECTOR
from palinode.methods.undial import UNDIAL
from palinode.methods.wga import WGA
from palinode.methods.whp import WHP, WHP_LOGITS

METHODS: dict[str, Method] = {
    "msa": MSA,
    "task_vector": TASK_VECTOR,
    "paired": PAIRED,
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
    "whp": WHP,
    "whp_logits": WHP_LOGITS,
}

__all__ = ["METHODS", "Method", "MethodSettings", "apply", "unlearned_point"]

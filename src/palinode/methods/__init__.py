"""Unlearning methods, one file each, in a plain table."""

from palinode.methods.apply import apply
from palinode.methods.msa import MSA, Method, unlearned_point
from palinode.methods.task_vector import TASK_VECTOR

METHODS: dict[str, Method] = {
    "msa": MSA,
    "task_vector": TASK_VECTOR,
}

__all__ = ["METHODS", "Method", "apply", "unlearned_point"]

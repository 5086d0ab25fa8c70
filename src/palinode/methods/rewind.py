"""Rewind-to-delete (Mu and Klabjan, arXiv 2409.09778): fine-tune an earlier checkpoint on retain rows.

L = CE(B_r) from θ_0, the checkpoint that MSA starts from. What the target learned elsewhere is lost with
it. The paper's certificate adds Gaussian noise to the weights, which is left out here.
"""

from palinode.methods.method import Method
from palinode.methods.retain_finetune import RetainOnlySettings, objective

REWIND = Method(
    name="rewind",
    summary="rewind-to-delete: plain fine-tuning of the base checkpoint on retain rows",
    source="Mu and Klabjan, arXiv 2409.09778",
    formula="L = CE(retain), from the base checkpoint",
    kind="training",
    needs=frozenset({"retain", "base"}),
    settings=RetainOnlySettings,
    start=lambda target, base: base,  # noqa: ARG005
    objective=objective,
)

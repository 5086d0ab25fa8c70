"""Task-vector negation (Ilharco et al., arXiv 2212.04089): θ_u = θ_D − α(θ_ft − θ_D).

The same arithmetic as MSA with θ_0 := θ_D: the target itself is fine-tuned on the forget set. It needs
no earlier checkpoint; the paper reports it as clearly weaker (docs/lab-notes.md has what we saw).
"""

from palinode.methods.method import Method
from palinode.methods.msa import VectorSettings

TASK_VECTOR = Method(
    name="task_vector",
    summary="task-vector negation: vectors from the target itself",
    source="Ilharco et al. 2023, arXiv 2212.04089",
    formula="θ_D − α(θ_ft − θ_D)",
    needs=frozenset({"base"}),  # for the rule that chooses the scales
    settings=VectorSettings,
    start=lambda target, base: target,  # noqa: ARG005
)

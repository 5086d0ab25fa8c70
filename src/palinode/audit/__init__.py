"""Adversarial checks of a model that should have forgotten something (spec: metrics.md §9, §12).

Each attack is one function and measures one model with a stated budget; `findings` sets two models side by
side, row by row, and says what was found; `policy` says what may be.
"""

from palinode.audit.attack import BUDGETS, Attack, AttackResult, AttackTest, AuditBudget
from palinode.audit.attacks import ATTACKS
from palinode.audit.findings import Answer, Finding
from palinode.audit.material import AuditRows, read_material
from palinode.audit.policy import Policy, build_policy, load_policy

__all__ = [
    "ATTACKS",
    "BUDGETS",
    "Answer",
    "Attack",
    "AttackResult",
    "AttackTest",
    "AuditBudget",
    "AuditRows",
    "Finding",
    "Policy",
    "build_policy",
    "load_policy",
    "read_material",
]

"""Federated conditional diffusion for health records, and the fairness that its rows buy at each hospital.

Names are imported when they are first used, so that ``import mcrage`` and the command line start fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mcrage.cddpm import CDDPM as CDDPM
    from mcrage.data.groups import Group as Group
    from mcrage.data.groups import GroupCounts as GroupCounts
    from mcrage.data.marginals import Marginals as Marginals
    from mcrage.data.reader import read_table as read_table
    from mcrage.data.schema import Column as Column
    from mcrage.data.schema import TableSchema as TableSchema
    from mcrage.data.split import split_by_patient as split_by_patient
    from mcrage.data.transform import TableTransform as TableTransform
    from mcrage.diffusion.network import ModelConfig as ModelConfig
    from mcrage.errors import McrageError as McrageError
    from mcrage.marginal.generator import MarginalGenerator as MarginalGenerator
    from mcrage.rebalancing.plan import RebalancePlan as RebalancePlan
    from mcrage.training.local import TrainingConfig as TrainingConfig

__version__ = "0.1.0"

_HOME = {
    "CDDPM": "mcrage.cddpm",
    "Column": "mcrage.data.schema",
    "Group": "mcrage.data.groups",
    "GroupCounts": "mcrage.data.groups",
    "MarginalGenerator": "mcrage.marginal.generator",
    "Marginals": "mcrage.data.marginals",
    "McrageError": "mcrage.errors",
    "ModelConfig": "mcrage.diffusion.network",
    "RebalancePlan": "mcrage.rebalancing.plan",
    "TableSchema": "mcrage.data.schema",
    "TableTransform": "mcrage.data.transform",
    "TrainingConfig": "mcrage.training.local",
    "read_table": "mcrage.data.reader",
    "split_by_patient": "mcrage.data.split",
}

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'mcrage' has no attribute '{name}'")

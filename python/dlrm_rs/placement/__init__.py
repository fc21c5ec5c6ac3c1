"""Which tables are on the GPU and which in the memory of the host, and what a step then costs."""

from dlrm_rs.placement.hardware import Hardware
from dlrm_rs.placement.placed import PlacedEmbeddingBags
from dlrm_rs.placement.plan import Plan, TablePlan, plan

__all__ = ["Hardware", "PlacedEmbeddingBags", "Plan", "TablePlan", "plan"]

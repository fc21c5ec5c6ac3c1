"""Fused optimizers: the update of a table's rows happens inside backward, and no gradient of a table exists.

A spec, such as `Adagrad(lr=0.01)`, is given to a module; the module's `fused_optimizer` is then a
`torch.optim.Optimizer` over its tables, for learning-rate schedulers and checkpoints. The engine owns the state.

Since backward *is* the step, what torch does between the two cannot be had for these tables: gradient accumulation
over micro-batches, clipping by the norm of all gradients, and unscaling of a scaled loss. A module without a fused
optimizer does all of these.

Updates are lazy: a row that no bag of a step has stays as it is, and so does its state, as with
`torch.optim.SparseAdam`. Weight decay, too, touches only the rows of the step.
"""

from dlrm_rs.optim.fused import FusedOptimizer
from dlrm_rs.optim.specs import (
    FTRL,
    LAMB,
    LARSSGD,
    SGD,
    Adagrad,
    Adam,
    AdamW,
    OptimizerSpec,
    PartialRowWiseAdam,
    PartialRowWiseLAMB,
    RowWiseAdagrad,
    RowWiseRMSprop,
)

__all__ = [
    "FTRL",
    "LAMB",
    "LARSSGD",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "FusedOptimizer",
    "OptimizerSpec",
    "PartialRowWiseAdam",
    "PartialRowWiseLAMB",
    "RowWiseAdagrad",
    "RowWiseRMSprop",
]

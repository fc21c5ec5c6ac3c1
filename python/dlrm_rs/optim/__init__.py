"""Fused optimizers: the update of a table's rows happens inside backward, and no gradient of a table exists.

A spec, such as `Adagrad(lr=0.01)`, is given to a module; the module's `fused_optimizer` is then a
`torch.optim.Optimizer` over its tables, for learning-rate schedulers and checkpoints. The engine owns the state.

Two ways to step, by `update` of the spec:

- `"backward"`: every backward through a lookup *is* a step, whichever gradient was asked for: `torch.autograd.grad` of
  the weights of ids alone moves the rows, too, unless they are frozen. The fastest; but what torch does between the
  two, such as gradient accumulation, several lookups of a table in one graph as one step, or unscaling of a scaled
  loss, cannot be had. `torch.amp.GradScaler.step` refuses such an optimizer; a loss that is scaled in another way
  trains on scaled gradients.
- `"step"`: backward keeps the gradient of what was looked up (`B` rows, not those of the tables), and
  `fused_optimizer.step()` runs the update once, on the sums of all that was kept: the same bits as of one batch;
  `zero_grad()` drops it, that of the model or of another optimizer over its parameters as well. All of these work then
  as with torch's optimizers, `torch.amp.GradScaler` included. What is kept is the module's own: a copy of it has none.

`torch.nn.utils.clip_grad_norm_`, hooks and other optimizers do not see these gradients in either way; `clip_norm` and
`clip_value` are of the spec.

Updates are lazy: a row that no bag of a step has stays as it is, and so does its state, as with
`torch.optim.SparseAdam`. Weight decay, too, touches only the rows of the step.

Rows of every format are trained, in fp32 arithmetic. A quantized row is decoded, updated, and encoded again: scale and
bias from its smallest and largest element, codes rounded stochastically, so that the mean of what an element can become
is the element. If an element is infinite or NaN then, the whole row is NaN; `check_finite` refuses gradients that are
not finite, or so large that a sum of them might not be.
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

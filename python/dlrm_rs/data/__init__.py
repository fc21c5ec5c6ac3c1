"""Data to train on: a real set that comes with a Python package, and synthetic logs of any size.

`dlrm_rs.data.flights` needs the extra `dlrm_rs[demo]` and is therefore not imported here.
"""

from dlrm_rs.data.batch import Batch
from dlrm_rs.data.synthetic import SHAPES, ClickLog, Shape

__all__ = ["SHAPES", "Batch", "ClickLog", "Shape"]

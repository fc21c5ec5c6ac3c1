"""Tables on the CPU, dense layers on the device, and neither waits for the other."""

from dlrm_rs.pipeline.pipeline import Pipeline
from dlrm_rs.pipeline.timeline import Summary

__all__ = ["Pipeline", "Summary"]

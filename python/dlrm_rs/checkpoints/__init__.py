"""DLRMs that others have saved, as ours."""

from dlrm_rs.checkpoints.load import DLRMCheckpoint, load_dlrm_checkpoint

__all__ = ["DLRMCheckpoint", "load_dlrm_checkpoint"]

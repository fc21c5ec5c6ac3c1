"""Where dense layers run, and the copies between there and the tables."""

from dlrm_rs.devices.device import CPU, CpuDevice, CudaDevice, Device, output_device
from dlrm_rs.devices.stand_in import StandIn

__all__ = ["CPU", "CpuDevice", "CudaDevice", "Device", "StandIn", "output_device"]

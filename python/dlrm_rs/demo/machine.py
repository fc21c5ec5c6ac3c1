"""What a measurement ran on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dlrm_rs


def describe_machine() -> dict[str, Any]:
    """Processor, system, versions, the time, and the commit if the working directory is a checkout of this project.

    Example:
        >>> sorted(describe_machine())[:4]
        ['commit', 'cores', 'dlrm_rs', 'numpy']
    """
    packages = ("torch", "numpy", "pandas", "scikit-learn")
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "dlrm_rs": dlrm_rs.__version__,
        "simd": dlrm_rs.info()["simd"],
        "commit": _commit(),
    }


def _processor() -> str:
    """The processor's name, which `platform.processor()` does not give on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str | None:
    """The commit that the working directory has checked out, marked if files differ; None outside a checkout."""
    git = shutil.which("git")
    if git is None or not Path("rust/dlrm-core").is_dir():
        return None
    described = subprocess.run(
        [git, "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or None

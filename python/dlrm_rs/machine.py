"""What a measurement ran on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from time import sleep
from typing import Any

import dlrm_rs


def describe_machine(packages: Sequence[str] = ()) -> dict[str, Any]:
    """Processor, load, memory, system, versions, the time, the commit if run in a checkout of this project.

    Args:
        packages: Whose versions matter beside those of torch and NumPy; one that is not installed gets None.

    Example:
        >>> machine = describe_machine(["no-such-package"])
        >>> machine["dlrm_rs"] == dlrm_rs.__version__, machine["no-such-package"]
        (True, None)
    """
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "load": os.getloadavg()[0],
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "huge_pages": _content("/sys/kernel/mm/transparent_hugepage/enabled"),
        "level_3_cache": _content("/sys/devices/system/cpu/cpu0/cache/index3/size"),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "numpy", *packages)},
        "dlrm_rs": dlrm_rs.__version__,
        "simd": dlrm_rs.info()["simd"],
        "commit": _commit(),
    }


def busy_share(seconds: float = 1.0) -> float:
    """The share of their time that the CPUs that this process may use are busy, while it sleeps: with other work.

    The load average would count what this process or the one before has just done.

    Args:
        seconds: For how long it looks.

    Raises:
        OSError: The system is not Linux.

    Example:
        >>> 0 <= busy_share(0.05) <= 1
        True
    """
    before = _cpu_times()
    sleep(seconds)
    passed = [now - then for now, then in zip(_cpu_times(), before, strict=True)]
    idle = passed[3] + passed[4]  # waiting for a disk is idle too
    return max(0.0, 1 - idle / max(1, sum(passed)))


def _cpu_times() -> list[int]:
    """Of the CPUs that this process may use, from /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal."""
    names = {f"cpu{cpu}" for cpu in os.sched_getaffinity(0)}
    lines = (line.split() for line in Path("/proc/stat").read_text(encoding="utf-8").splitlines())
    return [sum(times) for times in zip(*(map(int, line[1:9]) for line in lines if line[0] in names), strict=True)]


def cache_bytes() -> int:
    """Bytes of the level 3 caches of the CPUs that this process may use; 0 where Linux does not tell.

    Example:
        >>> cache_bytes() >= 0
        True
    """
    sizes: dict[str, int] = {}  # by the CPUs that share a cache
    for cpu in os.sched_getaffinity(0):
        folder = f"/sys/devices/system/cpu/cpu{cpu}/cache/index3"
        size, shared = _content(f"{folder}/size"), _content(f"{folder}/shared_cpu_list")
        if size and shared:
            sizes[shared] = int(size.removesuffix("K")) << 10
    return sum(sizes.values())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _content(path: str) -> str | None:
    """What Linux says in a file; None where there is no such file."""
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _processor() -> str:
    """The processor's name, and its numbers, as a virtual machine may call several kinds "AMD EPYC".

    `platform.processor()` does not give it on Linux.
    """
    first, _, _ = (_content("/proc/cpuinfo") or "").partition("\n\n")
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    numbers = [f"{name.split()[-1]} {fields[name]}" for name in ("cpu family", "model", "stepping") if name in fields]
    name = fields.get("model name", platform.machine())
    return f"{name} ({', '.join(numbers)})" if numbers else name


def _commit() -> str | None:
    """The commit that the working directory has checked out, marked if files differ; None outside a checkout."""
    git = shutil.which("git")
    if git is None or not Path("rust/dlrm-core").is_dir():
        return None
    described = subprocess.run(
        [git, "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or None

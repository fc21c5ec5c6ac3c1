"""Kernels are one piece of code each: an instruction that is left as a call costs more than all that surrounds it."""

import shutil
import subprocess

import pytest

from dlrm_rs import _dlrm_rs

# What tells which instructions a CPU has, once.
ONCE = ("cpuid", "xgetbv")


def test_no_instruction_of_a_kernel_is_a_call() -> None:
    """What the standard library has for an instruction appears by name where a caller may not have that instruction.

    So it does for closures, which know nothing of the level that they are used at, where they are not inlined.
    """
    if shutil.which("nm") is None:
        pytest.skip("nm, of binutils, is not here")
    path = str(_dlrm_rs.__file__)
    names = subprocess.run(["nm", "--defined-only", path], capture_output=True, text=True, check=True).stdout.split()
    assert any("dlrm_core" in name for name in names)
    assert [name for name in names if "core_arch" in name and not any(once in name for once in ONCE)] == []

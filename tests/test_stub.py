"""The hand-written stub of the engine says what the built module has."""

import subprocess
import sys

import pytest

pytest.importorskip("mypy")


def test_the_stub_agrees_with_the_module() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "mypy.stubtest", "dlrm_rs._dlrm_rs"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr

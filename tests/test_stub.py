"""The hand-written stub of the engine says what the built module has."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")


def test_the_stub_agrees_with_the_module(tmp_path: Path) -> None:
    config = tmp_path / "mypy.ini"
    # The stub alone is read: torch, which the package imports, takes most of a minute.
    config.write_text("[mypy]\nfollow_imports = skip\n")
    options = ["--mypy-config-file", str(config)]
    command = [sys.executable, "-W", "ignore", "-m", "mypy.stubtest", *options, "dlrm_rs._dlrm_rs"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr

"""The types of the package, as a user's own `mypy --strict` sees them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")

TYPING = Path(__file__).parent / "typing"


def test_user_code_is_typed(tmp_path: Path) -> None:
    # No settings of this project's.
    options = ["--strict", "--config-file=", f"--cache-dir={tmp_path}", "--no-error-summary"]
    command = [sys.executable, "-W", "ignore", "-m", "mypy", *options, "user_code.py", "wrong_code.py"]
    ran = subprocess.run(command, cwd=TYPING, capture_output=True, text=True, check=False)
    lines = (TYPING / "wrong_code.py").read_text().splitlines()
    named = [(number, re.search(r"  # ([a-z-]+)$", line)) for number, line in enumerate(lines, 1)]
    expected = [("wrong_code.py", number, found[1]) for number, found in named if found]
    errors = re.findall(r"^(.*\.py):(\d+): error: .*\[([a-z-]+)\]$", ran.stdout, re.MULTILINE)
    assert [(file, int(number), code) for file, number, code in errors] == expected, ran.stdout + ran.stderr

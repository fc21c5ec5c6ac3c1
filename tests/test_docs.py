"""The code in the documentation runs: the blocks of a page one after another, as a reader would."""

import functools
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"

# These show calls on models and files that are the reader's, and commands.
NOT_RUN = {"torchrec.md", "reference_dlrm.md", "benchmarks.md"}

PAGES = sorted(page.name for page in DOCS.glob("*.md") if page.name not in NOT_RUN)


@pytest.mark.parametrize("page", PAGES)
def test_code_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    # The default backend takes half a minute to compile what `test_compile` compiles by it.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    names: dict[str, Any] = {"__name__": page}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's compiler has some of its own
        for number, block in enumerate(blocks):
            exec(compile(block, f"{page}, block {number}", "exec"), names)

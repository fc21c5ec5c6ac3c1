"""Examples in docstrings, which griffe knows as `Examples:` alone, are headed `Example:` here, as most are one."""

import re
from typing import Any

import griffe


class ExamplesSection(griffe.Extension):
    """Renames the section while docstrings are read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for every object that it has read."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)

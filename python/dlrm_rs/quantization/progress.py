"""A progress bar for work that takes long, where there is a terminal and rich to draw it with; else none."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import rich.progress

__all__ = ["Progress", "progress_bar"]

T = TypeVar("T")

# Tables of fewer bytes are done before a bar is seen.
_LONG = 1 << 30


class Progress:
    """What is told of the work as it goes on.

    Args:
        bar: What draws it, or None.
    """

    def __init__(self, bar: rich.progress.Progress | None) -> None:
        self._bar = bar

    def of(self, doing: str, items: Sequence[T], size: Callable[[T], int]) -> Iterator[T]:
        """The items, each told of as done when the next is asked for.

        Args:
            doing: What is done to them, in a word.
            items: All of them.
            size: What an item counts.
        """
        if self._bar is None:
            yield from items
            return
        task = self._bar.add_task(doing, total=sum(map(size, items)))
        for item in items:
            done = size(item)  # before the work changes it
            yield item
            self._bar.advance(task, done)

    @contextmanager
    def steps(self, doing: str) -> Iterator[Callable[[int, int], None] | None]:
        """A function to tell how many steps are done, and how many there may be; None without a bar."""
        if self._bar is None:
            yield None
            return
        bar = self._bar
        task = bar.add_task(doing, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def progress_bar(wanted: bool | None, total_bytes: int) -> Iterator[Progress]:
    """Show progress while the block runs.

    Args:
        wanted: Whether to; None for yes on a terminal, if there is much to do and rich is installed.
        total_bytes: Of the tables.

    Raises:
        ModuleNotFoundError: It is wanted, and rich is not installed.
    """
    if wanted is False or (wanted is None and (total_bytes < _LONG or not sys.stderr.isatty())):
        yield Progress(None)
        return
    try:
        from rich.console import Console
        from rich.progress import Progress as Bar
    except ModuleNotFoundError as error:
        if wanted is None:
            yield Progress(None)
            return
        raise ModuleNotFoundError('progress: rich is missing: pip install "dlrm_rs[demo]"', name="rich") from error
    with Bar(console=Console(stderr=True), transient=True) as bar:
        yield Progress(bar)

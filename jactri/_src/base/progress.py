"""What goes with every chunk: a progress bar, by rich or tqdm, and the journal of a result on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor

from .journal import Journal


class Watch:
    """Told of every chunk: moves the bar, keeps the journal, and knows what is written already."""

    def __init__(self, advance: Callable[[], None] | None, journal: Journal | None):
        self.advance, self.journal = advance, journal

    @property
    def ahead(self) -> bool:
        """Whether an interrupted call wrote the next chunk."""
        return self.journal is not None and self.journal.ahead

    def skip(self, parts: list[Tensor]) -> bool:
        """Whether the next chunk, that goes to ``parts`` of the results, is written already."""
        if self.journal is None or not self.journal.skip(parts):
            return False
        if self.advance:
            self.advance()
        return True

    def done(self, parts: list[Tensor]) -> None:
        """A chunk was written to ``parts``."""
        if self.journal is not None:
            self.journal.done(parts)
        if self.advance:
            self.advance()


@contextlib.contextmanager
def bar(total: int | None, what: str = "jacobian") -> Iterator[Callable[[], None]]:
    """A bar of ``total`` steps (None: not known) on standard error; yields the function that advances it by one.

    Raises ImportError if neither rich nor tqdm is installed.
    """
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )
    except ImportError:
        try:
            from tqdm import tqdm
        except ImportError:
            raise ImportError("progress=True needs rich or tqdm: pip install rich") from None
        with tqdm(total=total, desc=what) as shown:
            yield lambda: shown.update(1)
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as shown:
        task = shown.add_task(what, total=total)
        yield lambda: shown.advance(task)

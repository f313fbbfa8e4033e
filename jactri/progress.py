"""A progress bar over chunks, by rich or tqdm."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def bar(total: int) -> Iterator[Callable[[], None]]:
    """A bar of ``total`` steps on standard error; yields the function that advances it by one.

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
        with tqdm(total=total, desc="jacobian") as shown:
            yield lambda: shown.update(1)
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as shown:
        task = shown.add_task("jacobian", total=total)
        yield lambda: shown.advance(task)

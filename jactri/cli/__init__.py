"""``python -m jactri`` and ``jactri``: see `commands`."""

from .commands import main

__all__ = ["main"]

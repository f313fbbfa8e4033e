"""Writes into parts of one tensor, one after another: they wait for the last of them, and are read with it as one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from .behind import Walk

NAME = "torch::autograd::CopySlices"

Write = tuple[Any, list[int | None]]
"""A node, and the values of its edges: what was there before, and what is written."""


class Writes:
    """Those of a walk. ``outputs`` and ``ends``, nodes, are what is asked for besides."""

    __slots__ = ("_asked", "_followed", "_waiting", "_walk", "apart")

    def __init__(self, walk: Walk, outputs: Sequence[Tensor], ends: Iterable[object]):
        self._walk, self._asked = walk, (outputs, ends)
        self._followed: set[object] | None = None
        self._waiting: dict[object, list[Write]] = {}
        self.apart: set[object] = set()
        """Those that are to be read by themselves."""

    def until(self, node, src: list[int | None]) -> list[Write]:
        """A write, and those before it that waited for it."""
        writes = self._waiting.pop(node.next_functions[0][0], [])
        writes.append((node, src))
        return writes

    def wait(self, writes: list[Write]) -> bool:
        """Let them wait, if another write into their result follows, and nothing else is done with it."""
        node = writes[-1][0]
        if self._followed is None:
            self._followed = self._find(node.__class__)
        if node not in self._followed:
            return False
        self._waiting[node] = writes
        return True

    def _find(self, kind: Any) -> set[object]:
        users: dict[object, list[bool]] = {}
        for user, edges in self._walk.edges.items():
            writes = user.__class__ is kind and user.name() == NAME
            for k, (p, _) in enumerate(edges):
                if p.__class__ is kind:
                    users.setdefault(p, []).append(writes and k == 0)
        outputs, ends = self._asked
        asked = {y.grad_fn for y in outputs}.union(ends)
        return {p for p, by in users.items() if by == [True] and p not in asked}

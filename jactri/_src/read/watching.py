"""What a graph that is kept was read from, and whether any of it was written to since, by autograd's version counters.

Maps hold tensors that nodes saved. Autograd looks at their counters when it unpacks them; what is held is not unpacked
again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from ..base import backends
from .graph import Reader


class Watching(Reader):
    """A reader that notes the tensors that were saved, and their versions.

    Those of checkpointed segments are not held: they are nobody else's, and computed anew.
    """

    def __init__(self):
        super().__init__()
        self.seen = Seen()

    def saved(self, name: str):
        group = self.recomputed.group
        before = 0 if group is None else group.reads
        value = super().saved(name)
        if isinstance(value, Tensor) and (group is None or group.reads == before):
            self.seen.add(f"a tensor of shape {tuple(value.shape)} that {self.name} saved", value)
        return value

    def later(self):
        if self.record.form is not None and backends.kernels_on(self.device):
            self.saved(
                self.record.form(self.saved).saved
            )  # kernels keep it, once they asked for it
        return super().later()


class Seen:
    """Tensors by what they are, with their versions when they were added."""

    __slots__ = ("_all",)

    def __init__(self):
        self._all: dict[int, tuple[str, Tensor, int]] = {}

    def add(self, name: str, x: Tensor) -> None:
        if not x.is_inference():  # which has no version, and no derivative
            self._all.setdefault(id(x), (name, x, x._version))

    def __iter__(self) -> Iterator[tuple[str, Tensor, int]]:
        return iter(self._all.values())

    def written(self) -> str | None:
        """What was written to since, or None."""
        return next((name for name, x, version in self if x._version != version), None)

    def add_all(self, name: str, tensors: Iterable[Tensor]) -> None:
        """Those of one kind, by their numbers."""
        for i, x in enumerate(tensors):
            self.add(f"{name}[{i}]", x)

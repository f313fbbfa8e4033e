"""Operands between guard zones: reading beside an input gives NaN, writing beside an output is found."""

import torch

ZONE = 64
SENTINEL = 12345.0


def packed(shape, order=None):
    """Strides of a dense tensor whose axes vary from slow to fast in ``order`` (by default as they come)."""
    strides, step = [0] * len(shape), 1
    for a in reversed(order or range(len(shape))):
        strides[a], step = step, step * max(shape[a], 1)
    return tuple(strides)


def _span(shape, strides):
    return (
        sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1 if 0 not in shape else 0
    )


def guarded(t, order=None, gap=1):
    """A copy of ``t`` with NaN everywhere around it: its axes in the memory order ``order``, entries ``gap`` apart.

    Axes of stride 0 (broadcast) stay so.
    """
    once = t[tuple(slice(0, 1) if s == 0 else slice(None) for s in t.stride())]
    strides = tuple(gap * s for s in packed(once.shape, order))
    buffer = torch.full(
        (_span(once.shape, strides) + 2 * ZONE,), float("nan"), dtype=t.dtype, device=t.device
    )
    view = buffer.as_strided(once.shape, strides, ZONE)
    view.copy_(once)
    return view.expand(t.shape)


class Canvas:
    """An output: ``view`` is full of NaN, and everything around it holds a sentinel."""

    def __init__(self, shape, dtype, device, order=None, gap=1):
        strides = tuple(gap * s for s in packed(shape, order))
        length = _span(shape, strides) + 2 * ZONE
        self.buffer = torch.full((length,), SENTINEL, dtype=dtype, device=device)
        self.view = self.buffer.as_strided(shape, strides, ZONE)
        self.view.fill_(float("nan"))

    def check(self):
        """Every element was written, and nothing else."""
        assert not self.view.isnan().any(), (
            "an element was not written, or came out of a guard zone"
        )
        self.view.fill_(SENTINEL)
        wanted = torch.full_like(self.buffer, SENTINEL)
        assert torch.equal(self.buffer, wanted), "a guard zone was written to"

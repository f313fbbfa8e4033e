"""Attention with tangents or cotangents, as a problem for `chooser`: by kernels, or tile by tile in torch's ops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...kernels import support
from .chooser import Offer, Way, dots

CHECKED_SCORES = 1 << 22
"""Scores that are computed in float64, to check a kernel's result: those of a sample at the least."""


@dataclass(frozen=True)
class AttentionKind:
    """What a choice depends on; ``batch`` is the power of two at or above the number of samples."""

    reverse: bool
    columns: int
    batch: int
    heads: int
    groups: int
    queries: int
    keys: int
    widths: tuple[int, int]
    wanted: tuple[bool, bool, bool]
    """Of q, k and v."""
    seen: str
    causal: bool
    dtype: torch.dtype
    precision: str
    device: torch.device

    @classmethod
    def of(cls, reverse, columns, sizes, wanted, seen, causal, dtype, device) -> AttentionKind:
        """``sizes``: B, H, G, T, S, d, e."""
        B, H, G, T, S, d, e = sizes
        return cls(
            reverse, columns, support.power_of_two(B), H, G, T, S, (d, e), wanted, seen, causal, dtype,
            support.precision(dtype), device,
        )  # fmt: skip

    @property
    def each(self) -> float:
        """Flops for a tangent or cotangent."""
        (d, e), (of_q, of_k, of_v) = self.widths, self.wanted
        products = d * (of_q + of_k) + e * ((of_q or of_k) + of_v)
        return 2.0 * self.batch * self.heads * self.queries * self.keys * products

    @property
    def flops(self) -> float:
        scores = 2.0 * self.batch * self.heads * self.queries * self.keys * self.widths[0]
        return scores + self.columns * self.each

    @property
    def bytes(self) -> float:
        d, e = self.widths
        ends = self.heads * self.queries * (d + e) + self.groups * self.keys * (d + e)
        return float(self.batch * (1 + self.columns) * ends * self.dtype.itemsize)

    def offers(self) -> list[Offer]:
        """The kernel, its tiles and ways to multiply."""
        from ...kernels import attention

        configs = attention.configs(*self.widths, self.columns)
        name = f"attention {'pull' if self.reverse else 'push'}"
        return [(((name, 1),), configs, dots(self.precision))] if configs else []

    def plain(self) -> dict[str, object]:
        """As plain data, for reports."""
        return {
            "reverse": self.reverse, "columns": self.columns, "batch": self.batch, "heads": self.heads,
            "groups": self.groups, "queries": self.queries, "keys": self.keys, "widths": self.widths,
            "wanted": self.wanted, "seen": self.seen, "causal": self.causal, "precision": self.precision,
            "dtype": str(self.dtype),
        }  # fmt: skip


@dataclass
class Product:
    """One to run. ``steps(n, dtype)`` and ``kernels(n, way, out)`` give the result for the first n of the samples."""

    what: AttentionKind
    samples: int
    steps: Callable[[int, torch.dtype | None], Tensor]
    kernels: Callable[[int, Way, Any], Tensor]

    def kind(self) -> AttentionKind:
        return self.what

    def timed(self) -> Product:
        return self

    def few(self) -> Product:
        k = self.what
        scores = k.columns * k.heads * k.queries * k.keys
        return replace(self, samples=min(self.samples, max(1, CHECKED_SCORES // max(scores, 1))))

    def torch(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.steps(self.samples, dtype)

    def launch(self, way: Way, out: Any = None) -> Tensor:
        return self.kernels(self.samples, way, out)

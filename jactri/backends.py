"""Which implementation runs a step, and why.

On the CPU a product of a tangent block with a weight goes to oneDNN or to ``torch.mm``: on some machines
``torch.mm`` (MKL) reaches half of oneDNN's rate, on others there is nothing to gain. Both are timed once a
process, on one product that stays in cache, when the first large product comes by.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

_SMALL = 1 << 21
"""Products below this many multiply-adds are bound by call overhead, where torch.mm is the cheapest."""


@dataclass(frozen=True)
class Probe:
    """What the one-time comparison of oneDNN with torch.mm found: milliseconds for one product of each."""

    onednn_ms: float | None
    mm_ms: float | None
    reason: str

    @property
    def use_onednn(self) -> bool:
        return self.onednn_ms is not None and self.onednn_ms < 0.9 * self.mm_ms


_probe: Probe | None = None


def _linear_pointwise():
    """The private oneDNN product, or None: the one place that knows its name and its argument list."""
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.t()``."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def probe() -> Probe:
    """Time both products once a process (about 10 ms); later calls return the same answer."""
    global _probe
    if _probe is None:
        _probe = _measure()
    return _probe


def _measure() -> Probe:
    if _linear_pointwise() is None:
        return Probe(None, None, "this build of torch has no oneDNN product: torch.mm")
    with torch.inference_mode(False), torch.no_grad():
        a, b = torch.ones(1024, 256), torch.ones(256, 256)  # square: b.t() is as good
        times = {}
        for name, call in (("onednn", _onednn), ("mm", torch.mm)):
            call(a, b)
            runs = []
            for _ in range(5):
                start = time.perf_counter()
                call(a, b)
                runs.append(time.perf_counter() - start)
            times[name] = 1e3 * sorted(runs)[2]
    ratio = times["mm"] / times["onednn"]
    return Probe(times["onednn"], times["mm"], f"oneDNN {ratio:.2f} times the rate of torch.mm")


def product(t: Tensor, p: Tensor, transposed: bool) -> Tensor:
    """``t @ p`` (``t @ p.t()`` if ``transposed``) for a block ``t`` and a 2-D ``p``, by what measured faster."""
    if (
        t.numel() * p.shape[0 if transposed else 1] >= _SMALL
        and t.dtype == torch.float32
        and t.device.type == "cpu"
        and not torch.is_grad_enabled()
        and torch.backends.mkldnn.enabled
        and probe().use_onednn
    ):
        out = _onednn(t.reshape(-1, t.shape[-1]), p if transposed else p.t())
    else:
        out = torch.mm(t.reshape(-1, t.shape[-1]), p.t() if transposed else p)
    return out.view(*t.shape[:-1], out.shape[1])


def product_choice(device: str, dtype: torch.dtype, flops: float) -> tuple[str, str]:
    """What `product` will use for a product of ``flops``, and why (for `explain`)."""
    if device != "cpu":
        return "torch.mm", f"on {device}"
    if dtype != torch.float32:
        return "torch.mm", str(dtype).removeprefix("torch.")
    if flops / 2 < _SMALL:
        return "torch.mm", "small"
    found = probe()
    return ("oneDNN" if found.use_onednn else "torch.mm"), found.reason

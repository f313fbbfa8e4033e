"""Which implementation runs a step, and why.

On a CUDA device (and in Triton's interpreter, when it is asked for) blocks go to Triton kernels where those cover the
step; see `kernels_for`, and `chooser` for which. On the CPU a product of a tangent block with a weight goes to oneDNN
or to ``torch.mm``: on some machines ``torch.mm`` (MKL) reaches half of oneDNN's rate, on others there is nothing to
gain. Both are timed once a process, on one product that stays in cache, when the first large product comes by.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
import warnings
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import support
from .remedies import one_of
from .tracing import aside, own, tracing

BACKENDS = ("auto", "torch", "triton")

asked: ContextVar[str] = ContextVar("backend", default="auto")
"""The backend of the call that runs."""

ready: ContextVar[support.Ready | None] = ContextVar("ready", default=None)
"""What the call that runs now has made of its matrices for kernels, which its chunks and sweeps share."""


class use:
    """A context in which blocks are computed by this backend."""

    __slots__ = ("_backend", "_token")

    def __init__(self, backend: str):
        self._backend = backend

    def __enter__(self) -> None:
        self._token = asked.set(self._backend)

    def __exit__(self, *error) -> None:
        asked.reset(self._token)


_packaged: ContextVar[bool] = ContextVar("packaged", default=False)


@contextlib.contextmanager
def packaging(package: bool = True):
    """A context whose ops are traced for a package, if it is one: no Python is in it, which launches kernels."""
    token = _packaged.set(package)
    try:
        yield
    finally:
        _packaged.reset(token)


def check_packaged(what: str, options: dict) -> None:
    """Raise where kernels are asked for of a call that becomes a package."""
    if options.get("backend") == "triton":
        raise RuntimeError(
            f"{what} and backend='triton' exclude each other: Python launches the kernels, and there is none in a "
            "package; pass backend='auto', or compile with engine='inductor'"
        )


def forced() -> bool:
    """Whether kernels are asked for by name, also where torch is faster."""
    return asked.get() == "triton"


def kernels_on(device: torch.device) -> bool:
    """Whether Triton kernels run for tensors on a device: they have no derivative, so only without grad mode."""
    backend = asked.get()
    if backend == "torch" or not (device.type == "cuda" or backend == "triton"):
        return False
    return not (torch.is_grad_enabled() or _packaged.get()) and support.missing() is None


def captured(device: torch.device) -> bool:
    """Whether ops go into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def capturing(device: torch.device) -> bool:
    """Whether ops go into a CUDA graph or a trace, where no value can be read."""
    return tracing() or captured(device)


def kernels_for(t: Tensor) -> bool:
    """Whether blocks like ``t`` go to Triton kernels, where one covers the step."""
    return kernels_on(t.device) and support.computes(t.dtype)


def check_asked(backend: str, device: torch.device, create_graph: bool) -> None:
    """Raise for a backend that does not exist, or Triton where it cannot run."""
    if backend == "auto":
        return
    if backend not in BACKENDS:
        raise ValueError(one_of("backend", backend, BACKENDS))
    if backend != "triton":
        return
    if create_graph:
        raise RuntimeError(
            "backend='triton' and create_graph=True exclude each other: the kernels have no derivative; "
            "pass backend='auto'"
        )
    if (why := support.missing()) is not None:
        raise RuntimeError(f"backend='triton': {why}; install triton, or pass backend='auto'")
    if device is not None and device.type != "cuda" and not support.interpreted():
        raise RuntimeError(
            f"backend='triton' needs inputs on a CUDA device, got {device}; pass backend='auto', or set "
            "TRITON_INTERPRET=1 before Python starts, to run the kernels slowly on the CPU"
        )


_log = logging.getLogger("jactri")
_warned = False


def unfit(kernel: str, error: support.Unfit) -> None:
    """Note that a kernel does not run for a shape on this device: logged, and one warning a process."""
    global _warned
    _log.info("the kernel %s is not used: %s", kernel, error)
    if not _warned:
        _warned = True
        warnings.warn(
            f"jactri: the Triton kernel {kernel} does not run here ({error}); torch takes its place. Further "
            "kernels are reported by the logger 'jactri' only",
            RuntimeWarning,
            stacklevel=2,
        )


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


@functools.cache
def _onednn_op():
    """The same as an op of a graph that Inductor compiles: of torch's own it takes constant matrices alone."""
    made = torch.library.Library("jactri", "FRAGMENT")
    made.define("linear(Tensor a, Tensor b) -> Tensor")
    made.impl("linear", lambda a, b: _onednn(a, b), "CPU")
    made.impl("linear", lambda a, b: a.new_empty(a.shape[0], b.shape[0]), "Meta")
    return made, torch.ops.jactri.linear.default  # which is there as long as what made it


def probe() -> Probe:
    """Time both products once a process (about 15 ms); later calls return the same answer."""
    global _probe
    if _probe is None:
        _probe = _measure()
    return _probe


def _measure() -> Probe:
    if _linear_pointwise() is None:
        return Probe(None, None, "this build of torch has no oneDNN product: torch.mm")
    with aside(), torch.inference_mode(False), torch.no_grad():
        a, b = torch.ones(1024, 256), torch.ones(256, 256)  # square: b.t() is as good
        times = {"onednn": float("inf"), "mm": float("inf")}
        # in turns, the first ones not counted, and the best of each: what disturbs may disturb one alone
        for run in range(12):
            for name, call in (("onednn", _onednn), ("mm", torch.mm)):
                start = time.perf_counter()
                call(a, b)
                taken = time.perf_counter() - start
                if run > 3:
                    times[name] = min(times[name], 1e3 * taken)
    ratio = times["mm"] / times["onednn"]
    return Probe(times["onednn"], times["mm"], f"oneDNN {ratio:.2f} times the rate of torch.mm")


def onednn_for(t: Tensor, work: int) -> bool:
    """Whether a product of ``t`` that takes so many multiply-adds is oneDNN's, without grad mode.

    Not in graphs that others trace, nor in packages, whose ops are torch's public ones.
    """
    return (
        work >= _SMALL
        and (not tracing() or (own() and not _packaged.get()))
        and t.dtype == torch.float32
        and t.device.type == "cpu"
        and torch.backends.mkldnn.enabled
        and probe().use_onednn
    )


def product(t: Tensor, p: Tensor, transposed: bool) -> Tensor:
    """``t @ p`` (``t @ p.t()`` if ``transposed``) for a block ``t`` and a 2-D ``p``, by what measured faster."""
    work = t.numel() * p.shape[0 if transposed else 1]
    if work >= _SMALL and not torch.is_grad_enabled() and onednn_for(t, work):
        multiply = _onednn_op()[1] if tracing() else _onednn
        out = multiply(t.reshape(-1, t.shape[-1]), p if transposed else p.t())
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

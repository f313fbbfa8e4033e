"""What every launcher needs: whether Triton runs here, torch's precision, offsets, and which faults mean "not here"."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import _len_torch_dispatch_stack

OLDEST = (3, 6)
"""The oldest triton that the kernels were written for and are compiled with in the tests."""

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALF)
"""What the kernels compute in; float64 goes to torch, where the tensor cores have it natively."""


@dataclass(frozen=True)
class Factor:
    """A diagonal for a kernel: ``name`` of `activations.DERIVATIVES` applied to ``values``.

    ``values`` has the shape of one block without its seeds, through strides of 0 where it is broadcast. ``second``,
    of the same shape: the second derivative beside a ready one, for a Laplacian; None for zero.
    """

    values: Tensor
    name: str = "ready"
    constants: tuple[float, ...] = ()
    second: Tensor | None = None


FORMED_FROM, FORMED_WORK = 8, 1 << 22
"""Uses of an element, and of all together, from which a costly derivative is formed once, ahead of a product.

Counted for an H100: a kernel of products, which issues instructions all the time, takes 0.5 ps (silu) to 1.4 ps (gelu)
a use; to form an element once takes 2.7 ps of memory, and a launch. Kernels bound by memory form it for nothing.
"""


def formed_once(f: Factor, uses: int) -> bool:
    """Whether a derivative, of which products use each element so often, is to be formed ahead of them."""
    if uses < FORMED_FROM or uses * f.values.numel() < FORMED_WORK:
        return False
    from .activations import DERIVATIVES

    return DERIVATIVES[f.name].costly


MOST_READY = 1 << 26
"""Bytes of prepared matrices that a call keeps for further uses of them; the last ones in any case."""


class Ready(dict):
    """What one call has made of its matrices so far: chunks and sweeps after the first find it here.

    By where a matrix lies, its look, and how it was made. An entry holds the matrix, so that no other tensor comes to
    lie at its address.
    """

    def find(self, m: Tensor, how: Hashable):
        """What was made of a matrix that way, or None."""
        found = self.get(_place(m, how))
        return None if found is None else found[0]

    def keep(self, made: Sequence[tuple[Tensor, object]], how: Hashable, size: int) -> None:
        """Note what was made of matrices, in one tensor of ``size`` bytes; the oldest go where they are too many."""
        while self and size + sum(n for *_, n in self.values()) > MOST_READY:
            del self[next(iter(self))]
        self.update({_place(m, how): (what, m, size / len(made)) for m, what in made})


def _place(m: Tensor, how: Hashable) -> tuple:
    return address(m), m.shape, m.stride(), m.dtype, how


def address(t: Tensor) -> int:
    """Where the first element is; in a trace, whose tensors have no memory, as if all storages were aligned."""
    if not _len_torch_dispatch_stack():
        return t.data_ptr()
    from torch._subclasses.fake_tensor import FakeTensor

    if not isinstance(t, FakeTensor):
        return t.data_ptr()
    return (t.untyped_storage()._cdata << 8) + t.storage_offset() * t.element_size()


def factor(f: Factor | None):
    """A diagonal as a launcher takes it: tensor, strides of a (rows, features) one, derivative, constants."""
    from .activations import DERIVATIVES

    if f is None:
        return None, (0, 0), None, ()
    return f.values, f.values.stride(), DERIVATIVES[f.name].function, f.constants


class Unfit(Exception):
    """A kernel cannot run for these shapes on this device: out of resources, or it does not compile there."""


def interpreted() -> bool:
    """Whether this process runs kernels in Triton's CPU interpreter (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


interpreter_rounds = False
"""Set by the tests, whose interpreter multiplies bfloat16: Triton's own does not, and gives garbage without a word."""


def computes(dtype: torch.dtype) -> bool:
    """Whether kernels take blocks of this dtype in this process."""
    if dtype is torch.bfloat16 and interpreted():
        return interpreter_rounds
    return dtype in DTYPES


@functools.cache
def missing() -> str | None:
    """Why Triton cannot be used in this process, or None where it can. Imports triton."""
    try:
        import triton
    except ImportError as error:
        return f"triton does not import ({error})"
    version = tuple(int(p) for p in triton.__version__.split(".")[:2])
    if version < OLDEST:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, OLDEST))}"
    return None


def precision(dtype: torch.dtype) -> str:
    """How exact products of this dtype have to be: "fp32", "tf32" where torch allows it, or "half".

    Follows ``torch.backends.cuda.matmul.fp32_precision``, which ``torch.set_float32_matmul_precision`` and
    ``allow_tf32`` set too.
    """
    if dtype in HALF:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "fp32"


def convolution_precision(dtype: torch.dtype) -> str:
    """`precision` for convolutions, which torch allows tf32 on their own: by default it does.

    ``torch.backends.cudnn.conv.fp32_precision`` is what cuDNN goes by: ``cudnn.allow_tf32`` writes it, and where it is
    unset it reads as ``cudnn.fp32_precision`` or ``torch.backends.fp32_precision``.
    """
    if dtype in HALF:
        return "half"
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "fp32"


def wide(*tensors: Tensor | None) -> bool:
    """Whether an element of any of the tensors is 2^31 or more elements away from its first."""
    return any(
        sum((n - 1) * abs(s) for n, s in zip(t.shape, t.stride(), strict=True)) >= 1 << 31
        for t in tensors
        if t is not None and t.numel()
    )


def on_device(t: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's device the current one: Triton launches there, on torch's current stream."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


@functools.cache
def _faults() -> tuple[type[Exception], ...]:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return OutOfResources, CompilationError, PTXASError


@contextlib.contextmanager
def fitting() -> Iterator[None]:
    """Turns the faults that say "not for this shape, or not on this device" into `Unfit`; others pass."""
    try:
        yield
    except _faults() as error:
        raise Unfit(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}") from error
    except RuntimeError as error:  # what a failed lowering pass raises has no type of its own
        if "PassManager" not in str(error):
            raise
        raise Unfit(f"the compiler failed: {str(error).strip().splitlines()[0]}") from error


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``n`` and ``least``."""
    return max(least, 1 << max(n - 1, 0).bit_length())

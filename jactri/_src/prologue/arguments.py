"""What a caller passes, checked: each error is the type that torch raises, and names what was given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from ..base import backends
from ..base.elsewhere import check_local
from ..base.remedies import instead_of, nearest, of_shape, one_of, returned
from ..run.blocks import Sizes
from ..run.formed import FORMS

ASSUME = "assume"
"""As ``per_sample``: that samples do not mix is the caller's word."""

HESSIAN = "the Hessian"
"""As ``what``: the answer is the Jacobian of a gradient."""

STRATEGIES = ("auto", "forward-mode", "reverse-mode", "mixed")


@dataclass(slots=True)
class Options:
    """What a call was asked for, beside its function and inputs; each call has some of it.

    ``out``: the caller's tensors and arrays, by output and input. ``form`` is that of the answer, as `formed.Formed`
    names it, which `taken` finds from its ``layout``; ``handles`` that of `graph.read`; ``what`` names the answer in
    refusals, ``of``: see `planning.Wanted`. ``blocksize``: the caller's, then `blocks.Sizes`. ``pattern``: the
    caller's, then by output and input as `patterns.taken_pattern` gives it; ``check``: whether it is to be tested.
    ``ranks``: the `agreement.Ranks` that have a part of the answer each; ``whole``: in the end all have all of it;
    ``told``: more that they compare, by what it is.
    ``unformed``: whether values are asked for where a sparse answer would be, as `formed.Unformed`.
    """

    create_graph: bool = False
    chunk_size: int | None = None
    memory_limit: int | str | None = None
    backend: str | None = "auto"
    per_sample: bool | str = False
    strategy: str = "auto"
    strict: bool = False
    progress: bool = False
    resume: bool = True
    out: Any = None
    layout: torch.layout | str = torch.strided
    handles: int | None = 0
    what: str = "the Jacobian"
    of: str | None = None
    form: str = "dense"
    blocksize: Any = None
    pattern: Any = None
    check: bool = False
    ranks: Any = None
    whole: bool = False
    told: dict[str, Any] | None = None
    unformed: bool = False

    @property
    def assume(self) -> bool:
        """Whether it is the caller's word that samples do not mix."""
        return self.per_sample == ASSUME

    def block(self, j: int, i: int) -> tuple[int, int] | None:
        """Rows and columns of a block of that output and input, in forms that have blocks."""
        return self.blocksize.of(j, i) if isinstance(self.blocksize, Sizes) else None


def taken(
    call: str, inputs: Any, asked: Options, name: str = "inputs"
) -> tuple[bool, tuple[Tensor, ...]]:
    """Whether the inputs of a call are a tuple, and they as one. Raises for what they or its options cannot be."""
    asked.form = form_of(asked.layout, asked.out)
    check_blocksize(asked.blocksize, asked.form)
    if asked.check and asked.pattern is None:
        raise ValueError(
            "check=True tests a pattern; pass pattern=, or call jactri.check(func, inputs)"
        )
    check_options(asked.strategy, asked.chunk_size, asked.out, asked.create_graph)
    tupled, xs = as_tuple(inputs, name, call)
    backends.check_asked(asked.backend, xs[0].device if xs else None, asked.create_graph)
    return tupled, xs


def check_options(strategy, chunk_size, out, create_graph) -> None:
    """Raise for an option out of range, and for two that exclude each other."""
    if strategy not in STRATEGIES:
        raise AssertionError(one_of("strategy", strategy, STRATEGIES))
    if chunk_size is not None and not (isinstance(chunk_size, int) and chunk_size > 0):
        raise ValueError(f"chunk_size must be a positive integer or None, got {chunk_size!r}")
    if not isinstance(create_graph, bool):
        got, remedy = repr(create_graph), "options are given by name"
        if isinstance(create_graph, Tensor):
            got, remedy = "a Tensor", "pass several inputs as one tuple: (x, y)"
        elif isinstance(create_graph, str) and create_graph in STRATEGIES:
            remedy = f"write strategy={create_graph!r}"
        raise TypeError(f"create_graph must be a bool, got {got}; {remedy}")
    if out is not None and create_graph:
        raise RuntimeError(
            "out= and create_graph=True exclude each other: a result written in place has no graph"
        )


_SPARSE = ("sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr")
_LAYOUTS = {
    **{name[-3:]: f"torch.{name}" for name in _SPARSE}, "banded": "'banded'", "dense": "torch.strided",
    **{f"torch.{name}": f"torch.{name}" for name in (*_SPARSE, "strided")},
    **{name: f"torch.{name}" for name in (*_SPARSE, "strided")},
}  # fmt: skip
"""What names of layouts stand for."""


def form_of(layout, out=None) -> str:
    """The form of the answer."""
    kind = FORMS.get(layout)
    if kind is None:
        close = nearest(layout, _LAYOUTS)
        raise ValueError(
            "layout must be torch.strided, torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr or "
            f"'banded', got {layout!r}"
            + ("" if close is None else f", did you mean {_LAYOUTS[close]}?")
        )
    if kind != "dense" and out is not None:
        raise RuntimeError(f"out= takes dense Jacobians; leave it out for layout={layout}")
    return kind


def check_blocksize(blocksize: Any, form: str) -> None:
    """Raise for what is no size of blocks, and for one that a form has no use for."""
    if blocksize is None:
        return
    if not isinstance(blocksize, (tuple, list)) or len(blocksize) != 2:
        raise TypeError(
            f"blocksize must be a tuple of two integers, rows and columns of a block, or None, got {blocksize!r}"
        )
    if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in blocksize):
        raise ValueError(f"blocksize must be two positive integers, got {blocksize!r}")
    if form != "bsr":
        raise ValueError(
            "blocksize is for layout=torch.sparse_bsr; leave it out, or ask for that layout"
        )


def as_tuple(
    value: Any, name: str, call: str, instead: Callable[[Any, str, bool], str] = instead_of
) -> tuple[bool, tuple[Tensor, ...]]:
    """Whether ``value`` is a tuple, and it as one. Raises TypeError where torch does.

    ``instead``: the end of that message, of a value, its name, and whether it lies in a tuple.
    """
    if isinstance(value, Tensor):
        return False, (value,)
    tupled = isinstance(value, tuple)
    values = value if tupled else (value,)
    for i, v in enumerate(values):
        if not isinstance(v, Tensor):
            where = f"value at index {i} has" if tupled else f"given {name} has"
            raise TypeError(
                f"The {name} of {call} must be a Tensor or a tuple of Tensors, but the {where} type {type(v)}"
                + instead(v, name, tupled)
            )
    return tupled, values


def outputs(result: Any, call: str) -> tuple[bool, tuple[Tensor, ...]]:
    """The same of what the caller's function returned."""
    name = "outputs of the user-provided function"
    return as_tuple(result, name, call, lambda value, _, nested: returned(value, nested))


def check_samples(per_sample, needed: bool = False) -> None:
    """Raise ValueError for a ``per_sample`` that is no option; ``needed``: of a call that is for samples only."""
    if (isinstance(per_sample, str) and per_sample != ASSUME) or (needed and not per_sample):
        options = (True, ASSUME) if needed else (True, False, ASSUME)
        raise ValueError(one_of("per_sample", per_sample, options))


def check_batch(per_sample, ys, xs) -> None:
    """Under ``per_sample``, all inputs and outputs must have the same number of samples on their first axis."""
    check_samples(per_sample)
    if not per_sample:
        return
    check_local(ys, xs)
    n = None
    for name, tensors in (("inputs", xs), ("outputs", ys)):
        for i, t in enumerate(tensors):
            if t.dim() == 0:
                raise ValueError(
                    f"per_sample=True needs a batch axis, but {name}[{i}] is 0-dimensional; "
                    "add one with unsqueeze(0), or drop per_sample"
                )
            n = t.shape[0] if n is None else n
            if t.shape[0] != n:
                remedy = (
                    "close over what all samples share: lambda x: func(x, shared)"
                    if name == "inputs"
                    else "for one sample, pass x.unsqueeze(0)"
                )
                raise ValueError(
                    f"per_sample=True needs one batch size on the first axis of all inputs and outputs, but "
                    f"{name}[{i}] has shape {tuple(t.shape)} and inputs[0] has {n} samples; {remedy}, or drop "
                    "per_sample"
                )


def check_real(call: str, ys, xs=()) -> None:
    """Raise for complex numbers at an outer end, whose pairs no entry of a matrix could hold."""
    for j, y in enumerate(ys):
        if y.is_complex():
            raise RuntimeError(
                f"{call} takes real outputs, but outputs[{j}] is {y.dtype}; return torch.view_as_real(output)"
            )
    for i, x in enumerate(xs):
        if x.is_complex():
            raise RuntimeError(
                f"{call} takes real inputs, but inputs[{i}] is {x.dtype}; pass torch.view_as_real(x) and make it "
                "complex inside of func"
            )


def block_shape(y: Tensor, x: Tensor, per_sample: bool | str) -> tuple[int, ...]:
    """The shape of one Jacobian block."""
    return (*y.shape, *x.shape[1:]) if per_sample else (*y.shape, *x.shape)


def out_rows(out, tupled_out: bool, tupled: bool):
    """``out`` with both tuple levels."""
    rows = out if tupled_out else (out,)
    return tuple(row if tupled else (row,) for row in rows)


def destinations(out, ys, xs, per_sample: bool | str) -> list[list[Tensor]]:
    """The caller's ``out`` as tensors. Raises for what does not fit the results."""
    if len(out) != len(ys) or any(len(row) != len(xs) for row in out):
        raise RuntimeError(
            "out must be nested as the result is: a tuple level for each of outputs and inputs"
        )
    return [
        [
            destination(out[j][i], y, x, block_shape(y, x, per_sample), f"output {j}, input {i}")
            for i, x in enumerate(xs)
        ]
        for j, y in enumerate(ys)
    ]


def destination(given, y: Tensor, x: Tensor, want: tuple[int, ...], name: str) -> Tensor:
    dest = given
    if isinstance(given, numpy.ndarray):
        if not given.flags.writeable:
            raise RuntimeError(
                f"out for {name} is a read-only array; open a memmap with mode 'r+' or 'w+'"
            )
        try:
            dest = torch.from_numpy(given)
        except (TypeError, ValueError) as error:
            raise RuntimeError(
                f"out for {name} must have dtype {x.dtype}; numpy's array of {given.dtype} cannot be a tensor: {error}"
            ) from None
    if not isinstance(dest, Tensor):
        raise TypeError(f"out must hold tensors or numpy arrays, got {type(given)} for {name}")
    if (
        tuple(dest.shape) != want
        or dest.dtype != x.dtype
        or dest.device not in (x.device, torch.device("cpu"))
    ):
        raise RuntimeError(
            f"out for {name} must have shape {want}, dtype {x.dtype} and device {x.device} (or cpu), "
            f"got {tuple(dest.shape)}, {dest.dtype} and {dest.device}{of_shape(dest, y, x, want)}"
        )
    if dest.requires_grad:
        raise RuntimeError(f"out for {name} requires grad; pass a detached tensor")
    return dest

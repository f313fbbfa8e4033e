"""`finite_difference`: the Jacobian by central differences, which owes nothing to any derivative rule.

Formulas: W. H. Press et al., Numerical Recipes, 3rd edition, section 5.7 (step sizes, steps that the dtype represents);
L. F. Richardson, "The approximate arithmetical solution by finite differences ...", Phil. Trans. R. Soc. A 210 (1911).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..base.classes import as_given, dressed, plain
from ..base.constants import halves
from ..base.elsewhere import check_local
from ..base.memory import Budget
from ..plan.planning import Wanted, check_answer
from ..prologue.arguments import ASSUME, as_tuple, block_shape, check_batch, outputs
from ..prologue.running import public, record
from ..read import handover, overriding
from .api import nest


@public
def finite_difference(
    func: Callable[..., Any],
    inputs: Tensor | tuple[Tensor, ...],
    *,
    step: float | None = None,
    richardson: bool = False,
    per_sample: bool | str = False,
) -> Any:
    """The Jacobian of ``func`` by central differences ``(f(x + h) - f(x - h)) / 2h``, nested as `jactri.jacobian`'s.

    An independent check: values of ``func`` are all that is used. ``func`` is called as `jactri.jacobian` calls it (in
    grad mode, on leaves that require grad, so it may differentiate inside), each time on fresh copies of the inputs
    and with the same random state, which is restored afterwards. Step sizes: Press et al., Numerical Recipes, section
    5.7.

    Args:
        func: takes the tensors of ``inputs``, returns a tensor or a tuple of tensors.
        inputs: a float32 or float64 tensor or a tuple of them. They are not modified.
        step: the distance ``h``, the same for all entries. By default ``eps ** (1/3) * max(1, abs(x))`` for each entry
            ``x``, with ``eps`` of the coarsest dtype among inputs and outputs: the error of the formula, of order
            ``h ** 2``, is then as large as that of rounding, ``eps / h``.
        richardson: extrapolate from ``h`` and ``h / 2`` to an error of order ``h ** 4``; the default step is then
            ``eps ** (1/5) * max(1, abs(x))``.
        per_sample: the first axis of all inputs and outputs is a batch of ``N`` samples which do not influence one
            another; return ``(N, *out, *in)``. The same entry of all samples is moved at once. ``"assume"``: it is not
            tested whether they do.

    Returns:
        ``J[j][i]`` of shape ``out_i.shape + in_j.shape``, in the dtype and on the device of the input, with a tuple
        level for each of outputs and inputs that is a tuple. For smooth functions of moderate size the error is about
        1e-10 in float64 (1e-12 by ``richardson``) and 1e-4 in float32. At a kink the mean of the slopes on both sides.
        Outputs that are not floating-point have Jacobians of zeros.

    Raises:
        TypeError: inputs or outputs that are not tensors or tuples of them.
        RuntimeError: inputs or outputs that are complex, inputs of integers, or in a dtype of 16 bits or less, in
            which no digit of a difference would be right; under ``per_sample``, samples that mix.
        ValueError: a ``step`` that is not positive, or so small that it does not move an entry; no common batch axis
            under ``per_sample``.
        IndexError: an empty tuple of inputs or outputs.

    Cost:
        Two evaluations of ``func`` for each entry of the inputs (four by ``richardson``); under ``per_sample`` for
        each entry of a sample, and about ``log2(N)`` to see that samples do not mix (not with ``"assume"``).

    Examples:
        >>> x = torch.linspace(-1, 1, 6, dtype=torch.float64)
        >>> by_differences = jactri.finite_difference(torch.sin, x)
        >>> torch.allclose(by_differences, torch.diag(x.cos()), atol=1e-8)
        True
        >>> by_differences.allclose(jactri.jacobian(torch.sin, x), atol=1e-8)
        True
    """
    tupled, xs = as_tuple(inputs, "inputs", "finite_difference")
    check_local((), xs)
    overriding.refuse("finite_difference")
    if handover.transforming(xs):
        raise RuntimeError("finite_difference is not available inside of a torch.func transform")
    differences = Differences(func, xs, step, richardson, per_sample)
    answer = nest(differences.blocks()[0], differences.tupled_out, tupled)
    return dressed(answer, (*differences.given, *xs))


class Differences:
    """A function near a point. ``ys`` are its outputs there."""

    def __init__(self, func, xs, step: float | None, richardson: bool, per_sample: bool | str):
        _check_inputs(xs)
        if step is not None and not step > 0:
            raise ValueError(f"step must be a positive number or None, got {step!r}")
        self.func, self.richardson, self.per_sample = func, richardson, bool(per_sample)
        self.assume = per_sample == ASSUME
        self.like = tuple(x.detach() for x in xs)
        self.xs = tuple(plain(x).contiguous() for x in self.like)
        self.devices = sorted({x.device.index for x in xs if x.is_cuda})
        self.tupled_out = False
        self.ys = self.at(self.xs)
        if not self.ys:
            raise IndexError("outputs is an empty tuple: return at least one tensor")
        for j, y in enumerate(self.ys):
            if y.is_complex():
                raise RuntimeError(
                    f"outputs[{j}] is complex ({y.dtype}); return torch.view_as_real(output)"
                )
        check_batch(per_sample, self.ys, self.xs)
        eps = max(torch.finfo(t.dtype).eps for t in (*self.ys, *self.xs) if t.is_floating_point())
        self.steps = [
            torch.full_like(x, step)
            if step is not None
            else x.abs().clamp(min=1.0) * eps ** (1 / 5 if richardson else 1 / 3)
            for x in self.xs
        ]

    def at(self, xs) -> tuple[Tensor, ...]:
        """The outputs at a point, with the random state as it is now."""
        with (
            torch.random.fork_rng(self.devices),
            torch.enable_grad(),
        ):
            leaves = [x.clone().requires_grad_() for x in xs]
            result, _ = record(self.func, *map(as_given, leaves, self.like))
        self.tupled_out, self.given = outputs(result, "finite_difference")
        return tuple(plain(y.detach()) for y in self.given)

    def blocks(
        self, gaps: bool = False, only: tuple[int, int] | None = None
    ) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        """``J[j][i]``, and if asked for how far the slopes to both sides are apart.

        ``only``: of one (input, entry), the rest is left as NaN.
        """
        budget = Budget(None, self.xs[0].device)
        wanted = Wanted(budget, per_sample=self.per_sample, of="jactri.jacobian with ")
        check_answer(self.ys, self.xs, wanted)
        if self.per_sample and not self.assume:
            self.check_samples()
        rows, apart = (
            [
                [
                    x.new_full(
                        block_shape(y, x, self.per_sample), 0.0 if only is None else torch.nan
                    )
                    for x in self.xs
                ]
                for y in self.ys
            ]
            for _ in range(2)
        )
        for i, x in enumerate(self.xs):
            for k in range(x[:1].numel() if self.per_sample else x.numel()):
                if only not in (None, (i, k)):
                    continue
                high, low = (self.moved(i, k, f) for f in (1.0, -1.0))
                found = _slopes(high, low)
                if self.richardson:
                    half = _slopes(*(self.moved(i, k, f) for f in (0.5, -0.5)))
                    found = {j: h + (h - found[j]) / 3 for j, h in half.items()}
                if gaps:
                    here = self.ys, self.entry(x, k)
                    right, left = _slopes(high, here), _slopes(here, low)
                    for j in found:
                        self.column(apart[j][i], i, k).copy_((right[j] - left[j]).abs())
                for j, slope in found.items():
                    self.column(rows[j][i], i, k).copy_(slope)
        return rows, apart

    def entry(self, x: Tensor, k: int) -> Tensor:
        """Entry ``k`` of a contiguous input, of all samples or the only one, as a view ``(N,)`` or ``(1,)``."""
        return x.view(x.shape[0] if self.per_sample else 1, -1)[:, k]

    def column(self, block: Tensor, i: int, k: int) -> Tensor:
        """The part of a block that belongs to entry ``k`` of input ``i``, shaped as the output."""
        axes = self.xs[i].dim() - self.per_sample
        return block.flatten(block.dim() - axes)[..., k] if axes else block

    def moved(self, i: int, k: int, factor: float) -> tuple[tuple[Tensor, ...], Tensor]:
        """The outputs where an entry of an input is moved by so many steps, and that entry."""
        x = self.xs[i].clone()
        at = self.entry(x, k)
        at += factor * self.entry(self.steps[i], k)
        return self.at((*self.xs[:i], x, *self.xs[i + 1 :])), at

    def check_samples(self) -> None:
        """Raise if moving half of the samples changes the outputs of others. Any two are once told apart."""
        for mask in halves(self.xs[0].shape[0], self.xs[0].device):
            near = [
                x + h * mask.to(x.device).view(-1, *[1] * (x.dim() - 1))
                for x, h in zip(self.xs, self.steps, strict=True)
            ]
            for j, (y, moved) in enumerate(zip(self.ys, self.at(near), strict=True)):
                still = ~mask.to(y.device)
                a, b = y[still], moved[still]
                same = torch.isclose(
                    a, b, rtol=1e2 * _eps(y), atol=1e2 * _eps(y) * _size(y), equal_nan=True
                )
                if not bool(same.all()):
                    raise RuntimeError(
                        f"per_sample=True, but samples mix: outputs[{j}] of some samples changed when others were "
                        "moved. Drop per_sample for the whole Jacobian, or make the samples independent (BatchNorm: "
                        "call net.eval())"
                    )


def _eps(y: Tensor) -> float:
    return torch.finfo(y.dtype).eps if y.is_floating_point() else 0.0


def _size(y: Tensor) -> float:
    finite = y[y.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _slopes(high, low) -> dict[int, Tensor]:
    """The differences between two (outputs, entry), of the outputs that are floating-point."""
    # by the distance that was gone, not the one that was meant: Numerical Recipes, equation 5.7.4
    distance = high[1] - low[1]
    if bool((distance == 0).any()):
        raise ValueError(
            "step is so small that an input does not change by it; leave it out for one that fits the dtype"
        )
    found = {}
    for j, (a, b) in enumerate(zip(high[0], low[0], strict=True)):
        if a.is_floating_point():
            d = distance.to(a.device)
            found[j] = (a - b) / d.view(-1, *[1] * (a.dim() - 1)) if a.dim() else (a - b) / d[0]
    return found


def _check_inputs(xs) -> None:
    if not xs:
        raise IndexError("inputs is an empty tuple: pass at least one tensor")
    for i, x in enumerate(xs):
        if x.dtype not in (torch.float32, torch.float64):
            raise RuntimeError(
                f"finite_difference takes inputs of float64 or float32, but inputs[{i}] is {x.dtype}; pass "
                "x.double(), and a function that takes it"
            )

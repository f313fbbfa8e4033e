"""`check`: the cross-check against ``torch.autograd.functional.jacobian``, in the inputs' dtype and in float64."""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from math import isnan, nan
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from ..base.classes import plain
from ..base.elsewhere import check_here, check_local
from ..base.tables import Shown, Table
from ..calls.api import jacobian
from ..calls.finite_difference import Differences
from ..compile.reached import modules_of
from ..plan.samples import probe_mixing
from ..prologue.arguments import as_tuple
from ..prologue.running import buffers_kept, eagerly, public
from ..read.overriding import refuse
from .report import explain, fallbacks

_TIMED_SECONDS = 0.5
_ROUNDED = 1e5 * torch.finfo(torch.float64).eps  # what is farther off in float64 is not rounding


_SCRIPT = "TorchScript interpreter"  # stands in every error of a script
_UNSCRIPTED = (
    "compared in the inputs' dtype alone: in float64 a script that func calls failed ({}); pass the ScriptModule "
    "itself or a module that holds it, which are copied to float64, or the function that was scripted"
)


class JacobianMismatch(AssertionError):
    """Raised by `check` with ``raise_on_error=True``, and by the proof of a `rule`; the message is the report.

    Examples:
        >>> class Square(torch.autograd.Function):
        ...     forward = staticmethod(lambda ctx, x: x * x)
        ...     backward = staticmethod(lambda ctx, grad: grad)  # should be 2 x grad
        >>> options = {"finite_difference": True, "raise_on_error": True}
        >>> try:
        ...     jactri.check(Square.apply, torch.ones(3), **options)
        ... except jactri.JacobianMismatch as error:
        ...     print(str(error).splitlines()[0])
        MISMATCH: output 0, input 0 is off from finite differences at entry (0, 0)
    """


@dataclass(frozen=True, repr=False)
class CheckReport(Shown):
    """What `check` found; ``str()`` of it is readable. Errors are against float64 autograd unless said otherwise.

    Relative errors are relative to the largest entry of the block.

    Attributes:
        ok: whether the check passed.
        max_abs_error: the largest error in the inputs' dtype.
        max_rel_error: the same, relative.
        worst: (output index, input index) of the largest relative error.
        torch_rel_error: torch's own error in the inputs' dtype.
        same_dtype_abs_error: how far jactri and torch are apart in the inputs' dtype.
        float64_rel_error: jactri in float64 against torch in float64: rounding, or a bug of either, whatever the dtype
            of the inputs. It is NaN where a script (``torch.jit``) cannot run in float64: then errors are against torch
            in the inputs' dtype.
        jactri_ms: milliseconds of `jactri.jacobian`.
        torch_ms: milliseconds of ``torch.autograd.functional.jacobian``.
        fallbacks: the ops that have no rule.
        reason: why it is not ok, and with which of the two finite differences agree.
        finite_difference_rel_error: how far jactri in float64 is from finite differences at most; None, as the next
            two, unless they were asked for.
        finite_difference_at: (output index, input index, index in the block) of that entry.
        finite_difference_gap: how far the slopes to both sides are apart there: at a kink, at least as far as the
            derivatives.

    Examples:
        >>> report = jactri.check(nn.functional.gelu, torch.linspace(-2, 2, 5))
        >>> report.ok, report.fallbacks
        (True, ())
        >>> report.float64_rel_error < 1e-12
        True
    """

    ok: bool
    max_abs_error: float
    max_rel_error: float
    worst: tuple[int, int]
    torch_rel_error: float
    same_dtype_abs_error: float
    float64_rel_error: float
    jactri_ms: float
    torch_ms: float
    fallbacks: tuple[str, ...]
    reason: str = ""
    finite_difference_rel_error: float | None = None
    finite_difference_at: tuple[int, int, tuple[int, ...]] | None = None
    finite_difference_gap: float | None = None

    def _parts(self) -> list[str | Table]:
        alone = isnan(self.float64_rel_error)
        truth = "torch's" if alone else "float64"
        rows = [
            (
                f"against {truth} autograd",
                f"largest error {self.max_abs_error:.3g} ({self.max_rel_error:.3g} of the largest entry), at output "
                f"{self.worst[0]}, input {self.worst[1]}",
            ),
            (
                "in the inputs' dtype",
                f"torch is off by {self.torch_rel_error:.3g} of the largest entry; jactri and torch differ by "
                f"{self.same_dtype_abs_error:.3g}",
            ),
            ("both in float64", "not known" if alone else f"{self.float64_rel_error:.3g} of the largest entry"),
            ("time", f"jactri {self.jactri_ms:.3g} ms, torch.autograd.functional.jacobian {self.torch_ms:.3g} ms"),
            ("fallbacks", fallbacks(self.fallbacks)),
        ]  # fmt: skip
        if self.finite_difference_rel_error is not None:
            rows.insert(3, ("finite differences in float64", self._slopes()))
        return [
            f"{'ok' if self.ok else 'MISMATCH'}{': ' + self.reason if self.reason else ''}",
            Table((), rows),
        ]

    def _slopes(self) -> str:
        if self.finite_difference_at is None:
            return "none to compare with"
        j, i, index = self.finite_difference_at
        return (
            f"off by {self.finite_difference_rel_error:.3g} of the largest entry, at "
            f"entry {index} of output {j}, input {i}; the slopes to both sides are {self.finite_difference_gap:.3g} "
            "apart there"
        )


class _Float64(TorchFunctionMode):
    """Every floating-point tensor that a torch function takes or makes becomes float64.

    Captured parameters and buffers are converted at each use and never written to.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args, kwargs = tree_map(_double, (args, kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return tree_map(_double, func(*args, **kwargs))


def _double(value):
    if value is torch.float32 or value is torch.float16 or value is torch.bfloat16:
        return torch.float64
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        check_here(value)
        return value.double()
    return value


def _in_float64(func: Callable[..., Any]) -> Callable[..., Any]:
    """``func`` with all that it uses in float64. What a script (``torch.jit``) holds is converted in a copy of it."""
    if isinstance(func, torch.nn.Module) and any(
        isinstance(m, torch.jit.ScriptModule) for m in func.modules()
    ):
        with torch.no_grad():  # a script's copy is recorded
            func = deepcopy(func).double()

    def call(*args):
        with _Float64():
            return func(*args)

    return call


@public
def check(
    func: Callable[..., Any],
    inputs: Tensor | tuple[Tensor, ...],
    *,
    per_sample: bool | str = False,
    strategy: str = "auto",
    raise_on_error: bool = False,
    finite_difference: bool = False,
) -> CheckReport:
    """Compare `jactri.jacobian` with ``torch.autograd.functional.jacobian`` in the inputs' dtype and in float64.

    ``func`` is run several times, each with the same random state and the same buffers of modules in training mode,
    which are restored afterwards; in float64 every tensor that it uses is converted, scripted modules in a copy. The
    check passes if jactri in float64 agrees with float64 autograd to rounding, and if in the inputs' dtype its error is
    no more than ten times torch's own (or a few hundred units of rounding).

    Args:
        func: as of `jactri.jacobian`.
        inputs: as of `jactri.jacobian`.
        per_sample: as of `jactri.jacobian`. Torch differentiates the sum over the batch, and a probe confirms that
            samples do not mix (with ``"assume"``, none does).
        strategy: as of `jactri.jacobian`.
        raise_on_error: raise `JacobianMismatch` instead of returning a report that is not ok.
        finite_difference: compare jactri in float64 with `jactri.finite_difference` too, which shares no derivative
            rule with torch. An entry passes that lies between the slopes to both sides, or is as near to their mean as
            rounding lets one tell; so a kink within the step, as of a ReLU near 0, is no mismatch. Where jactri and
            torch differ, the differences judge: if they agree with jactri everywhere and not with torch, the check
            passes, and ``reason`` says that torch is off. Without it, they judge the entry that differs most, for
            ``reason`` only.

    Returns:
        A `CheckReport`.

    Raises:
        JacobianMismatch: under ``raise_on_error``, a check that does not pass. Else what `jactri.jacobian` raises.

    Cost:
        Torch's row-by-row Jacobian, three times over; with ``finite_difference`` its evaluations of ``func`` too.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> x = torch.randn(4, 3)
        >>> report = jactri.check(net, x, per_sample=True, raise_on_error=True)
        >>> print(str(report).splitlines()[0])
        ok
    """
    refuse("jactri.check, whose truth is autograd's own derivative,")
    tupled, xs = as_tuple(inputs, "inputs", "check")
    check_local((), xs)
    given, func, modules = func, eagerly(func), modules_of(func)
    devices = sorted({x.device.index for x in xs if x.device.type == "cuda"})

    def same_random(call):
        with torch.random.fork_rng(devices), buffers_kept(modules):
            return call()

    def ours(args):
        return jacobian(func, args, strategy=strategy, per_sample=per_sample)

    mine, jactri_ms = _timed(lambda: same_random(lambda: ours(inputs)))
    theirs, torch_ms = _timed(lambda: same_random(lambda: _torch(func, inputs, per_sample)))
    plan = same_random(lambda: explain(func, inputs, strategy=strategy, per_sample=per_sample))
    wides = tuple(_double(x.detach()) for x in xs)
    wide = wides if tupled else wides[0]

    func64, alone = eagerly(_in_float64(given)), ""
    try:
        truth = same_random(lambda: _torch(func64, wide, per_sample))
        mine64 = same_random(
            lambda: jacobian(func64, wide, strategy=strategy, per_sample=per_sample)
        )
    except RuntimeError as error:
        if _SCRIPT not in str(error) or all(x.dtype == _double(x.dtype) for x in xs):
            raise
        alone = _UNSCRIPTED.format(str(error).strip().splitlines()[-1])
        mine64, truth = theirs, theirs
    mixes = per_sample is True and same_random(lambda: _mixes(func, xs))
    lists = [_blocks(nested, not tupled) for nested in (mine, theirs, mine64, truth)]
    report = _compare(lists, xs[0].dtype, mixes, jactri_ms, torch_ms, plan.fallbacks)
    real = not any(t.is_complex() for t in (*wides, *(b for *_, b in lists[3])))
    if alone:
        reason = f"{report.reason}; {alone}" if report.reason else alone
        report = replace(report, float64_rel_error=nan, reason=reason)
    elif len({len(blocks) for blocks in lists}) == 1 and not mixes:
        if finite_difference:
            with buffers_kept(modules):
                near = Differences(func64, wides, None, False, per_sample)
                report = _judged(report, near, lists, xs[0].dtype)
        elif report.float64_rel_error > _ROUNDED and real:
            with buffers_kept(modules):
                near = Differences(func64, wides, None, False, "assume" if per_sample else False)
                report = _judged(report, near, lists, xs[0].dtype, _worst(lists, near))
    if raise_on_error and not report.ok:
        raise JacobianMismatch(str(report))
    return report


def _timed(call) -> tuple[Any, float]:
    """The first result and the median milliseconds of a few calls (within half a second, the first not counted)."""
    result = call()
    runs: list[float] = []
    while len(runs) < 5 and sum(runs) < _TIMED_SECONDS:
        start = time.perf_counter()
        call()
        runs.append(time.perf_counter() - start)
    return result, 1e3 * sorted(runs)[len(runs) // 2]


def _torch(func, inputs, per_sample: bool | str):
    reference = torch.autograd.functional.jacobian
    if not per_sample:
        return reference(func, inputs)

    def of_sum(*args):
        y = func(*args)
        return tuple(v.sum(0) for v in y) if isinstance(y, tuple) else y.sum(0)

    def batch_first(block, i):
        return block.movedim(block.dim() - xs[i].dim(), 0)

    _, xs = as_tuple(inputs, "inputs", "check")
    rows = reference(of_sum, inputs)
    if isinstance(inputs, tuple):
        rows = rows if isinstance(rows[0], tuple) else (rows,)
        return tuple(tuple(batch_first(b, i) for i, b in enumerate(row)) for row in rows)
    rows = rows if isinstance(rows, tuple) else (rows,)
    return tuple(batch_first(b, 0) for b in rows)


def _mixes(func, xs) -> bool:
    leaves = tuple(x.detach().requires_grad_() for x in xs)
    with torch.enable_grad():
        ys = func(*leaves)
    ys = ys if isinstance(ys, tuple) else (ys,)
    with torch.no_grad():  # nothing of it is differentiated
        return ys[0].numel() > 0 and probe_mixing(ys, leaves) is not None


def _blocks(nested, single_input: bool) -> list[tuple[int, int, Tensor]]:
    if isinstance(nested, Tensor):
        return [(0, 0, plain(nested))]
    out = []
    for j, row in enumerate(nested):
        if isinstance(row, Tensor):
            row = plain(row)
            out.append((j, 0, row) if single_input else (0, j, row))
        else:
            out.extend((j, i, plain(block)) for i, block in enumerate(row))
    return out


def _gap(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference in float64; equal infinities and NaNs in the same places count as equal.

    So does an exact zero where autograd multiplied zero by infinity: outside of its ties a block is zero by structure.
    """
    a, b = a.double(), b.to(a.device).double()
    if a.shape != b.shape:
        return float("inf")
    same = (a == b) | (b.isnan() & (a.isnan() | (a == 0)))
    gap = torch.where(same, 0.0, (a - b).abs())
    return float(gap.nan_to_num(nan=float("inf")).max()) if gap.numel() else 0.0


def _scale(block: Tensor) -> float:
    finite = block[block.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _compare(lists, dtype, mixes, jactri_ms, torch_ms, fallbacks) -> CheckReport:
    """``lists``: the blocks of jactri, torch, and both in float64."""
    where = [(j, i) for j, i, _ in lists[0]]
    lists = [[b for _, _, b in blocks] for blocks in lists]
    ok, reason = True, ""
    worst, worst_rel, worst_abs, torch_rel, same, rel64 = (0, 0), 0.0, 0.0, 0.0, 0.0, 0.0
    if len({len(blocks) for blocks in lists}) != 1:
        ok, reason = False, "the results are nested differently"
    for place, a, b, a64, t in zip(where, *lists, strict=False):
        scale = _scale(t) or 1.0
        error, peer = _gap(a, t) / scale, _gap(b, t) / scale
        if error >= worst_rel:
            worst, worst_rel = place, error
        worst_abs = max(worst_abs, _gap(a, t))
        torch_rel, same = max(torch_rel, peer), max(same, _gap(a, b))
        rel64 = max(rel64, _gap(a64, t) / scale)
        if error > _allowed(peer, dtype):
            ok, reason = False, f"output {place[0]}, input {place[1]} is off in {dtype}"
        if _gap(a64, t) / scale > _ROUNDED:
            ok, reason = False, f"output {place[0]}, input {place[1]} is off in float64"
    if mixes:
        ok, reason = False, "a probe found that samples mix"
    return CheckReport(
        ok,
        worst_abs,
        worst_rel,
        worst,
        torch_rel,
        same,
        rel64,
        jactri_ms,
        torch_ms,
        fallbacks,
        reason,
    )


def _worst(lists, near: Differences) -> tuple[int, int]:
    """The (input, entry) at which jactri and torch in float64 differ most."""
    found = []
    for (_, i, a), (_, _, t) in zip(lists[2], lists[3], strict=True):
        gap = ((a - t).abs() / (_scale(t) or 1.0)).nan_to_num(nan=0.0)
        gap = torch.where(a.isnan() == t.isnan(), gap, torch.inf).flatten()
        if gap.numel():
            axes = near.xs[i].shape[1 if near.per_sample else 0 :]
            at = int(gap.argmax())
            found.append((float(gap[at]), (i, at % max(axes.numel(), 1))))
    return max(found, default=(0.0, (0, 0)))[1]


def _judged(report: CheckReport, near: Differences, lists, dtype, only=None) -> CheckReport:
    """The report with what finite differences say of the blocks in float64, all of them or of one (input, entry)."""
    slopes = near.blocks(gaps=True, only=only)
    failed, error, at, apart = _against(near, slopes, lists[2])
    if only is None:
        report = replace(
            report,
            finite_difference_rel_error=error,
            finite_difference_at=at,
            finite_difference_gap=apart,
        )
    if report.float64_rel_error <= _ROUNDED:
        return _off(report, at) if failed else report
    blamed, _, place, _ = _against(near, slopes, lists[3])
    if failed == blamed:
        word = "neither" if failed else "both"
        if only is None and failed:
            report = _off(report, at)
        return replace(report, reason=f"{report.reason}; finite differences agree with {word}")
    wrong, right = ("jactri", "torch") if failed else ("torch", "jactri")
    j, i, entry = at if failed else place
    verdict = f"{wrong} is off from finite differences at entry {entry} of output {j}, input {i}, {right} is not"
    if only is not None:
        verdict += "; finite_difference=True compares all entries"
    if failed or only is not None:
        return replace(report, ok=False, reason=verdict)
    # torch is no truth here, jactri in float64 is; torch's own rounding is known all the same
    own = max(
        _gap(a, b) / (_scale(b) or 1.0) for (*_, a), (*_, b) in zip(lists[0], lists[2], strict=True)
    )
    if own > _allowed(report.torch_rel_error, dtype):
        return replace(report, ok=False, reason=f"{verdict}, but is off in {dtype}")
    return replace(report, ok=True, reason=verdict)


def _allowed(peer: float, dtype: torch.dtype) -> float:
    """The error that passes in the inputs' dtype, where torch's own is ``peer``."""
    return max(10 * peer, 300 * torch.finfo(dtype).eps)


def _off(report: CheckReport, at) -> CheckReport:
    j, i, entry = at
    reason = f"output {j}, input {i} is off from finite differences at entry {entry}"
    return replace(report, ok=False, reason=reason)


def _against(near: Differences, slopes, blocks):
    """Whether blocks are off from finite differences; by how much of the largest entry, where, and the gap there."""
    eps = torch.finfo(torch.float64).eps
    found = []
    for j, i, a in blocks:
        d, gap = slopes[0][j][i], slopes[1][j][i]
        scale = _scale(a) or 1.0
        smooth = gap <= 1e-3 * (d.abs() + scale)  # where a NaN is no pole
        known = d.isfinite() & gap.isfinite() & (a.isfinite() | smooth)
        if not bool(known.any()):
            continue
        off = torch.where(known, (a - d).abs().nan_to_num(nan=torch.inf), 0.0)
        # the formula's h^2 times a third derivative is far below this; rounding grows on the way to the output
        rounding = 1e-6 * scale + 1e3 * eps * _scale(near.ys[j]) / float(near.steps[i].min())
        wrong = off > gap / 2 + rounding
        failed = bool(wrong.any())
        worst = (torch.where(wrong, off, 0.0) if failed else off).argmax()
        place = tuple(int(p) for p in torch.unravel_index(worst, off.shape))
        found.append((failed, float(off[place]) / scale, (j, i, place), float(gap[place])))
    return max(found, default=(False, 0.0, None, None), key=lambda f: f[:2])

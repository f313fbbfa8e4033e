"""How far a Jacobian may lie from the float64 truth. Every numerical comparison of the tests asks here.

The error of a block is measured against the largest entry of the true block, because an entry that
is the difference of large ones cannot be right to its own last digit. The bound grows with the
square root of the reduction length, as rounding errors of a sum of that length do.
"""

import math

import torch

# One rounding of each dtype.
UNIT = {
    torch.float64: 2.0**-52,
    torch.float32: 2.0**-23,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}
# A Jacobian is a product of a few local Jacobians, each rounded several times.
ROUNDINGS = 16


def bound(dtype, length=1, factor=1.0):
    """The largest relative error allowed for `dtype` where sums have `length` terms."""
    return UNIT[dtype] * ROUNDINGS * factor * math.sqrt(max(length, 1))


def length_of(*tensors):
    """The longest sum that a Jacobian between these tensors can need."""
    return max((t.numel() for t in tensors), default=1)


def assert_close(actual, truth, dtype, *, length=None, factor=1.0, scale=None, what="jacobian"):
    """`actual` equals `truth` up to the rounding of `dtype`; NaN and inf must stand where the truth has them.

    `scale` is the largest number that was summed, where that is known and larger than the result.
    """
    assert actual.shape == truth.shape, (
        f"{what}: shape {tuple(actual.shape)}, truth {tuple(truth.shape)}"
    )
    assert actual.layout == torch.strided, f"{what}: layout {actual.layout}"
    if truth.numel() == 0:
        return
    wide = torch.complex128 if truth.is_complex() else torch.float64
    actual, truth = actual.detach().to(wide), truth.detach().to(wide)
    finite = torch.isfinite(truth)
    error = actual - truth
    if (
        not finite.all()
    ):  # else whatever is not finite in `actual` is an error that is not below the bound
        torch.testing.assert_close(
            actual.masked_fill(finite, 0),
            truth.masked_fill(finite, 0),
            rtol=0,
            atol=0,
            equal_nan=True,
            msg=lambda m: f"{what}: NaN or inf differ\n{m}",
        )
        if not finite.any():
            return
        error, truth = error.masked_fill(~finite, 0), truth.masked_fill(~finite, 0)
    error = error.abs()
    scale = scale or truth.abs().max().item() or 1.0
    allowed = bound(dtype, truth.numel() if length is None else length, factor) * scale
    worst = error.max().item()
    if not worst <= allowed:
        at = divmod(int(torch.nan_to_num(error, nan=math.inf).argmax()), 1)[0]
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), error.shape))
        raise AssertionError(
            f"{what}: error {worst:.3e} at {index} exceeds {allowed:.3e} "
            f"(got {actual[index].item()!r}, truth {truth[index].item()!r}, scale {scale:.3e}, {dtype})"
        )


def assert_same_tree(actual, truth, dtype, **options):
    """The same nesting of tuples and dicts, and every leaf close."""
    assert type(actual) is type(truth), f"nesting: {type(actual)} where truth has {type(truth)}"
    if isinstance(truth, dict):
        assert list(actual) == list(truth), f"names {list(actual)} where truth has {list(truth)}"
        actual, truth = tuple(actual.values()), tuple(truth.values())
    if isinstance(truth, tuple):
        assert len(actual) == len(truth), f"tuple of {len(actual)} where truth has {len(truth)}"
        what = options.pop("what", "jacobian")
        for k, (a, t) in enumerate(zip(actual, truth, strict=True)):
            assert_same_tree(a, t, dtype, what=f"{what}[{k}]", **options)
    else:
        assert_close(actual, truth, dtype, **options)


def assert_gradients_close(ours, theirs, dtype, *, length, factor=1.0, floor=0.0, what="gradient"):
    """Lists of gradients, each measured beside the largest of all: one that cancels stays near zero.

    None is a gradient of zero. Differentiating a Jacobian once more loses about 3 bits. `floor` is the size
    of what was differentiated: all of the gradients may cancel.
    """
    present = [t for t in theirs if t is not None and t.numel()]
    largest = max([floor, *(t.detach().abs().max().item() for t in present)])
    for k, (g, t) in enumerate(zip(ours, theirs, strict=True)):
        if g is None and t is None:
            continue
        like = t if g is None else g
        g, t = (torch.zeros(like.shape, dtype=like.dtype) if v is None else v for v in (g, t))
        assert_close(
            g, t, dtype, length=length, factor=8 * factor, scale=largest, what=f"{what} {k}"
        )


def assert_as_good(ours, theirs, truth, dtype, *, what="jacobian"):
    """`ours` is as near to `truth` as `theirs`, but for one rounding of the result each and a factor of 2."""
    assert ours.shape == truth.shape, f"{what}: shape {tuple(ours.shape)}"
    if truth.numel() == 0:
        return
    error, peer = ((x.detach().double() - truth).abs().max().item() for x in (ours, theirs))
    allowed = 2 * peer + 2 * UNIT[dtype] * truth.abs().max().item()
    assert error <= allowed, f"{what}: error {error:.3e}, torch's own {peer:.3e}, {dtype}"

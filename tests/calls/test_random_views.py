"""Random chains of rearrangements, of the batch axis too: every axis must be tracked, or given up."""

import math

import pytest
import torch
from common import F64, MODES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import assert_close

import jactri

LARGEST = 48


def factored(x, k):
    """x in another shape of as many elements."""
    n, shape, left = x.numel(), [], x.numel()
    while left > 1 and len(shape) < 4:
        divisors = [d for d in range(1, left + 1) if left % d == 0]
        shape.append(divisors[k % len(divisors)])
        left //= shape[-1]
        k //= 3
    shape.append(left)
    assert math.prod(shape) == n
    return shape


def axis(x, k):
    return k % x.ndim


STEPS = [
    lambda x, a, b: x.reshape(factored(x, a)),
    lambda x, a, b: x.reshape(factored(x, a)[::-1]),
    lambda x, a, b: x.transpose(axis(x, a), axis(x, b)),
    lambda x, a, b: x.movedim(axis(x, a), axis(x, b)),
    lambda x, a, b: x.permute([(i + a) % x.ndim for i in range(x.ndim)]),
    lambda x, a, b: x.flip(axis(x, a)),
    lambda x, a, b: x.roll(1 + b % 3, axis(x, a)),
    lambda x, a, b: x.roll(1 + b),
    lambda x, a, b: x.unsqueeze(a % (x.ndim + 1)),
    lambda x, a, b: x.squeeze(),
    lambda x, a, b: x.unsqueeze(0).expand(2, *x.shape),
    lambda x, a, b: x.unsqueeze(a % (x.ndim + 1)).expand(
        *[2 if i == a % (x.ndim + 1) else -1 for i in range(x.ndim + 1)]),
    lambda x, a, b: x.repeat_interleave(2, axis(x, a)),
    lambda x, a, b: torch.cat([x, x], axis(x, a)),
    lambda x, a, b: torch.cat(x.tensor_split(2, axis(x, a))[::-1], axis(x, a)),
    lambda x, a, b: x.narrow(axis(x, a), b % x.shape[axis(x, a)], 1),
    lambda x, a, b: x.narrow(axis(x, a), 0, 1 + b % x.shape[axis(x, a)]),
    lambda x, a, b: x.narrow(axis(x, a), b % ((x.shape[axis(x, a)] + 1) // 2),
                             x.shape[axis(x, a)] // 2 or 1),
    lambda x, a, b: x.select(axis(x, a), b % x.shape[axis(x, a)]),
    lambda x, a, b: x.diagonal(b % 3 - 1, 0, 1) if x.ndim > 1 else x,
    lambda x, a, b: torch.diag_embed(x),
    lambda x, a, b: x.unfold(axis(x, a), 1 + b % min(2, x.shape[axis(x, a)]), 1),
    lambda x, a, b: x.index_select(axis(x, a), torch.arange(x.shape[axis(x, a)] - 1, -1, -1)),
    lambda x, a, b: x.index_select(axis(x, a), torch.tensor([b % x.shape[axis(x, a)]] * 2)),
    lambda x, a, b: x.unbind(axis(x, a))[b % x.shape[axis(x, a)]],
    lambda x, a, b: torch.stack(x.unbind(axis(x, a)), axis(x, b)),
    lambda x, a, b: x.tril(b % 3 - 1) if x.ndim > 1 else x,
    lambda x, a, b: x.flatten(),
    lambda x, a, b: x.rot90(1 + b % 3, (0, 1)) if x.ndim > 1 else x,
    lambda x, a, b: torch.nn.functional.pad(x, (a % 2, b % 2)) if x.ndim > 1 else x,
    lambda x, a, b: x.sum(axis(x, a), keepdim=True),
    lambda x, a, b: x.mean(axis(x, a)),
    lambda x, a, b: x + x.flip(axis(x, a)),
    lambda x, a, b: x * x.detach().cos(),
    lambda x, a, b: x + x.sin().roll(1, axis(x, a)),
    lambda x, a, b: x * x.narrow(axis(x, a), 0, 1),
    lambda x, a, b: x.cumsum(axis(x, a)),
    lambda x, a, b: x.sin(),
    lambda x, a, b: x.sigmoid() * 1.3,
    lambda x, a, b: x @ torch.ones(x.shape[-1], 2, dtype=x.dtype).tril() if x.ndim > 1 else x,
    lambda x, a, b: torch.einsum("...ij,...kj->...ik", x, x.detach()) if x.ndim > 1 else x,
    lambda x, a, b: x.softmax(axis(x, a)),
    lambda x, a, b: torch.layer_norm(x, x.shape[-1:], eps=0.1),
    lambda x, a, b: x + x.reshape(x.shape[::-1]).permute(*range(x.ndim - 1, -1, -1)),
    lambda x, a, b: x + x.mean(axis(x, a), keepdim=True),
    lambda x, a, b: x.repeat(2, *[1] * (x.ndim - 1)) * x.repeat_interleave(2, 0).cos(),
    lambda x, a, b: x.unsqueeze(0).expand(2, *x.shape).flatten(0, 1) + x.repeat_interleave(2, 0),
    lambda x, a, b: x.as_strided(x.shape, x.stride(), x.storage_offset()).sin(),
    lambda x, a, b: torch.where(x > 0, x, x.roll(1, axis(x, a)) * 0.5),
]  # fmt: skip


class Chain:
    """A function of rearrangements, and what they are, for the report of a failure."""

    def __init__(self, shape, codes, home):
        self.shape, self.home = shape, home
        generator = torch.Generator().manual_seed(sum(shape) + len(codes))
        self.x = torch.randn(shape, generator=generator, dtype=F64)
        self.codes, value = [], self.x
        for k, a, b in codes:
            if value.ndim == 0:
                break
            step = STEPS[k](value, a, b)
            if 0 < step.numel() <= LARGEST and step.ndim <= 5:
                self.codes.append((k, a, b))
                value = step

    def __call__(self, x):
        n = x.shape[0]
        for k, a, b in self.codes:
            x = STEPS[k](x, a, b)
        if self.home and x.numel() % n == 0:  # bring as many rows as there are samples
            return x.reshape(n, -1)
        return x

    def __repr__(self):
        names = [f"STEPS[{k}](x, {a}, {b})" for k, a, b in self.codes]
        return f"x {self.shape}: " + ", ".join(names) + (" then (N, -1)" if self.home else "")


numbers = st.integers(0, 11)
chains = st.builds(
    Chain,
    st.sampled_from(
        [(2, 3), (3, 2), (4, 3), (4, 2), (3,), (4,), (2, 2, 3), (4, 1), (6, 2), (1, 4)]
    ),
    st.lists(st.tuples(st.integers(0, len(STEPS) - 1), numbers, numbers), min_size=1, max_size=7),
    st.booleans(),
)


@pytest.mark.usefixtures("one_thread")
@settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=400,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(chain=chains)
def test_axes_are_tracked_or_given_up(chain):
    """The whole Jacobian is right; per sample there is the right answer or none, and none where samples mix."""
    x = chain.x
    truth = torch.autograd.functional.jacobian(chain, x)
    rounding = {"length": LARGEST, "factor": 8.0, "scale": max(1.0, truth.abs().max().item())}
    for mode in MODES:
        ours = jactri.jacobian(chain, x, strategy=mode)
        assert_close(ours, truth, F64, what=mode, **rounding)
    n, y = x.shape[0], chain(x)
    if y.ndim == 0 or y.shape[0] != n:
        with pytest.raises(ValueError, match="output"):
            jactri.jacobian(chain, x, per_sample=True)
        return
    grid = truth.movedim(y.ndim, 1)
    off = ~torch.eye(n, dtype=torch.bool)
    mixed = bool((grid[off] != 0).any())
    for mode in MODES:
        try:
            ours = jactri.jacobian(chain, x, strategy=mode, per_sample=True)
        except RuntimeError as refusal:
            if "per_sample" in str(refusal):
                continue
            raise
        assert not mixed, "answered, though samples mix"
        blocks = torch.stack([grid[k, k] for k in range(n)])
        assert_close(ours, blocks, F64, what=f"{mode}, per sample", **rounding)

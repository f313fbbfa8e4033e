"""The workloads at the sizes of a GPU, what each should reach there, and float64 truth for some of its samples."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..operators import Operator
from ..workloads import Workload, resized, select

FP32_GRADE = 130e12
"""Flops a second at which a Hopper card can deliver products of float32 accuracy, on paper: tensor cores, three tf32 or
six bf16 products each. Replaced by the measured rate where that is higher."""


@dataclass(frozen=True)
class Sized:
    """A workload at its GPU size. ``share``: the part of the lower bound to reach; ``ratio``: to the best peer, by
    precision setting."""

    workload: Workload
    share: float
    ratio: dict[str, float]

    @property
    def name(self) -> str:
        return self.workload.name


# name: samples, share of the bound, ratio to the best of eager and compiled peers (one for both settings, or each)
GOALS = {
    "W1-tanh": (16384, 0.6, (3, 4)),
    "W3": (1024, 0.6, (2.5, 2.5)),
    "W2": (1024, 0.5, (2, 2)),
    "W4": (256, 0.7, (10, 10)),
    "W1-silu": (16384, 0.6, (3, 4)),
    "W5": (256, 0.5, (2, 2)),
    "W7": (64, 0.4, (20, 20)),
    "W6-n4": (64, 0.6, (80, 80)),
    "W8-laplacian": (65536, 0.5, (5, 5)),
    "W8-divergence": (8192, 0.0, (40, 40)),
    "W9-parameters": (2048, 0.8, (1, 1)),
    "W9-ntk": (160, 0.5, (50, 50)),
}
"""In the order in which they are run: what time does not suffice for is the least important. A share of 0: launches
are what bounds it."""


def sized(names: list[str], shrink: int = 1) -> list[Sized]:
    """The workloads by name (all if none is given), each at its GPU size divided by ``shrink``."""
    found = []
    for name, (samples, share, (ieee, tf32)) in GOALS.items():
        if names and not any(name == n or name.startswith(n + "-") for n in names):
            continue
        (w,) = select([name])
        samples = max(2, samples // shrink)
        name = "W6" if name == "W6-n4" else name
        w = replace(resized(w, samples), name=name, goal=None)
        found.append(Sized(w, share, {"ieee": ieee, "tf32": tf32}))
    if names and not found:
        raise KeyError(f"no workload {names}; there are {', '.join(GOALS)}")
    return found


def problem(w: Workload, device: torch.device) -> tuple[nn.Module, Tensor]:
    """The network and its input on the device."""
    net = w.build()
    return net.to(device), w.draw(net).to(device)


def truth(w: Workload, net: nn.Module, x: Tensor, samples: int) -> Tensor:
    """Jacobians of the first samples in float64, one ``autograd.grad`` a row: (samples, *out, *in).

    Where the workload asks for something else: that, of the first samples.
    """
    net = copy.deepcopy(net).double()
    if w.operator is not None:
        return w.operator.truth(net, x[:samples].double())
    x = x[:samples].double().requires_grad_()
    y = net(x).reshape(samples, -1)
    rows = [torch.autograd.grad(y[:, k].sum(), x, retain_graph=True)[0] for k in range(y.shape[1])]
    return torch.stack(rows, 1).reshape(samples, *w.out_shape, *w.in_shape)


def distance(got: Any, want: Tensor, operator: Operator | None = None) -> float:
    """Relative, in the Frobenius norm; NaN where there is a NaN. ``got``, of more samples, is what a contender gave."""
    if operator is not None:
        got = operator.flat(got)
        if operator.pairs:
            got = got[:, : len(want)]
    got = got[: len(want)]
    if got.shape != want.shape:
        raise AssertionError(f"shape {tuple(got.shape)}, not {tuple(want.shape)}")
    off = torch.linalg.vector_norm(got.double() - want)
    return (off / torch.linalg.vector_norm(want)).item()


def bound_ms(w: Workload, rates: dict[str, float], setting: str) -> float:
    """The least time: flops at the card's rate for the precision, or the answer and inputs moved once."""
    if setting == "tf32":
        flops = rates["tf32_flops_per_s"]
    else:
        flops = max(rates["ieee_flops_per_s"], min(FP32_GRADE, rates["bf16_flops_per_s"] / 6))
    return 1e3 * max(w.flops / flops, w.bytes / rates["copy_bytes_per_s"])

"""A Jacobian in a loss, and its gradient in the weights: ``python -m benchmarks.penalty [--json FILE]``.

The loss is the squared norm of each sample's Jacobian, of the networks of W1 and W7 with weights that are trained.
Every contender's gradient is held against float64 first. Exit status 1 if one of jactri's is wrong or fails.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

import jactri

from . import compare, timing
from .record import write_json
from .workloads import Workload, select

OF = {"W1-tanh": 256, "W7": 4}
"""Workloads, and the samples of a step."""

FARTHEST = 1e-3
"""How far from float64 a gradient may be, relative to its largest entry."""


def _ours(net: nn.Module, x: Tensor) -> Tensor:
    return jactri.jacobian(net, x, per_sample=True, create_graph=True).square().sum()


def _func(net: nn.Module, x: Tensor) -> Tensor:
    weights = dict(net.named_parameters())
    return vmap(jacrev(lambda v: functional_call(net, weights, v[None])[0]))(x).square().sum()


def _step(
    loss: Callable[[Tensor], Tensor], net: nn.Module, x: Tensor
) -> Callable[[], list[Tensor]]:
    weights = list(net.parameters())
    return lambda: list(torch.autograd.grad(loss(x), weights, materialize_grads=True))


def contenders(net: nn.Module, x: Tensor, compiled: bool) -> dict[str, Callable[[], list[Tensor]]]:
    """Steps by their names, which give the gradient in each weight."""
    steps = {
        "jactri": _step(lambda x: _ours(net, x), net, x),
        "vmap(jacrev)": _step(lambda x: _func(net, x), net, x),
    }
    if compiled:
        made = jactri.compile(lambda x: _ours(net, x), x, of=None)
        if made.reason is not None:
            raise RuntimeError(f"the compiled step runs eagerly: {made.reason}")
        steps["jactri compile"] = _step(made, net, x)
    return steps


def _error(found: list[Tensor], want: list[Tensor]) -> float:
    size = max(w.abs().max() for w in want)
    return float(max((f - w).abs().max() for f, w in zip(found, want, strict=True)) / size)


def measure(w: Workload, options: argparse.Namespace) -> dict[str, Any]:
    """Check and time the contenders of one network."""
    net = w.build().requires_grad_()
    x = w.draw(net)
    exact = copy.deepcopy(net).double()
    want = _step(lambda x: _func(exact, x), exact, x.double())()
    calls = contenders(net, x, options.compile)
    errors = {name: _error(call(), want) for name, call in calls.items()}
    table = timing.interleave(
        calls,
        {name: timing.estimate(call) for name, call in calls.items()},
        rounds=options.rounds,
        budget=options.budget,
        seed=options.seed,
    )
    return {
        "workload": w.name, "title": f"{w.title.split(', N=')[0]}, N={len(x)}", "errors": errors,
        "seconds": {name: asdict(table.spread(name)) for name in calls},
        "ratios": {f"{a} / {b}": asdict(table.ratio(a, b)) for a in calls for b in calls if a != b},
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 1 if a gradient was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.penalty", description=__doc__)
    compare.add_options(parser, 30.0, "seconds of timing a network")
    options = parser.parse_args(arguments)
    about, results = compare.start(options), []
    for name, samples in OF.items():
        (w,) = select([name])
        results.append(found := measure(replace(w, samples=samples), options))
        print(f"\n{w.name}, {samples} samples: the gradient of |J|^2 in the weights")
        for call, s in found["seconds"].items():
            print(f"  {call:<18}{1e3 * s['median']:>9.4g} ms  error {found['errors'][call]:.1e}")
        for pair, s in found["ratios"].items():
            if s["median"] > 1:
                print(f"  {pair} = {s['median']:.2f}  (p20 {s['p20']:.2f}, p80 {s['p80']:.2f})")
        if options.json:
            write_json(options.json, {"kind": "penalty", "machine": about, "results": results})
    return int(any(e > FARTHEST for found in results for e in found["errors"].values()))


if __name__ == "__main__":
    sys.exit(main())

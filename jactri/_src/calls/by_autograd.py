"""Products with the Jacobian by autograd itself, where the blocks of the engine do not represent a graph.

Of `vectors.push` and `vectors.pull`: blocks ``(K, *x)`` to ``(K, *y)`` and back, None for zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..base.rates import block_bytes
from ..plan.needs import CACHE_BYTES
from ..read.graph import UnsupportedGraph
from ..read.opaque import why_not
from ..read.unrecorded import guarded
from ..read.vmapped import Vmapped


def pulled(ys, xs, blocks, columns: int, reason: UnsupportedGraph) -> list[Tensor]:
    """`vectors.pull` by autograd, for what the blocks of the engine do not represent."""
    live = [(y, b) for y, b in zip(ys, blocks, strict=True) if b is not None and y.requires_grad]
    if not live:
        return [x.new_zeros(columns, *x.shape) for x in xs]
    ends = [y for y, _ in live]
    graph = torch.is_grad_enabled()
    why = (reason.why or why_not(ends)) if graph else None
    if why is None:
        return _rows(lambda cs: _gradients(ends, xs, cs, graph), live)
    with torch.no_grad():
        made = _rows(lambda cs: _gradients(ends, xs, cs, False), live)
    return guarded(made, [*ends, *(b for _, b in live)], why)


def pushed(ys, xs, blocks, columns: int, reason: UnsupportedGraph) -> list[Tensor]:
    """`vectors.push` by autograd: the derivative of ``c J`` in c, in which it is linear."""
    # what hooks, and backwards of sparse tensors, make of a cotangent need not be recorded
    if reason.graph is not None or not reason.twice or why_not(ys) is not None:
        return [_by_rows(y, xs, blocks, columns, reason) for y in ys]
    with torch.enable_grad():
        cs = [torch.zeros_like(y, requires_grad=True) for y in ys]
        ends = [(y, c) for y, c in zip(ys, cs, strict=True) if y.requires_grad]
        if not ends:
            return [y.new_zeros(columns, *y.shape) for y in ys]
        back = _gradients(*([e[0] for e in ends], xs, [e[1] for e in ends]), True)
    live = [(g, b) for g, b in zip(back, blocks, strict=True) if b is not None and g.requires_grad]
    if not live:
        return [y.new_zeros(columns, *y.shape) for y in ys]
    starts = [g for g, _ in live]
    return _rows(lambda ts: _gradients(starts, cs, ts, torch.is_grad_enabled()), live)


def _by_rows(y: Tensor, xs, blocks, columns: int, reason: UnsupportedGraph) -> Tensor:
    """`vectors.push` to one output where ``c J`` cannot be differentiated: by the rows of the Jacobian.

    The gradient of a complex tensor is the one whose real pairs are the gradient in real pairs, see "Autograd for
    Complex Numbers" in PyTorch's notes.
    """
    n = y.numel()
    row = max(n, *(x.numel() for x in xs)) * y.element_size()
    most = max(1, int(block_bytes(y.device.type, CACHE_BYTES) // max(row, 1)))
    made = []
    for start in range(0, n, most):
        k = min(most, n - start)
        index = torch.arange(k, device=y.device)
        units = torch.zeros(k, n, dtype=y.dtype, device=y.device)
        units[index, start + index] = 1
        parts = []
        for unit in (units, 1j * units) if y.is_complex() else (units,):
            total = torch.zeros(columns, k, dtype=y.real.dtype, device=y.device)
            rows = pulled([y], xs, [unit.reshape(k, *y.shape)], k, reason)
            for g, t in zip(rows, blocks, strict=True):
                if t is not None:
                    pairs = [
                        torch.view_as_real(v.resolve_conj()) if v.is_complex() else v
                        for v in (t, g)
                    ]
                    total = total + pairs[0].reshape(columns, -1) @ pairs[1].reshape(k, -1).mT
            parts.append(total)
        made.append(torch.complex(*parts) if y.is_complex() else parts[0])
    return torch.cat(made, 1).reshape(columns, *y.shape) if made else y.new_zeros(columns, *y.shape)


def _gradients(ys, xs, cs, create_graph: bool) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        ys, xs, cs, retain_graph=True, create_graph=create_graph, materialize_grads=True
    )


def _rows(product, live) -> list[Tensor]:
    """``product`` for every row of blocks; ``live``: (tensor of the computation, its block)."""
    flat = torch.cat([b.reshape(len(b), t.numel()) for t, b in live], 1)  # of the widest dtype
    sizes = [t.numel() for t, _ in live]

    def one_row(row):
        parts = []
        for part, (t, _) in zip(row.split(sizes), live, strict=True):
            if part.is_complex() and not t.is_complex():
                part = part.real
            parts.append(part.to(t.dtype).view(t.shape))
        return product(parts)

    nodes = [t.grad_fn for t, _ in live if t.grad_fn is not None]  # none: of a cotangent itself
    name = " ".join(dict.fromkeys(node.name() for node in nodes))
    return list(Vmapped(one_row, f"the whole function ({name})")(flat))

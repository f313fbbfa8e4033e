"""PyTorch's own database of operators, as functions of tensors with sample inputs.

The database is part of every wheel of torch (torch.testing._internal), and made for torch's own tests.
"""

import itertools
import warnings
from unittest import mock

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

pytest.importorskip("expecttest", reason="torch's database imports it: pip install expecttest")
# its import would freeze torch.backends' flags for every test of this process
with warnings.catch_warnings(), mock.patch("torch.backends.disable_global_flags"):
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db

F64 = torch.float64
SAMPLES = 4
ENTRIES = 30_000  # of a Jacobian: larger samples are left out where there are smaller ones
SEEN = 60  # samples of an op that are looked at, and more if none of these will do


def name_of(op) -> str:
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


OPS = {
    name_of(op): op
    for op in op_db
    if op.supports_autograd and F64 in op.supported_backward_dtypes("cpu")
}


def tensors(tree) -> list:
    return [v for v in tree_flatten(tree)[0] if isinstance(v, torch.Tensor)]


class Function:
    """A sample as a function of its differentiable dense tensors, ``inputs``; it returns a tuple.

    Random numbers are the same in every call. Complex outputs are real pairs, whose Jacobian is one matrix; sparse ones
    are dense.
    ``most``: how many entries of an output are kept, of all others the Jacobian is not asked.
    """

    def __init__(self, op, sample):
        self.op, self.sample, self.most = op, sample, None
        self.leaves, self.spec = tree_flatten((sample.input, sample.args, sample.kwargs))
        self.places = [
            k
            for k, v in enumerate(self.leaves)
            if isinstance(v, torch.Tensor) and v.requires_grad and v.layout == torch.strided
        ]
        self.inputs = tuple(self.leaves[k].detach() for k in self.places)

    def __call__(self, *xs):
        torch.manual_seed(7)
        leaves = list(self.leaves)
        for k, x in zip(self.places, xs, strict=True):
            leaves[k] = x
        given, args, kwargs = tree_unflatten(leaves, self.spec)
        with warnings.catch_warnings():
            # what torch says of its ops (beta, deprecated, slow) is not about jactri
            warnings.simplefilter("ignore")
            found = self.op(given, *args, **kwargs)
            if self.sample.output_process_fn_grad is not None:
                found = self.sample.output_process_fn_grad(found)
        return tuple(self.real(y) for y in tensors(found) if y.requires_grad)

    def real(self, y):
        if y.layout != torch.strided:
            y = y.to_dense()
        if y.is_complex():
            y = torch.view_as_real(y.resolve_conj())
        return y if self.most is None else y.reshape(-1)[: self.most]

    def run(self):
        """(outputs, inputs) of a graph of autograd's own."""
        # not clones: views look beyond their own entries in some samples
        leaves = tuple(x.detach().requires_grad_() for x in self.inputs)
        return self(*leaves), leaves

    def size(self) -> int:
        """Entries of the Jacobian."""
        return sum(y.numel() for y in self.run()[0]) * sum(x.numel() for x in self.inputs)


def functions(op, most=SAMPLES, entries=ENTRIES):
    """Up to ``most`` functions of an op, from all over its samples, whose Jacobian has at most ``entries``.

    Where all are larger, the first, with as much of its output as fits.
    """
    torch.manual_seed(0)
    samples = op.sample_inputs("cpu", F64, requires_grad=True)
    first = list(itertools.islice(samples, SEEN))
    step = max(1, len(first) // most)
    spread = [*range(0, len(first), step)][:most]
    order = (*spread, *(k for k in range(len(first)) if k not in spread))
    rest = ((k, first[k]) for k in order)
    found, large = {}, {}
    for k, sample in itertools.chain(rest, enumerate(samples, len(first))):
        func = Function(op, sample)
        size = func.size() if func.places else 0
        if size:
            (found if size <= entries else large)[k] = func
        if len(found) == most or (large and k >= SEEN):
            break
    if not found and large:
        k, func = next(iter(large.items()))
        func.most = max(1, 16 * entries // sum(x.numel() for x in func.inputs))
        found[k] = func
    return found


def some_rows(func, most=12):
    """For every output that has entries: its index, some of its entries, and their rows by `torch.autograd.grad`."""
    outputs, leaves = func.run()
    generator = torch.Generator().manual_seed(0)
    found = []
    for j, y in enumerate(outputs):
        if not y.numel():
            continue
        at = torch.randperm(y.numel(), generator=generator)[:most].sort().values
        rows = [gradients(y.reshape(-1)[k], leaves, retain_graph=True) for k in at.tolist()]
        found.append((j, at, [torch.stack(column) for column in zip(*rows, strict=True)]))
    return found


def gradients(y, xs, **options):
    """`torch.autograd.grad`, with zeros for what y does not depend on."""
    if not y.requires_grad:
        return [torch.zeros_like(x) for x in xs]
    grads = torch.autograd.grad(y, xs, allow_unused=True, **options)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, xs, strict=True)]


def hessians(y, xs):
    """The second derivatives of a scalar, by autograd: ``H[i][j]`` of shape ``(xs[i].numel(), *xs[j].shape)``."""
    found = []
    for g in gradients(y, xs, create_graph=True):
        rows = [gradients(e, xs, retain_graph=True) for e in g.reshape(-1)]
        found.append(
            [torch.stack(column) for column in zip(*rows, strict=True)]
            if rows
            else [x.new_zeros(0, *x.shape) for x in xs]
        )
    return found

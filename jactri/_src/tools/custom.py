"""`rule`: a user's own rule for an op or an ``autograd.Function``.

It stands in the registry of jactri's own rules (`rules.REGISTRY`), and is held against the node's own gradient at its
first use at every combination of shapes and dtypes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace as changed
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack

from ..base.tables import Shown
from ..maps.curvature import Curvature, Curves, Unary, as_they_are, full
from ..maps.linear_map import Identity
from ..maps.mask import Mask
from ..read.graph import Reader
from ..read.opaque import Opaque
from ..read.reading import read
from ..read.structure import Bent, Node, Output, Structure, said
from ..rules import REGISTRY, Record
from ..rules.elementwise import CONSTANT
from ..second.curves import CurveReader, UnknownCurvature, default
from .verification import Verification


class Rule(Shown):
    """A rule of a user, in force from when it is given a function until `remove`; as a context manager, for a block.

    It is made by `jactri.rule`.

    Attributes:
        targets: what it is for.

    Examples:
        >>> class Double(torch.autograd.Function):
        ...     forward = staticmethod(lambda ctx, x: 2 * x)
        ...     backward = staticmethod(lambda ctx, grad: 2 * grad)
        >>> with jactri.rule(Double)(lambda node: node.elementwise(2.0)) as double:
        ...     double.check(Double.apply, torch.ones(3))
        ...     jactri.diagonal(Double.apply, torch.ones(3))
        1
        tensor([2., 2., 2.])
    """

    def __init__(self, targets: tuple, replace: bool, linear: bool):
        if not targets:
            raise TypeError(
                "jactri.rule needs what it is for: a class of autograd.Function, an op or the name of a node"
            )
        self.targets = tuple(dict.fromkeys(map(target_of, targets)))
        self._replaces, self._linear = replace, linear
        self._function: Callable | None = None
        self._second: Callable | None = None
        self._records: dict[str | type, Record] = {}
        self._seen: set[tuple] = set()
        self._met: list[str] | None = None

    def __call__(self, function: Callable[[Node], object]) -> Rule:
        """Put the rule in force.

        Args:
            function: takes a `Node`, returns what its methods make: see `rule`.
        """
        if self._function is not None:
            raise RuntimeError(f"{self} has its function already; make another rule")
        for target in self.targets:
            if target in REGISTRY and REGISTRY[target].read is not None and not self._replaces:
                raise ValueError(
                    f"there is a rule for {named(target)} already; pass replace=True to jactri.rule to take its place"
                )
        self._function = function
        for target in self.targets:
            before = REGISTRY.get(target)
            # what else is known of the op stays
            own = changed(before or Record(), read=self._read, curve=self._curve)
            _stacks.setdefault(target, [before]).append(own)
            self._records[target] = REGISTRY[target] = own
        return self

    def remove(self) -> None:
        """Take the rule back; what it replaced is in force again. More than once does nothing."""
        while self._records:
            target, own = self._records.popitem()
            stack = _stacks[target]
            stack.remove(own)
            if stack[-1] is None:
                REGISTRY.pop(target, None)
            else:
                REGISTRY[target] = stack[-1]
            if len(stack) == 1:
                del _stacks[target]

    def __enter__(self) -> Rule:
        return self

    def __exit__(self, *_):
        self.remove()

    def _parts(self) -> list[str]:
        return [f"<jactri.rule for {', '.join(map(named, self.targets))}>"]

    def second(self, function: Callable) -> Callable:
        """Decorate what gives the second derivative along tangents, for `jactri.laplacian` and `jactri.bilaplacian`.

        Without it, ``linear=True`` or a ``bend``, the Laplacian is taken from the graph of the gradient, which is
        slower.

        Args:
            function: ``function(node, *tangents)`` gets a block ``(K, *input)`` for each tensor argument, None for one
                that does not depend on x, and returns the K values ``D2f[u, u]``, ``(K, *output)``; for several
                outputs, a tuple.
        """
        self._second = function
        return function

    def check(self, func: Callable, *inputs: Tensor) -> int:
        """Run ``func`` and hold every node of this rule in it, in first and second derivatives, against autograd.

        Args:
            func: takes ``inputs``, returns a tensor or a tuple of tensors.
            inputs: floating-point tensors.

        Returns:
            How many nodes there were.

        Raises:
            JacobianMismatch: at the first node that disagrees.
            ValueError: there was no node, or the rule declined it.
        """
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        with torch.enable_grad():
            out = func(*leaves)
            ys = [y for y in (out if isinstance(out, tuple) else (out,)) if y.requires_grad]
            self._met = []
            try:
                read(ys, leaves, _Tolerant())
                met = self._met
            finally:
                self._met = None
        if not met:
            raise ValueError(f"no node of {self} lies between the inputs and the output of func")
        return len(met)

    # -- what the registry calls ------------------------------------------------------------------

    def _read(self, g: Reader):
        where = f"rule for {named(self.targets[0])}"
        node = Node(g, where)
        rows = structured(self._function(node), node, where)
        if rows is None:
            if self._met is not None:
                raise ValueError(
                    f"{where}: it returned None for {node}, which leaves the node to autograd"
                )
            return None
        mark = len(g.values)
        ids = emitted(g, rows, where)
        self._verify(g, range(mark, len(g.values)), ids, where)
        return ids

    def _verify(self, g: Reader, new: range, ids, where: str, curves: Curves | None = None) -> None:
        """Once for nodes that are alike; all of them in `check`."""
        if _len_torch_dispatch_stack() or not g.meta:
            return  # traced: there are no values
        verification = Verification(g, new, ids, where)
        key = (verification.key(), curves is not None)
        if self._met is None and key in self._seen:
            return
        if curves is not None:
            verification.second(curves)
        else:
            verification.first()
            if torch.is_grad_enabled() or self._met is not None:
                verification.second()
        self._seen.add(key)
        if self._met is not None and curves is None:
            self._met.append(g.name)

    def _curve(self, r: CurveReader) -> Curves | None:
        where = f"rule for {named(self.targets[0])}"
        edges = [(v, s, e) for v in r.new for s, e in r.values[v].sources]
        if any(isinstance(e, Opaque) for _, _, e in edges):
            return default(r)
        found: Curves = {}
        if self._second is not None:
            node = Node(r, where)
            for nr, v in enumerate(r.ids):
                if v is not None:
                    found[v] = _Along(v, nr, tuple(r.src), self._second, node, where)
        elif not self._linear:
            alone = sum(s is not None for s in r.src) == 1
            for v, s, edge in edges:
                if alone and isinstance(edge, Bent) and edge.bend is not None:
                    found[v] = _Bend(s, where, as_they_are, _Slopes(edge))
                elif edge.__class__ not in (*CONSTANT, Mask):
                    return None
        self._verify(r, r.new, r.ids, where, found)
        return found


def structured(made, node: Node, where: str):
    """What the user returned, as one tuple of structures for each output."""
    if made is None:
        return None
    rows = (made,) if len(node.outputs) == 1 else made
    if not isinstance(rows, tuple | list) or len(rows) != len(node.outputs):
        raise ValueError(
            f"{where}: it must return a tuple with one entry for each of {len(node.outputs)} outputs"
        )
    out: list[tuple | list | None] = []
    for row in rows:
        if row is None:
            out.append(None)
            continue
        row = (row,) if isinstance(row, Structure) else row
        if not isinstance(row, tuple | list) or not all(
            r is None or isinstance(r, Structure) for r in row
        ):
            raise TypeError(
                f"{where}: it must return what the methods of node make (node.elementwise, ...), one for each "
                f"tensor argument, got {type(row).__name__}"
            )
        if len(row) != len(node.inputs):
            raise ValueError(
                f"{where}: {len(row)} structures for {len(node.inputs)} tensor arguments; None stands for one "
                "without gradient"
            )
        for r, place in zip(row, node.inputs, strict=True):
            if r is None and place is not None:
                raise ValueError(
                    f"{where}: no structure for an argument that has a gradient; node.zero() is none"
                )
        out.append(row)
    return out


def emitted(g: Reader, rows, where: str) -> tuple[int | None, ...]:
    """The values of a node's outputs, by the structures of each."""
    ids: list[int | None] = []
    for nr, (row, m) in enumerate(zip(rows, g.meta, strict=True)):
        if row is None or not m.dtype.is_floating_point:
            ids.append(None)
            continue
        at = Output(g, nr)
        terms = [
            (r.emit(at, s, where), Identity())
            for r, s in zip(row, g.src, strict=True)
            if s is not None and r is not None
        ]
        for t, _ in terms:
            if g.values[t].shape != at.shape:
                raise ValueError(f"{where}: an output {at.shape} is given as {g.values[t].shape}")
        out = at.add(terms) if terms else None
        if out in g.src:  # a value of its own, which may have a curvature
            out = at.emit([(out, Identity())], at.shape)
        ids.append(out)
    return tuple(ids)


class _Bend(Unary):
    """That of an elementwise structure."""

    __slots__ = ()

    def along(self, blocks):
        return self.slopes()[1] * blocks[0].square()


class _Tolerant(CurveReader):
    """Goes on where a curvature is not known."""

    def visit(self, node, src):
        try:
            return super().visit(node, src)
        except UnknownCurvature:
            return self.ids


class _Slopes:
    """Slope and bend of an elementwise structure, when they are asked for."""

    def __init__(self, edge: Bent):
        self._edge = edge

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> Tensor:
        return self._edge.bend() if i else self._edge.d

    def __iter__(self):
        return iter((self[0], self[1]))


class _Along(Curvature):
    """The second derivative of one output of a node along tangents, by a user's function."""

    __slots__ = ("_nr", "_second", "_src", "_value", "node", "where")

    def __init__(self, value: int, nr: int, src: tuple, second: Callable, node: Node, where: str):
        self.sources = tuple(dict.fromkeys(s for s in src if s is not None))
        self._value, self._nr, self._src, self._second = value, nr, src, second
        self.node, self.where = node, where

    def narrow(self, cut, ndim):
        return None

    def along(self, blocks: Sequence[Tensor]) -> Tensor:
        given = dict(zip(self.sources, blocks, strict=True))
        out = self._second(self.node, *[None if s is None else given[s] for s in self._src])
        out = out[self._nr] if len(self.node.outputs) > 1 else out
        shape = (blocks[0].shape[0], *self.node.outputs[self._nr].shape)
        if not isinstance(out, Tensor) or out.shape != shape:
            raise ValueError(f"{self.where}: second must return a tensor {shape}, got {said(out)}")
        return out

    def term(self, t):
        ties = t.layout(self._value).tied.intersection(*[t.layout(s).tied for s in self.sources])
        return t.seeds.signed(self.along([full(t, s, ties) for s in self.sources])).sum(0)


_stacks: dict[str | type, list[Record | None]] = {}
"""What a target's rules are, oldest first, while a user's is in force: jactri's own, or None, and those of users."""

_NODE = re.compile(r"\w+Backward\d+")


def target_of(target) -> str | type:
    """The key of the registry that a caller's target stands for."""
    if isinstance(target, type) and issubclass(target, torch.autograd.Function):
        return target
    op = getattr(target, "_opoverload", target)
    if isinstance(op, torch._ops.OpOverload):
        if op.namespace in ("aten", "prims"):
            raise TypeError(
                f"{op}: for an op of torch's own give the name of its node, as y.grad_fn.name() tells it"
            )
        return f"GeneratedBackwardFor_{op.namespace}_{op._opname}_{op._overloadname}Backward"
    if isinstance(target, str):
        if not _NODE.fullmatch(target) and "::" not in target:
            raise ValueError(
                f"{target!r} is no name of a node of torch's own, such as 'TanhBackward0' (y.grad_fn.name()); of an "
                "autograd.Function give the class, whose name need not be its alone"
            )
        return target
    raise TypeError(
        "jactri.rule is for a class of autograd.Function, an op of torch.library or the name of a node, got "
        f"{target!r}"
    )


def named(target: str | type) -> str:
    return target if isinstance(target, str) else target.__qualname__


def rule(*targets: Any, replace: bool = False, linear: bool = False) -> Rule:
    """Tell jactri the derivative of an op or of an ``autograd.Function`` as a structure.

    Without a rule jactri calls the node's own backward, once for each row: exact, and slow. With one, the op takes part
    in structured sweeps, forward ones too, keeps samples apart, and has second derivatives for `jactri.laplacian`.

    It decorates a function that gets a `jactri.Node` and returns, for each tensor argument of the op, what one of the
    node's methods makes: `Node.elementwise`, `Node.mask`, `Node.matrix`, `Node.linear`, `Node.identity` or `Node.zero`.
    For one argument that is the structure alone; else a tuple, in which None stands for an argument without gradient;
    for several outputs, a tuple with one such entry for each. To return None leaves that node to its own backward.

    At its first use, and for every new combination of shapes and dtypes, the rule is held against the node's own
    gradient: by one cotangent, its push against its pull, the axes that it keeps; its second derivatives, for
    ``create_graph`` and the Laplacian, against those of autograd, where autograd records them. It is in force for calls
    that come after; what `jactri.compile` planned before stays as it was planned.

    Args:
        targets: classes of ``torch.autograd.Function`` (the very class, not those derived from it), ops of
            ``torch.library`` (``torch.ops.mine.op.default``, or what ``custom_op`` returns), or names of nodes of
            torch's own ops (``"SincBackward0"``, as ``y.grad_fn.name()`` has it).
        replace: take the place of a rule that is there, jactri's own or another.
        linear: the op is linear in all of its differentiable arguments together: its second derivative is zero.

    Returns:
        The `jactri.Rule`, which stands where the decorated function stood: ``remove()`` takes it back, a ``with`` block
        does so at its end; ``second`` decorates a second derivative; ``check(func, *inputs)`` verifies it.

    Raises:
        TypeError, ValueError: a target or a structure that is none, a wrong shape, a second rule for a target; the
            message says which.
        JacobianMismatch: (in the call that uses the rule) it contradicts autograd.

    Cost:
        That of the function, at every reading of a graph, and one product with the node at the first use.

    Examples:
        >>> class Square(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         ctx.save_for_backward(x)
        ...         return x * x
        ...     @staticmethod
        ...     def backward(ctx, grad):
        ...         (x,) = ctx.saved_tensors
        ...         return 2 * x * grad
        >>> @jactri.rule(Square)
        ... def square(node):
        ...     (x,) = node.saved_tensors
        ...     return node.elementwise(2 * x, bend=2.0)
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> with jactri.fallback("error"):
        ...     jactri.laplacian(lambda x: Square.apply(x).sum(1), x)
        tensor([4., 4.])
        >>> square.check(Square.apply, x)
        1
        >>> square.remove()
    """
    return Rule(targets, replace, linear)

"""A call as one graph of ATen ops: traced by ``make_fx`` on fake tensors, which have no values for Python to read."""

from __future__ import annotations

import copy
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._C import _DisableAutocast
from torch._dynamo import config as dynamo
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves

from ..base.constants import constants
from ..base.tracing import REFUSALS, made_now, of_others, stands_for_others, tracing
from ..plan.owners import apart, apart_behind
from ..plan.planning import prove_by_probe
from .reached import Reached

_DISTRIBUTED = ("torch.distributed", "torch.nn.parallel")

_PLAIN = (Tensor, Parameter)

_DETACHES = torch.ops.aten.detach.default, torch.ops.aten.alias.default
_VIEW, _RESHAPE = torch.ops.aten.view.default, torch.ops.aten.reshape.default

_READS = (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__)
_SETS = (Tensor.data.__set__, Tensor.grad.__set__, Tensor.grad.__delete__)

_NORMALISES = tuple(
    getattr(torch.ops.aten, name).default
    for name in ("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm")
)

_one_at_a_time = threading.RLock()
"""A trace sets what others read: options of torch and, through func, attributes of modules."""


FOLDED = 1 << 21
"""Bytes of constants that are read rather than computed: what a cache holds from call to call."""


class Untraceable(Exception):
    """Why a call cannot be one graph."""


@dataclass
class Traced:
    """A graph whose placeholders are the inputs, then what the function held."""

    graph: fx.GraphModule
    held: list[Tensor]
    spec: TreeSpec
    """How the graph's results are nested."""

    @property
    def results(self) -> list[fx.Node]:
        """The nodes of its answer's tensors."""
        return list(next(iter(reversed(self.graph.graph.nodes))).args[0])


def frozen(traced: Traced) -> Traced:
    """With constants for what the function holds: copies of it, as it is now."""
    graph = copy.deepcopy(traced.graph)
    nodes = graph.graph
    if traced.held:
        for k, node in enumerate(
            [n for n in nodes.nodes if n.op == "placeholder"][-len(traced.held) :]
        ):
            graph.register_buffer(f"constant_{k}", traced.held[k].detach().clone())
            with nodes.inserting_before(node):
                constant = nodes.get_attr(f"constant_{k}")
            constant.meta = dict(node.meta)
            node.replace_all_uses_with(constant)
            nodes.erase_node(node)
        graph.recompile()
    return Traced(graph, [], traced.spec)


def folded(traced: Traced) -> Traced:
    """With what follows from jactri's own constants alone, as seeds and where entries stand, as constants.

    Views of constants stay as they are, which are no work; what is written to is none.
    """
    nodes = traced.graph.graph
    own = set(map(id, constants()))
    places = [n for n in nodes.nodes if n.op == "placeholder"]
    places = places[len(places) - len(traced.held) :]
    known = {n: t for n, t in zip(places, traced.held, strict=True) if id(t) in own}
    if not known:
        return traced
    written = _written(nodes)
    values = dict(known)  # and what numbers alone make, a constant where it meets others
    with torch.no_grad(), _DisableAutocast():
        for node in nodes.nodes:
            if node.op != "call_function" or node in written or not _may_fold(node):
                continue
            sources = node.all_input_nodes
            if all(n in values for n in sources):
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)
                if any(n in known for n in sources):
                    known[node] = values[node]
    ends = [
        n for n in known if not _is_view(n) and any(_is_view(u) or u not in known for u in n.users)
    ]
    if sum(known[n].numel() * known[n].element_size() for n in ends) > FOLDED:
        return traced
    graph = traced.graph
    first = next(n for n in nodes.nodes if n.op != "placeholder")
    for k, node in enumerate(ends):
        graph.register_buffer(f"known_{k}", known[node].contiguous())
        with nodes.inserting_before(first):
            constant = nodes.get_attr(f"known_{k}")
        constant.meta = dict(node.meta)
        node.replace_all_uses_with(constant)
    nodes.eliminate_dead_code()
    for node in places:
        if node in known:
            nodes.erase_node(node)
    used = {n.target for n in nodes.nodes if n.op == "get_attr"}
    for name in [name for name, _ in graph.named_buffers() if name not in used]:
        delattr(graph, name)
    graph.recompile()
    left = [t for n, t in zip(places, traced.held, strict=True) if n not in known]
    return Traced(graph, left, traced.spec)


def _written(nodes: fx.Graph) -> set[fx.Node]:
    """What is written to, and all of which that is a view."""
    found: set[fx.Node] = set()
    for node in reversed(nodes.nodes):
        if isinstance(node.target, torch._ops.OpOverload):
            for given, alias in _aliases(node.target, node.args, node.kwargs):
                if isinstance(given, fx.Node) and (alias.is_write or node in found):
                    found.add(given)
    return found


def _may_fold(node: fx.Node) -> bool:
    """Whether an op is a function of its tensors, whose result is one that may be kept."""
    target, like = node.target, node.meta.get("val")
    return (
        isinstance(target, torch._ops.OpOverload)
        and not target._schema.is_mutable
        and not _draws(node)
        and isinstance(like, Tensor)
        and like.numel() * like.element_size() <= FOLDED
    )


def _is_view(node: fx.Node) -> bool:
    """Whether an op gives what is, or may be, a view."""
    return isinstance(node.target, torch._ops.OpOverload) and any(
        True for _ in _aliases(node.target, node.args, node.kwargs)
    )


def trace(
    call: Callable[..., Any],
    inputs: Sequence[Tensor],
    written: Sequence[Tensor],
    reached: Reached,
    lasting: bool = False,
) -> Traced:
    """The graph of ``call(*inputs)``. Of all tensors only those of ``written`` may be written to.

    ``lasting``: what func holds stays as it is, so that its Python may read values there. Raises Untraceable.
    """
    for m in reached.modules:
        if any(c.__module__.startswith(_DISTRIBUTED) for c in type(m).__mro__):
            raise Untraceable(f"{type(m).__name__} distributes its weights")
    for x in inputs:
        if x.__class__ not in _PLAIN:
            raise Untraceable(f"an input is of {type(x)}")
        _check_lazy(x, "an input")
    for t in written:
        _check_lazy(t, "out")
    mode = fakes()
    # of views, since what is one tensor now may be two later
    given = [fake(mode, t.detach()) for t in (*inputs, *written)]
    spec: list[TreeSpec] = []

    def flat(*given):
        xs = [*given]
        for k, x in enumerate(inputs):
            if x.requires_grad:
                xs[k] = given[k].detach().requires_grad_()
        with _Unwritten(reached, lasting), _Unseen(reached, lasting):
            leaves, made = tree_flatten(call(*xs))
        spec.append(made)
        if not all(isinstance(t, Tensor) for t in leaves):
            raise Untraceable("its answer holds what is no tensor")
        return leaves

    graph, left = _made(flat, given, reached)
    held = _lift(graph)
    for t in held:
        _check_lazy(t, reached.called(t))
    read = set(map(id, held))
    for name, before, registered in left:
        if registered or id(before) in read:
            raise Untraceable(f"func sets {name}, which the next call may read")
    _check_statistics(graph)
    _plain(graph)
    _check_ops(graph, len(inputs), len(inputs) + len(written), held, reached)
    return Traced(graph, held, spec[0])


def _check_lazy(t: Tensor, what: str) -> None:
    """Raise Untraceable for a tensor whose memory holds its negation or conjugate: kernels read memory."""
    if t.is_neg() or t.is_conj():
        raise Untraceable(
            f"{what} is negated or conjugated lazily: pass what its resolve_neg() or resolve_conj() gives"
        )


def _what_is_read(error: DataDependentOutputException) -> str:
    """Why a value is asked for, which only a run has."""
    proofs = {apart.__code__, apart_behind.__code__, prove_by_probe.__code__}
    if any(frame.f_code in proofs for frame, _ in traceback.walk_tb(error.__traceback__)):
        return 'values prove that samples do not mix; per_sample="assume" takes your word for it'
    return f"a value is read, by {error.func}"


def _made(flat, given: list[Tensor], reached: Reached) -> tuple[fx.GraphModule, list[tuple]]:
    """The graph of a function of fake tensors, and what of func's it had to be taken out of."""
    with _one_at_a_time:
        before = reached.contents()
        try:
            # what torch.compile compiled runs as it was before
            with (
                of_others(reached.tensors.values()) as others,
                dynamo.patch(error_on_nested_fx_trace=False),
                warnings.catch_warnings(),
            ):
                # torch looks at .grad of what it makes a fake of
                warnings.filterwarnings(
                    "ignore", message="The .grad attribute of a Tensor that is not"
                )
                try:
                    graph = make_fx(flat, tracing_mode="fake")(*given)
                finally:
                    accumulated = _grads_put_back(others)
        except DataDependentOutputException as error:
            raise Untraceable(_what_is_read(error)) from error
        except DynamicOutputShapeException as error:
            raise Untraceable(f"the shape of what {error.func} gives depends on values") from error
        except REFUSALS as error:  # the ordinary call went well
            raise Untraceable(f"{type(error).__name__}: {error}".split("\n")[0]) from error
        finally:
            left = reached.taken_out(before, _of_trace)
        if accumulated is not None:
            raise Untraceable(f"func writes to the .grad of {reached.called(accumulated)}")
    return graph, left


def _grads_put_back(others: dict[int, tuple[Tensor, Tensor | None]]) -> Tensor | None:
    """Put back the .grad of tensors to which a backward accumulated some of the trace; one of them."""
    found = None
    for t, before in others.values():
        if t.is_leaf and isinstance(t.grad, FakeTensor):
            found, t.grad = t, before
    return found


def fakes() -> FakeTensorMode:
    """The mode of a trace. As in exports, its tensors do not keep the number that one of no axes stands for."""
    return FakeTensorMode(allow_non_fake_inputs=True, export=True)


def fake(mode: FakeTensorMode, t: Tensor) -> Tensor:
    """The tensor of a trace that stands for ``t``."""
    return t if isinstance(t, FakeTensor) else mode.from_tensor(t)


class _Unwritten(TorchDispatchMode):
    """Raises Untraceable where a tensor that is not of the trace would be written to, or its values read by Python.

    It may have others when the graph runs, unless what func holds is ``lasting``.
    """

    def __init__(self, reached: Reached, lasting: bool):
        super().__init__()
        self.reached, self.lasting = reached, lasting

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if made_now():
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            for t, alias in _aliases(func, args, kwargs):
                if alias.is_write and _real(t):
                    raise Untraceable(f"func writes to {self.reached.called(t)}")
        held = [] if self.lasting else [t for t in tree_leaves((args, kwargs)) if _real(t)]
        if not held:
            return func(*args, **kwargs)
        if torch.Tag.data_dependent_output in func.tags:
            raise Untraceable(f"a value is read, of {self.reached.called(held[0])}")
        stands_for_others(held)
        found = func(*args, **kwargs)
        for t in tree_leaves(found):
            if isinstance(t, FakeTensor):  # fakes keep what follows from numbers
                t.constant = None
        return found


class _Unseen(TorchFunctionMode):
    """The same of what is no op: it reads memory, or puts other memory into a tensor."""

    def __init__(self, reached: Reached, lasting: bool):
        super().__init__()
        self.reached, self.lasting = reached, lasting

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _SETS and _real(args[0]) and tracing():
            raise Untraceable(f"func writes to {self.reached.called(args[0])}")
        if func in _READS and not self.lasting and _real(args[0]) and tracing():
            raise Untraceable(f"a value is read, of {self.reached.called(args[0])}")
        return func(*args, **(kwargs or {}))


def _real(value: Any) -> bool:
    """Whether something is a tensor that has values."""
    return isinstance(value, Tensor) and not isinstance(value, FakeTensor)


def _aliases(op, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """The arguments that an op returns views of, or writes to, and how; of a list, each."""
    for k, argument in enumerate(op._schema.arguments):
        if argument.alias_info is not None:
            given = args[k] if k < len(args) else kwargs.get(argument.name)
            for each in given if isinstance(given, (list, tuple)) else (given,):
                yield each, argument.alias_info


def _of_trace(value: Any) -> bool:
    """Whether something is, or holds, a tensor of a trace."""
    return any(isinstance(t, FakeTensor) for t in tree_leaves(value))


def _lift(graph: fx.GraphModule) -> list[Tensor]:
    """Make placeholders of all tensors that the graph holds; the tensors."""
    nodes = graph.graph
    held: dict[int, tuple[Tensor, fx.Node]] = {}
    last = [n for n in nodes.nodes if n.op == "placeholder"][-1]
    for node in list(nodes.nodes):
        if node.op != "get_attr":
            continue
        t = getattr(graph, node.target)
        if not isinstance(t, Tensor):
            raise Untraceable(f"it holds a {type(t).__name__}")
        if t.layout is not torch.strided:
            raise Untraceable(f"it holds a tensor of {t.layout}")
        if id(t) not in held:
            with nodes.inserting_after(last):
                last = nodes.placeholder(f"held_{len(held)}")
            last.meta = dict(node.meta)
            held[id(t)] = t, last
        node.replace_all_uses_with(held[id(t)][1])
        nodes.erase_node(node)
    graph._buffers.clear()
    graph._parameters.clear()
    graph.recompile()
    return [t for t, _ in held.values()]


def _plain(graph: fx.GraphModule) -> None:
    """Without ops that depend on what a trace has in another way.

    Nothing differentiates the graph: a detached tensor is the tensor. And fakes may have other strides than tensors
    have, where an axis has one entry: what can be a view there may have to be a copy.
    """
    for node in list(graph.graph.nodes):
        if node.target in _DETACHES:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        elif node.target is _VIEW:
            node.target = _RESHAPE
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _check_ops(graph, first: int, last: int, held, reached: Reached) -> None:
    """Raise Untraceable for random numbers, and where a placeholder but for some is written to, also by a view."""
    placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    source = {n: k for k, n in enumerate(placeholders)}
    for node in graph.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        if _draws(node):
            raise Untraceable(f"func draws random numbers, by {node.target}")
        for given, alias in _aliases(node.target, node.args, node.kwargs):
            k = source.get(given) if isinstance(given, fx.Node) else None
            if k is None:
                continue
            source[node] = k
            if alias.is_write and not first <= k < last:
                what = "an input" if k < last else reached.called(held[k - last])
                raise Untraceable(f"func writes to {what}")


def _check_statistics(graph: fx.GraphModule) -> None:
    """Raise Untraceable for a normalisation of a batch whose schema does not tell that it writes to what it is given.

    Also where nothing uses what it gives.
    """
    for node in graph.graph.nodes:
        if node.target in _NORMALISES:
            names = [a.name for a in node.target._schema.arguments]
            given = dict(zip(names, node.args, strict=False)) | node.kwargs
            if given["training"] and given["running_mean"] is not None:
                raise Untraceable(f"{node.target} writes to running statistics")


def _draws(node: fx.Node) -> bool:
    """Whether an op draws random numbers: dropout of nothing does not."""
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    names = [a.name for a in node.target._schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    return "dropout_p" not in names or given.get("dropout_p", 0.0) > 0

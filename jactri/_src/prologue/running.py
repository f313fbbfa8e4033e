"""What surrounds every call: how the caller's function is run, and in which context jactri's own products are.

The function runs as the caller would run it, in grad mode and with the caller's autocast, but eagerly: what of it
torch.compile compiled is one node to autograd, whose graph cannot be read (and whose backward fails at a second batch
size). Products run outside of autocast: they belong to the graph, whose dtypes are the function's.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import Module
from torch.utils.hooks import RemovableHandle

from ...kernels.support import Ready
from ..base import backends
from ..base.classes import PLAIN, dressed, leaf_and_given, plain
from ..base.elsewhere import check_local
from ..base.remedies import misfit, not_callable
from ..base.tracing import own
from ..read import overriding, ranges
from ..read.ranges import watching
from .arguments import outputs
from .failures import note


def public(call: Callable) -> Callable:
    """A public call, or method: outside of inference mode, in which autograd records nothing.

    Within a function of torch.compile it runs as it is.
    """

    @functools.wraps(call)
    def called(*args, **options):
        if torch.compiler.is_dynamo_compiling():  # what is traced of a call leaves its modes behind
            return torch.compiler.disable(checked)(*args, **options)
        stream = getattr(_recording, "stream", None)
        if stream is not None:  # the graph of what runs in here is needed as a whole
            with stream.pause(), stream_now(None):
                return called(*args, **options)
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return checked(*args, **options)
        return checked(*args, **options)

    checked = with_remedies(call)
    return called


def with_remedies(call: Callable) -> Callable:
    """A call that says what to write instead of arguments that it does not have."""

    @functools.wraps(call)
    def called(*args, **options):
        try:
            return call(*args, **options)
        except TypeError:
            if (error := misfit(call, args, options)) is None:
                raise
        raise error

    return called


class computing:
    """The context of jactri's own products: with a graph if one is asked for, and never in autocast's precision.

    They share what they make of matrices for kernels, and forget it with the context. ``backend``: that of the call;
    None leaves it as it is.
    """

    __slots__ = ("_autocast", "_backend", "_create_graph", "_grad", "_ready", "_token")

    def __init__(self, create_graph: bool, backend: str | None = None):
        self._create_graph, self._backend = create_graph, backend
        self._autocast: torch._C._DisableAutocast | None = None

    def __enter__(self) -> None:
        if self._create_graph:
            overriding.refuse("create_graph=True")
        self._token = None if self._backend is None else backends.asked.set(self._backend)
        self._ready = backends.ready.set(Ready())
        self._grad = torch.is_grad_enabled()
        torch._C._set_grad_enabled(self._create_graph)
        if torch._C._is_any_autocast_enabled():
            self._autocast = torch._C._DisableAutocast()
            self._autocast.__enter__()

    def __exit__(self, *error) -> None:
        if self._autocast is not None:
            self._autocast.__exit__(*error)
        torch._C._set_grad_enabled(self._grad)
        backends.ready.reset(self._ready)
        if self._token is not None:
            backends.asked.reset(self._token)


# -- the caller's function ------------------------------------------------------------------------


class Ran(NamedTuple):
    """A function that was run: the ends of its graph, of the plain class (see classes.py), and what it returned."""

    ys: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...]
    tupled: bool
    result: Any

    def output(self, create_graph: bool) -> Any:
        """What it returned, as the caller of jactri gets it."""
        return self.result if create_graph else detached(self.result)

    def dressed(self, answer: Any, xs: Sequence[Tensor]) -> Any:
        """An answer as autograd would have given it for what it was run on (see `classes.dressed`)."""
        return dressed(answer, (*(self.result if self.tupled else (self.result,)), *xs))


def prepare(
    func,
    xs: tuple[Tensor, ...],
    create_graph: bool,
    call: str = "jacobian",
    answers: bool = True,
    stream: Any = None,
) -> Ran:
    """Run ``func`` on inputs that require grad, for a call of this name. ``answers``: what comes of it are numbers.

    ``stream``: a `streaming.Streamed`, in which it runs.
    """
    if not xs:
        raise IndexError("inputs is an empty tuple: pass at least one tensor")
    check_local((), xs)
    grad = torch.is_grad_enabled()
    if grad and answers and not create_graph and recording() and any(x.requires_grad for x in xs):
        warnings.warn(_CONSTANT.format(call), stacklevel=2)
    torch._C._set_grad_enabled(True)
    try:
        leaves, given = zip(*[leaf_and_given(x, create_graph) for x in xs], strict=True)
        run = record
        if stream is not None:
            stream.begin(leaves)
            run = stream.record
        if watching():
            result, handles = ranges.call(run, func, given)
        else:
            result, handles = run(func, *given)
        if handles:
            for leaf in leaves:
                leaf._jactri_handles = handles  # see graph.read
        tupled_out, ys = outputs(result, call)
        if not PLAIN.issuperset(map(type, ys)):
            ys = tuple(map(plain, ys))
    finally:
        torch._C._set_grad_enabled(grad)
    return Ran(ys, leaves, tupled_out, result)


_CONSTANT = (
    "jactri.{} inside of a function that jactri differentiates gives a constant, whose derivative is zero, as torch's "
    "does: pass create_graph=True to differentiate it too, or inputs.detach() where a constant is meant"
)

_recording = threading.local()


def record(call, *args):
    """Call a function for its graph, which will be read: what it returns, and how many hooks it registered."""
    if not callable(call):
        raise not_callable(call)
    before, _recording.now = recording(), True
    if not before:
        overriding.begin()
    number = RemovableHandle.next_id
    try:
        return _eager(call, args, {}), RemovableHandle.next_id - number
    except (RuntimeError, TypeError) as error:
        note(error, call, args, {})
        raise
    finally:
        _recording.now = before


@contextlib.contextmanager
def stream_now(stream: Any):
    """Within: ``stream`` is the `streaming.Streamed` in which this thread's function runs, or None."""
    before, _recording.stream = getattr(_recording, "stream", None), stream
    try:
        yield
    finally:
        _recording.stream = before


def recording() -> bool:
    """Whether this runs inside of a function whose graph will be read."""
    return getattr(_recording, "now", False)


def eagerly(func: Callable) -> Callable:
    """A function that runs as `record` runs it, for those who call it themselves, as torch.func's transforms."""
    if not callable(func):
        raise not_callable(func)

    @functools.wraps(func, updated=())
    def called(*args, **kwargs):
        return _eager(func, args, kwargs)

    return called


class _Eager:
    """Calls functions; meanwhile those of torch.compile run as they were before.

    The stance of the compiler is one for all threads: the first to come sets it, and the last to go puts it back.
    """

    def __init__(self):
        self._lock, self._inside, self._stance = threading.Lock(), 0, None

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._stance = torch.compiler.set_stance("force_eager")
            self._inside += 1

    def __exit__(self, *error) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                stance, self._stance = self._stance, None
                stance.__exit__(None, None, None)

    def __call__(self, func, args, kwargs):
        if "torch._dynamo" not in sys.modules:  # nothing is compiled
            return func(*args, **kwargs)
        if torch._C._dynamo.eval_frame.get_eval_frame_callback() not in (None, False):
            # within a compiled function, whose frames are compiled as they are called
            return torch.compiler.disable(self)(func, args, kwargs)
        with self:
            return func(*args, **kwargs)


_eager = _Eager()


def staying_eager() -> contextlib.AbstractContextManager[None]:
    """A context in which what of a function is compiled runs eagerly."""
    return _eager if "torch._dynamo" in sys.modules else contextlib.nullcontext()


def saved_as_it_is() -> saved_tensors_hooks:
    """A context in which what autograd saves is kept as it is, whatever hooks the caller has on that."""
    return saved_tensors_hooks(_same, _same)


def _same(x: Any) -> Any:
    return x


@contextlib.contextmanager
def buffers_kept(modules: Iterable[Module]):
    """Put back the buffers that a forward pass in training mode writes to; gives what may be put back."""
    saved = [
        (m, name, b, b.clone(), b._version)
        for m in modules
        if m.training and not own()  # whose ops write nothing
        for name, b in m._buffers.items()
        if b is not None
    ]
    try:
        yield saved
    finally:
        with torch.no_grad():
            for m, name, b, copy, version in saved:
                if b._version != version:
                    b.copy_(copy)
                elif b.layout is torch.strided and all(b.stride()):
                    # native ops write to statistics without telling; those are dense
                    if b.device.type != "cpu":  # to compare would wait for the device
                        b.data.copy_(copy)
                    elif not torch.equal(b, copy):
                        b.copy_(copy)
                m._buffers[name] = b


def detached(result: Any):
    """What a function returned, without its graph."""
    return tuple(r.detach() for r in result) if isinstance(result, tuple) else result.detach()

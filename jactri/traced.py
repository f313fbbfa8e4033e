"""Forward pass and accumulation as one straight-line function, for repeated calls on a CPU whose ops never change.

What `cudagraph` is on a GPU. The ops below autograd are recorded, the caller's own as well: a call runs none of the
caller's Python, records no graph and compares none; values that only the graph needed are not computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .behind import nodes_behind
from .constants import constants
from .guard import is_python, key
from .held import Held
from .hooks import check_hooks
from .kept import kept_tensors
from .operators.jobs import Ends, Job
from .peephole import fused
from .running import computing
from .tape import Recorder, Stale, Tape, Unrecordable, function, strided, tensors


class Traced:
    """One recorded call."""

    def __init__(self, job: Job, xs: tuple[Tensor, ...], out: Any):
        if job.backend == "triton":
            raise Unrecordable("Triton's kernels are not ops that can be recorded")
        if any(x.is_complex() for x in xs):
            raise Unrecordable("an input is complex")
        job, given = job.by_ops(), tensors(out)
        inputs = [x.detach().clone() for x in xs]  # no memory in common with what func holds
        self.held = Held(job.func, lambda: job.forward(tuple(inputs)))
        self.settings = _settings()
        job.rows(job.forward(tuple(inputs)), out)  # what is measured or probed once
        with Recorder(job.limit(xs[0].device)) as recorder:
            with _Exits() as exits:
                ends = job.forward(tuple(inputs))
            check_hooks(job, ends)
            rows = job.rows(ends, out)
        if exits.found:
            raise Unrecordable(exits.found)
        if any(is_python(node) for node in nodes_behind(ends.ys)):
            raise Unrecordable("an autograd.Function in it is Python code")
        self.held.settle()
        shown = tensors(ends.result) if job.shows_output else []
        held = [*self.held.tensors, *job.held, *constants(), *kept_tensors()]
        lines, results = connected(
            recorder.lines, [*rows, *shown], [*inputs, *given, *held], recorder.numbers
        )
        recorder.lines = fused(lines, results)
        tape = Tape(recorder, results, given, inputs)
        fixed = {id(t) for t in held} | recorder.numbers
        for i, t in enumerate(tape.outside):
            if id(t) not in fixed and not _of_a_number(t):
                raise Unrecordable(
                    f"a tensor {tuple(t.shape)} comes from neither the inputs, nor what func holds, nor its ops"
                )
            tape.constants[f"x{i}"] = t
        foreign = {_storage(t) for t in (*tape.outside, *inputs) if t.numel()}
        if any(t.numel() and _storage(t) in foreign for t in shown):
            raise Unrecordable("the output shares memory with an input or a parameter")
        self.ends, self.rows = job.lean(ends), len(rows)
        self.strides = [x.stride() for x in inputs]
        parameters = [f"i{i}" for i in range(len(inputs))] + [f"o{i}" for i in range(len(given))]
        lines = [*tape.code, f"return [{', '.join(tape.results)}]"]
        self.run = function("traced", parameters, lines, tape.constants)
        self.how = f"replays {tape.ops} ops, those of func among them"

    def __call__(self, xs: tuple[Tensor, ...], given: list[Tensor]) -> tuple[Ends, list[Tensor]]:
        """The forward pass's ends, and the tensors of the answer. Raises Stale if something was replaced."""
        if (change := self.held.changed()) is not None:
            raise Stale(change)
        if self.settings != _settings():
            raise Stale("torch's settings")
        xs = [_laid(x, strides) for x, strides in zip(xs, self.strides, strict=True)]
        with computing(False):
            made = self.run(*xs, *given)
        shown = made[self.rows :]
        ends = self.ends
        if shown:
            ends = ends._replace(
                result=tuple(shown) if isinstance(ends.result, tuple) else shown[0]
            )
        return ends, made[: self.rows]


class _Exits(TorchFunctionMode):
    """Notices where values of tensors leave torch: what comes back would be that of the recording.

    ``READS`` are functions that read lengths off a tensor and record no op that does; ``found`` is a reason.
    """

    WAYS = (
        Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__, Tensor.untyped_storage, Tensor.__repr__,
    )  # fmt: skip
    READS = (
        torch.tensor_split, Tensor.tensor_split, torch.ctc_loss, torch.nn.functional.ctc_loss,
        torch._pack_padded_sequence, torch._VF._pack_padded_sequence,
    )  # fmt: skip
    found: str | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = [*args[1:], *(kwargs or {}).values()]
        if func in self.WAYS or (func in self.READS and tensors(given)):
            self.found = f"func takes values out of torch, by {func.__name__}"
        elif torch.is_autocast_enabled("cpu"):  # also inside of ops, where no cast is recorded
            self.found = "autocast is on"
        return func(*args, **(kwargs or {}))


_NARROW = {
    torch.float64: torch.float32,
    torch.int64: torch.int32,
    torch.complex128: torch.complex64,
}


def _of_a_number(t: Tensor) -> bool:
    """Whether autograd made a tensor of a Python number: such a one promotes no dtype."""
    narrow = _NARROW.get(t.dtype)
    return t.dim() == 0 and torch.result_type(torch.zeros((), dtype=narrow), t) is narrow


def _laid(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """An input with the strides of the recording."""
    if x.stride() == strides:
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x.detach())


def _settings() -> tuple:
    """What else decides which ops a function runs."""
    return torch.is_autocast_enabled("cpu"), torch.get_default_dtype()


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def connected(
    lines: list[tuple], results: list[Tensor], known: list[Tensor], numbers: set[int]
) -> tuple[list[tuple], list[Tensor]]:
    """Lines whose arguments are the very tensors that earlier ones made.

    Autograd hands out what it saved as another tensor with the same memory. A recorder holds all memory that it sees,
    so none is used twice, and tensors of one memory and look here are so in every replay: the same ops made them.
    """
    own = {id(t) for t in known} | numbers
    made: dict[tuple, Tensor] = {}
    turned = {id(args[0]) for op, args, *_ in lines if torch.Tag.inplace_view in op.tags}

    def note(t: Tensor) -> None:
        strided(t)
        own.add(id(t))
        if t.numel() and id(t) not in turned:  # else its look at the time is not known any more
            made[key(t)] = t

    def swapped(tree):
        if isinstance(tree, Tensor):
            known = id(tree) in own or tree.layout is not torch.strided or not tree.numel()
            return tree if known else made.get(key(tree), tree)
        if isinstance(tree, (list, tuple)):
            return type(tree)([swapped(item) for item in tree])
        return tree

    for t in known:
        note(t)
    found = []
    for op, args, kwargs, out in lines:
        args, kwargs = swapped(args), {k: swapped(v) for k, v in kwargs.items()}
        for t in tensors(out):
            note(t)
        found.append((op, args, kwargs, out))
    return found, swapped(results)

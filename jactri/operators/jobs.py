"""What `jactri.compile` compiles: a call of the library in parts, of which only the first runs each time.

``forward`` runs the caller's function and gives the ends of the graph that autograd recorded; ``rows`` computes tensors
from that graph, which is what is recorded and replayed; ``answer`` nests them as the call does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..api import Request, compute, jacobian, nest
from ..arguments import as_tuple, check_options, out_rows
from ..behind import handles_of
from ..memory import free_bytes, parse_bytes
from ..running import computing, detached, prepare
from . import points
from . import weight as weights
from .diagonal import check_shape, diagonal, diagonal_of
from .divergence import divergence
from .divergence import of_output as trace_of
from .gradient import gradient
from .gram import jjt, jtj, nested, rows_of
from .laplacian import laplacian
from .laplacian import of_output as laplacian_of
from .ntk import check as check_compute
from .ntk import empirical_ntk, of_runs
from .parameters import ParameterJacobian, parameter_jacobian
from .recorded import Recorded


class Ends(NamedTuple):
    """A forward pass: outputs and inputs of the graph, and what the job wants of it afterwards."""

    ys: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...]
    result: Any


@dataclass(frozen=True)
class Job:
    """Fields without a default are the call's inputs, the others its options."""

    func: Callable[..., Any]
    count: int
    """How many tensors the callable takes."""
    chunk_size: int | None = None
    memory_limit: int | str | None = None
    backend: str = "auto"

    name: ClassVar[str]
    """Of the call."""
    strategy = "auto"

    @classmethod
    def options(cls) -> list[str]:
        return [f.name for f in fields(cls) if f.name not in ("func", "count")]

    def check(self, xs: tuple[Tensor, ...]) -> None:
        """Raise for options and numbers of inputs that the call does not take."""
        check_options(self.strategy, self.chunk_size, None, False)
        backends.check_asked(self.backend, xs[0].device, False)

    def _one(self, xs) -> None:
        if len(xs) != 1:
            raise TypeError(f"{self.name} takes one tensor, got {len(xs)} example_inputs")

    def within(self, memory_limit: int) -> Job:
        """Where the free memory cannot be asked for."""
        return replace(self, memory_limit=self.memory_limit or memory_limit)

    def limit(self, device: torch.device) -> float:
        """Bytes that a recording may hold."""
        if self.memory_limit is not None:
            return parse_bytes(self.memory_limit)
        return max(free_bytes(device) // 2, 1)

    def by_ops(self) -> Job:
        """With torch's ops alone, which can be recorded."""
        return replace(self, backend="torch")

    @property
    def held(self) -> tuple[Tensor, ...]:
        """Tensors among the options. They may be updated in place."""
        return ()

    def forward(self, inputs: tuple[Tensor, ...]) -> Ends:
        raise NotImplementedError

    def rows(self, ends: Ends, out: Any) -> list[Tensor]:
        """The tensors of the answer, one after the other; ``out``: what the caller gave, to write them to."""
        raise NotImplementedError

    def answer(self, ends: Ends, rows: list[Tensor], out: Any) -> Any:
        raise NotImplementedError

    def handles(self, ends: Ends) -> int | None:
        """How many hooks were registered in the forward pass; None if there may be others on its graph."""
        return handles_of(ends.leaves)

    @property
    def shows_output(self) -> bool:
        """Whether the output of the function is a part of the answer."""
        return getattr(self, "return_output", False) or getattr(self, "return_lower", False)

    def lean(self, ends: Ends) -> Ends:
        """Of the ends, what `answer` asks for beside an output that is shown: no graph and no values."""
        empty = () if isinstance(ends.result, tuple) else None
        return Ends((None,) * len(ends.ys), (None,) * len(ends.leaves), empty)

    def check_out(self, out: Any) -> None:
        raise TypeError(f"a compiled {self.name} takes no out=")


@dataclass(frozen=True)
class _Jacobian(Job):
    per_sample: bool | str = False
    strategy: str = "auto"
    return_output: bool = False
    name = "jacobian"

    def forward(self, inputs):
        ys, leaves, _, result = prepare(self.func, inputs, False)
        return Ends(ys, leaves, result)

    def rows(self, ends, out):
        out = out_rows(out, isinstance(ends.result, tuple), self.count > 1)
        asked = Request(
            self.strategy, False, False, self.per_sample, self.chunk_size, self.memory_limit, False,
            self.backend, True, out,
        )  # fmt: skip
        return [block for row in compute(ends.ys, ends.leaves, asked) for block in row]

    def answer(self, ends, rows, out):
        n = self.count
        if out is None:
            rows = [rows[k : k + n] for k in range(0, len(rows), n)]
            out = nest(rows, isinstance(ends.result, tuple), n > 1)
        return (detached(ends.result), out) if self.return_output else out

    def check_out(self, out):
        pass


@dataclass(frozen=True)
class _Gram(Job):
    weight: Tensor | tuple[Tensor | None, ...] | None = None
    per_sample: bool | str = False
    return_output: bool = False

    @property
    def held(self):
        given = self.weight if isinstance(self.weight, tuple) else (self.weight,)
        return tuple(w for w in given if w is not None)

    def check(self, xs):
        super().check(xs)
        for w in self.held:
            as_tuple(w, "weight", self.name)

    def forward(self, inputs):
        ys, leaves, _, result = prepare(self.func, inputs, False)
        return Ends(ys, leaves, result)

    def rows(self, ends, out):
        made = rows_of(
            self.name, ends.ys, ends.leaves, self.weight, self.per_sample, False,
            self.chunk_size, self.memory_limit, self.backend,
        )  # fmt: skip
        return [block for row in made for block in row]

    def answer(self, ends, rows, out):
        n = len(ends.leaves if self.name == "jtj" else ends.ys)
        rows = tuple(tuple(rows[k : k + n]) for k in range(0, len(rows), n))
        tupled_out = isinstance(ends.result, tuple)
        result = detached(ends.result) if self.return_output else None
        return nested(self.name, rows, self.count > 1, tupled_out, result, self.return_output)


@dataclass(frozen=True)
class _JTJ(_Gram):
    name = "jtj"


@dataclass(frozen=True)
class _JJT(_Gram):
    name = "jjt"


@dataclass(frozen=True)
class _Point(Job):
    """Calls of one tensor, a batch of points; see `points`."""

    per_sample: bool | str = True
    return_lower: bool = False
    same: ClassVar[bool] = False

    def check(self, xs):
        self._one(xs)
        limits = self.chunk_size, self.memory_limit, self.backend
        points.options(xs[0], self.name, False, *limits, self.per_sample)

    @property
    def asked(self) -> points.Options:
        limits = self.chunk_size, self.memory_limit, self.backend
        return points.Options(False, *limits, self.per_sample)

    def forward(self, inputs):
        (x,) = inputs
        _, y, leaf = points.evaluate(self.func, x, self.name, False, self.same)
        return Ends((y,), (leaf,), y)

    def answer(self, ends, rows, out):
        return (ends.result.detach(), *rows) if self.return_lower else rows[0]


@dataclass(frozen=True)
class _Gradient(_Point):
    name = "gradient"

    def rows(self, ends, out):
        return [points.jacobian(*ends.ys, *ends.leaves, self.asked)]


@dataclass(frozen=True)
class _Divergence(_Point):
    name, same = "divergence", True

    def rows(self, ends, out):
        with computing(False, self.backend):
            return [trace_of(*ends.ys, *ends.leaves, self.asked).detach()]


@dataclass(frozen=True)
class _Laplacian(_Point):
    weight: Tensor | None = None
    name = "laplacian"

    @property
    def held(self):
        return () if self.weight is None else (self.weight,)

    def rows(self, ends, out):
        (x,) = ends.leaves
        a = None if self.weight is None else weights.check(self.weight, x)
        first, lap = laplacian_of(*ends.ys, x, a, self.asked, self.return_lower)
        return [first, lap] if self.return_lower else [lap]


@dataclass(frozen=True)
class _Diagonal(Job):
    return_output: bool = False
    name = "diagonal"

    def check(self, xs):
        self._one(xs)
        super().check(xs)

    def forward(self, inputs):
        ys, leaves, tupled, result = prepare(self.func, inputs, False)
        check_shape(ys if tupled else result, *inputs)
        return Ends(ys, leaves, result)

    def rows(self, ends, out):
        with computing(False, self.backend):
            return [diagonal_of(*ends.ys, *ends.leaves, self.chunk_size, self.memory_limit)]

    def answer(self, ends, rows, out):
        return (ends.result.detach(), rows[0]) if self.return_output else rows[0]


class Names(NamedTuple):
    """What is left of a forward pass where it is replayed: the parameters' names."""

    params: dict[str, None]


@dataclass(frozen=True)
class _OfParameters(Job):
    """Calls of a module, whose leaves are its parameters, and its inputs: samples are proven not to mix."""

    params: Any = None
    per_sample: bool | str = True

    def _run(self, x) -> Recorded:
        return Recorded(
            self.func, x, self.params, False, self.name, read=False, per_sample=self.per_sample
        )

    @staticmethod
    def _ends(*runs: Recorded) -> Ends:
        leaves = [*runs[0].params.values()]
        for run in runs:
            leaves += run.leaves
        return Ends(tuple(run.y for run in runs), tuple(leaves), runs)

    def handles(self, ends):
        found = [run.handles for run in ends.result]
        return None if None in found else sum(found)

    def lean(self, ends):
        return Ends((), (), tuple(Names(dict.fromkeys(run.params)) for run in ends.result))


@dataclass(frozen=True)
class _ParameterJacobian(_OfParameters):
    name = "parameter_jacobian"

    def forward(self, inputs):
        return self._ends(self._run(inputs))

    def rows(self, ends, out):
        (run,) = ends.result
        with backends.use(self.backend):
            made = ParameterJacobian(run.read(), self.chunk_size, self.memory_limit).dense(out)
        return list(made.values())

    def answer(self, ends, rows, out):
        (run,) = ends.result
        return dict(zip(run.params, rows, strict=True)) if out is None else out

    def check_out(self, out):
        if not isinstance(out, dict):
            raise TypeError(
                f"out must be a dict of tensors by parameter name, got {type(out).__name__}"
            )


@dataclass(frozen=True)
class _Kernel(_OfParameters):
    compute: str = "full"
    name = "empirical_ntk"

    def check(self, xs):
        if len(xs) > 2:
            raise TypeError(f"empirical_ntk takes x1 and x2, got {len(xs)} example_inputs")
        check_compute(self.compute)
        super().check(xs)

    def forward(self, inputs):
        return self._ends(*(self._run(x) for x in inputs))

    def rows(self, ends, out):
        with backends.use(self.backend):
            runs = [run.read() for run in ends.result]
            return [of_runs(runs, self.compute, self.chunk_size, self.memory_limit)]

    def answer(self, ends, rows, out):
        return rows[0]


JOBS: dict[Callable[..., Any], type[Job]] = {
    jacobian: _Jacobian,
    gradient: _Gradient,
    divergence: _Divergence,
    laplacian: _Laplacian,
    diagonal: _Diagonal,
    jtj: _JTJ,
    jjt: _JJT,
    parameter_jacobian: _ParameterJacobian,
    empirical_ntk: _Kernel,
}

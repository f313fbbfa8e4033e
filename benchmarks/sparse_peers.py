"""Whom `benchmarks.sparse` compares: jactri, colours by hand in torch.func, dense torch.func, asdex, sparsejac.

Each is built for one problem: what it finds out before its first call (a pattern and colours) is done then, and timed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import networkx
import numpy as np
import torch
from torch import Tensor
from torch.func import jacfwd, jacrev, jvp, vjp, vmap

import jactri
from jactri._src.calls import api, compressed, patterned

from .sparse_problems import TORCH, Problem, jax_names

OURS, COMPILED = "jactri", "jactri.compile"
DENSE = 1 << 25
"""Bytes of a dense answer up to which torch.func is asked for it."""


@dataclass(frozen=True)
class Entries:
    """A pattern, row by row."""

    row: np.ndarray
    column: np.ndarray
    shape: tuple[int, int]

    def __len__(self) -> int:
        return len(self.row)

    @staticmethod
    def of(row: Any, column: Any, shape: tuple[int, ...]) -> Entries:
        row, column = (np.asarray(t).astype(np.int64) for t in (row, column))
        order = np.lexsort((column, row))
        return Entries(row[order], column[order], (int(shape[0]), int(shape[1])))


@dataclass(frozen=True)
class Made:
    """A contender, ready."""

    call: Callable[[], Any]
    matrix: Callable[[Any], Tensor]
    """An answer as a matrix of torch: sparse, or dense."""
    facts: dict[str, Any]
    """``products`` and ``entries``, where it has any."""


# ---- jactri


@contextmanager
def counted() -> Iterator[list[int]]:
    """How many products the sparse calls meanwhile are planned to run: the most seeds that a block carries."""
    planned, read, found = api.plan_for, compressed.values, []

    def plan_for(*args: Any, **options: Any) -> Any:
        plan = planned(*args, **options)
        found.append(sum(s.columns() for s in plan.sweeps))
        return plan

    def values(how: Any, *args: Any, **options: Any) -> Any:
        found.append(how.products)
        return read(how, *args, **options)

    api.plan_for, patterned.plan_for, compressed.values = plan_for, plan_for, values
    try:
        yield found
    finally:
        api.plan_for, patterned.plan_for, compressed.values = planned, planned, read


def ours(problem: Problem, quick: bool) -> Made:
    function, x = problem.torch(quick)

    def call() -> Tensor:
        return jactri.jacobian(function, x, layout=torch.sparse_csr)

    with counted() as found:
        made = call()
    return Made(
        call, lambda answer: answer, {"products": sum(found), "entries": made.values().numel()}
    )


def ours_compiled(problem: Problem, quick: bool) -> Made:
    """By `jactri.compile`, of the pattern that `jactri.sparsity` finds; for tests nothing is handed to a compiler."""
    function, x = problem.torch(quick)
    pattern, engine = jactri.sparsity(function, x), "fx" if quick else "inductor"
    with counted() as found:
        made = jactri.compile(function, x, layout=torch.sparse_csr, pattern=pattern, engine=engine)
    if made.reason is not None:
        raise RuntimeError(made.reason)
    return Made(
        lambda: made(x), lambda answer: answer, {"products": found[0], "entries": pattern.nnz}
    )


# ---- colours


def largest_first(entries: Entries, rows: bool) -> np.ndarray:
    """The colour of each row, or column, by networkx' greedy colouring as sparsejac asks for it.

    Two have another colour if they share a column, or row.
    """
    count = entries.shape[not rows]
    own, other = (entries.row, entries.column) if rows else (entries.column, entries.row)
    order = np.argsort(other, kind="stable")
    near = networkx.Graph()
    near.add_nodes_from(range(count))
    for group in np.split(own[order], np.flatnonzero(np.diff(other[order])) + 1):
        one, two = np.triu_indices(len(group), 1)
        near.add_edges_from(zip(group[one].tolist(), group[two].tolist(), strict=True))
    found = networkx.greedy_color(near, "largest_first")
    return np.array([found[k] for k in range(count)])


@dataclass(frozen=True)
class Coloured:
    """The way, of columns or of rows, that takes fewer colours."""

    rows: bool
    colour: np.ndarray

    @staticmethod
    def of(entries: Entries) -> Coloured:
        found = (Coloured(rows, largest_first(entries, rows)) for rows in (False, True))
        return min(found, key=lambda c: c.count)

    @property
    def count(self) -> int:
        return int(self.colour.max()) + 1


def by_hand(problem: Problem, quick: bool, entries: Entries, coloured: Coloured) -> Made:
    """One product a colour by torch.func, and the entries picked out of them."""
    function, x = problem.torch(quick)
    out = function(x).shape
    colour = torch.from_numpy(coloured.colour)
    seeds = (colour == torch.arange(coloured.count)[:, None]).double()
    seeds = seeds.reshape(-1, *(out if coloured.rows else x.shape))
    row, column = map(torch.from_numpy, (entries.row, entries.column))
    seed, value = (row, column) if coloured.rows else (column, row)
    place = colour[seed] * entries.shape[coloured.rows] + value
    start = torch.cat(
        [
            torch.zeros(1, dtype=torch.int64),
            torch.bincount(row, minlength=entries.shape[0]).cumsum(0),
        ]
    )

    def call() -> Tensor:
        if coloured.rows:
            _, pull = vjp(function, x)
            (found,) = vmap(pull)(seeds)
        else:
            found = vmap(lambda t: jvp(function, (x,), (t,))[1])(seeds)
        values = found.reshape(-1).index_select(0, place)
        return torch.sparse_csr_tensor(start, column, values, entries.shape, check_invariants=False)

    return Made(call, lambda answer: answer, {"products": coloured.count, "entries": len(entries)})


def dense(problem: Problem, quick: bool, transform: Callable) -> Made:
    function, x = problem.flat(quick, TORCH)
    x = torch.from_numpy(x)
    call = transform(function)
    many = len(x) if transform is jacfwd else len(function(x))
    return Made(lambda: call(x), lambda answer: answer, {"products": many})


# ---- JAX


def of_jax(problem: Problem, quick: bool) -> tuple[Callable, Any]:
    import jax

    function, x = problem.flat(quick, jax_names())
    return function, jax.device_put(x, jax.devices("cpu")[0])


def bcoo(answer: Any) -> Tensor:
    """JAX's sparse matrix as torch's."""
    index, values = (torch.from_numpy(np.array(t)) for t in (answer.indices, answer.data))
    return torch.sparse_coo_tensor(index.T, values, answer.shape, check_invariants=False).coalesce()


def _waiting(run: Callable, x: Any) -> Callable[[], Any]:
    def call() -> Any:
        answer = run(x)
        answer.data.block_until_ready()
        return answer

    return call


def asdex(problem: Problem, quick: bool) -> Made:
    """Its pattern, its colours of the way that takes fewer, and one jit."""
    import asdex
    import jax

    function, x = of_jax(problem, quick)
    pattern = asdex.jacobian_sparsity(function, x)
    coloured = asdex.jacobian_coloring_from_sparsity(pattern)
    run = jax.jit(asdex.jacobian_from_coloring(function, coloured))
    facts = {
        "products": int(coloured.num_colors), "entries": int(pattern.nnz),
        "order": {"fwd": "forward-mode", "rev": "reverse-mode"}[coloured.mode],
    }  # fmt: skip
    return Made(_waiting(run, x), bcoo, facts)


def sparsejac(problem: Problem, quick: bool, entries: Entries, coloured: Coloured) -> Made:
    """It is given the pattern, and the way that takes fewer colours."""
    import jax
    import sparsejac
    from jax.experimental.sparse import BCOO

    function, x = of_jax(problem, quick)
    index = np.stack([entries.row, entries.column], 1)
    pattern = BCOO((jax.numpy.ones(len(entries)), jax.numpy.asarray(index)), shape=entries.shape)
    transform = sparsejac.jacrev if coloured.rows else sparsejac.jacfwd
    run = jax.jit(transform(function, pattern))
    return Made(_waiting(run, x), bcoo, {"products": coloured.count, "entries": len(entries)})


# ---- all


JAX = ("asdex", "sparsejac")


def missing(name: str) -> str | None:
    """Why a peer cannot run: what is not installed."""
    needed = ("jax", name) if name in JAX else ()
    absent = [n for n in needed if importlib.util.find_spec(n) is None]
    return f"{', '.join(absent)} not installed" if absent else None


def versions() -> dict[str, str | None]:
    """Of the peers, None where one is missing."""
    return {n: None if missing(n) else importlib.metadata.version(n) for n in JAX}


def peers(
    problem: Problem, quick: bool, entries: Entries, coloured: Coloured
) -> dict[str, Callable[[], Made]]:
    """What builds each but jactri, by name."""
    found: dict[str, Callable[[], Made]] = {
        COMPILED: lambda: ours_compiled(problem, quick),
        "asdex": lambda: asdex(problem, quick),
        "sparsejac": lambda: sparsejac(problem, quick, entries, coloured),
        "coloured torch.func": lambda: by_hand(problem, quick, entries, coloured),
    }
    if 8 * entries.shape[0] * entries.shape[1] <= DENSE:
        found["torch.func.jacfwd"] = lambda: dense(problem, quick, jacfwd)
        found["torch.func.jacrev"] = lambda: dense(problem, quick, jacrev)
    return found


def entries_of(answer: Tensor) -> Entries:
    """The pattern of jactri's matrix."""
    start, column = answer.crow_indices(), answer.col_indices()
    row = torch.arange(answer.shape[0]).repeat_interleave(start.diff())
    return Entries(row.numpy(), column.numpy(), tuple(answer.shape))

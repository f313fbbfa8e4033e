"""One Jacobian in a file that all ranks write to: interrupted, resumed by another number of ranks, and refused."""

import json
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import jactri
from jactri._src.base import journal
from jactri._src.spread import dealt
from jactri._src.spread.dealt import Dealt

F64 = torch.float64


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(9, 12, dtype=F64), nn.Tanh(), nn.Linear(12, 7, dtype=F64))


def data(seed=0):
    return torch.randn(5, 9, dtype=F64, generator=torch.Generator().manual_seed(seed))


class Hook(nn.Module):
    """What autograd alone can compute."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        y = self.inner(x)
        y.register_hook(lambda g: 2 * g)
        return y


# name: options, parts of the file
WAYS = {
    "columns": ({"strategy": "forward-mode"}, 9),
    "rows": ({"strategy": "reverse-mode"}, 7),
    "blocks": ({"per_sample": True, "strategy": "reverse-mode", "chunk_size": 2}, 7),
    "blocks by columns": ({"per_sample": True, "strategy": "forward-mode"}, 9),
    "mixed": ({"strategy": "mixed", "memory_limit": 4000}, 7),
}


class Stop(KeyboardInterrupt):
    """What a user's Ctrl-C does."""


def mapped(path, shape=(), mode="r+"):
    return np.lib.format.open_memmap(
        path, mode=mode, dtype="float64" if mode == "w+" else None, shape=shape
    )


def made(path, shape):
    """The file, which rank 0 makes where there is none."""
    if dist.get_rank() == 0 and not os.path.exists(path):
        mapped(path, shape, "w+")[:] = np.nan
    dist.barrier()
    return mapped(path)


def run(path, way="rows", after=None, dies=None, func=None, x=None, **options):
    """On one rank: how many parts it computed before it was stopped, or all."""
    done = []

    def noted(self, span, number, parts, real=Dealt.done):
        if len(done) == after and (dies is None or dist.get_rank() == dies):
            if dies is not None:
                os._exit(1)
            for part in parts:
                part.fill_(float("nan"))  # half written
            raise Stop
        done.append(span)
        real(self, span, number, parts)

    def ended(self, real=Dealt.finish):
        if after is not None and dies is None:
            raise Stop
        real(self)

    asked = dict(WAYS[way][0]) | options
    shape = (5, 7, 9) if asked.get("per_sample") else (5, 7, 5, 9)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    out = made(path, shape)
    kept, wait = (Dealt.done, Dealt.finish), dealt.EVERY
    Dealt.done, Dealt.finish, dealt.EVERY = noted, ended, 0.0
    try:
        back = jactri.jacobian(
            func or net(), data() if x is None else x, out=out, mesh=mesh, **asked
        )
        assert back is out
    except Stop:
        pass
    finally:
        (Dealt.done, Dealt.finish), dealt.EVERY = kept, wait
    return len(done)


def truth(way):
    per_sample = WAYS[way][0].get("per_sample", False)
    J = torch.autograd.functional.jacobian(net(), data())
    return J[torch.arange(5), :, torch.arange(5)] if per_sample else J


def check(path, way):
    assert torch.allclose(torch.from_numpy(np.load(path)), truth(way), rtol=1e-12, atol=1e-12)
    assert os.listdir(os.path.dirname(path)) == ["J.npy"]


@pytest.fixture
def path(tmp_path):
    (tmp_path / "of").mkdir()
    return str(tmp_path / "of" / "J.npy")


@pytest.mark.parametrize("way, count", [("rows", 1), *((way, 2) for way in WAYS), ("columns", 4)])
def test_all_ranks_write_one_file(ranks, path, way, count):
    done = ranks(count, run, path, way)
    assert sum(done) == WAYS[way][1]
    assert max(done) == -(-WAYS[way][1] // count)
    check(path, way)


@pytest.mark.parametrize(
    "way, before, then",
    [
        ("rows", 2, 1),
        ("columns", 4, 2),
        ("blocks", 1, 3),
        ("blocks by columns", 2, 3),
        ("mixed", 3, 2),
    ],
)
def test_resumed_by_another_number_of_ranks(ranks, path, way, before, then):
    stopped = sum(ranks(before, run, path, way, 1))
    assert stopped == before
    assert len(os.listdir(os.path.dirname(path))) == 1 + before
    assert sum(ranks(then, run, path, way)) == WAYS[way][1] - stopped
    check(path, way)


def test_interrupted_twice_and_by_fewer(ranks, path):
    first = sum(ranks(4, run, path, "columns", 1))
    second = sum(ranks(2, run, path, "columns", 1))
    assert (first, second, sum(ranks(3, run, path, "columns"))) == (4, 2, 3)
    check(path, "columns")


def test_a_rank_that_dies_leaves_a_file_to_go_on_from(ranks, path):
    found = ranks(2, run, path, "columns", 2, 1, errors=True, timeout=10)
    assert found[1].kind == "Died"
    assert found[0].kind in ("RuntimeError", "DistBackendError", "DistNetworkError")
    kept = [
        len(json.loads(p.read_text())["done"])
        for p in journal.left_by_ranks(journal_of(path)).values()
    ]
    assert sorted(kept) == [2, 4]
    assert sum(ranks(3, run, path, "columns")) == 3
    check(path, "columns")


def journal_of(path):
    return journal.path_of(mapped(path))


def with_files_of_their_own(path):
    own = f"{path}{dist.get_rank()}"
    return jactri.jacobian(
        net(), data(), out=mapped(own, (5, 7, 5, 9), "w+"), mesh=init_device_mesh("cpu", (2,))
    )


def test_files_that_are_not_one(ranks, path):
    """Each would hold half of the Jacobian."""
    found = ranks(2, with_files_of_their_own, path, errors=True, timeout=20)
    assert all("differ in the file of out" in e.text for e in found)


def diagonal(path, after=None):
    """Few entries of the Jacobian are not 0."""
    func, x = torch.sin, torch.linspace(1, 2, 300, dtype=F64)
    if dist.get_rank() == 0:
        mapped(path, (300, 300), "w+")  # whether it is there or not
    return run(path, "rows", after, func=func, x=x)


def test_few_entries_tell_a_file_that_was_made_anew(ranks, path):
    ranks(2, diagonal, path, 3)
    found = ranks(2, diagonal, path, errors=True, timeout=20)
    assert any("does not hold what the interrupted call wrote" in e.text for e in found)


def fails_once(path):
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            return self.net(x)

    func, asked = Failing(), {}
    if dist.get_rank() == 1:
        asked["memory_limit"] = 200
    return run(path, "rows", func=func, **asked)


def test_the_error_of_one_rank_ends_all(ranks, path):
    found = ranks(3, fails_once, path, errors=True, timeout=20)
    assert [e.kind for e in found] == ["RuntimeError", "MemoryLimitTooSmall", "RuntimeError"]
    assert "rank 1 failed" in found[0].text
    assert sum(ranks(2, run, path, "rows")) < 7  # what the others had done is there
    check(path, "rows")


def by_autograd(path):
    import warnings

    warnings.filterwarnings("ignore", message="a hook on gradients")
    return run(path, "rows", func=Hook(net()))


def test_what_autograd_computes_is_written_too(ranks, path):
    assert sum(ranks(2, by_autograd, path)) == 7
    assert torch.allclose(torch.from_numpy(np.load(path)), 2 * truth("rows"), atol=1e-12)


# -- what is refused -------------------------------------------------------------------------------


def other(path, what):
    asked = {}
    if what == "inputs":
        asked["x"] = data(1)
    elif what == "weights":
        asked["func"] = net(1)
    elif what == "order":
        asked["strategy"] = "forward-mode"
    elif what == "per_sample":
        asked |= {"per_sample": True}
    elif what == "made anew":
        if dist.get_rank() == 0:
            mapped(path, (5, 7, 5, 9), "w+")
        dist.barrier()
    return run(path, "rows", **asked)


REFUSED = {
    "inputs": "is of an interrupted call for another computation (its inputs differs)",
    "weights": "(its weights differs)",
    "order": "(its order differs)",
    "made anew": "does not hold what the interrupted call wrote",
}


@pytest.mark.parametrize("what", REFUSED)
def test_another_computation_is_refused_on_every_rank(ranks, path, what):
    ranks(2, run, path, "rows", 1)
    found = ranks(3, other, path, what, errors=True, timeout=20)
    assert all(e.kind == "RuntimeError" for e in found)
    assert any(REFUSED[what] in e.text for e in found)
    if what != "made anew":  # by one rank, and the others say that it failed
        assert all(REFUSED[what] in e.text for e in found)
        assert sum(ranks(1, run, path, "rows")) == 5
        check(path, "rows")


@pytest.mark.parametrize("text", ["", "[]", "no cut", "no parts"])
def test_a_journal_that_is_broken_is_refused(ranks, path, text):
    ranks(1, run, path, "rows", 1)
    (file,) = journal.left_by_ranks(journal_of(path)).values()
    told = json.loads(file.read_text())
    if text == "no cut":
        del told["cut"]
    told["done"] = [7] if text == "no parts" else told["done"]
    file.write_text(json.dumps(told) if text.startswith("no") else text)
    (error,) = ranks(1, run, path, "rows", errors=True)
    assert error.kind == "RuntimeError" and "resume=False" in error.text


def start_over(path):
    return run(path, "rows", resume=False)


def test_one_may_start_over(ranks, path):
    ranks(4, run, path, "rows", 1)
    assert sum(ranks(2, start_over, path)) == 7
    check(path, "rows")


def alone(path, **options):
    return jactri.jacobian(net(), data(), strategy="reverse-mode", out=mapped(path), **options)


def test_a_call_alone_and_one_by_ranks_know_each_other(ranks, path):
    ranks(2, run, path, "rows", 1)
    with pytest.raises(
        RuntimeError, match="of an interrupted call over the ranks of a mesh; pass mesh="
    ):
        alone(path)
    alone(path, resume=False)
    check(path, "rows")
    journal_of(path).write_text("{}")
    (error, _) = ranks(2, run, path, "rows", errors=True, timeout=20)
    assert "is of an interrupted call without mesh=; leave mesh= out to go on" in error.text

"""``out=`` as numpy arrays and memmaps: a Jacobian streamed to disk, interrupted, resumed, and refused."""

import itertools
import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from common import F64, MODES, unfollowed
from tolerances import assert_close

import jactri
from jactri._src.base import journal
from jactri._src.base.journal import Journal, path_of

STRATEGIES = [*MODES, "mixed"]


def network(*widths, seed=0):
    torch.manual_seed(seed)
    layers = []
    for i, o in itertools.pairwise(widths):
        layers += [torch.nn.Linear(i, o, dtype=F64), torch.nn.Tanh()]
    return torch.nn.Sequential(*layers[:-1])


def problem(seed=0):
    net = network(12, 30, 5, 30, 10, seed=seed)
    return net, torch.randn(6, 12, dtype=F64, generator=torch.Generator().manual_seed(seed))


def mapped(path, shape, mode="w+", dtype="float64"):
    return np.lib.format.open_memmap(path, mode=mode, dtype=dtype, shape=shape)


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("options", [{}, {"chunk_size": 3}, {"memory_limit": 60_000}], ids=str)
def test_results_are_streamed_to_disk(tmp_path, per_sample, strategy, options):
    net, x = problem()
    truth = jactri.jacobian(net, x, per_sample=per_sample, strategy="reverse-mode")
    file = tmp_path / "J.npy"
    out = mapped(file, tuple(truth.shape))
    out[:] = np.nan
    back = jactri.jacobian(net, x, per_sample=per_sample, strategy=strategy, out=out, **options)
    assert back is out
    del out, back
    assert_close(torch.from_numpy(np.load(file)), truth, F64, length=60)
    assert [f.name for f in tmp_path.iterdir()] == ["J.npy"]


def test_arrays_and_nested_arrays():
    net, x = problem()
    truth = jactri.jacobian(net, x, per_sample=True)
    out = np.full(truth.shape, np.nan)
    value, back = jactri.jacobian(net, x, per_sample=True, out=out, return_output=True)
    assert back is out
    assert_close(torch.from_numpy(out), truth, F64, length=60)
    assert_close(value, net(x).detach(), F64, length=60)
    pair = (np.full((6, 12), np.nan), torch.full((6, 12), float("nan"), dtype=F64))
    jactri.jacobian(lambda x: (x.sum(1), x.prod(1)), x, per_sample=True, out=pair)
    want = jactri.jacobian(lambda x: (x.sum(1), x.prod(1)), x, per_sample=True)
    for a, b in zip(pair, want, strict=True):
        assert_close(torch.as_tensor(a), b, F64, length=60)


def test_jacobian_of_streams_too(tmp_path):
    net, x = problem()
    x.requires_grad_()
    out = mapped(tmp_path / "J.npy", (6, 10, 12))
    assert jactri.jacobian_of(net(x), x, per_sample=True, out=out) is out
    assert_close(torch.from_numpy(out), jactri.jacobian(net, x, per_sample=True), F64, length=60)


class Stop(KeyboardInterrupt):
    """What a user's Ctrl-C does."""


def interrupted(monkeypatch, after, net, x, **options):
    """Run until ``after`` chunks are done, then stop in the middle of the next one."""
    left = [after]

    def stopping(self, parts, real=Journal.done):
        if left[0] == 0:
            for part in parts:
                part.fill_(float("nan"))  # half written
            raise Stop
        left[0] -= 1
        real(self, parts)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "done", stopping)
        with pytest.raises(Stop):
            jactri.jacobian(net, x, **options)


def count_chunks(monkeypatch):
    done = []

    def counted(self, parts, real=Journal.done):
        done.append(1)
        real(self, parts)

    monkeypatch.setattr(Journal, "done", counted)
    return done


LIMITS = [
    {"chunk_size": 3},
    {"memory_limit": 1_500},  # below one seed of all samples: ranges of samples
    {"strategy": "forward-mode", "chunk_size": 5},
    {"strategy": "mixed", "chunk_size": 2},
    {"per_sample": False, "chunk_size": 3},  # zeros between samples are those of the first call
]


@pytest.mark.parametrize("options", LIMITS, ids=str)
@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_interrupted_call_goes_on_where_it_stopped(tmp_path, monkeypatch, options, after):
    net, x = problem()
    kw = {"per_sample": True, **options}
    truth = jactri.jacobian(net, x, per_sample=kw["per_sample"], strategy="reverse-mode")
    file = tmp_path / "J.npy"
    done = count_chunks(monkeypatch)
    jactri.jacobian(net, x, out=mapped(file, tuple(truth.shape)), **kw)
    total = len(done)
    assert total > 2
    out = mapped(file, tuple(truth.shape))
    interrupted(monkeypatch, after, net, x, out=out, **kw)
    assert path_of(out).exists()
    del out
    out = mapped(file, tuple(truth.shape), "r+")
    done.clear()
    jactri.jacobian(net, x, out=out, **kw)
    assert len(done) == total - after
    assert_close(torch.from_numpy(out), truth, F64, length=60)
    assert not path_of(out).exists()


def test_a_killed_process_loses_no_more_than_a_second(tmp_path):
    script = f"""
    import os, sys, numpy as np, torch, jactri
    from jactri._src.base import journal
    journal.EVERY = 0.0
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(12, 30), torch.nn.Tanh(), torch.nn.Linear(30, 10)).double()
    x = torch.ones(6, 12, dtype=torch.float64)
    out = np.lib.format.open_memmap({str(tmp_path / "J.npy")!r}, mode=sys.argv[1], dtype="float64", shape=(6, 10, 12))
    done = []
    def counted(self, parts, real=journal.Journal.done):
        real(self, parts)
        done.append(1)
        if len(done) == int(sys.argv[2]):
            os.kill(os.getpid(), 9)
    journal.Journal.done = counted
    jactri.jacobian(net, x, per_sample=True, strategy="reverse-mode", chunk_size=2, out=out)
    assert torch.allclose(torch.from_numpy(out), jactri.jacobian(net, x, per_sample=True))
    print(len(done))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    killed = subprocess.run([*command, "w+", "3"], capture_output=True, text=True, timeout=120)
    assert killed.returncode == -9, killed.stderr
    again = subprocess.run([*command, "r+", "0"], capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert again.stdout.split() == ["2"]  # of five chunks


def test_a_bar_goes_on_too(tmp_path, monkeypatch, capfd):
    net, x = problem()
    out = mapped(tmp_path / "J.npy", (6, 10, 12))
    kw = {"per_sample": True, "out": out, "chunk_size": 3, "strategy": "reverse-mode"}
    interrupted(monkeypatch, 2, net, x, **kw)
    jactri.jacobian(net, x, progress=True, **kw)
    assert "4/4" in capfd.readouterr().err


@pytest.fixture
def left(tmp_path, monkeypatch, request):
    """The memmap of an interrupted call, and its options."""
    net, x = problem()
    net.requires_grad_(not hasattr(request, "param"))
    out = mapped(tmp_path / "J.npy", (6, 10, 12))
    kw = {"per_sample": True, "out": out, "chunk_size": 3, "strategy": "reverse-mode"}
    interrupted(monkeypatch, 2, net, x, **kw)
    return net, x, kw


def moved(net, by):
    """With its last weight changed, as by a step of training."""
    with torch.no_grad():
        net[-1].weight.mul_(1 + by)
    return net


OTHERS = {
    "inputs": lambda net, x: (net, x + 1),
    "weights": lambda net, x: (moved(net, 1e-12), x),
    "function": lambda net, x: (lambda x: net(x).tanh(), x),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_computation_is_refused(left, what):
    net, x, kw = left
    func, at = OTHERS[what](net, x)
    before = kw["out"].copy()
    with pytest.raises(RuntimeError, match=rf"its {what} differs.*resume=False"):
        jactri.jacobian(func, at, **kw)
    np.testing.assert_array_equal(kw["out"], before)
    jactri.jacobian(func, at, **kw, resume=False)
    truth = jactri.jacobian(func, at, per_sample=True)
    assert_close(torch.from_numpy(kw["out"]), truth, F64, length=60)
    assert not path_of(kw["out"]).exists()


def test_what_was_begun_with_overrides_is_another_function(left, monkeypatch):
    net, x, kw = left
    with jactri.overrides({"tanh": jactri.identity}):
        truth = jactri.jacobian(net, x, per_sample=True)
        jactri.jacobian(net, x, **kw)  # anew
        assert_close(torch.from_numpy(kw["out"]), truth, F64, length=60)
        interrupted(monkeypatch, 1, net, x, **kw)
    with pytest.raises(RuntimeError, match=r"its function differs.*resume=False"):
        jactri.jacobian(net, x, **kw)


@pytest.mark.parametrize("left", ["frozen"], indirect=True)
def test_other_constants_are_refused_by_what_they_do(left):
    net, x, kw = left
    with pytest.raises(RuntimeError, match=r"its outputs differs"):
        jactri.jacobian(moved(net, 1e-8), x, **kw)
    jactri.jacobian(moved(net, -1e-8), x, **kw)  # but for rounding as they were


def test_another_shape_is_refused(left):
    net, x, kw = left
    whole = np.lib.format.open_memmap(
        kw["out"].filename, mode="r+", dtype="float64", shape=(6, 10, 12)
    )
    with pytest.raises(RuntimeError, match=r"shape \(4, 10, 12\)"):
        jactri.jacobian(net, x[:4], **{**kw, "out": whole})


def test_other_options_are_refused(left):
    net, x, kw = left
    with pytest.raises(RuntimeError, match=r"other options.*resume=False"):
        jactri.jacobian(net, x, **{**kw, "chunk_size": 4})
    with pytest.raises(RuntimeError, match=r"other options.*resume=False"):
        jactri.jacobian(net, x, **{**kw, "strategy": "forward-mode"})
    jactri.jacobian(net, x, **kw)
    truth = jactri.jacobian(net, x, per_sample=True)
    assert_close(torch.from_numpy(kw["out"]), truth, F64, length=60)


def test_a_file_that_was_made_anew_is_refused(left):
    net, x, kw = left
    kw["out"] = mapped(kw["out"].filename, (6, 10, 12))  # "w+": zeros
    with pytest.raises(RuntimeError, match=r"mode 'w\+'"):
        jactri.jacobian(net, x, **kw)
    jactri.jacobian(net, x, **kw, resume=False)
    truth = jactri.jacobian(net, x, per_sample=True)
    assert_close(torch.from_numpy(kw["out"]), truth, F64, length=60)


@pytest.mark.parametrize("zeros", [0, 200])
@pytest.mark.parametrize("at_once", [50, 700, 1 << 20])
def test_few_entries_tell_a_file_that_was_made_anew(tmp_path, monkeypatch, at_once, zeros):
    monkeypatch.setattr(journal, "_AT_ONCE", at_once)
    scale = torch.ones(300, dtype=F64)
    scale[:zeros] = 0
    x, kw = torch.zeros(300, dtype=F64), {"strategy": "reverse-mode", "chunk_size": 100}
    out = mapped(tmp_path / "J.npy", (300, 300))
    interrupted(monkeypatch, 2, lambda x: x.sin() @ scale.diag(), x, out=out, **kw)
    out = mapped(tmp_path / "J.npy", (300, 300))
    if not zeros:
        with pytest.raises(RuntimeError, match=r"mode 'w\+'"):
            jactri.jacobian(lambda x: x.sin() @ scale.diag(), x, out=out, **kw)
    else:  # as they were
        jactri.jacobian(lambda x: x.sin() @ scale.diag(), x, out=out, **kw)
        assert torch.equal(torch.from_numpy(out), scale.diag())


@pytest.mark.parametrize("values", [[], [float("nan"), 1.0, 2.0], [float("inf"), -1.0, 2.0]])
def test_outputs_that_are_no_numbers_are_compared(tmp_path, monkeypatch, values):
    y = torch.tensor(values, dtype=F64)
    x = torch.ones(3, dtype=F64)
    out = mapped(tmp_path / "J.npy", (len(y), 3))
    if not values:
        jactri.jacobian(lambda x: x[:0], x, out=out)
        return
    kw = {"strategy": "reverse-mode", "chunk_size": 1}
    interrupted(monkeypatch, 1, lambda x: x.prod() * y, x, out=out, **kw)
    with pytest.raises(RuntimeError, match="its outputs differs"):
        jactri.jacobian(lambda x: x.prod() * y.flip(0), x, out=out, **kw)
    jactri.jacobian(lambda x: x.prod() * y, x, out=out, **kw)
    assert torch.equal(torch.from_numpy(out).nan_to_num(), y.nan_to_num()[:, None].expand(3, 3))


@pytest.mark.parametrize("text", ["", "{}", "[]", "not json", json.dumps({"form": 99})])
def test_an_unreadable_journal_is_refused(left, text):
    net, x, kw = left
    path_of(kw["out"]).write_text(text)
    with pytest.raises(RuntimeError, match="resume=False"):
        jactri.jacobian(net, x, **kw)


def test_parts_of_one_file_have_a_journal_each(tmp_path, monkeypatch):
    net, x = problem()
    whole = mapped(tmp_path / "J.npy", (2, 6, 10, 12))
    kw = {"per_sample": True, "chunk_size": 3, "strategy": "reverse-mode"}
    interrupted(monkeypatch, 2, net, x, out=whole[0], **kw)
    interrupted(monkeypatch, 1, net, x + 1, out=whole[1], **kw)
    jactri.jacobian(net, x, out=whole[0], **kw)
    jactri.jacobian(net, x + 1, out=whole[1], **kw)
    for k in range(2):
        truth = jactri.jacobian(net, x + k, per_sample=True)
        assert_close(torch.from_numpy(whole[k]), truth, F64, length=60)
    assert [f.name for f in tmp_path.iterdir()] == ["J.npy"]


def test_arrays_that_cannot_be_written(tmp_path):
    net, x = problem()
    mapped(tmp_path / "J.npy", (6, 10, 12))
    kw = {"per_sample": True}
    with pytest.raises(RuntimeError, match="read-only"):
        jactri.jacobian(net, x, out=mapped(tmp_path / "J.npy", (6, 10, 12), "r"), **kw)
    with pytest.raises(RuntimeError, match="dtype"):
        jactri.jacobian(net, x, out=np.empty((6, 10, 12), "float32"), **kw)
    with pytest.raises(RuntimeError, match="dtype"):
        jactri.jacobian(net, x, out=np.empty((6, 10, 12), ">f8"), **kw)
    with pytest.raises(RuntimeError, match="shape"):
        jactri.jacobian(net, x, out=np.empty((6, 10, 11)), **kw)
    with pytest.raises(TypeError, match="numpy"):
        jactri.jacobian(net, x, out=[[1.0]], **kw)


def test_copy_on_write_memory_has_no_journal(tmp_path):
    net, x = problem()
    mapped(tmp_path / "J.npy", (6, 10, 12))
    out = mapped(tmp_path / "J.npy", (6, 10, 12), "c")
    jactri.jacobian(net, x, per_sample=True, out=out)
    assert_close(torch.from_numpy(out), jactri.jacobian(net, x, per_sample=True), F64, length=60)
    assert not np.load(tmp_path / "J.npy").any()


def test_a_function_computed_as_a_whole_is_written(tmp_path):
    x = torch.randn(5, dtype=F64)
    out = mapped(tmp_path / "J.npy", (5, 5))
    jactri.jacobian(lambda x: unfollowed(torch.fft.fft(x)).abs(), x, out=out)
    want = torch.autograd.functional.jacobian(lambda x: torch.fft.fft(x).abs(), x)
    assert_close(torch.from_numpy(out), want, F64, length=60)

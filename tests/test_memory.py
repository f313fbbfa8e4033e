"""Memory: the predicted and the measured peak, on the sizes at which a naive Jacobian would not fit."""

import subprocess
import sys
import textwrap

import pytest
import torch

import jactri
from jactri.memory import free_bytes, parse_bytes

MEASURE = """
import ctypes, gc, sys, torch, jactri

def status(name):
    with open("/proc/self/status") as lines:
        for line in lines:
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024

def peak(call):
    # extra resident bytes while `call` runs, its result included
    call()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    before = status("VmRSS")
    result = call()
    return status("VmHWM") - before, result
"""


def measured(body: str) -> list[float]:
    """Run a script after MEASURE in a fresh process; it prints numbers."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE + textwrap.dedent(body)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [float(word) for word in done.stdout.split()]


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc to measure the peak")


@linux
def test_the_full_shape_takes_no_more_than_the_answer_and_a_fifth():
    extra, answer = measured(
        """
        net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 32))
        x = torch.randn(128, 32)
        extra, J = peak(lambda: jactri.jacobian(net, x))
        print(extra, J.numel() * 4)
        """
    )
    assert extra <= 1.2 * answer


@linux
@pytest.mark.parametrize("strategy", ["forward-mode", "reverse-mode"])
def test_the_peak_stays_under_memory_limit(strategy):
    # unlimited, the blocks of the wide layer alone take 256 * 64 * 2048 * 4 = 134 MB
    limit = 40_000_000
    extra, free, answer = measured(
        f"""
        from jactri import planner
        planner.CACHE_BYTES = 1 << 40  # only the limit may cut chunks
        net = torch.nn.Sequential(
            torch.nn.Linear(256, 2048), torch.nn.Tanh(), torch.nn.Linear(2048, 256)
        )
        x = torch.randn(64, 256)
        kw = dict(per_sample=True, strategy={strategy!r})
        extra, J = peak(lambda: jactri.jacobian(net, x, memory_limit={limit}, **kw))
        free, _ = peak(lambda: jactri.jacobian(net, x, **kw))
        print(extra, free, J.numel() * 4)
        """
    )
    assert free > 2 * limit, "the case must need the limit"
    assert answer < extra <= 1.1 * limit


@pytest.mark.parametrize("strategy", ["forward-mode", "reverse-mode"])
def test_limited_results_are_the_same(strategy):
    net = torch.nn.Sequential(
        torch.nn.Linear(6, 40), torch.nn.Tanh(), torch.nn.Linear(40, 7)
    ).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    whole = jactri.jacobian(net, x, strategy=strategy)
    torch.testing.assert_close(
        jactri.jacobian(net, x, strategy=strategy, memory_limit=22_000), whole
    )


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("strategy", ["forward-mode", "reverse-mode"])
def test_ranges_of_samples_run_where_one_seed_of_all_does_not_fit(
    strategy, per_sample, monkeypatch
):
    from jactri import api

    spans = []

    def spied(graph, options, real=api.split_samples):
        pieces = real(graph, options)
        spans.extend(span for span, _, _ in pieces)
        return pieces

    monkeypatch.setattr(api, "split_samples", spied)
    net = torch.nn.Sequential(
        torch.nn.Linear(6, 40), torch.nn.Tanh(), torch.nn.Linear(40, 40), torch.nn.SiLU(),
        torch.nn.Linear(40, 7),
    ).double()  # fmt: skip
    x = torch.randn(37, 6, dtype=torch.float64)
    kw = {"strategy": strategy, "per_sample": per_sample}
    whole = jactri.jacobian(net, x, **kw)
    limit = whole.numel() * 8 + 30_000
    torch.testing.assert_close(jactri.jacobian(net, x, memory_limit=limit, **kw), whole)
    assert len(spans) > 1
    assert [i for start, n in spans for i in range(start, start + n)] == list(range(37))


def test_functions_computed_as_a_whole_run_in_chunks_of_rows(monkeypatch):
    from jactri import whole

    blocks = []

    def counted(one_row, block, name, real=whole.batched):
        blocks.append(block.shape[0])
        return real(one_row, block, name)

    monkeypatch.setattr(whole, "batched", counted)
    x = torch.randn(32, dtype=torch.float64)

    def spectrum(x):
        return torch.fft.fft(x).abs()

    free = jactri.jacobian(spectrum, x)
    assert blocks == [32]
    limited = jactri.jacobian(spectrum, x, memory_limit=20_000)
    assert len(blocks) > 3 and sum(blocks) == 64
    torch.testing.assert_close(limited, free)


def test_samples_that_mix_are_not_cut_into_ranges():
    w = torch.randn(4000, 50, dtype=torch.float64)
    x = torch.randn(50, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="memory_limit"):
        jactri.jacobian(
            lambda x: (w @ x).tanh().sum().view(1, 1).expand(50, 1).tanh(), x, memory_limit=40_000
        )


def test_a_limit_below_one_seed_is_refused():
    net = torch.nn.Linear(6, 40)
    x = torch.randn(5, 6)
    with pytest.raises(ValueError, match="memory_limit"):
        jactri.jacobian(lambda x: net(x).tanh(), x, memory_limit=100)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (7, 7),
        ("7", 7),
        ("7B", 7),
        ("1.5KB", 1500),
        ("2GB", 2 * 10**9),
        ("2 GiB", 2 << 30),
        ("1mib", 1 << 20),
    ],
)
def test_amounts_of_memory(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("bad", [0, -5, "lots", "", 1.5, True, "-1GB", "1 parsec"])
def test_bad_amounts_of_memory(bad):
    with pytest.raises(ValueError, match="memory_limit"):
        parse_bytes(bad)


def test_free_bytes_is_plausible():
    assert 1 << 20 < free_bytes(torch.device("cpu")) < 1 << 50

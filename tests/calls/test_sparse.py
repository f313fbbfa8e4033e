"""Patterns and sparse results: held against the support of the dense Jacobian in float64."""

import math
import re

import numpy
import pytest
import torch
from common import unfollowed
from tolerances import assert_close
from torch import nn
from windows import DENSE_SAMPLES, FUNCTIONS

import jactri
from jactri._src.base.csr import Csr
from jactri._src.plan.colours import period
from jactri._src.plan.supports import Trace, pattern_of
from jactri._src.read.reading import read
from jactri._src.run import entries, formed

F64 = torch.float64
LAYOUTS = [torch.sparse_coo, torch.sparse_csr, "banded"]
MODES = ["auto", "forward-mode", "reverse-mode"]


def data(name, n=None):
    func, shape, exact = FUNCTIONS[name]
    shape = shape if n is None else (n, *shape[1:])
    gen = torch.Generator().manual_seed(0)
    return func, torch.randn(shape, generator=gen, dtype=F64), exact


def truth(func, x, per_sample):
    if not len(x):
        return x.new_zeros(*func(x).shape, *x.shape[per_sample:])
    J = torch.autograd.functional.jacobian(func, x)
    if per_sample:
        n = len(x)
        return torch.stack([J[i].select(J.dim() - x.dim() - 1, i) for i in range(n)]) if n else J
    return J


def close(got, want, length=200):
    assert_close(got, want, got.dtype, length=length)


def same(found, want):
    close(found.to_dense().reshape(want.shape), want)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_pattern_holds_the_support(name):
    func, x, exact = data(name)
    mask = jactri.sparsity(func, x)
    want = truth(func, x, False)
    assert mask.layout is torch.sparse_coo and mask.dtype is torch.bool and mask.shape == want.shape
    support = want != 0
    assert not (support & ~mask.to_dense()).any()
    if exact:
        assert torch.equal(mask.to_dense(), support)
    assert mask._nnz() < 0.6 * want.numel()
    strides = torch.tensor([math.prod(mask.shape[a + 1 :]) for a in range(mask.dim())])
    assert (strides @ mask._indices()).diff().gt(0).all()  # in order, none twice


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_form_and_mode(name, per_sample):
    func, x, _ = data(name)
    want = truth(func, x, per_sample)
    for mode in MODES:
        kw = {"per_sample": per_sample, "strategy": mode}
        close(jactri.jacobian(func, x, **kw), want)
        for layout in LAYOUTS:
            if per_sample and name in DENSE_SAMPLES:
                with pytest.raises(
                    ValueError, match="every entry of a sample's Jacobian of output 0"
                ):
                    jactri.jacobian(func, x, layout=layout, **kw)
                continue
            found = jactri.jacobian(func, x, layout=layout, **kw)
            same(found, want)
            if layout == torch.sparse_coo:
                assert found.shape == want.shape and found.is_coalesced()
                torch.sparse_coo_tensor(
                    found.indices(), found.values(), found.shape, check_invariants=True
                )
                mask = jactri.sparsity(func, x, per_sample=per_sample)
                assert torch.equal(mask._indices(), found.indices())
            elif layout == torch.sparse_csr:
                rows = math.prod(want.shape[: want.dim() - x.dim() + per_sample])
                n = len(x) if per_sample else 1
                size = (rows // n, want.numel() // rows)
                assert found.shape == ((n, *size) if per_sample else size)
                torch.sparse_csr_tensor(
                    found.crow_indices(), found.col_indices(), found.values(), found.shape, check_invariants=True
                )  # fmt: skip
            else:
                assert isinstance(found, jactri.Banded) and found.shape == want.shape
                out = want.shape[: want.dim() - x.dim() + per_sample]
                assert found.values.shape[:-1] == out
                assert found.columns.shape == found.values.shape[per_sample:]
                assert (found.values[(found.columns < 0).expand(found.values.shape)] == 0).all()


@pytest.mark.parametrize(
    "name", ["three convolutions", "down and up", "residual", "strided lines", "max pool"]
)
@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("per_sample", [True, False])
def test_batches(name, n, per_sample):
    func, x, _ = data(name, n)
    want = truth(func, x, per_sample)
    for mode in MODES:
        kw = {"per_sample": per_sample, "strategy": mode}
        close(jactri.jacobian(func, x, **kw), want)
        for layout in LAYOUTS:
            if n:
                same(jactri.jacobian(func, x, layout=layout, **kw), want)


@pytest.mark.parametrize(
    "name", ["three convolutions", "up", "strides", "residual", "a flat image"]
)
def test_dtypes_layouts_in_memory_and_out(name):
    func, x, _ = data(name)
    want = truth(func, x, True)
    single = nn.ModuleList([func]) if isinstance(func, nn.Module) else None
    if single is not None:
        single.float()
        try:
            found = jactri.jacobian(func, x.float(), per_sample=True)
            assert found.dtype is torch.float32
            close(found, want, length=200)
        finally:
            single.double()
    for turned in (
        x.mT.contiguous().mT,
        x.clone(memory_format=torch.channels_last) if x.dim() == 4 else x,
    ):
        close(jactri.jacobian(func, turned, per_sample=True), want)
    out = torch.full(want.shape, float("nan"), dtype=F64)
    assert jactri.jacobian(func, x, per_sample=True, out=out) is out
    close(out, want)
    strided = torch.full((*want.shape[:-1], 2 * want.shape[-1]), float("nan"), dtype=F64)[..., ::2]
    jactri.jacobian(func, x, per_sample=True, out=strided)
    close(strided, want)
    full = torch.full((*want.shape[: want.dim() - x.dim() + 1], *x.shape), float("nan"), dtype=F64)
    jactri.jacobian(func, x, out=full)
    close(full, truth(func, x, False))


@pytest.mark.parametrize("name", ["three convolutions", "strides", "residual", "down and up"])
@pytest.mark.parametrize("mode", MODES)
def test_it_can_be_differentiated(name, mode):
    func, x, _ = data(name, 2)

    def loss(call, **kw):
        a = x.clone().requires_grad_()
        J = call(func, a, create_graph=True, **kw)
        if J.layout is torch.sparse_coo:
            J = J.to_dense()
        return torch.autograd.grad((J**2).sum(), [a, *func.parameters()], allow_unused=True)

    want = loss(torch.autograd.functional.jacobian)
    for layout in (torch.strided, torch.sparse_coo):
        for got, grad in zip(
            loss(jactri.jacobian, strategy=mode, layout=layout), want, strict=True
        ):
            if grad is not None:
                close(got, grad)


def test_chunks_limits_and_progress():
    func, x, _ = data("three convolutions", 4)
    want = truth(func, x, True)
    limits = [{"memory_limit": int(want.nbytes * f)} for f in (1.1, 1.5, 3, 20)]
    for kw in ({"chunk_size": 3}, {"progress": True}, *limits):
        for mode in MODES:
            close(jactri.jacobian(func, x, per_sample=True, strategy=mode, **kw), want)
    with pytest.raises(ValueError, match="memory_limit"):
        jactri.jacobian(func, x, per_sample=True, memory_limit=1000)
    for layout in LAYOUTS:
        same(jactri.jacobian(func, x, per_sample=True, layout=layout, chunk_size=7), want)
        with pytest.raises(ValueError, match="memory_limit"):
            jactri.jacobian(func, x, per_sample=True, layout=layout, memory_limit=10_000)


@pytest.mark.parametrize("mode", MODES)
def test_chunks_of_samples_that_mix_after_the_windows(mode):
    """The first layers are the same for all chunks of samples: they see the coloured seeds, too."""
    net = FUNCTIONS["three convolutions"][0]
    x = torch.randn(4, 1, 12, 11, dtype=F64)

    def func(x):
        y = net(x)
        return y - y.mean(0)

    want = truth(func, x, False)
    for size in (49, 98):
        close(jactri.jacobian(func, x, strategy=mode, chunk_size=size), want)


@pytest.mark.parametrize("rows", [1 << 26, 3000])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("per_sample", [True, False])
def test_a_memmap_is_filled_from_the_entries(per_sample, mode, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(formed, "ROWS_BYTES", rows)
    func, x, _ = data("three convolutions", 2)
    want = truth(func, x, per_sample)
    file = numpy.lib.format.open_memmap(tmp_path / "J.npy", "w+", "float64", want.shape)
    options = {"per_sample": per_sample, "strategy": mode, "memory_limit": 6_000_000}
    assert "colours" in str(jactri.explain(func, x, **options))
    file[:] = numpy.nan
    for _ in range(2):  # the second call finds nothing left of the first
        assert jactri.jacobian(func, x, out=file, **options) is file
        close(torch.from_numpy(numpy.array(file)), want)
        assert [p.name for p in tmp_path.iterdir()] == ["J.npy"]


def test_an_interrupted_call_forms_the_entries_again(tmp_path, monkeypatch):
    """Beside an output that is written chunk by chunk."""
    net = data("three convolutions")[0]
    x = data("three convolutions", 2)[1]

    def func(x):
        y = net(x)
        return y, y.flatten(1).softmax(1)

    want = [truth(lambda x, j=j: func(x)[j], x, False) for j in range(2)]
    shapes = [w.shape for w in want]
    files = tuple(
        numpy.lib.format.open_memmap(tmp_path / f"J{j}.npy", "w+", "float64", s)
        for j, s in enumerate(shapes)
    )
    options = {"strategy": "reverse-mode", "chunk_size": 60, "out": files}
    finish = entries.Entries.finish

    def stop(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(entries.Entries, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        jactri.jacobian(func, x, **options)
    assert (tmp_path / "J0.npy.progress").exists()
    monkeypatch.setattr(entries.Entries, "finish", finish)
    jactri.jacobian(func, x, **options)
    for file, w in zip(files, want, strict=True):
        close(torch.from_numpy(numpy.array(file)), w)
    assert not (tmp_path / "J0.npy.progress").exists()


def test_weights_that_change_are_seen():
    """Products of weights are kept: also a write behind autograd's back must be seen."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 1, 3),
    )
    net = net.double()
    x = torch.randn(1, 1, 8, 8, dtype=F64)
    for change in (
        lambda w: w.data.mul_(1.5),
        lambda w: setattr(w, "data", torch.randn_like(w)),
        lambda w: w.detach().numpy().__imul__(0.5),
    ):
        close(jactri.jacobian(net, x), truth(net, x, False))
        change(net[2].weight)
    close(jactri.jacobian(net, x), truth(net, x, False))


def test_several_inputs_and_outputs():
    torch.manual_seed(0)
    first, second = (nn.Conv2d(1, 2, 3, padding=1).double() for _ in range(2))

    def func(a, b):
        y = torch.tanh(first(a) + second(b))
        return y, y.mul(2).sum(1), b.sin()

    xs = torch.randn(2, 1, 5, 6, dtype=F64), torch.randn(2, 1, 5, 6, dtype=F64)
    want = torch.autograd.functional.jacobian(func, xs)
    for layout in LAYOUTS:
        found = jactri.jacobian(func, xs, layout=layout)
        for row, want_row in zip(found, want, strict=True):
            for got, block in zip(row, want_row, strict=True):
                same(got, block)
    masks = jactri.sparsity(func, xs)
    assert masks[2][0]._nnz() == 0 and masks[2][1]._nnz() == xs[1].numel()
    for j, row in enumerate(jactri.jacobian(func, xs)):
        for i, block in enumerate(row):
            close(block, want[j][i])


def test_what_mixes_is_named():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 3)).double()
    x = torch.randn(1, 1, 6, 6, dtype=F64)
    for layout in LAYOUTS:
        with pytest.raises(
            ValueError, match=r"Jacobian of output 0 by input 0 .* AddmmBackward0 .*torch.strided"
        ):
            jactri.jacobian(net, x, layout=layout)
    mixing = nn.BatchNorm2d(1).double().train()
    with pytest.raises(ValueError, match=r"NativeBatchNormBackward0.* mixes them"):
        jactri.jacobian(mixing, x.repeat(3, 1, 1, 1), per_sample=True, layout=torch.sparse_coo)
    with pytest.raises(ValueError, match="not known to be independent"):
        jactri.sparsity(mixing, x.repeat(3, 1, 1, 1), per_sample=True)
    assert jactri.sparsity(net, x)._nnz() == 3 * 36  # nothing is known to be zero


@pytest.mark.parametrize(
    ("error", "match", "kw"),
    [
        (ValueError, "layout must be torch.strided", {"layout": torch.sparse_bsc}),
        (ValueError, "layout must be torch.strided", {"layout": "coo"}),
        (RuntimeError, "out= takes dense", {"layout": torch.sparse_coo, "out": torch.empty(2, 2)}),
    ],
)
def test_bad_options(error, match, kw):
    with pytest.raises(error, match=match):
        jactri.jacobian(torch.sin, torch.ones(2), **kw)
    a = torch.ones(2, requires_grad=True)
    with pytest.raises(error, match=match):
        jactri.jacobian_of(a.sin(), a, **kw)


def test_what_has_no_pattern():
    with pytest.raises(ValueError, match="complex"):
        jactri.jacobian(
            lambda x: unfollowed(torch.fft.fft(x)).abs(), torch.ones(3), layout=torch.sparse_coo
        )
    with pytest.raises(ValueError, match="complex"):
        jactri.sparsity(lambda x: unfollowed(torch.fft.fft(x)).abs(), torch.ones(3))
    with pytest.raises(RuntimeError, match="transform"):
        torch.func.vmap(lambda x: jactri.jacobian(torch.sin, x, layout=torch.sparse_coo))(
            torch.ones(2, 3)
        )


def test_a_large_image():
    """No dense tool can hold it: 128 * 128 pixels squared."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1)
    ).double()
    x = torch.randn(1, 1, 128, 128, dtype=F64, requires_grad=True)
    J = jactri.jacobian(net, x, layout=torch.sparse_csr)
    assert J.shape == (128**2, 128**2) and J.values().numel() == (5 * 128 - 6) ** 2
    y = net(x).flatten()
    for row in (0, 127, 5000, 128**2 - 1):
        (want,) = torch.autograd.grad(y[row], x, retain_graph=True)
        unit = torch.zeros(1, 128**2, dtype=F64)
        unit[0, row] = 1
        close((J.t() @ unit.t()).reshape(want.shape), want, length=50)


def brute_period(support):
    seeds = support.shape[1]
    for p in range(1, seeds):
        classes = [support[:, c::p].sum(1).max(initial=0) for c in range(p)]
        if max(classes) <= 1:
            return p
    return seeds


def test_the_period_is_the_least():
    gen = numpy.random.default_rng(0)
    for _ in range(200):
        support = gen.random(gen.integers(1, 9, 2)) < gen.random()
        assert period(Csr.of_dense(support)) == brute_period(support)


def test_a_pattern_with_any_supports():
    """Entries in order, against the dense pattern formed by a loop."""
    func, x, _ = data("a flat image")
    x = x.requires_grad_()
    y = func(x)
    graph = read((y,), (x,))
    pattern = pattern_of(Trace(graph, graph.inputs[0]), graph.outputs[0])
    entries = pattern.entries()
    mask = jactri.sparsity(func, x.detach()).to_dense().reshape(y.numel(), x.numel())
    rows, columns = mask.nonzero(as_tuple=True)
    assert entries.row.tolist() == rows.tolist() and entries.column.tolist() == columns.tolist()
    assert entries.start.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
    assert pattern.nnz == len(rows) and pattern.shape == mask.shape


def test_plans_use_colours_and_patches():
    func, x, _ = data("three convolutions")
    for mode in MODES:
        text = str(jactri.explain(func, x, per_sample=True, strategy=mode))
        assert re.search(
            r"\d+ colours for \d+ seeds that never meet in one entry, by patches", text
        )
        assert "convolution, patches of 7x7" in text
    func, x, _ = data("down and up")
    text = str(jactri.explain(func, x, per_sample=True, strategy="forward-mode"))
    assert "colours for 80 seeds" in text and "patches" not in text


@pytest.mark.parametrize("name", ["three convolutions", "down and up"])
def test_compiled_calls_with_colours_and_patches(name):
    func, x, _ = data(name)
    call = jactri.compile(func, x, per_sample=True, engine="fx")
    assert call.graph is not None
    for k in range(3):
        moved = x + 0.1 * k
        close(call(moved), truth(func, moved, True))
    if isinstance(func, nn.Module):
        with torch.no_grad():
            kept = [p.clone() for p in func.parameters()]
            try:
                for p in func.parameters():
                    p.mul_(1.25)
                close(call(x), truth(func, x, True))
            finally:
                for p, old in zip(func.parameters(), kept, strict=True):
                    p.copy_(old)
        close(call(x), truth(func, x, True))

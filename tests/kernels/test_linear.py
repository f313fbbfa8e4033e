"""step, chain and pair against float64: values, every element written, nothing else touched."""

from itertools import pairwise

import pytest
import torch
from guard import Canvas, guarded
from precision import WAYS, distance, limit

from jactri.kernels import chain as chains
from jactri.kernels import linear, operands
from jactri.kernels.activations import DERIVATIVES
from jactri.kernels.support import Factor

CONSTANTS = {
    "slope": 0.1, "alpha": 0.7, "scale": 1.1, "input_scale": 1.3, "beta": 2.0, "threshold": 20.0,
    "least": -0.5, "most": 0.5,
}  # fmt: skip
ODD = [
    (1, 1, (1, 1)),
    (3, 2, (17, 33)),
    (2, 5, (100, 3)),
    (5, 1, (64, 130)),
    (1, 70, (33, 16)),
    (7, 11, (130, 129)),
]
DEEP = [
    (3, 5, (17, 33, 3)),
    (2, 3, (1, 128, 1)),
    (10, 7, (64, 64, 8)),
    (1, 9, (3, 100, 16, 5, 64)),
    (5, 3, (128, 128, 128)),
]
PAIRS = [
    (3, 5, (17, 33, 3)),
    (2, 3, (1, 300, 1)),
    (32, 2, (256, 256, 32)),
    (1, 9, (130, 65, 128)),
    (4, 3, (64, 16, 100)),
]


def constants(name):
    return tuple(CONSTANTS[c] for c in DERIVATIVES[name].constants)


def diagonal(f):
    """The derivative as the kernels of tests/kernels/test_activations.py have it, in float64."""
    from jactri.kernels.elementwise import scaled_sum

    ones = torch.ones(1, *f.values.shape, device=f.values.device)
    return scaled_sum([(ones, f)], ones.shape)[0].double()


def expected(t, matrices, factors):
    t = t.double()
    for i, f in enumerate(factors):
        if f is not None:
            t = t * diagonal(f)
        if i < len(matrices):
            t = t @ matrices[i].double()
    return t


def in_float32(t, matrices, factors):
    """The same in torch's own float32 products."""
    for i, f in enumerate(factors):
        if f is not None:
            t = t * diagonal(f).to(t.dtype)
        if i < len(matrices):
            t = t @ matrices[i]
    return t


def operands_of(
    K,
    R,
    widths,
    device,
    dtype=torch.float32,
    name="tanh",
    which=None,
    order=None,
    gap=1,
    shared=False,
):
    """A block, matrices and factors between guard zones; ``which`` of the widths have a factor (all by default)."""
    t = (
        torch.randn(K, 1 if shared else R, widths[0], device=device)
        .to(dtype)
        .expand(K, R, widths[0])
    )
    matrices = [
        torch.randn(a, b, device=device).to(dtype) / max(a, 1) ** 0.5 for a, b in pairwise(widths)
    ]
    factors = [
        Factor(
            guarded(torch.randn(R, w, device=device).tanh().to(dtype), gap=gap),
            name,
            constants(name),
        )
        if which is None or i in which
        else None
        for i, w in enumerate(widths)
    ]
    swap = None if order is None else (1, 0)
    return guarded(t, order, gap), [guarded(m, swap, gap) for m in matrices], factors


def launch(kernel, t, matrices, factors, **options):
    if kernel == "step":
        return linear.step(t, *matrices, *factors, **options)
    return getattr(chains, kernel)(t, matrices, factors, **options)


def check(kernel, t, matrices, factors, way, dtype=torch.float32, order=None, gap=1, **options):
    K, R, _ = t.shape
    canvas = Canvas((K, R, matrices[-1].shape[1]), dtype, t.device, order, gap)
    kept = [x.clone() for x in (t, *matrices)]
    got = launch(kernel, t, matrices, factors, precision=way, out=canvas.view, **options)
    assert got is canvas.view
    truth = expected(t, matrices, factors)
    if (plus := options.get("plus")) is not None:
        truth = truth + plus.double()
    plain = distance(in_float32(t, matrices, factors), truth) if way not in ("half", "tf32") else 0
    off = distance(got, truth)
    canvas.check()
    assert off <= limit(way, dtype, len(matrices), plain), off
    assert all(torch.equal(a, b) for a, b in zip(kept, (t, *matrices), strict=True))


SHAPES = [("step", s) for s in ODD] + [("chain", s) for s in DEEP] + [("pair", s) for s in PAIRS]


@pytest.mark.parametrize("way", WAYS[:-1])
@pytest.mark.parametrize("kernel, shape", SHAPES)
def test_shapes_and_precisions(kernel, shape, way, device):
    check(kernel, *operands_of(*shape, device), way)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel, shape", SHAPES)
def test_half(kernel, shape, dtype, device):
    check(kernel, *operands_of(*shape, device, dtype), "half", dtype)


@pytest.mark.parametrize("name", DERIVATIVES)
@pytest.mark.parametrize(
    "kernel, widths", [("step", (20, 24)), ("chain", (20, 24, 18)), ("pair", (20, 40, 18))]
)
def test_every_derivative_at_every_place(kernel, widths, name, device):
    for place in range(len(widths)):
        check(kernel, *operands_of(3, 4, widths, device, name=name, which={place}), "tf32x3")


@pytest.mark.parametrize("way", ["bf16x6", "tf32x3"])
@pytest.mark.parametrize(
    "kernel, config",
    [("step", c) for c in linear.CONFIGS]
    + [("chain", c) for c in chains.CHAIN_CONFIGS]
    + [("pair", c) for c in chains.PAIR_CONFIGS],
)
def test_every_configuration(kernel, config, way, device):
    widths = {"step": (70, 150), "chain": (40, 64, 33), "pair": (70, 150, 33)}[kernel]
    check(kernel, *operands_of(9, 20, widths, device), way, config=config)


RESIDENT = [("tf32", torch.float32), ("half", torch.bfloat16), ("half", torch.float16)]


@pytest.mark.parametrize("way, dtype", RESIDENT)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", [*PAIRS, (9, 31, (128, 70, 33)), (1, 1, (256, 100, 5))])
def test_a_block_that_stays_in_registers(shape, shared, way, dtype, device):
    given = operands_of(*shape, device, dtype, shared=shared)
    check("pair", *given, way, dtype, config=chains.RESIDENT_CONFIGS[way])


@pytest.mark.parametrize("which", [(), (0,), (1,), (2,)])
@pytest.mark.parametrize("order", [None, (1, 0, 2), (2, 1, 0)])
def test_strides_of_a_block_that_stays_in_registers(order, which, device):
    given = operands_of(3, 5, (20, 70, 17), device, order=order, gap=2, which=which)
    config = chains.RESIDENT_CONFIGS["tf32"]
    check("pair", *given, "tf32", order=order, gap=2, config=config)


def test_which_blocks_stay_in_registers(device):
    """Those whose parts fit, in their features' own powers of two, on a card of Hopper's kind."""
    for precision, config in chains.RESIDENT_CONFIGS.items():
        most = chains.RESIDENT_OUT[precision]
        for widths, stays in {
            (256, 300, 32): True, (128, 7, most): True, (64, 256, 32): False, (200, 256, 32): False,
            (512, 256, 32): False, (256, 256, most + 1): False,
        }.items():  # fmt: skip
            found = chains.pair_configs(widths, precision, torch.device("cpu"))
            assert (config in found) == stays
    assert chains.pair_configs((256, 256, 32), "fp32", torch.device("cpu")) == chains.PAIR_CONFIGS


@pytest.mark.parametrize("gap", [1, 3])
@pytest.mark.parametrize("order", [None, (1, 0, 2), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize(
    "kernel, widths", [("step", (20, 33)), ("chain", (20, 33, 17)), ("pair", (20, 33, 17))]
)
def test_strides(kernel, widths, order, gap, device):
    """Inputs, matrices (transposed ones too), what is added and the output in other memory orders, with gaps."""
    given = operands_of(3, 5, widths, device, order=order, gap=gap)
    around = guarded(torch.randn(3, 5, widths[-1], device=device), order, gap)
    for way, plus in (("bf16x6", None), ("ieee", around), ("ieee", around[:1].expand(3, -1, -1))):
        check(kernel, *given, way, order=order, gap=gap, plus=plus)


@pytest.mark.parametrize(
    "kernel, widths", [("step", (20, 33)), ("chain", (20, 33, 17)), ("pair", (200, 33, 17))]
)
def test_a_block_that_all_rows_share(kernel, widths, device):
    """Under an identity seed the first block is a weight: stride 0 along the rows, formed in registers."""
    t, matrices, factors = operands_of(3, 9, widths, device, shared=True)
    assert t.stride(1) == 0
    check(kernel, t, matrices, factors, "bf16x6")


@pytest.mark.parametrize("shape", [(0, 3, (4, 5, 6)), (2, 0, (4, 5, 6)), (2, 3, (4, 5, 0))])
def test_nothing_to_compute(shape, device):
    t, matrices, factors = operands_of(*shape, device)
    for kernel in ("chain", "pair"):
        got = launch(kernel, t, matrices, factors, precision="bf16x6")
        assert got.shape == (*shape[:2], shape[2][-1])
    got = linear.step(t, matrices[0], precision="bf16x6")
    assert got.shape == (*shape[:2], shape[2][1])


@pytest.mark.parametrize("way", ["ieee", "tf32x3", "bf16x6"])
def test_a_sum_over_nothing_is_zero(way, device):
    t, m = torch.empty(2, 3, 0, device=device), torch.empty(0, 5, device=device)
    assert torch.equal(linear.step(t, m, precision=way), torch.zeros(2, 3, 5, device=device))


def test_saved_values_of_another_dtype(device):
    t, matrices, factors = operands_of(3, 5, (20, 33), device, torch.bfloat16)
    factors = [Factor(f.values.float(), f.name) for f in factors]
    check("step", t, matrices, factors, "half", torch.bfloat16)


@pytest.mark.clean_memory
def test_offsets_beyond_32_bits(device):
    """Rows 2^30 elements apart: the memory in between is reserved, and never touched."""
    far = torch.empty((1 << 31) + 4096, device=device).as_strided((2, 3, 20), (64, 1 << 30, 1))
    far.copy_(torch.randn(2, 3, 20))
    z = torch.empty((1 << 31) + 4096, device=device).as_strided((3, 20), (1 << 30, 1))
    z.copy_(torch.randn(3, 20).tanh())
    m = torch.randn(20, 9, device=device)
    out = torch.empty((1 << 31) + 4096, device=device).as_strided((2, 3, 9), (64, 1 << 30, 1))
    truth = expected(far, [m], [Factor(z, "tanh"), None])
    got = linear.step(far, m, Factor(z, "tanh"), precision="bf16x6", out=out)
    assert distance(got, truth) < 1e-6
    both = [m, torch.randn(9, 9, device=device)]
    truth = expected(far, both, [Factor(z, "tanh"), None, None])
    for kernel in (chains.chain, chains.pair):
        got = kernel(far, both, [Factor(z, "tanh"), None, None], precision="bf16x6", out=out)
        assert distance(got, truth) < 1e-6


@pytest.mark.parametrize("way, parts", [("tf32", 1), ("tf32x3", 2), ("bf16x6", 3)])
def test_prepared_parts_add_up(way, parts, device):
    """Several matrices in one launch, in either memory order, padded with zeros."""
    given = [
        guarded(torch.randn(shape, device=device), order)
        for shape, order in (
            ((20, 33), None),
            ((33, 20), (1, 0)),
            ((1, 1), None),
            ((64, 16), (1, 0)),
        )
    ]
    made = operands.prepare(given, way)
    for m, p in zip(given, made, strict=True):
        rows, columns = m.shape
        assert p.padded % operands.ALIGNED == 0 and p.padded >= rows
        whole = sum(
            torch.as_strided(
                p.values,
                (p.padded, columns),
                (p.rows, p.columns),
                p.values.storage_offset() + i * p.parts,
            ).double()
            for i in range(parts)
        )
        assert (whole[:rows] - m).abs().max() <= 2.0**-23 * m.abs().max()
        assert not whole[rows:].any()


def test_a_matrix_that_needs_no_preparation_is_read_where_it_lies(device):
    w = torch.randn(64, 32, device=device)
    (p,) = operands.prepare([w.t()], "tf32")
    assert p.values.data_ptr() == w.data_ptr() and p.padded == 32
    (p,) = operands.prepare([w.bfloat16()], "half")
    assert p.padded == 64


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(bad, device):
    t, m = torch.randn(2, 3, 20, device=device), torch.randn(20, 9, device=device)
    t[1, 2, 5] = bad
    for way in WAYS[:-1]:
        got = linear.step(t, m, precision=way)
        assert (
            not got[1, 2].isfinite().any()
            and got[0].isfinite().all()
            and got[1, :2].isfinite().all()
        )

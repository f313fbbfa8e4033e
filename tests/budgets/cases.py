"""What is compiled: every kernel with every configuration, at the sizes of the workloads that it is for."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from benchmarks.gpu.driver import TARGETS
from jactri.kernels import (
    attention,
    band,
    batched,
    conv,
    direct,
    elementwise,
    first,
    laplacian,
    linear,
    operands,
    patches,
    pool,
    rows,
)
from jactri.kernels import chain as chains
from jactri.kernels.activations import DERIVATIVES
from jactri.kernels.support import Factor
from jactri.kernels.windows import Window

MODERN = ("sm_90", "sm_100")
DTYPES = {"half": torch.bfloat16}


def _network(widths, K, R, dtype, name, reverse=False, shared=True):
    """A chain's operands: the block of the first layer is a weight that all rows share, or a block of its own."""
    t = torch.empty(K, 1 if shared else R, widths[0], dtype=dtype).expand(K, R, widths[0])
    matrices = [
        torch.empty(a, b, dtype=dtype) if reverse else torch.empty(b, a, dtype=dtype).t()
        for a, b in pairwise(widths)
    ]
    factors = [Factor(torch.empty(R, w, dtype=dtype), name) for w in widths[:-1]]
    return t, matrices, [*factors, None]


def _step(config, shared):
    def run(way):
        dtype = DTYPES.get(way, torch.float32)
        if shared:  # W2, 784-512-512-10 in reverse: rows of the last weight, ReLU before and after
            t, (m,), (before, _) = _network((512, 512), 10, 1024, dtype, "relu", True)
            after = before
        else:  # W3, 32-256-512-784 forward: the last step, sigmoid at the end
            t, (m,), _ = _network((512, 784), 32, 1024, dtype, "tanh", shared=False)
            before, after = None, Factor(torch.empty(1024, 784, dtype=dtype), "sigmoid")
        linear.step(t, m, before, after, precision=way, config=config)

    return run


def _whole(kernel, widths, K, R, name, config, reverse=False, around=False):
    def run(way):
        given = _network(widths, K, R, DTYPES.get(way, torch.float32), name, reverse, not around)
        plus = torch.empty(K, R, widths[-1]) if around else None
        getattr(chains, kernel)(*given, precision=way, config=config, plus=plus)

    return run


def _laplacian(kernel, widths, K, R, config, first=False, last=False):
    """Layers of a tanh network; a chain's first block is shared by all samples, a ``first`` step forms its own."""

    def run(way):
        dtype = DTYPES.get(way, torch.float32)
        shared = first or kernel == "chain"
        t = torch.empty(K + 1, 1 if shared else R, widths[0], dtype=dtype).expand(K + 1, R, -1)
        matrices = [torch.empty(b, a, dtype=dtype).t() for a, b in pairwise(widths)]
        before, *factors = (Factor(torch.empty(R, w, dtype=dtype), "tanh") for w in widths)
        options = {"precision": way, "config": config}
        if last:
            options["last"] = torch.empty(1, widths[-1], dtype=dtype).t()
        if kernel == "chain":
            laplacian.chain(t, matrices, factors, **options)
        else:
            laplacian.step(t, *matrices, *factors, before=before if first else None, **options)

    return run


def _rows(name, n, around=False):
    def run(way):
        t = torch.empty(64, 1024, n, dtype=DTYPES.get(way, torch.float32))
        std, weight = torch.empty(1024, 1).expand(1024, n), torch.empty(n).expand(1024, n)
        rows.rows(
            t, torch.empty(1024, n), name, Factor(std), Factor(weight), plus=t if around else None
        )

    return run


def _sum(terms):
    def run(way):
        dtype = DTYPES.get(way, torch.float32)
        t, y = torch.empty(32, 1024, 256, dtype=dtype), torch.empty(1024, 256, dtype=dtype)
        elementwise.scaled_sum([(t, Factor(y, "sigmoid")), (t, Factor(y))][:terms], t.shape)

    return run


def _derivative(name):
    def run(way):
        f = Factor(torch.empty(1024, 256), name, (0.5,) * len(DERIVATIVES[name].constants))
        elementwise.scaled_sum([(torch.empty(32, 1024, 256), f)], (32, 1024, 256))

    return run


def _batched(config):
    """W4: two Jacobians at 32 features, 784 of either end; blocks as sweeps leave them, seeds first."""

    def run(way):
        left, right = (
            torch.empty(32, 256, 784, dtype=DTYPES.get(way, torch.float32)).transpose(0, 1)
            for _ in range(2)
        )
        batched.batched(left.mT, right, precision=way, config=config)

    return run


def _prepare(way):
    operands.prepare([torch.empty(256, 256).t(), torch.empty(32, 256).t()], way)


def _conv(
    launch, channels, image, K, N, *, before=None, after=None, last=False, config=None, **window
):
    """A 3x3 convolution with padding 1 of (channels in, out), or its transpose, of a block of its own."""

    def run(way):
        dtype = DTYPES.get(way, torch.float32)
        I, O = channels
        G, stride, transposed = (
            window.get(w, d) for w, d in (("groups", 1), ("stride", 1), ("transposed", False))
        )
        size = [n * stride if transposed else n // stride for n in image]
        t = torch.empty(K, N, I, *image, dtype=dtype)
        t = t.movedim(2, -1).contiguous().movedim(-1, 2) if last else t
        w = torch.empty((I, O // G, 3, 3) if transposed else (O, I // G, 3, 3), dtype=dtype)
        zb, za = (
            torch.empty(N, c, *s, dtype=dtype) for c, s in zip(channels, (image, size), strict=True)
        )
        options = {} if launch is direct.direct else {"precision": way}
        launch(
            t, w, Window(tuple(size), (stride,) * 2, (1, 1), (1, 1), G, transposed),
            before and Factor(zb, before), after and Factor(za, after), config=config, **options,
        )  # fmt: skip

    return run


def _pool(name):
    """2x2 windows of 32x32 images, a ReLU before (push) or after (pull)."""

    def run(way):
        fine, coarse = torch.empty(64, 16, 32, 32, 32), torch.empty(64, 16, 32, 16, 16)
        index, z = (
            torch.empty(16, 32, 16, 16, dtype=torch.int64),
            Factor(torch.empty(fine.shape[1:]), "relu"),
        )
        if name == "gather":
            pool.gather(fine, index, z)
        else:
            pool.scatter(coarse, index, Window((32, 32), (2, 2), (0, 0), (1, 1)), (2, 2), None, z)

    return run


def _dense(way):
    """W6: 25 colours, images of 32x32."""
    table = torch.empty(32, 32, dtype=torch.uint8)
    band.dense(torch.empty(64, 25, 1024), torch.empty(1024, dtype=torch.int32), (table, table))


def _patches(config, channels=16, convolutions=3, last=False):
    """W6 in reverse: the windows of two derivatives with a border, the answer with its zeros.

    ``last``: a third derivative scales what is written, its channels before its pixels.
    """

    def run(way):
        dtype, (c, hw, N), k = (
            DTYPES.get(way, torch.float32),
            (channels, 32, 64),
            2 * convolutions + 1,
        )
        sizes = [(i, i, c if i < k else 1) for i in range(3, k + 1, 2)]
        widths = [i * j * c for i, j, c in sizes]
        factors = []
        for i, _, _ in sizes[:-1]:
            image = torch.empty(N, hw + i - 1, hw + i - 1, c, dtype=dtype)
            strides = (*image.stride()[:3], *image.stride()[1:])
            factors.append(image.as_strided((N, hw, hw, i, i, c), strides))
        border = torch.empty(N, 1, hw + k - 1, hw + k - 1, dtype=dtype)
        (n, c, y, x), size = border.stride(), sizes[-1]
        factors.append(border.as_strided((N, hw, hw, *size), (n, y, x, y, x, c)) if last else None)
        V = hw * hw
        place = patches.Place(
            (V * V, 0, hw * V + hw, V + 1, hw, 1, V), -(k // 2) * (hw + 1), (-(k // 2),) * 2, (1, 1), (hw, hw)
        )  # fmt: skip
        patches.patches(
            torch.empty(widths[0], dtype=dtype).expand(N, 1, hw, hw, -1),
            [torch.empty(a, b, dtype=dtype) for a, b in pairwise(widths)],
            factors, sizes, (2, 1), torch.empty(N * V * V, dtype=dtype), place,
            zeros=V, precision=way, config=config,
        )  # fmt: skip

    return run


def _first(transposed):
    """W6: 49 colours, images of 32x32, 16 channels."""

    def run(way):
        weight = torch.empty(1, 16, 3, 3) if transposed else torch.empty(16, 1, 3, 3)
        window = Window((32, 32), (1, 1), (1, 1), (1, 1), 1, transposed)
        colours = ((1, 0, 1), (7, 0, 7), (7, 0, 7))
        first.first(
            weight, window, (32, 32), colours, 64, Factor(torch.empty(64, 16, 32, 32), "relu")
        )

    return run


def _attention(kernel, width, config, K, seen):
    """A head of keys for two of queries; heads beside one another in memory."""

    def run(way):
        dtype = DTYPES.get(way, torch.float32)
        q, k, v = (
            torch.empty(2, 1024, heads, width, dtype=dtype).transpose(1, 2) for heads in (8, 4, 4)
        )
        blocks = [torch.empty(K, *t.shape, dtype=dtype) for t in (q, k, v)]
        mask = torch.empty(1024, 1024, dtype=torch.bool) if seen == "mask" else None
        given = q, k, v, attention.Seen(mask, seen == "causal"), 0.125
        options = {"precision": way, "config": attention.configs(width, width, K)[config]}
        found = attention.Forward(torch.empty(q.numel() // width * (width + 2)), tuple(q.shape))
        if kernel == "forward":
            attention.forward(*given, **options)
        elif kernel == "push":
            attention.push(*given, found, blocks, **options)
        else:
            into = [b if n in kernel else None for n, b in zip("qkv", blocks, strict=True)]
            attention.pull(*given, found, blocks[0], into, **options)

    return run


@dataclass(frozen=True)
class Case:
    """What launches a kernel, at which precisions, for which targets; ``products``: tensor cores must be used."""

    kernel: str
    launch: Callable[[str], None]
    ways: tuple[str, ...]
    targets: tuple[str, ...] = tuple(TARGETS)
    products: bool = True


MORE = ("bf16x6", "tf32x3")
"""The two fp32-grade ways; the first configuration of a kernel is compiled for the other precisions as well."""


def _ways(i):
    return (*MORE, "tf32", "half") if i == 0 else MORE


CASES: dict[str, Case] = {"prepare": Case("prepare", _prepare, MORE, products=False)}
for _i, _c in enumerate(linear.CONFIGS):
    CASES[f"step/W2 first/{_i}"] = Case("step", _step(_c, True), _ways(_i))
    CASES[f"step/W3 last/{_i}"] = Case("step", _step(_c, False), _ways(_i))
for _i, _c in enumerate(batched.CONFIGS):
    CASES[f"batched/W4 784-32-784/{_i}"] = Case("batched", _batched(_c), _ways(_i))
for _i, _c in enumerate(chains.PAIR_CONFIGS):
    _w1 = _whole("pair", (256, 256, 32), 32, 16384, "tanh", _c)
    _targets = MODERN if _c.out > 64 else tuple(TARGETS)
    CASES[f"pair/W1 256-256-32/{_i}"] = Case("pair", _w1, _ways(_i), _targets)
CASES["pair/W1 256-256-32/resident"] = Case(
    "pair",
    lambda way: _whole("pair", (256, 256, 32), 32, 16384, "tanh", chains.RESIDENT_CONFIGS[way])(
        way
    ),
    tuple(chains.RESIDENT_CONFIGS),
    ("sm_90",),
)
_w8 = _whole("pair", (256, 256, 64), 64, 8192, "tanh", chains.PAIR_CONFIGS[0])
CASES["pair/W8 256-256-64/0"] = Case("pair", _w8, MORE)
_w7 = _whole("pair", (64, 256, 64), 64, 64, "gelu", chains.PAIR_CONFIGS[0], around=True)
CASES["pair/W7 64-256-64, around/0"] = Case("pair", _w7, MORE[:1], ("sm_80", "sm_90"))
for _i, _c in enumerate(chains.CHAIN_CONFIGS):
    _w9 = _whole("chain", (64, 64, 8), 32, 2048, "tanh", _c)
    CASES[f"chain/W9 64-64-8/{_i}"] = Case("chain", _w9, _ways(_i))
_w8 = _whole("chain", (128, 128, 128, 3), 1, 65536, "tanh", chains.CHAIN_CONFIGS[0], True)
CASES["chain/W8 128-128-128-3/0"] = Case("chain", _w8, _ways(0), MODERN)
# W8: the whole network but its last layer of one feature, which is summed; narrower where 128 does not fit
_w8 = _laplacian("chain", (3, 128, 128, 128), 3, 65536, chains.CHAIN_CONFIGS[0], last=True)
CASES["laplacian chain/W8/0"] = Case("laplacian_chain", _w8, MORE, MODERN)
_narrow = _laplacian("chain", (3, 64, 64, 64), 3, 65536, chains.CHAIN_CONFIGS[1], last=True)
CASES["laplacian chain/64/1"] = Case("laplacian_chain", _narrow, MORE[:1], ("sm_80", "gfx942"))
_w8 = _laplacian("step", (128, 128), 3, 65536, laplacian.CONFIGS[0], last=True)
CASES["laplacian step/W8 last/0"] = Case(
    "laplacian_step", _w8, MORE[:1], ("sm_80", "sm_90", "gfx942")
)
_wide = _laplacian("step", (768, 768), 50, 256, laplacian.CONFIGS[0], first=True)
CASES["laplacian step/50-768 first/0"] = Case("laplacian_step", _wide, MORE[:1], MODERN)
_wide = _laplacian("step", (768, 768), 50, 256, laplacian.CONFIGS[1])
CASES["laplacian step/50-768/1"] = Case("laplacian_step", _wide, MORE[1:], ("sm_90",))
for _n in (16, 784, 2 * rows.WHOLE):
    CASES[f"rows/softmax/{_n}"] = Case(
        "rows", _rows("softmax", _n), ("fp32",), ("sm_90", "gfx942"), False
    )
for _name, _around in (("rows/centred/64", False), ("rows/centred/64, around", True)):
    CASES[_name] = Case("rows", _rows("centred", 64, _around), ("fp32", "half"), products=False)
CASES["rows/log_pull/784"] = Case("rows", _rows("log_pull", 784), ("fp32",), products=False)
for _n in (1, 2):
    CASES[f"scaled_sum/{_n}"] = Case("scaled_sum", _sum(_n), ("fp32", "half"), products=False)
for _name in DERIVATIVES:
    CASES[f"derivative/{_name}"] = Case(
        "scaled_sum", _derivative(_name), ("fp32",), ("sm_90",), False
    )
for _i, _c in enumerate(conv.CONFIGS):
    # W5 in reverse: the second and third layer's pull, of images in rows and in channels-last memory
    _w5 = _conv(
        conv.convolve, (64, 32), (8, 8), 10, 256, after="relu", transposed=True, stride=2, config=_c
    )
    _where = (_ways(0), tuple(TARGETS)) if _i == 0 else (MORE[:1], ("sm_90",))
    CASES[f"conv/W5 64-32 stride 2/{_i}"] = Case("conv", _w5, *_where)
    _w5 = _conv(
        conv.convolve, (64, 64), (8, 8), 10, 256, before="relu", after="relu", last=True, transposed=True, config=_c
    )  # fmt: skip
    CASES[f"conv/W5 64-64 relu/{_i}"] = Case("conv", _w5, MORE, ("sm_90",))
_w5 = _conv(
    conv.convolve, (64, 32), (16, 16), 10, 256, after="relu", last=True, transposed=True, stride=2,
    config=conv.CONFIGS[0],
)  # fmt: skip
CASES["conv/W5 64-32 stride 2 last/0"] = Case("conv", _w5, ("bf16x6", "tf32x3", "tf32"), ("sm_90",))
_few = _conv(conv.convolve, (3, 32), (32, 32), 64, 16, after="tanh", config=conv.CONFIGS[0])
CASES["conv/3-32/0"] = Case("conv", _few, MORE[:1], ("sm_90", "sm_100"))
for _name, _last, _g, _o in (
    ("rows", False, 32, 32),
    ("last", True, 32, 32),
    ("few out", False, 1, 3),
):
    _depth = _conv(direct.direct, (32, _o), (32, 32), 64, 16, before="relu", last=_last, groups=_g)
    CASES[f"direct/{_name}"] = Case("direct", _depth, ("fp32",), ("sm_90", "gfx942"), False)
for _name in ("gather", "scatter"):
    CASES[f"pool/{_name}"] = Case(_name, _pool(_name), ("fp32",), ("sm_90", "gfx942"), False)
for _name in ("push", "pull"):
    CASES[f"first/{_name}"] = Case(
        "first", _first(_name == "pull"), ("fp32",), ("sm_90", "gfx942"), False
    )
CASES["patches/W6 144-400-49/resident"] = Case(
    "patches", _patches(patches.RESIDENT_CONFIG), (*MORE, "tf32", "half"), ("sm_90",)
)
for _i, _c in enumerate(patches.CONFIGS):
    CASES[f"patches/W6 144-400-49/{_i}"] = Case("patches", _patches(_c), _ways(_i))
CASES["patches/two layers 144-25/0"] = Case(
    "patches", _patches(patches.CONFIGS[0], convolutions=2), MORE[:1], ("sm_90",)
)
CASES["patches/W6 scaled/0"] = Case(
    "patches", _patches(patches.CONFIGS[0], last=True), MORE[:1], ("sm_90",)
)
CASES["patches/32 channels 288-800-49/0"] = Case(
    "patches", _patches(patches.CONFIGS[0], 32), MORE, ("sm_90",)
)
for _kernel, _name, _width, _i, _K, _seen, _way, _target in (
    ("attention_forward", "forward", 64, 1, 1, "mask", "half", "sm_90"),
    ("attention_forward", "forward", 256, 0, 1, "causal", "tf32x3", "sm_90"),
    ("attention_push", "push", 64, 0, 1, "mask", "tf32x3", "sm_90"),
    ("attention_push", "push", 64, 0, 16, "", "bf16x6", "sm_90"),
    ("attention_push", "push", 64, 1, 3, "causal", "half", "sm_80"),
    ("attention_push", "push", 128, 1, 16, "causal", "half", "sm_90"),
    ("attention_push", "push", 256, 0, 3, "", "tf32", "sm_90"),
    ("attention_pull_queries", "pull q", 64, 0, 16, "mask", "half", "gfx942"),
    ("attention_pull_queries", "pull q", 256, 0, 3, "causal", "tf32x3", "sm_90"),
    ("attention_pull_keys", "pull k", 64, 1, 3, "causal", "tf32x3", "sm_90"),
    ("attention_pull_keys", "pull k", 128, 1, 1, "mask", "half", "sm_100"),
    ("attention_pull_keys", "pull v", 256, 0, 16, "", "half", "sm_90"),
):
    CASES[f"attention/{_name} {_width} {_seen or 'all'} {_K}/{_i}"] = Case(
        _kernel, _attention(_name.removeprefix("pull "), _width, _i, _K, _seen), (_way,), (_target,)
    )
CASES["band/dense"] = Case("dense", _dense, ("fp32",), ("sm_90", "gfx942"), False)


def jobs():
    """(case, precision, target) of everything that can be chosen there: not tf32x3 on AMD, see `chooser.dots`."""
    for name, case in CASES.items():
        for target in case.targets:
            for way in case.ways:
                if not (way == "tf32x3" and target == "gfx942"):
                    yield name, way, target

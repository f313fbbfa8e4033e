"""Every row of the op table, in every way a Jacobian can be asked, against float64 autograd."""

import warnings
from functools import cache

import pytest
import torch
from cases import ALL, LATER, graph_nodes
from cases.case import op_of
from tolerances import (
    assert_as_good,
    assert_close,
    assert_gradients_close,
    assert_same_tree,
    length_of,
)

import jactri
import jactri._src.rules

pytestmark = pytest.mark.usefixtures("one_thread")

MODES = ("reverse-mode", "forward-mode")
F32, F64 = torch.float32, torch.float64


def ids(cases):
    return [case.name for case in cases]


def as_tuple(x):
    return x if isinstance(x, tuple) else (x,)


def reference(func, inputs, create_graph=False):
    """torch's own Jacobian as rows of tuples, whatever the nesting; empty outputs too."""
    empty = []

    def flat(*xs):
        outputs = as_tuple(func(*xs))
        empty.extend(tuple(y.shape) for y in outputs)
        return tuple(y for y in outputs if y.numel())

    if all(y.numel() == 0 for y in as_tuple(func(*inputs))):
        rows = ()
        empty.extend(tuple(y.shape) for y in as_tuple(func(*inputs)))
    else:
        rows = torch.autograd.functional.jacobian(flat, inputs, create_graph=create_graph)
    full = iter(rows)
    return tuple(
        next(full)
        if torch.Size(shape).numel()
        else tuple(x.new_zeros(shape + x.shape) for x in inputs)
        for shape in empty
    )


# A variant is another size of a case: it runs in float64 and per sample, and not the other ways.
MAIN = [case for case in ALL if not case.variant]


@cache
def truth(case):
    """The float64 Jacobian of a case, at the point that all of its runs share."""
    return reference(*case.build(F64))


def jacobian_rows(case, func, inputs, **options):
    """jactri's Jacobian in the shape of `reference`: one tuple of inputs an output."""
    result = jactri.jacobian(func, inputs, **options)
    return result if isinstance(result[0], tuple) else (result,)


def compare(case, rows, dtype, expected=None, what="jacobian"):
    if expected is None:
        expected = truth(case)
    narrow = (
        dtype if case.inner is None else max(dtype, case.inner, key=lambda d: torch.finfo(d).eps)
    )
    length = length_of(*(t for row in expected for t in row))
    assert_same_tree(rows, expected, narrow, length=length, factor=case.factor, what=what)


# Where a rule leaves its op to autograd, which is right: arguments that it does not cover.
DECLINED = {
    "pad_replicate_-1_2_on_2x2x3",
    "as_strided_beyond",
    "complex_solve",
    "complex_written_part",
    "complex_written_mixed",
}


@pytest.mark.parametrize("case", ALL, ids=ids(ALL))
def test_float64_by_a_rule_where_there_is_one(case):
    """A rule that gave up without need would still be right, and slow."""
    func, inputs = case.build(F64)
    for x in inputs:
        x.requires_grad_()
    ruled = graph_nodes(func(*inputs), inputs) <= nodes_with_rules()
    for mode in MODES:
        func, inputs = case.build(F64)
        if ruled and case.name in DECLINED:
            with jactri.fallback("error"), pytest.raises(jactri.FallbackError):
                jactri.jacobian(func, inputs, strategy=mode)
        with jactri.fallback("error" if ruled and case.name not in DECLINED else "allow"):
            rows = jacobian_rows(case, func, inputs, strategy=mode)
        compare(case, rows, F64, what=mode)


@pytest.mark.parametrize("case", MAIN, ids=ids(MAIN))
def test_float32(case):
    for mode in MODES:
        func, inputs = case.build(F32)
        compare(case, jacobian_rows(case, func, inputs, strategy=mode), F32, what=mode)


@pytest.mark.parametrize("case", MAIN, ids=ids(MAIN))
def test_automatic_strategy_and_bystanders(case):
    """strategy="auto" is right too, and the caller's things are as they were."""
    func, inputs = case.build(F64)
    module = getattr(func, "module", None)
    inputs[0].requires_grad_()
    inputs[0].grad = torch.ones_like(inputs[0])
    copies = [x.detach().clone() for x in inputs]
    flags = [(x.requires_grad, x.is_leaf, x._version) for x in inputs]
    marked = list(module.parameters()) if module is not None else []
    torch.manual_seed(5)
    before = torch.get_rng_state()
    func(*(x.detach().clone().requires_grad_() for x in inputs))
    drawn = torch.get_rng_state()
    if module is not None:
        func, _ = case.build(F64)  # func may have moved running statistics
        module = func.module
        marked = list(module.parameters())
    torch.set_rng_state(before)
    with torch.no_grad():
        rows = jacobian_rows(case, func, inputs)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), drawn), "random numbers beyond func's own"
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    compare(case, rows, F64)
    assert all(not j.requires_grad for row in rows for j in row)
    assert flags == [(x.requires_grad, x.is_leaf, x._version) for x in inputs]
    for x, copy in zip(inputs, copies, strict=True):
        assert_close(x, copy, F64, what="an input")
    assert torch.equal(inputs[0].grad, torch.ones_like(inputs[0]))
    assert all(x.grad is None for x in (*inputs[1:], *marked))


# What networks in half precision are made of.
HALF_NAMES = {
    "MLP", "MLP_relu_wide_output", "Linear_3d", "LayerNorm", "LayerNorm_tokens", "layer_norm_weights",
    "RMSNorm", "GroupNorm", "InstanceNorm1d", "BatchNorm2d_eval", "BatchNorm1d_train", "Conv1d", "Conv2d_pad",
    "ConvTranspose2d", "small_convnet", "AvgPool2d", "MaxPool2d", "softmax", "log_softmax", "tanh", "GELU",
    "GELU_tanh", "SiLU", "Sigmoid", "sdpa", "sdpa_causal", "Block", "TransformerEncoderLayer", "logsumexp_dim1",
    "mean_dim1", "sum_dim1", "var_dim1", "std_dim1", "cumsum", "normalize", "mul_samples_vector", "mm", "bmm",
    "add_3x4_with_4", "cross_entropy", "mse_loss", "gather", "index_rows", "cat", "split_products",
    "embedding", "attention_by_hand", "vector_norm_dim1", "pow_3", "exp", "sqrt", "PReLU", "interpolate_align",
}  # fmt: skip
HALF = [case for case in MAIN if case.name in HALF_NAMES]
assert len(HALF) == len(HALF_NAMES), HALF_NAMES - {case.name for case in HALF}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("case", HALF, ids=ids(HALF))
def test_half_precision(case, dtype):
    """As near to the float64 truth, at the same rounded point, as torch's own Jacobian in that dtype."""
    exact = reference(*case.build(F64, rounded=dtype))
    theirs = reference(*case.build(dtype))
    for mode in ("auto", *MODES):
        rows = jacobian_rows(case, *case.build(dtype), strategy=mode)
        for ours, peers, truths in zip(rows, theirs, exact, strict=True):
            for j, peer, t in zip(ours, peers, truths, strict=True):
                assert j.dtype == peer.dtype
                assert_as_good(j, peer, t, dtype, what=mode)


STRIDED = [case for case in MAIN if case.strided and any(x.shape for x in case.inputs)]


@pytest.mark.parametrize("case", STRIDED, ids=ids(STRIDED))
def test_non_contiguous_inputs(case):
    for mode in MODES:
        func, inputs = case.build(F64, strided=True)
        compare(case, jacobian_rows(case, func, inputs, strategy=mode), F64, what=mode)


SEVERAL = [case for case in MAIN if len(case.inputs) > 1]


@pytest.mark.parametrize("case", SEVERAL, ids=ids(SEVERAL))
def test_one_input_alone(case):
    """With the other inputs constant, the graph holds other nodes, edges and saved tensors."""
    for k in range(len(case.inputs)):
        for mode in MODES:
            func, inputs = case.build(F64)

            def alone(x, func=func, inputs=inputs, k=k):
                return func(*inputs[:k], x, *inputs[k + 1 :])

            rows = jacobian_rows(case, alone, (inputs[k],), strategy=mode)
            compare(case, rows, F64, tuple((row[k],) for row in truth(case)), f"{mode}, input {k}")


MODULES = [case for case in MAIN if case.module is not None]


@pytest.mark.parametrize("case", MODULES, ids=ids(MODULES))
def test_frozen_parameters(case):
    for mode in MODES:
        func, inputs = case.build(F64, frozen=True)
        compare(case, jacobian_rows(case, func, inputs, strategy=mode), F64, what=mode)


BATCHED = [case for case in ALL if case.samples is not None]


def per_sample_truth(case):
    """The blocks on the diagonal of samples; the others are proven to be zero first."""
    rows = []
    for row in truth(case):
        blocks = []
        for k in case.samples:
            full = row[k]
            n, inner = case.inputs[k].shape[0], case.inputs[k].shape[1:]
            outer = full.shape[1 : full.ndim - 1 - len(inner)]
            grid = full.reshape(n, outer.numel(), n, torch.Size(inner).numel())
            mixed = grid.clone()
            mixed.diagonal(dim1=0, dim2=2).zero_()
            assert not mixed.any(), f"{case.name} mixes samples"
            diagonal = grid.diagonal(dim1=0, dim2=2).movedim(-1, 0)
            blocks.append(diagonal.reshape(n, *outer, *inner))
        rows.append(tuple(blocks))
    return tuple(rows)


@pytest.mark.parametrize("case", BATCHED, ids=ids(BATCHED))
def test_per_sample(case):
    expected = per_sample_truth(case)
    for mode, dtype in [("auto", F64), ("auto", F32), ("forward-mode", F64), ("reverse-mode", F64)]:
        func, inputs = case.build(dtype)

        def batched(*xs, func=func, inputs=inputs):
            full = list(inputs)
            for k, x in zip(case.samples, xs, strict=True):
                full[k] = x
            return func(*full)

        chosen = tuple(inputs[k] for k in case.samples)
        rows = jacobian_rows(case, batched, chosen, strategy=mode, per_sample=True)
        compare(case, rows, dtype, expected, mode)


@pytest.mark.parametrize("case", BATCHED, ids=ids(BATCHED))
def test_samples_in_ranges_under_a_memory_limit(case):
    """From the smallest limit that is enough: samples and seeds come in parts, with the same result."""
    expected = per_sample_truth(case)
    func, inputs = case.build(F64)

    def batched(*xs):
        full = list(inputs)
        for k, x in zip(case.samples, xs, strict=True):
            full[k] = x
        return func(*full)

    chosen = tuple(inputs[k] for k in case.samples)
    answer = sum(t.nbytes for row in expected for t in row)
    enough = 0
    for limit in (answer + 100 * 2**k for k in range(14)):
        for mode in MODES:
            try:
                rows = jacobian_rows(
                    case, batched, chosen, strategy=mode, per_sample=True, memory_limit=limit
                )
            except ValueError as refusal:
                assert "memory_limit" in str(refusal)  # noqa: PT017 (small limits may be refused)
                continue
            compare(case, rows, F64, expected, f"{mode} in {limit} bytes")
            enough += 1
        if enough > 1:
            return
    assert enough, "no limit up to 800 kB was enough"


def runs(case, batch):
    """Whether a case can take this many samples: some have their batch size written in."""
    func, inputs = case.build(F64, batch=batch)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            outputs = as_tuple(func(*inputs))
    except (RuntimeError, ValueError, IndexError, UserWarning):
        return False
    return all(y.shape[:1] == (batch,) for y in outputs)


RESIZED = [
    (case, n)
    for case in BATCHED
    if not case.variant
    for n in (0, 1)[not case.empty :]
    if runs(case, n)
]


@pytest.mark.parametrize("case, batch", RESIZED, ids=[f"{c.name}-{n}" for c, n in RESIZED])
def test_one_sample_and_none(case, batch):
    func, inputs = case.build(F64, batch=batch)
    expected = reference(func, inputs)
    for mode in ("auto", *MODES):
        compare(case, jacobian_rows(case, func, inputs, strategy=mode), F64, expected, mode)

    def batched(*xs):
        full = list(inputs)
        for k, x in zip(case.samples, xs, strict=True):
            full[k] = x
        return func(*full)

    chosen = tuple(inputs[k] for k in case.samples)
    rows = jacobian_rows(case, batched, chosen, per_sample=True)
    for ours, row, y in zip(rows, expected, as_tuple(func(*inputs)), strict=True):
        blocks = tuple(
            row[k].squeeze(y.ndim) if batch else row[k][:, ..., :0] for k in case.samples
        )
        shapes = [(*y.shape, *x.shape[1:]) for x in chosen]
        blocks = tuple(b.reshape(s) for b, s in zip(blocks, shapes, strict=True))
        compare(case, (ours,), F64, (blocks,), f"{batch} samples")


def test_most_cases_take_any_number_of_samples():
    assert len(RESIZED) > 0.8 * 2 * len([case for case in BATCHED if not case.variant])


MIXING = [case for case in ALL if case.mixes is not None]


@pytest.mark.parametrize("case", MIXING, ids=ids(MIXING))
def test_per_sample_refuses_to_mix(case):
    for mode in ("auto", *MODES):
        func, inputs = case.build(F64)
        with pytest.raises(RuntimeError, match=r"(?i)samples") as caught:
            jactri.jacobian(func, inputs, strategy=mode, per_sample=True)
        assert not isinstance(caught.value, NotImplementedError), mode


TWICE = [case for case in MAIN if case.second]


@cache
def weights_of(case):
    generator = torch.Generator().manual_seed(3)
    return tuple(
        tuple(torch.randn(j.shape, generator=generator, dtype=F64) for j in row)
        for row in truth(case)
    )


def gradients_of_combination(case, take, twin):
    """A Jacobian by `take`, and the gradients of a fixed random combination of its entries."""
    func, inputs = case.build(F64, twin=twin)
    for x in inputs:
        x.requires_grad_()
    rows = take(func, inputs)
    total = sum(
        (j.to(F64) * w).sum()
        for row, ws in zip(rows, weights_of(case), strict=True)
        for j, w in zip(row, ws, strict=True)
    )
    wanted = inputs
    if getattr(func, "module", None) is not None:
        wanted = (*inputs, *func.module.parameters())
    if not total.requires_grad:
        return rows, tuple(torch.zeros_like(x) for x in wanted)
    return rows, torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("case", TWICE, ids=ids(TWICE))
def test_create_graph(case):
    rows, grads = gradients_of_combination(
        case, lambda f, xs: reference(f, xs, create_graph=True), twin=True
    )
    rows = tuple(tuple(j.detach() for j in row) for row in rows)
    length = length_of(*(t for row in rows for t in row))
    largest = max((t.abs().max().item() for row in rows for t in row if t.numel()), default=0.0)
    for mode in MODES:
        ours, our_grads = gradients_of_combination(
            case,
            lambda f, xs, m=mode: jacobian_rows(case, f, xs, create_graph=True, strategy=m),
            twin=False,
        )
        compare(case, ours, F64, rows, mode)
        assert_gradients_close(
            our_grads,
            grads,
            F64 if case.inner is None else case.inner,
            length=length,
            factor=case.factor,
            floor=largest,
            what=f"{mode}, gradient",
        )


SPECIAL = [case for case in ALL if case.special]


@pytest.mark.parametrize("case", SPECIAL, ids=ids(SPECIAL))
def test_special_values(case):
    """One value at a time, so that a NaN stays where it is; ours equals autograd's in the same dtype."""
    for dtype in (F64, F32):
        func, _ = case.build(dtype)
        for value in case.special:
            x = torch.tensor([[value]], dtype=dtype)
            expected = reference(func, (x,))
            for mode in MODES:
                rows = jacobian_rows(case, func, (x,), strategy=mode)
                compare(case, rows, dtype, expected, f"{mode} at {value}, {dtype}")


@cache
def nodes_of_table():
    produced = {}
    for case in ALL:
        names = produced[case.name] = set()
        for dtype in (F64, F32):  # an LSTM is one node in float32 and a graph in float64
            func, inputs = case.build(dtype)
            for x in inputs:
                x.requires_grad_()
            names |= graph_nodes(func(*inputs), inputs)
    return produced


@pytest.mark.clean_memory
def test_cases_produce_the_nodes_they_are_for():
    produced = nodes_of_table()
    absent = {
        case.name: sorted(missing)
        for case in ALL
        if (missing := case.nodes - {op_of(name) for name in produced[case.name]})
    }
    assert not absent


# Nodes that other devices record for ops of this table: their rules run when the table runs there.
ELSEWHERE = {
    "CudnnBatchNormBackward0",
    "FusedRmsNormBackward0",
    "MiopenBatchNormBackward0",
    "ScaledDotProductCudnnAttentionBackward0",
    "ScaledDotProductEfficientAttentionBackward0",
    "ScaledDotProductFlashAttentionBackward0",
    "ScaledDotProductFusedAttentionOverrideableBackward0",
    # in test_elsewhere.py, in a process of its own
    "torch.distributed.fsdp._fully_shard._fsdp_param_group::RegisterPostBackwardFunction",
    "torch.distributed.tensor._api::_FromTorchTensor", "torch.distributed.tensor._api::_ToTorchTensor",
    "torch.nn.parallel.distributed::_DDPSink",
    "CutBackward",  # in test_ops_streamed.py
    # in test_graph_features.py: torch's own is not its derivative
    "AsStridedScatterBackward0",
    # in test_sparse_constants.py
    "CoalesceBackward0", "SparseAddmmBackward0", "SparseCompressedTensorBackward0",
    "SparseCooTensorWithDimsAndTensorsBackward0", "SparseLogSoftmaxBackward0", "SparseMaskBackward0",
    "SparseSampledAddmmBackward0", "SparseSoftmaxBackward0", "SparseSparseMatmulBackward0", "SparseSumBackward0",
    "ToDenseBackward0", "ToSparseBackward0", "ToSparseBackward1", "ToSparseBscBackward0", "ToSparseBsrBackward0",
    "ToSparseCscBackward0", "ToSparseCsrBackward0", "ValuesBackward0",
}  # fmt: skip


@cache
def nodes_with_rules():
    """By their names, those of Functions too."""
    return {
        k if isinstance(k, str) else f"{k.__name__}Backward"
        for k, record in jactri._src.rules.REGISTRY.items()
        if record.read is not None or record.complex is not None
    }


@pytest.mark.clean_memory
def test_every_rule_has_a_case():
    produced = set().union(*nodes_of_table().values())
    known = nodes_with_rules()
    assert known >= ELSEWHERE
    later = {op for case in LATER for op in case.nodes}
    missing = {name for name in known - produced - ELSEWHERE if op_of(name) not in later}
    assert not missing, f"rules that no case in tests/cases runs: {sorted(missing)}"


def test_the_registry_holds_the_ops_of_the_common_networks():
    """Falling back on these would be right, and slow: they are what jactri is for."""
    common = {
        "AddmmBackward0", "MmBackward0", "BmmBackward0", "ConvolutionBackward0", "TanhBackward0",
        "ReluBackward0", "SiluBackward0", "GeluBackward0", "SigmoidBackward0", "SoftmaxBackward0",
        "NativeLayerNormBackward0", "AddBackward0", "MulBackward0", "ViewBackward0", "SumBackward1",
        "CatBackward0", "SliceBackward0", "SelectBackward0", "IndexBackward0", "MeanBackward1",
        "MaxPool2DWithIndicesBackward0", "NativeBatchNormBackward0", "NativeGroupNormBackward0",
        "ScaledDotProductFlashAttentionForCpuBackward0", "LogSoftmaxBackward0", "PowBackward0",
    }  # fmt: skip
    assert not common - set(jactri._src.rules.REGISTRY)

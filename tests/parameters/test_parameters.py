"""`parameter_jacobian` and `ggn` against a backward pass for every entry of the output."""

import pytest
import torch
from parameter_cases import CASES, F64, build, flat, like, rows, truth_of, whole
from tolerances import assert_close, assert_gradients_close
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import jactri


def largest(truth):
    """The scale of rounding errors: entries of one parameter may all cancel."""
    return max(t.abs().max().item() for t in truth.values())


def jacobian(name, n=4, dtype=F64, **options):
    module, x = build(name, n, dtype)
    return module, x, jactri.parameter_jacobian(module, x, **options)


@pytest.mark.parametrize("n", [4, 1])
@pytest.mark.parametrize("name", CASES)
def test_dense(name, n):
    module, x, jac = jacobian(name, n)
    truth, dense = rows(module, x), jac.dense()
    assert list(dense) == list(truth) == list(jac.names)
    assert_close(jac.output, module(x), F64, what="output")
    for key, want in truth.items():
        assert_close(dense[key], want, F64, what=key, scale=largest(truth))
    matrix = jac.matrix()
    assert matrix.shape == (*jac.output.shape, sum(p.numel() for p in module.parameters()))
    assert_close(matrix, flat(truth, jac.output.dim()), F64, scale=largest(truth))
    for (key, t), want in zip(jac.split(matrix).items(), truth.items(), strict=True):
        assert key == want[0] and t.shape == want[1].shape
        assert torch.equal(t, dense[key]) or jac._run.by_autograd


def test_matrix_and_split():
    """Steps and blocks of them; parameters of several dtypes; with a graph."""
    module, x, jac = jacobian("odd")
    matrix = jac.matrix()
    step = torch.randn(2, matrix.shape[-1], dtype=F64)
    parts = jac.split(step)
    assert parts["shift"].shape == (2,) and parts["shift"]._base is not None  # a view
    assert_close(jac @ parts, torch.einsum("n...p,kp->kn...", matrix, step), F64, length=1000)
    assert_close(flat(jac.split(step[0])), step[0], F64)
    graphed = jactri.parameter_jacobian(module, x, create_graph=True).matrix()
    assert graphed.requires_grad
    assert_close(graphed, matrix, F64)
    module = nn.Sequential(nn.Linear(3, 2).double(), Narrow(nn.Linear(2, 2)))
    x = x[:, :3]
    jac = jactri.parameter_jacobian(module, x)
    matrix = jac.matrix()
    assert matrix.dtype == F64
    for (key, t), want in zip(jac.split(matrix).items(), jac.dense().items(), strict=True):
        assert key == want[0] and t.dtype == want[1].dtype and torch.equal(t, want[1])
    for wrong, error in ((matrix[..., 1:], RuntimeError), (torch.tensor(1.0), RuntimeError)):
        with pytest.raises(error, match="must have the 14 entries of all parameters"):
            jac.split(wrong)
    with pytest.raises(TypeError, match="matrix must be a Tensor"):
        jac.split([1.0] * 14)


class Narrow(nn.Module):
    """A layer in its own dtype."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.float()).double()


def of_func(module, x):
    """The Jacobian ``(N, *out, P)`` by torch.func."""
    params = {name: p.detach() for name, p in module.named_parameters()}
    made = torch.func.jacrev(lambda v: torch.func.functional_call(module, v, (x,)))(params)
    y = module(x)
    return torch.cat([t.reshape(*y.shape, -1) for t in made.values()], -1)


@pytest.mark.parametrize("name", ["mlp", "tokens", "cnn", "shared", "norms", "complex"])
def test_gram_with_another(name):
    """Of other samples, and of another module with parameters of the same names and shapes."""
    module, x = build(name)
    other, _ = build(name)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1 * torch.randn_like(p))
    J, j = jactri.parameter_jacobian(module, x), of_func(module, x)
    for right, samples in ((module, x[1:]), (other, x)):
        K, k = jactri.parameter_jacobian(right, samples), of_func(right, samples)
        want = torch.tensordot(j, k, [[-1], [-1]])
        assert_close(J.gram(K), want, F64, length=j.shape[-1])
        turned = torch.tensordot(k, j, [[-1], [-1]])
        assert_close(K.gram(J), turned, F64, length=j.shape[-1])


def test_gram_with_another_output_and_what_is_refused():
    body, x = build("mlp")
    heads = [nn.Sequential(body, nn.Linear(3, k).double()) for k in (1, 5)]
    names = [name for name, _ in heads[0].named_parameters() if name.startswith("0.")]
    J, K = (jactri.parameter_jacobian(net, x, names) for net in heads)
    sizes = sum(p.numel() for p in body.parameters())
    want = torch.tensordot(
        of_func(heads[0], x)[..., :sizes], of_func(heads[1], x)[..., :sizes], [[-1], [-1]]
    )
    assert_close(J.gram(K), want, F64, length=sizes)
    with pytest.raises(TypeError, match="other must be a ParameterJacobian"):
        J.gram(want)
    with pytest.raises(ValueError, match="other must have the names of this Jacobian"):
        J.gram(jactri.parameter_jacobian(heads[0], x))
    whole_j, whole_k = (jactri.parameter_jacobian(net, x) for net in heads)
    with pytest.raises(ValueError, match=r"'1\.weight' of other .*\(1, 3\).*\(5, 3\)"):
        whole_j.gram(whole_k)


@pytest.mark.parametrize("n", [4, 1])
@pytest.mark.parametrize("name", CASES)
def test_products(name, n):
    module, _, jac = jacobian(name, n)
    truth, _ = truth_of(name, n)
    length = truth.numel()
    v, u = like(module), torch.randn(2, *jac.output.shape, dtype=F64)
    want = (truth @ flat(v)).reshape(jac.output.shape)
    assert_close(jac @ v, want, F64, length=length, what="J v")
    block = {k: torch.stack([t, 2 * t, -t]) for k, t in v.items()}
    assert_close(
        jac @ block, torch.stack([want, 2 * want, -want]), F64, length=length, what="J block"
    )
    back = torch.einsum("nmp,knm->kp", truth, u.reshape(2, n, -1))
    assert_close(flat(jac.T @ u, 1), back, F64, length=length, what="J^T block")
    one = jac.T @ u[0]
    assert list(one) == list(jac.names)
    assert_close(flat(one), back[0], F64, length=length, what="J^T u")
    assert jac.T.T is jac


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("name", CASES)
def test_gram_and_variance(name, chunk_size):
    module, _, jac = jacobian(name, chunk_size=chunk_size)
    truth, _ = truth_of(name)
    n, m, p = truth.shape
    shape = tuple(jac.output.shape)
    rows_ = truth.reshape(n * m, p)
    assert_close(jac.gram(), (rows_ @ rows_.t()).reshape(*shape, *shape), F64, length=p)
    v = like(module, positive=True)
    want = (truth * flat(v)) @ truth.mT
    assert_close(jac.variance(v), want.reshape(*shape, *shape[1:]), F64, length=p, what="variance")
    of_each = want.diagonal(0, 1, 2).reshape(shape)
    assert_close(jac.variance(v, diagonal=True), of_each, F64, length=p, what="variances")


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("form", ["diagonal", "dense", "function"])
@pytest.mark.parametrize("name", CASES)
def test_ggn(name, form, chunk_size):
    module, x = build(name)
    truth, _ = truth_of(name)
    n, m, p = truth.shape
    shape = tuple(module(x).shape)
    h = torch.randn(n, m, m, dtype=F64)
    h = h + h.mT
    if form == "diagonal":
        h = torch.diag_embed(h.diagonal(0, 1, 2))
        given = h.diagonal(0, 1, 2).reshape(shape)
    elif form == "dense":
        given = h.reshape(*shape, *shape[1:])
    else:

        def given(block):
            return torch.einsum("nij,knj->kni", h, block.reshape(-1, n, m)).reshape(block.shape)

    operator = jactri.ggn(module, x, given, chunk_size=chunk_size)
    v = like(module)
    # the sum may cancel: its terms are the scale
    terms = torch.einsum("nip,nij,njp->p", truth.abs(), h.abs(), truth.abs())
    scale = terms.max().item() * p
    want = torch.einsum("nip,nij,njq,q->p", truth, h, truth, flat(v))
    assert_close(flat(operator @ v), want, F64, length=n * m * m, scale=scale)
    block = {k: torch.stack([t, 3 * t]) for k, t in v.items()}
    both = torch.stack([want, 3 * want])
    assert_close(flat(operator @ block, 1), both, F64, length=n * m * m, scale=3 * scale)
    diagonal = torch.einsum("nip,nij,njp->p", truth, h, truth)
    made = operator.diagonal()
    assert list(made) == list(operator.names)
    assert_close(flat(made), diagonal, F64, length=n * m * m, scale=terms.max().item())


@pytest.mark.parametrize("name", ["mlp", "cnn", "language tied", "odd", "gru", "lstm"])
def test_float32(name):
    _, _, jac = jacobian(name, dtype=torch.float32)
    dense, gram = jac.dense(), jac.gram()
    truth, by_name = truth_of(name)
    n, m, p = truth.shape
    for key, want in by_name.items():
        assert dense[key].dtype == torch.float32
        assert_close(dense[key], want, torch.float32, length=64, what=key)
    want = (truth.reshape(n * m, p) @ truth.reshape(n * m, p).t()).reshape(gram.shape)
    assert_close(gram, want, torch.float32, length=64 * p, what="gram")


@pytest.mark.parametrize("name", ["mlp", "cnn", "language"])
def test_empty_batch(name):
    module, x = build(name)
    x = x[:0]
    jac = jactri.parameter_jacobian(module, x)
    out = tuple(module(x).shape[1:])
    assert jac.output.shape == (0, *out)
    for key, j in jac.dense().items():
        assert j.shape == (0, *out, *module.get_parameter(key).shape)
    assert jac.gram().shape == (0, *out, 0, *out)
    assert jac.variance(like(module)).shape == (0, *out, *out)
    assert jac.variance(like(module), diagonal=True).shape == (0, *out)
    assert jac.matrix().shape == (0, *out, sum(p.numel() for p in module.parameters()))
    graphed = jactri.parameter_jacobian(module, x, create_graph=True).matrix()
    assert graphed.shape == jac.matrix().shape
    assert (jac @ like(module)).shape == (0, *out)
    back = jac.T @ torch.zeros(0, *out, dtype=F64)
    assert all(t.shape == module.get_parameter(k).shape and not t.any() for k, t in back.items())
    diagonal = jactri.ggn(module, x, torch.zeros(0, *out, dtype=F64)).diagonal()
    assert all(not t.any() for t in diagonal.values())


def test_out():
    for name in ("mlp", "cnn", "language tied", "shared", "weight norm", "a number a sample"):
        module, x, jac = jacobian(name)
        truth = rows(module, x)
        out = {k: torch.full_like(t, torch.nan) for k, t in truth.items()}
        assert all(a is b for a, b in zip(jac.dense(out=out).values(), out.values(), strict=True))
        apart = {
            k: torch.full((2, *t.shape, 2), torch.nan, dtype=F64)[1, ..., 0] for k, t in out.items()
        }
        jac.dense(out=apart)  # in memory with gaps
        for key, want in truth.items():
            assert_close(out[key], want, F64, what=key, scale=largest(truth))
            assert_close(apart[key], want, F64, what=key, scale=largest(truth))


@pytest.mark.parametrize("name", ["mlp", "cnn", "language tied", "odd", "gru", "shared", "norms"])
def test_create_graph(name):
    with sdpa_kernel(SDPBackend.MATH):  # torch has no second derivative of the fused one
        second_derivatives(name)


def second_derivatives(name):
    """Gradients of every result, in parameters and inputs, against those of the truth built with a graph."""
    module, x = build(name, 2)
    params = list(module.parameters())
    ends = [*params]
    if x.is_floating_point():
        x.requires_grad_()
        ends.append(x)
    y = module(x)
    n, m = 2, y[0].numel()
    truth = []
    for entry in y.reshape(-1):
        grads = torch.autograd.grad(entry, params, create_graph=True, allow_unused=True)
        truth.append(
            torch.cat(
                [(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(grads, params, strict=True)]
            )
        )  # fmt: skip
    truth = torch.stack(truth).reshape(n, m, -1)
    jac = jactri.parameter_jacobian(module, x, create_graph=True)
    assert jac.output.requires_grad
    v, w = like(module), like(module, 2, positive=True)
    flat_j = torch.cat([j.reshape(n, m, -1) for j in jac.dense().values()], 2)
    full = truth.reshape(n * m, -1)
    pairs = [
        (flat_j, truth),
        (jac.gram().reshape(n * m, -1), full @ full.t()),
        (jac @ v, (truth @ flat(v)).reshape(y.shape)),
        (flat(jac.T @ y), y.reshape(-1) @ full),
        (jac.variance(w).reshape(n, m, m), (truth * flat(w)) @ truth.mT),
        (
            flat(jactri.ggn(module, x, torch.ones_like(y), create_graph=True).diagonal()),
            truth.square().sum((0, 1)),
        ),
    ]
    for k, (ours, theirs) in enumerate(pairs):
        c = torch.randn(ours.shape, dtype=F64)
        floor = float((theirs.detach().abs() * c.abs()).sum())
        got, want = (
            torch.autograd.grad((t * c).sum(), ends, retain_graph=True, allow_unused=True)
            for t in (ours, theirs)
        )
        assert_gradients_close(
            got, want, F64, length=full.numel(), floor=floor, factor=8, what=f"{name}, result {k}"
        )


def test_nothing_of_the_callers_is_modified():
    module, x = build("cnn")
    x.requires_grad_()
    before = {k: t.clone() for k, t in module.state_dict().items()}
    jac = jactri.parameter_jacobian(module, x)
    jac.dense(), jac.gram(), jac @ like(module), jac.T @ jac.output
    assert not jac.output.requires_grad
    for key, t in module.state_dict().items():
        assert torch.equal(t, before[key])
    assert x.grad is None and all(p.grad is None and p.requires_grad for p in module.parameters())
    assert not module.training


def test_training_mode_keeps_buffers():
    """The power iteration of a spectral norm and the statistics of BatchNorm are those from before the call."""
    module, x = build("spectral norm")
    module.train()
    before = {k: t.clone() for k, t in module.state_dict().items()}
    jactri.parameter_jacobian(module, x).dense()
    for key, t in module.state_dict().items():
        assert torch.equal(t, before[key]), key
    module, x = build("cnn")
    module.train()
    before = {k: t.clone() for k, t in module.state_dict().items()}
    with pytest.raises(
        RuntimeError, match=r"samples mix: the op NativeBatchNormBackward0 .*eval\(\)"
    ):
        jactri.parameter_jacobian(module, x)
    for key, t in module.state_dict().items():
        assert torch.equal(t, before[key]), key
    assert module.training


def test_some_parameters():
    module, x = build("mlp")
    truth = rows(module, x)
    for params in ("2.weight", ["2.weight"], [module[2].weight], module[2].weight):
        jac = jactri.parameter_jacobian(module, x, params)
        assert jac.names == ("2.weight",)
        assert_close(jac.dense()["2.weight"], truth["2.weight"], F64)
    module[0].requires_grad_(False)
    jac = jactri.parameter_jacobian(module, x)
    assert jac.names == ("2.weight", "2.bias", "4.weight", "4.bias")
    with pytest.raises(RuntimeError, match=r"'0\.weight' is frozen"):
        jactri.parameter_jacobian(module, x, ["0.weight"])


def test_a_shared_parameter_by_either_name():
    module, x = build("language tied")
    truth = rows(module, x)["words.weight"]
    for name in ("words.weight", "last.weight"):
        jac = jactri.parameter_jacobian(module, x, name)
        assert jac.names == (name,)
        assert_close(jac.dense()[name], truth, F64)
    with pytest.raises(ValueError, match="given twice"):
        jactri.parameter_jacobian(module, x, ["words.weight", "last.weight"])


def test_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.last = nn.Embedding(5, 3), nn.Linear(3, 2)

        def forward(self, i, x):
            return self.last(self.words(i) * x)

    class Loose(Two):
        def forward(self, i, x):
            return super().forward(i, x.sum(0, keepdim=True))

    module = Two().double()
    i, x = torch.tensor([1, 4, 4]), torch.randn(3, 3, dtype=F64)
    dense = jactri.parameter_jacobian(module, (i, x)).dense()

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.two = module

        def forward(self, x):
            return self.two(i, x)

    for key, want in rows(One(), x).items():
        assert_close(dense[key.removeprefix("two.")], want, F64, what=key)
    with pytest.raises(ValueError, match=r"x\[1\] has 2 samples"):
        jactri.parameter_jacobian(Loose().double(), (i, x[:2]))


@pytest.mark.parametrize("limit", ["90KB", "200KB", "20MB"])
def test_memory_limit(limit):
    """The same results in chunks of the output and ranges of parameters."""
    module, x = build("cnn")
    truth, by_name = whole(module, x)
    n, m, p = truth.shape
    jac = jactri.parameter_jacobian(module, x, memory_limit=limit)
    for key, j in jac.dense().items():
        assert_close(j, by_name[key], F64, what=key)
    full = truth.reshape(n * m, p)
    assert_close(jac.gram(), (full @ full.t()).reshape(n, m, n, m), F64, length=p)
    v = like(module, positive=True)
    assert_close(jac.variance(v), (truth * flat(v)) @ truth.mT, F64, length=p)
    made = jactri.ggn(module, x, torch.ones(n, m, dtype=F64), memory_limit=limit).diagonal()
    assert_close(flat(made), truth.square().sum((0, 1)), F64, length=n * m)


def test_repr_tells_the_factors():
    _, _, jac = jacobian("language")
    text = repr(jac)
    assert "15 parameters with 240 entries" in text
    assert "words.weight" in text and "cotangent at rows" in text
    assert "cotangent x activation" in text
    _, _, jac = jacobian("weight norm")
    assert "formed" in repr(jac)
    _, _, jac = jacobian("shared")
    assert "2 times cotangent x activation" in repr(jac) and "not used" in repr(jac)
    _, _, jac = jacobian("complex")
    assert repr(jac).startswith(
        "ParameterJacobian(output (4, 3) torch.float64 on cpu, 2 parameters"
    )


def test_inference_mode_and_compiled_modules():
    module, x = build("mlp")
    truth = rows(module, x)
    with torch.inference_mode():
        dense = jactri.parameter_jacobian(module, x.clone()).dense()
    compiled = jactri.parameter_jacobian(torch.compile(module, backend="eager"), x).dense()
    for key, want in truth.items():
        assert_close(compiled["_orig_mod." + key], want, F64, what=key, scale=largest(truth))
        assert_close(dense[key], want, F64, what=key, scale=largest(truth))


def test_strided_inputs():
    module, _ = build("cnn")
    x = torch.randn(4, 8, 16, 2, dtype=F64).permute(0, 3, 1, 2)[..., ::2]
    truth, dense = rows(module, x), jactri.parameter_jacobian(module, x).dense()
    for key, want in truth.items():
        assert_close(dense[key], want, F64, what=key, scale=largest(truth))


def test_autocast():
    """The layers run in bfloat16, what is made of them in what they gave; results have the parameters' dtype."""
    module, x = build("mlp", dtype=torch.float32)
    truth = rows(*build("mlp"))
    v = like(module, positive=True)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        jac = jactri.parameter_jacobian(module, x)
        dense, gram = jac.dense(), jac.gram()
        variance, back = jac.variance(v), jac.T @ jac.output
    assert jac.output.dtype == torch.bfloat16
    for key, want in truth.items():
        assert dense[key].dtype == back[key].dtype == torch.float32
        assert_close(dense[key], want, torch.bfloat16, scale=largest(truth), what=key)
    full = torch.cat([t.reshape(12, -1) for t in truth.values()], 1)
    assert_close(gram, (full @ full.t()).reshape(gram.shape), torch.bfloat16, what="gram")
    n = full.reshape(4, 3, -1)
    assert_close(variance, (n * flat(v)) @ n.mT, torch.bfloat16, what="variance")

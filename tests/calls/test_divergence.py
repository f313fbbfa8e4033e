"""divergence against the trace of float64 Jacobians, exact and estimated."""

import itertools

import pytest
import torch
from common import F64, Cube, make
from tolerances import assert_close, assert_gradients_close
from torch import nn
from torch.func import jacrev, vmap
from torch.utils.flop_counter import FlopCounterMode

import jactri
from jactri._src.base import weights
from jactri._src.calls import divergence as calls
from jactri._src.meet.trace import ways
from jactri._src.prologue.arguments import Options
from jactri._src.read.reading import read

pytestmark = pytest.mark.usefixtures("one_thread")


def mlp(*sizes, act=nn.Tanh):
    layers = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1])


class InTime(nn.Module):
    """A field in x and time, as flows have it: one column more."""

    def __init__(self, first=True):
        super().__init__()
        self.net, self.first = mlp(5, 7, 6, 4), first

    def forward(self, x):
        t = torch.linspace(0, 1, len(x), dtype=x.dtype).unsqueeze(1)
        return self.net(torch.cat([x, t] if self.first else [t, x], 1))


class Residual(nn.Module):
    def __init__(self, *sizes, scale=0.3):
        super().__init__()
        self.net, self.scale = mlp(*sizes), scale

    def forward(self, x):
        return x + self.scale * self.net(x)


class Mixer(nn.Module):
    """A residual stream with a norm and attention over features."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x):
        h = torch.tanh(self.a(x)) + x
        return x + self.b(torch.softmax(self.norm(h), 1)) * torch.sigmoid(x)


FIELDS = {
    # name: (module, whether it has a closed form)
    "linear": (lambda: mlp(4, 4), True),
    "two_linear": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4)), True),
    "one_hidden": (lambda: mlp(4, 9, 4), True),
    "two_hidden": (lambda: mlp(4, 9, 7, 4), True),
    "three_hidden": (lambda: mlp(4, 9, 8, 7, 4), False),
    "five_hidden": (lambda: mlp(4, 6, 5, 6, 5, 6, 4, act=nn.SiLU), False),
    "activated_at_the_end": (lambda: nn.Sequential(mlp(4, 9, 4), nn.Sigmoid()), True),
    "activated_at_the_start": (lambda: nn.Sequential(nn.Tanh(), mlp(4, 9, 4)), True),
    "activated_twice": (lambda: nn.Sequential(nn.Tanh(), nn.Linear(4, 4), nn.Sigmoid()), True),
    "activations": (lambda: nn.Sequential(nn.Tanh(), nn.SiLU()), True),
    "residual": (lambda: Residual(4, 8, 6, 4), True),
    "residual_deep": (lambda: Residual(4, 8, 6, 5, 4), False),
    "time": (InTime, True),
    "time_before": (lambda: InTime(False), True),
    "mixer": (Mixer, False),
    "stacked_residuals": (lambda: nn.Sequential(Residual(4, 5, 4), Residual(4, 6, 4)), False),
    "eval_batch_norm": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4)).eval(),
        True,
    ),
}  # fmt: skip

FUNCTIONS = {
    "identity": (lambda x: x, True),
    "scaled": (lambda x: -2 * x + 1, True),
    "elementwise": (lambda x: torch.sin(x) * x**2, True),
    "constant": (lambda x: torch.ones_like(x), None),
    "detached": (lambda x: x.detach() * 2, None),
    "rotation": (lambda x: torch.stack([x[:, 1], -x[:, 0], x[:, 3], -x[:, 2]], 1), None),
    "flipped": (lambda x: torch.sin(x.flip(1)), None),
    "softmax": (lambda x: torch.softmax(x, 1), None),
    "halves": (lambda x: torch.cat([x[:, 2:] * 2, torch.exp(x[:, :2]) * x[:, 2:]], 1), None),
    "python": (lambda x: Cube.apply(x) * x[:, :1], None),
    "complex": (lambda x: torch.fft.ifft(torch.fft.fft(x) * 2).real * x, None),
}


@pytest.fixture(params=[*FIELDS, *FUNCTIONS])
def case(request):
    torch.manual_seed(1)
    x = torch.randn(6, 4, dtype=F64)
    if request.param in FIELDS:
        module, closed = FIELDS[request.param]
        return make(module), x, closed
    f, closed = FUNCTIONS[request.param]
    return f, x, closed


def truth(f, x):
    """The blocks of torch's whole Jacobian."""
    whole = torch.autograd.functional.jacobian(f, x)
    n = x[0].numel() if x.dim() > 1 else x.numel()
    rows = len(x) if x.dim() > 1 else 1
    blocks = whole.reshape(rows, n, rows, n).diagonal(0, 0, 2)
    return blocks.diagonal(0, 0, 1).sum(-1).reshape(x.shape[:1] if x.dim() > 1 else ())


def scale_of(f, x):
    return max(1.0, torch.autograd.functional.jacobian(f, x).abs().max().item())


def test_exact(case):
    f, x, closed = case
    for create_graph in (False, True):
        y, got = jactri.divergence(f, x, create_graph, return_lower=True)
        assert_close(got, truth(f, x), F64, length=400, scale=scale_of(f, x))
        assert_close(y, f(x), F64)
        assert create_graph or not (y.requires_grad or got.requires_grad)
    if closed is not None:
        leaf = x.clone().requires_grad_()
        assert ways(read([f(leaf)], [leaf]), True).closed == closed


BATCHES_ONLY = {
    "time",
    "time_before",
    "mixer",
    "eval_batch_norm",
    "rotation",
    "flipped",
    "softmax",
    "halves",
    "python",
}
"""What reads the axis of samples, or that behind it."""


@pytest.mark.parametrize(
    "case", [k for k in (*FIELDS, *FUNCTIONS) if k not in BATCHES_ONLY], indirect=True
)
def test_a_point(case):
    f, x, _ = case
    point = x[1]
    got = jactri.divergence(f, point)
    assert got.shape == ()
    assert_close(got, truth(f, point), F64, length=400, scale=scale_of(f, point))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_sizes_and_dtypes(n, dtype):
    for name in ("two_hidden", "three_hidden", "residual", "mixer"):
        torch.manual_seed(1)
        net, x = make(FIELDS[name][0]), torch.randn(n, 4, dtype=F64)
        want = truth(net, x) if n else x.new_zeros(0)
        got = jactri.divergence(net.to(dtype), x.to(dtype))
        assert got.dtype == dtype and got.shape == (n,)
        assert_close(got, want, dtype, length=400, scale=10.0)


@pytest.mark.parametrize("name", sorted(set(FIELDS) - {"eval_batch_norm"}))
def test_third_derivatives(name):
    """The loss of a continuous flow: the gradient of the divergence in the parameters and in x."""
    torch.manual_seed(1)
    net = make(FIELDS[name][0])
    x = torch.randn(3, 4, dtype=F64, requires_grad=True)
    parameters = [x, *net.parameters()]
    y = net(x)
    total = 0
    for i in range(4):
        (g,) = torch.autograd.grad(y[:, i].sum(), x, create_graph=True)
        total = total + g[:, i]
    want = torch.autograd.grad(total.square().sum(), parameters, allow_unused=True)
    got = jactri.divergence(net, x, create_graph=True)
    got = torch.autograd.grad(got.square().sum(), parameters, allow_unused=True)
    assert_gradients_close(got, want, F64, length=2000, floor=1.0)


@pytest.mark.parametrize("options", [
    {"chunk_size": 1}, {"chunk_size": 3}, {"memory_limit": "100KB"}, {"backend": "torch"},
])  # fmt: skip
def test_options(options):
    for name in ("two_hidden", "three_hidden", "mixer"):
        torch.manual_seed(1)
        net, x = make(FIELDS[name][0]), torch.randn(6, 4, dtype=F64)
        assert_close(jactri.divergence(net, x, **options), truth(net, x), F64, length=400)
        torch.manual_seed(2)
        estimate, error = jactri.divergence(net, x, estimate=5, **options)
        torch.manual_seed(2)
        whole = jactri.divergence(net, x, estimate=5)
        assert_close(estimate, whole[0], F64, length=100, scale=10.0)
        assert_close(error, whole[1], F64, length=100, scale=10.0)


def test_images():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 3, padding=1))
    net, x = net.double(), torch.randn(2, 2, 4, 3, dtype=F64)
    assert_close(jactri.divergence(net, x), truth(net, x), F64, length=400, scale=5.0)
    estimate, _ = jactri.divergence(net, x, estimate=2)
    assert estimate.shape == (2,)


# -- what is kept with weights ----------------------------------------------------------------------


def products(net, x):
    """Multiply-adds after the forward pass."""
    leaf = x.clone().requires_grad_()
    y = net(leaf)
    asked = Options(backend="torch", per_sample=True)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        made = calls.of_output(y, leaf, asked)
    return made, counter.get_total_flops() // 2


def test_the_bracket_is_kept_until_a_weight_changes():
    torch.manual_seed(0)
    net, x = mlp(6, 9, 7, 6), torch.randn(5, 6)
    first, last = net[0].weight, net[4].weight
    bracket, each = 7 * 6 * 9, 5 * 9 * 7
    assert products(net, x)[1] == bracket + each
    made, count = products(net, x)
    assert count == each
    for weight in (last, first, net[2].weight):
        weight.data.mul_(1.5)  # behind autograd's back
        made, count = products(net, x)
        assert count == bracket + each
        assert_close(made, truth(net, x), torch.float32, length=100)
    other = mlp(6, 9, 7, 6)
    other.load_state_dict(net.state_dict())
    assert products(other, x)[1] == bracket + each
    assert products(net, torch.randn(3, 6))[1] == 3 * 9 * 7  # whatever the batch
    held = [t for e in weights._all() for made in e.made.values() for t in made[1]]
    assert any(t.shape == (9, 7) for t in held)


@pytest.mark.parametrize(("n", "bracket"), [(1, False), (64, True)])
def test_a_bracket_that_is_not_kept_must_pay(n, bracket):
    """In grad mode: for one sample its two rows cost less than a matrix of hidden by hidden units."""
    torch.manual_seed(0)
    net, x = make(lambda: mlp(2, 300, 200, 2)), torch.randn(n, 2, dtype=F64)
    with FlopCounterMode(display=False) as counter:
        got = jactri.divergence(net, x, True)
    forward = n * (2 * 300 + 300 * 200 + 200 * 2)
    wanted = (2 + n) * 300 * 200 if bracket else n * (2 * 300 * 200 + 2 * 200 * 2)
    assert counter.get_total_flops() // 2 == forward + wanted
    assert_close(got, truth(net, x), F64, length=1000)


def test_weights_that_are_made_anew():
    """Under a parametrization no weight is a leaf: nothing is kept, and the result is right."""
    torch.manual_seed(0)
    net = make(lambda: mlp(4, 5, 4))
    nn.utils.parametrizations.weight_norm(net[0])
    x = torch.randn(3, 4, dtype=F64)
    for _ in range(2):
        assert_close(jactri.divergence(net, x), truth(net, x), F64, length=100)
        with torch.no_grad():
            net[0].parametrizations.weight.original1.mul_(2)


# -- estimates --------------------------------------------------------------------------------------


def test_estimates_are_unbiased():
    torch.manual_seed(0)
    net, x = make(lambda: mlp(4, 6, 5, 4)), torch.randn(3, 4, dtype=F64)
    generator = torch.Generator().manual_seed(7)
    mean, error = jactri.divergence(net, x, estimate=3000, generator=generator)
    assert mean.shape == error.shape == (3,)
    assert ((mean - truth(net, x)).abs() < 4 * error).all()
    again = jactri.divergence(
        net, x, estimate=3000, generator=torch.Generator().manual_seed(7), return_lower=True
    )
    assert len(again) == 3
    assert torch.equal(again[1], mean) and torch.equal(again[2], error)
    # the standard error is that of the mean: 16 times as many vectors, a quarter of it
    _, few = jactri.divergence(net, x, estimate=3000 // 16, generator=generator)
    assert ((few / error - 4).abs() < 1.5).all()


def test_estimates_of_a_diagonal_are_exact():
    x = torch.randn(3, 4, dtype=F64)
    mean, error = jactri.divergence(torch.sin, x, estimate=3)
    assert_close(mean, torch.cos(x).sum(1), F64)
    assert error.abs().max() < 1e-14


def test_one_vector_has_no_standard_error():
    x = torch.randn(3, 4, dtype=F64)
    mean, error = jactri.divergence(torch.sin, x, estimate=1)
    assert torch.isfinite(mean).all() and torch.isnan(error).all()
    mean, error = jactri.divergence(torch.sin, x[0], estimate=2)
    assert mean.shape == error.shape == ()


def test_estimates_can_be_differentiated():
    torch.manual_seed(0)
    net, x = make(lambda: mlp(4, 6, 5, 4)), torch.randn(3, 4, dtype=F64)
    generator = torch.Generator().manual_seed(7)
    signs = torch.randint(0, 2, (5, 3, 4), generator=generator).to(F64) * 2 - 1
    leaf = x.clone().requires_grad_()
    y = net(leaf)
    terms = [(torch.autograd.grad(y, leaf, s, create_graph=True)[0] * s).sum(1) for s in signs]
    want = torch.autograd.grad(torch.stack(terms).mean(0).sum(), net[0].weight)
    generator.manual_seed(7)
    mean, _ = jactri.divergence(net, x, True, estimate=5, generator=generator)
    got = torch.autograd.grad(mean.sum(), net[0].weight)
    assert_gradients_close(got, want, F64, length=100)


# -- where it runs, and what it refuses -------------------------------------------------------------


def test_transforms_and_inference_mode():
    net, x = make(lambda: mlp(4, 6, 5, 4)), torch.randn(3, 4, dtype=F64)
    want = truth(net, x)
    assert_close(vmap(lambda v: jactri.divergence(net, v))(x), want, F64, length=100)
    stacked = torch.stack([x, x])
    y, got = vmap(lambda v: jactri.divergence(net, v, return_lower=True))(stacked)
    assert_close(got[0], want, F64, length=100)
    assert_close(y[0], net(x), F64)
    with torch.inference_mode():
        assert_close(jactri.divergence(net, x), want, F64, length=100)
    gradient = torch.func.grad(lambda v: jactri.divergence(net, v))(x[0])
    assert_close(gradient, jacrev(lambda v: jacrev(net)(v).trace())(x[0]), F64, length=100)
    with pytest.raises(RuntimeError, match="estimate"):
        vmap(lambda v: jactri.divergence(net, v, estimate=3))(x)


def test_samples_by_a_loop_are_proven_by_a_probe():
    net, x = make(lambda: mlp(4, 6, 5, 4)), torch.randn(3, 4, dtype=F64)
    got = jactri.divergence(lambda v: torch.stack([net(r) for r in v]), x)
    assert_close(got, truth(net, x), F64, length=100)


def test_bystanders():
    net, x = make(lambda: mlp(4, 6, 5, 4)), torch.randn(3, 4, dtype=F64, requires_grad=True)
    state = torch.get_rng_state()
    jactri.divergence(net, x)
    assert torch.equal(torch.get_rng_state(), state)
    jactri.divergence(net, x, estimate=2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)
    assert x.grad is None and all(p.grad is None and p.requires_grad for p in net.parameters())


def test_bad_input():
    net, x = make(lambda: mlp(4, 6, 3)), torch.randn(5, 4, dtype=F64)
    with pytest.raises(RuntimeError, match=r"shape of x, \(5, 4\), got \(5, 3\)"):
        jactri.divergence(net, x)
    with pytest.raises(RuntimeError, match=r"shape of x, \(4,\), got \(3,\)"):
        jactri.divergence(net, x[0])
    with pytest.raises(RuntimeError, match=r"shape of x, \(5, 4\), got \(\)"):
        jactri.divergence(lambda v: v.sum(), x)
    with pytest.raises(RuntimeError, match=r"int64.*x\.float\(\)"):
        jactri.divergence(lambda v: v, torch.ones(3, 2, dtype=torch.long))
    with pytest.raises(TypeError, match="x of divergence must be a tensor"):
        jactri.divergence(net, (x,))
    with pytest.raises(TypeError, match="one tensor, got a tuple of 2"):
        jactri.divergence(lambda v: (v, v), x)
    for f in (lambda v: v - v.mean(0), lambda v: torch.tanh(v) @ (v.t() @ v)):
        for estimate in (None, 2):
            with pytest.raises(RuntimeError, match="samples mix"):
                jactri.divergence(f, x, estimate=estimate)
    for estimate in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="estimate"):
            jactri.divergence(lambda v: v, x, estimate=estimate)
    with pytest.raises(ValueError, match="generator"):
        jactri.divergence(lambda v: v, x, generator=torch.Generator())
    with pytest.raises(ValueError, match="chunk_size"):
        jactri.divergence(lambda v: v, x, chunk_size=0)
    with pytest.raises(ValueError, match="backend"):
        jactri.divergence(lambda v: v, x, backend="cublas")

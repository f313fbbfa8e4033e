"""create_graph=True: the Jacobian's own derivatives are exact, and a penalty on it trains a network."""

import gc

import pytest
import torch
import torch.nn.functional as F
from cases.layers import Block, with_math
from common import F64, MODES, make
from tolerances import assert_close, assert_gradients_close
from torch import nn

import jactri

NETWORKS = {
    "tanh MLP": (make(lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))), (2, 2)),
    "softplus, sigmoid, SiLU, GELU": (
        make(lambda: nn.Sequential(nn.Linear(2, 3), nn.Softplus(), nn.Linear(3, 3), nn.Sigmoid(),
             nn.Linear(3, 2), nn.SiLU(), nn.GELU())), (2, 2)),
    "convolution": (
        make(lambda: nn.Sequential(nn.Conv1d(1, 2, 2), nn.Tanh(), nn.AvgPool1d(2), nn.Flatten(),
             nn.Linear(2, 2))), (2, 1, 4)),
    "LayerNorm and softmax": (
        make(lambda: nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3), nn.Softmax(-1))), (2, 3)),
    "transformer block": (make(Block), (1, 2, 4)),
    "products and quotients": (lambda x: (x * x.sin() / (x**2 + 1)).cumsum(-1), (2, 3)),
}  # fmt: skip


@pytest.mark.parametrize("per_sample", [False, True], ids=["whole", "per_sample"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NETWORKS)
def test_gradcheck_of_the_jacobian(name, mode, per_sample):
    """Finite differences of the Jacobian's entries, in float64."""
    func, shape = NETWORKS[name]
    x = torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def jacobian(x):
        return jactri.jacobian(func, x, create_graph=True, strategy=mode, per_sample=per_sample)

    assert jacobian(x).requires_grad
    assert torch.autograd.gradcheck(jacobian, (x,), fast_mode=True)


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck_in_the_parameters(mode):
    x = torch.randn(2, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    w = torch.randn(4, 3, dtype=F64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    b = torch.randn(4, dtype=F64, generator=torch.Generator().manual_seed(3)).requires_grad_()

    def jacobian(w, b):
        return jactri.jacobian(
            lambda x: torch.tanh(F.linear(x, w, b)) ** 2, x, create_graph=True, strategy=mode
        )

    assert torch.autograd.gradcheck(jacobian, (w, b))


@pytest.mark.parametrize("mode", MODES)
def test_third_derivatives(mode):
    """jactri of jactri: the Jacobian of a Jacobian is the Hessian, and it can be differentiated again."""

    def f(x):
        return (x.sin() * x.prod()).sum()

    x = torch.tensor([0.3, -0.7, 1.1], dtype=F64)

    def gradient(x):
        return jactri.jacobian(f, x, create_graph=True, strategy=mode)

    def hessian(x):
        return jactri.jacobian(gradient, x, create_graph=True, strategy=mode)

    assert_close(hessian(x), torch.autograd.functional.hessian(f, x), F64, length=9)
    x.requires_grad_()
    assert torch.autograd.gradcheck(hessian, (x,))
    third = jactri.jacobian(hessian, x.detach(), strategy=mode)
    truth = torch.func.jacrev(torch.func.jacrev(torch.func.jacrev(f)))(x.detach())
    assert_close(third, truth, F64, length=27)


def tensors_alive():
    gc.collect()
    return [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]


def test_the_graph_of_the_penalty_is_freed():
    """Training keeps nothing alive from step to step."""
    net = make(lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)))
    x = torch.ones(4, 2, dtype=F64)
    (jactri.jacobian(net, x, per_sample=True, create_graph=True) ** 2).sum().backward()
    first = [p.grad for p in net.parameters()]
    alive = len(tensors_alive())
    for _ in range(3):
        net.zero_grad(set_to_none=True)
        (jactri.jacobian(net, x, per_sample=True, create_graph=True) ** 2).sum().backward()
    assert len(tensors_alive()) <= alive
    assert_gradients_close([p.grad for p in net.parameters()], first, F64, length=1)


@pytest.mark.parametrize("mode", ["forward-mode", "reverse-mode"])
def test_a_jacobian_penalty_trains_a_digit_classifier(mode):
    """On real images: the penalised network has a much smaller Jacobian, and still reads digits."""
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn brings the digits")
    images, labels = datasets.load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32) / 16
    labels = torch.tensor(labels)
    train, test = slice(0, 1200), slice(1200, None)
    sizes, accuracies = [], []
    for weight in (0.0, 0.05):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for step in range(120):
            at = torch.arange(step * 50, step * 50 + 50) % 1200
            x = images[train][at]
            loss = F.cross_entropy(net(x), labels[train][at])
            if weight:
                y, j = jactri.jacobian(
                    net, x, per_sample=True, create_graph=True, strategy=mode, return_output=True
                )
                assert y.requires_grad
                loss = loss + weight * j.square().sum((1, 2)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            accuracies.append((net(images[test]).argmax(1) == labels[test]).float().mean().item())
        j = jactri.jacobian(net, images[test][:64], per_sample=True)
        truth = torch.func.vmap(torch.func.jacrev(net))(images[test][:64]).detach()
        assert_close(j, truth.double(), torch.float32)
        sizes.append(j.square().sum((1, 2)).mean().item())
    assert accuracies[0] > 0.85
    assert accuracies[1] > 0.85
    assert sizes[1] < 0.5 * sizes[0]


def test_penalties_agree_between_directions_and_with_autograd():
    net = make(lambda: nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.LayerNorm(4), nn.Linear(4, 2)))
    x = torch.randn(5, 3, dtype=F64)

    def gradients(take):
        net.zero_grad(set_to_none=True)
        take(x).square().sum().backward()
        return [p.grad for p in net.parameters()]

    truth = gradients(lambda x: torch.autograd.functional.jacobian(net, x, create_graph=True))
    for mode in MODES:
        for per_sample in (False, True):
            ours = gradients(
                lambda x, m=mode, p=per_sample: jactri.jacobian(
                    net, x, create_graph=True, strategy=m, per_sample=p
                )
            )
            assert_gradients_close(ours, truth, F64, length=64)


def test_the_attention_of_torch_cannot_do_it_and_jactri_can():
    block = make(Block)
    x = torch.randn(1, 3, 4, dtype=F64)
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.functional.jacobian(block, x, create_graph=True).sum().backward()
    truth = torch.autograd.functional.jacobian(with_math(block), x, create_graph=True)
    expected = torch.autograd.grad(
        truth.square().sum(), list(block.parameters()), allow_unused=True
    )
    for mode in MODES:
        j = jactri.jacobian(block, x, create_graph=True, strategy=mode)
        grads = torch.autograd.grad(j.square().sum(), list(block.parameters()), allow_unused=True)
        assert_gradients_close(grads, expected, F64, length=truth.numel(), factor=16)

"""docs/howto/libraries.md: every block runs, and what it defines gives what the library or torch finds without jactri.

pip install laplace-torch torchjd[quadprog_projector] pytorch-lightning captum torchdiffeq; where torchvision does not
fit the installed torch, without it (pip install --no-deps). .ci/run names the versions.
"""

import copy
import re
from pathlib import Path

import numpy as np
import pages
import pytest
import torch
from helpers import client
from tolerances import assert_close
from torch import nn

import jactri

PAGE = "docs/howto/libraries.md"
_, *SECTIONS = re.split(r"^## ", (Path(__file__).parents[2] / PAGE).read_text(), flags=re.M)
SECTIONS = dict(section.split("\n", 1) for section in SECTIONS)
MODULES = {
    "laplace-torch": "laplace",
    "TorchJD": "torchjd.autojac",
    "Lightning": "pytorch_lightning",
    "SciPy": "scipy.optimize",
    "Captum": "captum.attr",
    "torchdiffeq": "torchdiffeq",
}
F64 = torch.float64

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),  # BackPACK's
    # Lightning's
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]


@pytest.fixture
def recipe(tmp_path, monkeypatch, capsys):
    """What a section of the page defines, its blocks having been run."""

    def run(title):
        client(MODULES[title], f"pip install {title.lower()}")
        monkeypatch.chdir(tmp_path)
        torch.manual_seed(0)
        return pages.run(SECTIONS[title], f"{PAGE}: {title}", capsys)

    return run


def test_sections():
    assert list(SECTIONS) == list(MODULES)


NETS = {
    "linear": lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3)
    ),
}
LABELS = {
    "classification": lambda: torch.randint(3, (6,)),
    "regression": lambda: torch.randn(6, 3, dtype=F64),
}


def test_laplace(recipe):
    found = recipe("laplace-torch")
    from laplace import Laplace, curvature
    from torch.utils.data import DataLoader, TensorDataset

    J = curvature.GGNInterface(found["net"], "classification").jacobians(found["x"])[0]
    truth = found["posterior"].functional_variance(J).detach()
    assert_close(found["covariance"], truth, torch.float32, length=400)

    def same(ours, theirs, what):
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a.detach(), b.detach(), F64, length=400, what=what)

    for name, make in NETS.items():
        for likelihood, labels in LABELS.items():
            torch.manual_seed(0)
            net, x, y = make().double(), torch.randn(6, 4, dtype=F64), labels()
            net.output_size = 3  # as the library notes it

            def backend(kind, *, net=net, likelihood=likelihood, **options):
                # BackPACK leaves its hooks on a net
                return kind(copy.deepcopy(net), likelihood, **options)

            chosen = {"subnetwork_indices": torch.tensor([0, 3, 20])}
            for options in ({}, chosen):
                ours = backend(found["JactriGGN"], **options)
                theirs = backend(curvature.GGNInterface, **options)
                fisher = backend(found["JactriEF"], **options)
                truth = backend(curvature.EFInterface, **options)
                same(ours.jacobians(x), theirs.jacobians(x), name)
                for method in ("full", "diag"):
                    same(getattr(ours, method)(x, y), getattr(theirs, method)(x, y), method)
                    same(getattr(fisher, method)(x, y), getattr(truth, method)(x, y), method)
                same(fisher.gradients(x, y), truth.gradients(x, y), "gradients")
            for other in (curvature.CurvlinopsGGN, curvature.BackPackGGN):
                ours, theirs = backend(found["JactriGGN"]), backend(other)
                same(ours.jacobians(x), theirs.jacobians(x), other.__name__)
            # through the library
            data = DataLoader(TensorDataset(x, y), batch_size=3)
            for which, form, truth in (
                ("all", "diag", curvature.GGNInterface),
                ("all", "kron", curvature.CurvlinopsGGN),
                ("last_layer", "full", curvature.GGNInterface),
            ):
                predicted = []
                for kind in (found["JactriGGN"], truth):
                    posterior = Laplace(copy.deepcopy(net), likelihood, which, form, backend=kind)
                    posterior.fit(data)
                    mean = posterior(x)
                    predicted.append(mean if isinstance(mean, tuple) else (mean,))
                same(*predicted, form)


def test_torchjd(recipe):
    found = recipe("TorchJD")
    from torchjd.aggregation import UPGrad
    from torchjd.autogram import Engine
    from torchjd.autojac import backward, jac_to_grad

    net = found["net"].double()
    x, y, parameters = found["x"].double(), found["y"], list(net.parameters())

    def directions(losses, ours):
        net.zero_grad()
        ours(losses)
        got = [p.grad for p in parameters]
        net.zero_grad()
        backward(losses)
        jac_to_grad(parameters, UPGrad())
        for g, p in zip(got, parameters, strict=True):
            assert_close(g, p.grad, F64, length=400)

    def several(losses):
        for p, J in zip(parameters, jactri.jacobian_of(losses, tuple(parameters)), strict=True):
            p.jac = J
        jac_to_grad(parameters, UPGrad())

    each = found["EachLoss"](net)
    P = jactri.parameter_jacobian(each, (x, y))

    def of_samples(_):
        weights = found["UPGradWeighting"]()(P.gram())
        for p, step in zip(parameters, (P.T @ weights).values(), strict=True):
            p.grad = step

    out = net(x)
    several_losses = torch.stack(
        [nn.functional.cross_entropy(out, y), out.square().mean(), out.abs().sum()]
    )
    directions(several_losses, several)
    directions(each(x, y), of_samples)
    gramian = Engine(net, batch_dim=0).compute_gramian(each(x, y))
    assert_close(P.gram(), gramian, F64, length=400)


def test_lightning(recipe):
    found = recipe("Lightning")
    pl, torch_data = found["pl"], torch.utils.data

    class Recorded(found["Classifier"]):
        def __init__(self):
            super().__init__()
            self.seen = []

        def on_after_backward(self):
            values = {n: p.detach().clone() for n, p in self.named_parameters()}
            self.seen.append((values, [p.grad.clone() for p in self.parameters()]))

        def test_step(self, batch, batch_idx):
            assert torch.is_inference_mode_enabled()
            J = jactri.jacobian(self, batch[0], per_sample=True)
            truth = torch.func.vmap(torch.func.jacrev(lambda row: self(row[None])[0]))(x)
            assert_close(J, truth.detach(), F64)

    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    module = Recorded().double()
    x, y = torch.randn(8, 4, dtype=F64), torch.randint(3, (8,))
    trainer = pl.Trainer(
        max_steps=2, callbacks=[found["JacobianPenalty"](0.1)], accelerator="cpu", **dict.fromkeys(quiet, False)
    )  # fmt: skip
    trainer.fit(module, torch_data.DataLoader(torch_data.TensorDataset(x, y), batch_size=4))
    assert len(module.seen) == 2 and "training_step" not in vars(module)
    assert trainer.callback_metrics["jacobian_penalty"] > 0
    trainer.test(module, torch_data.DataLoader(torch_data.TensorDataset(x, y), 8), verbose=False)
    for (values, grads), a, b in zip(module.seen, x.split(4), y.split(4), strict=True):

        def loss(values, a=a, b=b):
            def net(x):
                return torch.func.functional_call(module, values, (x,))

            J = torch.func.vmap(torch.func.jacrev(lambda row: net(row[None])[0]))(a)
            return nn.functional.cross_entropy(net(a), b) + 0.1 * J.square().sum((1, 2)).mean()

        truth = torch.func.grad(loss)(values)
        for g, t in zip(grads, truth.values(), strict=True):
            assert_close(g, t, F64, length=400)


def test_scipy(recipe):
    found = recipe("SciPy")
    assert found["least"].success and found["solution"].success and found["smooth"].success
    x = np.linspace(-1.0, 1.0, 500)
    truth = torch.autograd.functional.jacobian(found["smoothing"], torch.from_numpy(x))
    J = found["sparse_jacobian"](x)
    assert J.nnz == 500 + 3 * 498
    assert_close(torch.from_numpy(J.toarray()), truth, F64)
    x = np.linspace(-1.0, 1.0, 10)
    truth = torch.autograd.functional.hessian(found["rosenbrock"], torch.from_numpy(x))
    assert_close(torch.from_numpy(found["hessian"](x)), truth, F64, length=10)


def test_captum(recipe):
    found = recipe("Captum")
    from captum.attr import InputXGradient, IntegratedGradients, Saliency

    net, x = found["net"], found["x"]
    for name, method in (
        ("saliency", Saliency), ("input_x_gradient", InputXGradient), ("attributions", IntegratedGradients),
    ):  # fmt: skip
        for target in (0, 7):
            theirs = method(net).attribute(x.clone().requires_grad_(), target=target).detach()
            assert_close(found[name][:, target], theirs, torch.float32, length=400, what=name)


@pytest.mark.parametrize("solver", ["odeint", "odeint_adjoint"])
def test_torchdiffeq(recipe, solver):
    found = recipe("torchdiffeq")
    import torchdiffeq

    solve, field = getattr(torchdiffeq, solver), found["flow"].field.double()

    class ByRows(nn.Module):
        def __init__(self):
            super().__init__()
            self.field = field

        def forward(self, t, state):
            with torch.enable_grad():
                z = state[0] if state[0].requires_grad else state[0].requires_grad_()
                velocity = field(torch.cat([z, t.expand(len(z), 1)], 1))
                rows = [
                    torch.autograd.grad(velocity[:, i].sum(), z, create_graph=True)[0][:, i]
                    for i in (0, 1)
                ]
            return velocity, -sum(rows)

    z, times = found["z"].double(), torch.tensor([0.0, 1.0], dtype=F64)
    ends = []
    for flow in (found["flow"], ByRows()):
        field.zero_grad()  # to None
        state = z.clone(), torch.zeros(len(z), dtype=F64)
        path, change = solve(flow, state, times, method="rk4", options={"step_size": 0.5})
        (path[-1].square().sum() - change[-1].sum()).backward()
        ends.append([path[-1].detach(), change[-1].detach(), *(p.grad for p in field.parameters())])
    for ours, theirs in zip(*ends, strict=True):
        assert_close(ours, theirs, F64, length=400)

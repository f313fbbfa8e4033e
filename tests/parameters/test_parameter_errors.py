"""What `parameter_jacobian`, `empirical_ntk` and `ggn` refuse, and how they say so."""

import parameter_cases as cases
import pytest
import torch
from common import unfollowed
from parameter_cases import CASES, F64, build, like
from torch import nn

import jactri

GENERIC = {"by autograd": "by autograd", "bag": "opaque", "opaque": "opaque"}
"""Those that autograd computes a part of."""


def jacobian(name, n=4, dtype=F64, **options):
    module, x = build(name, n, dtype)
    return module, x, jactri.parameter_jacobian(module, x, **options)


def test_out_that_does_not_fit():
    module, x, jac = jacobian("mlp")
    out = jac.dense()
    with pytest.raises(TypeError, match="dict"):
        jac.dense(out=list(out.values()))
    with pytest.raises(ValueError, match=r"unknown: \['wrong'\]"):
        jac.dense(out={**out, "wrong": x})
    with pytest.raises(RuntimeError, match=r"0\.bias.*must have shape \(4, 3, 5\)"):
        jac.dense(out={**out, "0.bias": x})
    with pytest.raises(RuntimeError, match="requires grad"):
        jac.dense(out={k: t.clone().requires_grad_() for k, t in out.items()})
    with pytest.raises(RuntimeError, match="create_graph"):
        jactri.parameter_jacobian(module, x, create_graph=True).dense(out=out)


@pytest.mark.parametrize(
    "mixing",
    [
        lambda f, x: f(x - x.mean(0)),
        lambda f, x: f(x).softmax(0),
        lambda f, x: f(x).cumsum(0),
        lambda f, x: f(x.flip(0)),
    ],
)
def test_samples_that_mix(mixing):
    module = cases.Wrap(nn.Linear(3, 2), mixing)
    for call in (jactri.parameter_jacobian, jactri.empirical_ntk):
        with pytest.raises(RuntimeError, match="samples mix: the op"):
            call(module, torch.randn(4, 3))


def test_looked_up_samples_that_mix():
    module = nn.Sequential(
        nn.Embedding(5, 3), cases.Wrap(nn.Linear(3, 2), lambda f, x: f(x - x.mean(0)))
    )
    with pytest.raises(RuntimeError, match="samples mix"):
        jactri.parameter_jacobian(module, torch.tensor([[1, 2], [3, 4], [0, 1]]))


def test_wrong_modules_and_parameters():
    module, x = build("mlp")
    call = jactri.parameter_jacobian
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got function.*functional_call"):
        call(lambda t: t, x)
    with pytest.raises(ValueError, match="Tanh has no parameters"):
        call(nn.Tanh(), x)
    with pytest.raises(ValueError, match=r"no parameter '2\.wieght'; names like it: 2\.weight"):
        call(module, x, ["2.wieght"])
    with pytest.raises(ValueError, match=r"shape \(4, 3\) is no parameter"):
        call(module, x, [x])
    with pytest.raises(TypeError, match="names or tensors, got int"):
        call(module, x, [3])
    with pytest.raises(TypeError, match="names or tensors, got int"):
        call(module, x, 3)
    with pytest.raises(ValueError, match="empty"):
        call(module, x, [])
    with pytest.raises(RuntimeError, match="all 6 parameters of Sequential are frozen"):
        call(module.requires_grad_(False), x)


def test_wrong_inputs_and_outputs():
    module, x = build("mlp")
    call = jactri.parameter_jacobian
    with pytest.raises(TypeError, match="x has type <class 'list'>"):
        call(module, [x])
    with pytest.raises(TypeError, match=r"x of parameter_jacobian.*index 1 has type <class 'int'>"):
        call(module, (x, 1))
    with pytest.raises(IndexError, match="empty tuple"):
        call(module, ())
    with pytest.raises(ValueError, match="0-dimensional"):
        call(module, torch.tensor(1.0, dtype=F64))
    with pytest.raises(ValueError, match=r"shape \(3,\) for 2 samples"):
        call(cases.Wrap(nn.Linear(2, 3).double(), lambda f, t: f(t[0])), x[:2, :2])
    with pytest.raises(ValueError, match=r"shape \(\)"):
        call(cases.Wrap(module, lambda f, t: f(t).sum()), x)
    with pytest.raises(TypeError, match="has type <class 'tuple'>"):
        call(nn.LSTM(3, 2).double(), x.unsqueeze(0))
    with pytest.raises(RuntimeError, match=r"torch\.int64"):
        call(cases.Wrap(module, lambda f, t: f(t).long()), x)
    for n in (0, -1, 1.5):
        with pytest.raises(ValueError, match="chunk_size"):
            call(module, x, chunk_size=n)
    with pytest.raises(ValueError, match="memory_limit must be"):
        call(module, x, memory_limit="much").dense()
    with pytest.raises(ValueError, match=r"the Jacobian takes .*out="):
        call(module, x, memory_limit=100).dense()


def test_wrong_operands():
    module, x, jac = jacobian("mlp")
    v = like(module)
    with pytest.raises(ValueError, match=r"missing: \['4\.bias'\]"):
        jac @ {k: t for k, t in v.items() if k != "4.bias"}
    with pytest.raises(
        RuntimeError, match=r"v\['0\.bias'\] must have the parameter's shape \(5,\)"
    ):
        jac @ {**v, "0.bias": torch.zeros(4, dtype=F64)}
    with pytest.raises(RuntimeError, match="one leading axis more"):
        jac @ {**v, "0.bias": torch.zeros(2, 5, dtype=F64)}
    with pytest.raises(TypeError):
        jac @ x
    with pytest.raises(RuntimeError, match=r"u must have the output's shape \(4, 3\)"):
        jac.T @ torch.zeros(3)
    with pytest.raises(RuntimeError, match="must be a tensor of shape"):
        jac.variance({**v, "0.bias": 1.0})
    with pytest.raises(
        RuntimeError, match=r"loss_hessian must have shape \(4, 3\) .* or \(4, 3, 3\)"
    ):
        jactri.ggn(module, x, torch.zeros(4))
    with pytest.raises(TypeError, match="a Tensor or a function"):
        jactri.ggn(module, x, 1.0)
    with pytest.raises(RuntimeError, match="must return one like it"):
        jactri.ggn(module, x, lambda block: block[0]) @ v


def test_a_step_in_between_is_refused():
    module, _, jac = jacobian("mlp")
    with torch.no_grad():
        module[2].weight.add_(1)
    for use in (jac.dense, jac.gram, lambda: jac @ like(module), lambda: jac.T @ jac.output):
        with pytest.raises(RuntimeError, match=r"2\.weight was modified in place"):
            use()


def test_fallback_is_refused_where_it_is_one():
    for name in CASES:
        module, x = build(name)
        with jactri.fallback("error"):
            if name in GENERIC:
                with pytest.raises(jactri.FallbackError):
                    jactri.parameter_jacobian(module, x)
            else:
                jactri.parameter_jacobian(module, x).dense()


def test_inside_of_a_transform_is_refused():
    module, x = build("mlp")
    with pytest.raises(RuntimeError, match=r"torch\.func transform"):
        torch.func.vmap(
            lambda t: jactri.parameter_jacobian(module, t.unsqueeze(0)).dense()["0.bias"]
        )(x)


def test_weights_of_other_tensors_are_refused():
    """The output depends on leaves that are no parameters, and on no parameter: zeros would be silently wrong."""

    class Generated(nn.Module):
        def __init__(self, complex_values=False):
            super().__init__()
            self.own, self.unused = nn.Linear(3, 2), nn.Parameter(torch.ones(2))
            self.weights = [torch.randn(2, 3, dtype=F64, requires_grad=True)]
            self.complex_values, self.also = complex_values, False

        def forward(self, x):
            w = (
                unfollowed(torch.complex(self.weights[0], x.new_ones(2, 3))).abs()
                if self.complex_values
                else self.weights[0]
            )
            y = nn.functional.linear(x, w).tanh()
            return y + self.own(x) if self.also else y

    x = torch.randn(4, 3, dtype=F64)
    said = r"Generated does not depend .* own\.weight.* 1 other .*\(2, 3\).*elsewhere"
    for complex_values in (False, True):
        module = Generated(complex_values).double()
        for call in (
            jactri.parameter_jacobian,
            jactri.empirical_ntk,
            lambda m, t: jactri.ggn(m, t, torch.ones(4, 2)),
        ):
            with pytest.raises(
                RuntimeError,
                match=said,
            ):
                call(module, x)
        with pytest.raises(RuntimeError, match="weights live elsewhere"):
            jactri.compile(module, x, of=jactri.empirical_ntk)
        # what leads from x to the caller's tensors is no weight, and a parameter that is not used has zeros
        module.weights[0].requires_grad_(False)
        w = torch.ones(3, dtype=F64, requires_grad=True)
        jac = jactri.parameter_jacobian(module, x * w, create_graph=True)
        assert not any(j.any() for j in jac.dense().values())
        module.weights[0].requires_grad_(True)
        module.also = True
        assert not jactri.parameter_jacobian(module, x, "unused").dense()["unused"].any()
        dense = jactri.parameter_jacobian(module, x).dense()
        assert not dense["unused"].any() and dense["own.weight"].any()
    module = nn.Linear(3, 2).double()
    copies = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    functional = cases.Wrap(module, lambda f, t: torch.func.functional_call(f, copies, t))
    with pytest.raises(RuntimeError, match="2 other tensors"):
        jactri.parameter_jacobian(functional, x)

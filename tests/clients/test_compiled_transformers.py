"""Tiny random language models under `jactri.compile`: d outputs / d embeddings, and gradients of it.

pip install transformers
"""

import pytest
import torch
from helpers import client
from tolerances import assert_close

import jactri

client("transformers", "pip install transformers")

from test_transformers import BERT, F32, F64, LANGUAGE, build  # noqa: E402  which imports it

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning:transformers"),
]


def embeddings(model):
    def func(x):
        found = model(inputs_embeds=x)
        return found.logits if hasattr(found, "logits") else found.last_hidden_state

    return func


def small(name):
    """One layer of a model, as a function of embeddings; and a dtype that it computes in inside."""
    kind, options, inner, known = LANGUAGE[name]
    layers = {k: 1 for k in options if k in ("num_hidden_layers", "n_layer", "num_layers")}
    if name == "Mixtral":
        layers["experts_implementation"] = "eager"
    model = build(kind, f"{name}Config", known[-1], F64, **{**options, **layers})
    return model, embeddings(model), {"dtype": inner or F64, "length": 80, "factor": 16.0}


def draw():
    return torch.randn(2, 5, 16, dtype=F64)


@pytest.mark.parametrize("name", LANGUAGE)
def test_jacobians(name):
    model, func, close = small(name)
    step = jactri.compile(func, draw(), per_sample=True, engine="fx")
    for _ in range(2):
        x = draw()
        assert_close(step(x), jactri.jacobian(func, x, per_sample=True), **close)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.1)
    assert step.traces == 1
    if name == "Mixtral":  # which experts it asks depends on values
        assert "nonzero" in step.reason
    else:
        assert step.reason is None


@pytest.mark.parametrize("name", ["Bert", "Llama"])
def test_gradients(name):
    model, func, close = small(name)
    options = {"per_sample": True, "create_graph": True}
    step = jactri.compile(func, draw(), engine="fx", **options)
    assert step.reason is None
    weights = [p for p in model.parameters() if p.dim() == 2][-4:]
    x = draw()
    grads = [
        torch.autograd.grad(J.square().mean(), weights, allow_unused=True, materialize_grads=True)
        for J in (step(x), jactri.jacobian(func, x, **options))
    ]
    for ours, theirs in zip(*grads, strict=True):
        assert_close(ours, theirs, **close)


def test_by_the_compiler():
    options = {**BERT, "num_hidden_layers": 1}
    func = embeddings(build("BertModel", "BertConfig", "sdpa", F32, **options))
    step = jactri.compile(func, draw().float(), per_sample=True)
    assert step.reason is None and step.explain().parts[0].engine == "inductor"
    x = draw().float()
    assert_close(step(x), jactri.jacobian(func, x, per_sample=True), F32, length=80, factor=4.0)

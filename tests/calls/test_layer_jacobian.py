"""jactri.layer_jacobian: Jacobians between layers by name, reduced over tokens at both ends."""

import pytest
import torch
from common import F64
from layer_cases import TOKENS, WIDTH, Tiny, ids, tiny, whole
from tolerances import assert_close
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import jactri

SOURCES = ["layers.0", "layers.1"]
MASKS = {
    "all": None,
    "right": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
    "left": torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]),
}


def weight(*shape):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(3))


def matrices(how, mask, end):
    """A reduction as a matrix, ``(rows, samples, tokens)``, entry by entry."""
    valid = torch.ones(2, TOKENS, dtype=F64) if mask is None else mask.double()
    if how is None:
        return torch.eye(2 * TOKENS, dtype=F64).reshape(-1, 2, TOKENS)
    if how in ("sum", "mean") if isinstance(how, str) else False:
        return (valid if how == "sum" else valid / valid.sum())[None]
    if isinstance(how, int):
        made = torch.zeros(1, 2, TOKENS, dtype=F64)
        for n in range(2):
            made[0, n, valid[n].nonzero().flatten()[how]] = 1 if end == "target" else 0.5
        return made
    whole = how.reshape(TOKENS, -1).expand(2, TOKENS, -1) if how.dim() < 3 else how
    return (whole * valid[..., None]).permute(2, 0, 1)


def truth(model, name, given, mask, reduce, rows=None):
    J = whole(model, name, given, mask)
    left, right = (
        matrices(h, mask, end) for h, end in zip(reduce, ("target", "source"), strict=True)
    )
    J = torch.einsum("anx,nxdmye,bmy->adbe", left, J, right)
    if rows is not None:
        J = torch.einsum("kd,adbe->akbe", rows, J)
    shapes = []
    for how, (count, features) in zip(reduce, (J.shape[:2], J.shape[2:]), strict=True):
        if how is None:
            shapes += [2, TOKENS, features]
        elif isinstance(how, torch.Tensor) and how.dim() > 1:
            shapes += [count, features]
        else:
            shapes += [features]
    return J.reshape(shapes)


REDUCTIONS = {
    "lens": ("sum", "mean"),
    "mean, sum": ("mean", "sum"),
    "tokens": (-1, 0),
    "second in second": (1, 1),
    "a token in each": (2, None),
    "weights": (weight(TOKENS, 3), weight(TOKENS)),
    "weights of samples": (weight(TOKENS), weight(2, TOKENS, 2)),
    "whole": (None, None),
    "whole target": (None, "mean"),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_reductions_are_those_of_the_whole_jacobian(reduce, mask):
    model, given, reduce, mask = tiny(), ids(), REDUCTIONS[reduce], MASKS[mask]
    inputs = {"input_ids": given, "attention_mask": mask}
    found = jactri.layer_jacobian(model, inputs, SOURCES, "norm", reduce)
    assert list(found) == SOURCES
    for name, J in found.items():
        wanted = truth(model, name, given, mask, reduce)
        assert J.shape == wanted.shape
        assert not J.requires_grad
        assert_close(J, wanted, F64, length=200)


@pytest.mark.parametrize(
    "options", [{}, {"chunk_size": 1}, {"chunk_size": 4}, {"memory_limit": "40KB"}]
)
def test_chunks_give_the_same(options):
    model, given = tiny(), ids()
    found = jactri.layer_jacobian(model, given, "layers.*", "norm", **options)
    for name in SOURCES:
        assert_close(found[name], truth(model, name, given, None, ("sum", "mean")), F64, length=200)


def test_rows_of_an_unembedding_and_random_ones():
    model, given = tiny(), ids()
    head = model.head.weight[2:5]
    J = jactri.layer_jacobian(model, given, "layers.0", "norm", (-1, "mean"), rows=head)["layers.0"]
    assert_close(J, truth(model, "layers.0", given, None, (-1, "mean"), head), F64, length=200)
    S = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(7), dtype=F64) / 2
    J = jactri.layer_jacobian(model, given, SOURCES, "norm", rows=4, seed=7)
    for name in SOURCES:
        assert_close(J[name], truth(model, name, given, None, ("sum", "mean"), S), F64, length=200)
    J = jactri.layer_jacobian(model, given, "layers.1", "norm", (weight(TOKENS, 3), 0), rows=S)
    assert J["layers.1"].shape == (3, 4, WIDTH)
    assert_close(
        J["layers.1"],
        truth(model, "layers.1", given, None, (weight(TOKENS, 3), 0), S),
        F64,
        length=200,
    )


def test_the_model_is_called_as_its_owner_calls_it():
    model, given = tiny(), ids()
    wanted = truth(model, "layers.0", given, None, ("sum", "mean"))
    embeds = {"inputs_embeds": model.embed(given)}
    for inputs in (given, (given,), (given, None), {"input_ids": given}, embeds):
        J = jactri.layer_jacobian(model, inputs, ["layers.0"], "norm")
        assert_close(J["layers.0"], wanted, F64, length=200)
    with torch.inference_mode():
        J = jactri.layer_jacobian(model, given, "layers.0", "norm")["layers.0"]
    assert_close(J, wanted, F64, length=200)
    trained = tiny().requires_grad_()
    J = jactri.layer_jacobian(trained.train(), given, "layers.0", "norm")["layers.0"]
    assert_close(J, wanted, F64, length=200)
    assert trained.training
    assert all(p.grad is None for p in trained.parameters())


def test_the_whole_model_and_one_of_its_outputs_are_targets():
    model, given = tiny(), ids()
    J = jactri.layer_jacobian(model, given, ["layers.2"])["layers.2"]  # its first output
    assert_close(J, truth(model, "layers.2", given, None, ("sum", "mean")), F64, length=200)
    J = jactri.layer_jacobian(model, given, ["layers.1:input"], ":output[logits]")["layers.1:input"]
    head = model.head.weight
    wanted = truth(model, "layers.0", given, None, ("sum", "mean"), head)
    assert_close(J, wanted, F64, length=200)


def test_a_source_that_is_the_target():
    J = jactri.layer_jacobian(tiny(), ids(), ["norm", "layers.2"], "norm")
    assert list(J) == ["layers.2", "norm"]
    assert_close(J["norm"], torch.eye(WIDTH, dtype=F64), F64, length=1)


def test_one_forward_pass_and_one_sweep():
    runs = []
    model, given = tiny(depth=4), ids()
    handle = model.register_forward_hook(lambda *_: runs.append(1))
    flops = {}
    for name in ("layers.0", "layers.*"):
        with FlopCounterMode(display=False) as counter:
            jactri.layer_jacobian(model, given, name, "norm")
        flops[name] = counter.get_total_flops()
    handle.remove()
    assert len(runs) == 2
    assert flops["layers.*"] == flops["layers.0"]


def test_memory_is_that_of_the_reduced_answer():
    """40 tokens: the whole Jacobians take 2.7 MB, and one row of a chunk some KB."""
    model, given = tiny(depth=4), ids(2, 40)
    whole = 4 * (2 * 40 * WIDTH) ** 2 * 8
    J = jactri.layer_jacobian(model, given, "layers.*", "norm", memory_limit=whole // 8)
    assert sum(j.nbytes for j in J.values()) == 4 * WIDTH * WIDTH * 8
    again = jactri.layer_jacobian(model, given, "layers.*", "norm")
    for name in J:
        assert_close(J[name], again[name], F64, length=400)


@pytest.mark.parametrize("shape", [(7, 3), (2, 3, 4, 3), (1, 3)])
def test_other_axes(shape):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x = torch.randn(shape, dtype=F64).transpose(0, -2).contiguous().transpose(0, -2)
    J = jactri.layer_jacobian(net, x, "0", "2", ("mean", "sum"))["0"]
    hidden = net[0](x)
    slope = (1 - hidden.tanh() ** 2).flatten(0, -2).mean(0)
    assert_close(J, net[2].weight * slope, F64, length=40)
    J = jactri.layer_jacobian(net, x[:0], "0", "2", ("sum", "sum"))["0"]
    assert torch.equal(J, torch.zeros(2, 3, dtype=F64))


def test_layers_that_run_several_times():
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.last = nn.Linear(3, 3), nn.Identity()

        def forward(self, x):
            for _ in range(3):
                x = self.layer(x).tanh()
            return self.last(x)

    torch.manual_seed(0)
    model, x = Again().double(), torch.randn(2, 3, dtype=F64)
    J = jactri.layer_jacobian(model, x, ["layer"], "last")
    assert list(J) == ["layer#0", "layer#1", "layer#2"]
    one = jactri.layer_jacobian(model, x, ["layer#1"], "layer#2")
    assert list(one) == ["layer#1"]
    h = model.layer(model.layer(x).tanh())
    wanted = (model.layer.weight * (1 - h.tanh() ** 2)[:, None]).mean(0)
    assert_close(one["layer#1"], wanted, F64, length=6)
    with pytest.raises(RuntimeError, match="target='layer' ran 3 times; name one of 'layer#0', "):
        jactri.layer_jacobian(model, x, ["layer#0"], "layer")


# -- masks ------------------------------------------------------------------------------------------


def test_masks_of_the_caller():
    model, given, mask = tiny(), ids(), MASKS["right"]
    # the model itself does not mask
    source, target = torch.tensor([[0, 1, 1, 1, 1]] * 2), MASKS["right"]
    J = jactri.layer_jacobian(
        model, given, "layers.0", "norm", mask={"layers.0": source, "norm": target.bool()}
    )["layers.0"]
    whole_J = whole(model, "layers.0", given)
    left, right = matrices("sum", target, "target"), matrices("mean", source, "source")
    wanted = torch.einsum("anx,nxdmye,bmy->adbe", left, whole_J, right)[0, :, 0]
    assert_close(J, wanted, F64, length=200)
    inputs = {"input_ids": given, "attention_mask": mask}
    J = jactri.layer_jacobian(model, inputs, "layers.0", "norm", mask=None)["layers.0"]
    wanted = whole(model, "layers.0", given, mask).sum((0, 1, 3, 4)) / 10
    assert_close(J, wanted, F64, length=200)


def test_what_is_behind_padding_does_not_matter():
    """A layer without a derivative at the padded tokens: they are left out, and not multiplied by zero."""

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Identity(), nn.Identity()

        def forward(self, x, attention_mask):
            return self.b(self.a(x).sqrt())

    x = torch.tensor([[[4.0], [0.0]], [[1.0], [16.0]]], dtype=F64)
    mask = torch.tensor([[1, 0], [1, 1]])
    J = jactri.layer_jacobian(Root(), {"x": x, "attention_mask": mask}, "a", "b")["a"]
    assert_close(J, torch.tensor([[(0.25 + 0.5 + 0.125) / 3]], dtype=F64), F64, length=3)


def test_samples_one_after_another_are_masked_too():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Identity(), nn.Identity()

        def forward(self, x, attention_mask):
            return self.b(self.a(x.flatten(0, 1)) ** 2)

    x, mask = torch.randn(2, 3, 1, dtype=F64), torch.tensor([[1, 0, 1], [0, 1, 1]])
    J = jactri.layer_jacobian(Flat(), {"x": x, "attention_mask": mask}, "a", "b")["a"]
    assert_close(J, (2 * x[mask.bool()]).mean().reshape(1, 1), F64, length=6)


def test_a_mask_by_position_and_rows_without_tokens():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.tiny, self.pool = tiny(), nn.Identity()

        def forward(self, input_ids, attention_mask):
            return self.pool(self.tiny(input_ids, attention_mask)["hidden"][:, 0])

    model, mask = Pooled(), MASKS["right"]
    J = jactri.layer_jacobian(model, (ids(), mask), "tiny.layers.0", "tiny.norm")["tiny.layers.0"]
    wanted = truth(model.tiny, "layers.0", ids(), mask, ("sum", "mean"))
    assert_close(J, wanted, F64, length=200)
    J = jactri.layer_jacobian(model, (ids(), mask), "tiny.layers.0", "pool")["tiny.layers.0"]
    wanted = truth(model.tiny, "layers.0", ids(), mask, (0, "mean"))
    assert_close(J, wanted, F64, length=200)


class Checkpointed(nn.Module):
    """A layer of `Tiny` whose activations are made again."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden, mask=None):
        return checkpoint(self.layer, hidden, mask=mask, use_reentrant=False)


@pytest.mark.parametrize("end", ["mlp", "norm1:input", ""])
@pytest.mark.parametrize("how", ["mean", 1, weight(TOKENS, 2)], ids=["mean", "token", "weights"])
def test_sources_within_checkpointed_layers(end, how):
    model = tiny().requires_grad_(True)
    given = {"input_ids": ids(), "attention_mask": MASKS["right"]}
    name = f"layers.1.layer.{end}".rstrip(".")
    plain = f"layers.1.{end}".rstrip(".")
    wanted = jactri.layer_jacobian(model, given, plain, "norm", ("sum", how))[plain]
    model.layers = nn.ModuleList(Checkpointed(layer) for layer in model.layers)
    assert_close(
        jactri.layer_jacobian(model, given, name, "norm", ("sum", how))[name],
        wanted,
        F64,
        length=200,
    )


# -- bad input --------------------------------------------------------------------------------------


def call(
    model=None, inputs=None, source="layers.0", target="norm", reduce=("sum", "mean"), **options
):
    model = tiny() if model is None else model
    return jactri.layer_jacobian(
        model, ids() if inputs is None else inputs, source, target, reduce, **options
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"source": "layer.0"}, ValueError, "'layer.0' matches no module of Tiny; did you mean"),
        ({"target": "layers.*"}, ValueError, r"target='layers.\*' matches 3 modules: name one of 'layers.0'"),
        ({"target": 3}, TypeError, "target must be the name of one layer, got 3"),
        ({"source": []}, IndexError, "source is empty"),
        ({"target": "layers.0", "source": "layers.1"}, RuntimeError,
         "source 'layers.1' comes after its target 'layers.0', which does not depend on it"),
        ({"target": "layers.0.mlp", "source": ["layers.0.norm2", "layers.0"]}, RuntimeError,
         "source 'layers.0' comes after its target 'layers.0.mlp'"),
        ({"target": "layers.0.mlp:input", "source": "layers.0:output[1]"}, RuntimeError, "comes after its target"),
        ({"target": "layers.2.attn:output[1]", "source": "layers.1.attn:output[1]", "reduce": (None, None),
          "inputs": (ids()[:, :1],)}, RuntimeError, "does not depend on"),
        ({"reduce": "mean"}, TypeError, "reduce must be a pair"),
        ({"reduce": ("sum", "men")}, ValueError, "reduce at the source must be .*did you mean 'mean'"),
        ({"reduce": (True, "mean")}, TypeError, "reduce at the target must be 'sum', .*got True"),
        ({"reduce": (torch.ones(5).long(), "mean")}, ValueError, "weights are of floating point"),
        ({"reduce": (torch.ones(4, 2), "mean")}, RuntimeError, r"\(4, 2\) do not fit 'norm' of shape \(2, 5, 6\)"),
        ({"reduce": ("sum", torch.ones(3, 5, 2))}, RuntimeError, r"do not fit 'layers.0' .*pass \(5,\), \(5, K\)"),
        ({"reduce": (5, "mean")}, IndexError, "there is no token 5 in 'norm'"),
        ({"reduce": ("sum", -6)}, IndexError, "there is no token -6 in 'layers.0'"),
        ({"rows": 0}, ValueError, "rows must be .*got 0"),
        ({"rows": "all"}, TypeError, "rows must be .*got 'all'"),
        ({"rows": torch.ones(3, 5)}, RuntimeError, r"do not fit the target 'norm', which has 6 features; pass"),
        ({"inputs": [ids()]}, TypeError, r"inputs must be .*; pass tuple\(inputs\)"),
        ({"inputs": "text"}, TypeError, "pass what a tokenizer returns"),
        ({"inputs": {"input_ids": ids(), "past_key_values": object()}}, RuntimeError,
         "inputs hold past_key_values, a cache .*use_cache=False"),
        ({"inputs": {"input_ids": ids(), "attention_mask": torch.tensor([[1, 1, 1, 1, 2]] * 2)}}, RuntimeError,
         "holds more than ones"),
        ({"mask": torch.zeros(2, TOKENS)}, ValueError, "'mean' of no token"),
        ({"mask": torch.eye(4)}, RuntimeError, r"mask of shape \(4, 4\) does not fit 'layers.0', of shape \(2, 5, 6\)"),
        ({"mask": {"layers.1": None}}, ValueError, "mask has 'layers.1', which is none of the layers 'norm', "),
        ({"mask": "none"}, ValueError, "mask must be 'auto'"),
        ({"mask": 3}, TypeError, "mask must be 'auto'"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be"),
        ({"memory_limit": 64}, ValueError, "memory_limit"),
        ({"backend": "jax"}, ValueError, "backend"),
    ],
)  # fmt: skip
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        call(**options)


def test_reductions_over_a_missing_axis():
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double()
    x = torch.randn(4, 3, dtype=F64)
    for reduce in ((0, "mean"), ("sum", torch.ones(4))):
        with pytest.raises(
            IndexError, match=r"needs one token axis, .*has shape \(4, 3\); pass None"
        ):
            jactri.layer_jacobian(net, x, "0", "1", reduce)
    with pytest.raises(
        IndexError, match=r"at the source: 'mean' needs an axis before the features"
    ):
        jactri.layer_jacobian(net, x[0], "0", "1")
    with pytest.raises(IndexError, match=r"needs one token axis, .*has shape \(1, 1, 4, 3\)"):
        jactri.layer_jacobian(net, x[None, None], "0", "1", ("sum", 0))
    J = jactri.layer_jacobian(net, x[0], "0", "1", (None, None))["0"]
    assert_close(J, torch.diag(1 - net(x[0]) ** 2), F64, length=3)


def test_training_mode_with_dropout_and_detached_layers():
    model = tiny(dropout=0.5).train()
    with pytest.raises(
        RuntimeError, match=r"training mode and draws random numbers, .*\(as 'layers.0.drop'\)"
    ):
        call(model)
    call(model.eval())

    class Cut(Tiny):
        def forward(self, input_ids):
            return self.head(self.norm(self.embed(input_ids).detach()))

    with pytest.raises(
        RuntimeError, match="'norm' does not depend on source 'embed', though that ran before"
    ):
        call(Cut().double(), source="embed")


def test_statistics_of_batch_norms_are_put_back():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh()).double().train()
    x = torch.randn(5, 3, dtype=F64)
    J = jactri.layer_jacobian(net, x, "0", "2", (None, None))["0"]
    assert torch.equal(net[1].running_mean, torch.zeros(3, dtype=F64))
    assert_close(J, torch.autograd.functional.jacobian(net[1:], net[0](x)), F64, length=15)


def test_inside_of_a_transform():
    model = tiny()
    with pytest.raises(RuntimeError, match=r"not available inside of a torch.func transform"):
        torch.func.vmap(lambda x: call(model, x[None])["layers.0"])(ids())

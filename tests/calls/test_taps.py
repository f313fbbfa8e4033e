"""jactri.taps: activations by the names of layers, kept while a module runs as its owner runs it."""

import collections
import contextlib
import dataclasses

import pytest
import torch
from common import F64, mlp
from layer_cases import TOKENS, by_hand, entering, ids, tiny, whole
from tolerances import assert_close
from torch import nn
from torch.utils.checkpoint import checkpoint

import jactri


def hooks(model):
    """All that a hook may leave behind."""
    kinds = [
        "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
        "_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks",
    ]  # fmt: skip
    return sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)


def rows(y, x):
    found = [
        torch.autograd.grad(e, x, retain_graph=True, allow_unused=True)[0]
        for e in y.flatten().unbind()
    ]
    zero = torch.zeros_like(x)
    return torch.stack([zero if g is None else g for g in found]).reshape(*y.shape, *x.shape)


def test_taps_of_a_frozen_model_of_tokens_are_one_graph():
    model, given = tiny(), ids()
    before = {n: p.clone() for n, p in model.named_parameters()}
    with jactri.taps(model, ["layers.*", "norm"]) as taps:
        out = model(given)
    assert list(taps) == ["layers.0", "layers.1", "layers.2", "norm"]
    assert torch.equal(taps["norm"], out["hidden"])
    assert torch.equal(taps["layers.1"], entering(model, "layers.1", given))
    J = jactri.jacobian_of(taps["norm"], taps["layers.0"])
    assert_close(J, whole(model, "layers.0", given), F64, length=60)
    both = jactri.jacobian_of(taps["norm"], (taps["layers.0"], taps["layers.2"]), per_sample=True)
    for i, name in enumerate(("layers.0", "layers.2")):
        truth = whole(model, name, given)
        for n in range(2):
            assert_close(both[i][n], truth[n, ..., n, :, :], F64, length=60)
    assert hooks(model) == 0
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_the_function_between_taps_goes_into_other_calls():
    model, given = tiny(), ids(1)
    with jactri.taps(model, ["layers.1", "norm"]) as taps:
        model(given)
    h, rest = taps["layers.1"], taps.function("layers.1", "norm")
    assert torch.equal(rest(h), by_hand(model, "layers.1")(h))
    J = whole(model, "layers.1", given).reshape(30, 30)
    c = torch.randn(2, *h.shape, dtype=F64)
    assert_close(jactri.vjp(rest, h, c)[1].flatten(1), c.flatten(1) @ J, F64, length=60)
    for differentiate in (None, "auto"):
        along = jactri.jvp(rest, h, c, differentiate=differentiate)[1]
        assert_close(along.flatten(1), c.flatten(1) @ J.T, F64, length=60)
    assert_close(jactri.jtj(rest, h).reshape(30, 30), J.T @ J, F64, length=60)
    assert_close(jactri.diagonal(rest, h).flatten(), J.diagonal(), F64, length=60)
    assert_close(jactri.jacobian(rest, h).reshape(30, 30), J, F64, length=60)
    (grad,) = torch.autograd.grad(taps["norm"], h, c[0])
    assert_close(grad.flatten(), c[0].flatten() @ J, F64, length=60)
    assert hooks(model) == 0


def test_functions_that_there_are_not():
    model, given = tiny(dropout=0.5), ids()
    names = ["layers.*", "layers.0.attn:output[1]"]
    taps = tapped(model, names, given)
    with pytest.raises(
        RuntimeError, match=r"'layers.0' does not depend on .*, which comes after it"
    ):
        taps.function("layers.1", "layers.0")
    with pytest.raises(RuntimeError, match=r"does not depend on source 'layers.1'"):
        taps.function("layers.1", "layers.1")
    with pytest.raises(KeyError, match="'norm' is not tapped"):
        taps.function("layers.1", "norm")
    rest = taps.function("layers.0", "layers.2")
    with pytest.raises(
        RuntimeError, match=r"has shape \(2, 5, 6\), got an activation of \(2, 4, 6\)"
    ):
        rest(taps["layers.0"][:, 1:])
    taps = tapped(model.train(), names, given)
    with pytest.raises(
        RuntimeError, match=r"another 'layers.2' when it runs again .*model.eval\(\)"
    ):
        taps.function("layers.0", "layers.2")
    with jactri.taps(model.eval(), names) as taps:
        hidden, _ = model.layers[0](model.embed(given))
        model.layers[2](model.layers[1](hidden)[0])
        with pytest.raises(RuntimeError, match="whose context is over"):
            taps.function("layers.0", "layers.2")
    with pytest.raises(RuntimeError, match="the model was called 0 times in the context"):
        taps.function("layers.0", "layers.2")


@pytest.mark.parametrize("frozen", [True, False])
def test_ports_keys_and_keywords(frozen):
    model, given = tiny().requires_grad_(not frozen), ids()
    names = [
        "layers.1:input", "layers.1.attn:input", "layers.1.attn:output[1]", "layers.1:output[1]", "", ":output[logits]",
        "layers.1.attn:input[hidden]", "head:input[0]",
    ]  # fmt: skip
    with jactri.taps(model, names) as taps:
        model(inputs_embeds=model.embed(given), attention_mask=torch.ones(2, TOKENS))
    assert set(taps) == set(names)
    assert len(taps) == len(names)
    assert torch.equal(taps["layers.1:input"], entering(model, "layers.0", given))
    assert torch.equal(taps["layers.1.attn:input"], taps["layers.1.attn:input[hidden]"])
    assert taps["layers.1:output[1]"].shape == (2, 2, TOKENS, TOKENS)
    assert torch.equal(taps[":output[logits]"], model.head(taps["head:input[0]"]))
    assert torch.equal(taps[""], taps["head:input[0]"])  # the first floating-point tensor
    # by what the attention takes alone: the residual is another way to its layer
    J = jactri.jacobian_of(taps[""], taps["layers.1.attn:input"])
    assert_close(J, rows(taps[""], taps["layers.1.attn:input"]), F64, length=60)
    through = jactri.jacobian_of(taps[""], taps["layers.1:input"])
    assert not torch.allclose(J, through)


def test_patterns_are_of_parts_of_paths():
    model = tiny()
    with jactri.taps(model, "layers.?.mlp.*") as taps:
        model(ids())
    assert list(taps) == [f"layers.{i}.mlp.{j}" for i in range(3) for j in range(3)]
    with jactri.taps(model, ["**.qkv", "layers.0:output", "layers.0"]) as taps:
        model(ids())
    assert list(taps) == [
        "layers.0.attn.qkv",
        "layers.0",
        *(f"layers.{i}.attn.qkv" for i in (1, 2)),
    ]
    assert taps["layers.0:output"] is taps["layers.0"]
    assert repr(taps).startswith("Taps({'layers.0.attn.qkv': (2, 5, 18), ")


def test_patterns_leave_out_what_has_no_activation():
    class Some(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.positions, self.pick = nn.Embedding(5, 3), nn.Tanh(), nn.Identity()
            self.last, self.never = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, ids):
            x = self.embed(ids)
            with torch.no_grad():
                where = self.positions(x)
            return self.last(x + where), self.pick(ids)

    for pattern, wanted in (("*", ["embed", "last"]), ("**:input", ["last:input"])):
        taps = tapped(Some(), pattern, ids(1) % 5)
        assert list(taps) == wanted
    with pytest.raises(RuntimeError, match="'positions' runs under no_grad"):
        tapped(Some(), ["*", "positions"], ids(1) % 5)
    with pytest.raises(RuntimeError, match="'pick': a Tensor has no floating-point tensor"):
        tapped(Some(), ["pick", "*"], ids(1) % 5)


def test_writes_in_place_reach_no_tap():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, dtype=F64)
    with jactri.taps(net, ["0", "1:input", "1", "2"]) as taps:
        net(x)
    hidden = net[0](x)
    assert torch.equal(taps["0"], hidden)
    assert torch.equal(taps["1:input"], hidden)
    assert torch.equal(taps["1"], hidden.relu())
    J = jactri.jacobian_of(taps["2"], (taps["0"], taps["1:input"], taps["1"]), per_sample=True)
    on = (hidden > 0).double()
    assert_close(J[0], net[2].weight * on[:, None], F64, length=4)
    assert_close(J[1], net[2].weight * on[:, None], F64, length=4)
    assert_close(J[2], net[2].weight.expand(5, 2, 4), F64, length=4)


def test_a_layer_that_hands_its_input_through_is_a_place_of_its_own():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.same, self.out = nn.Identity(), nn.Identity()

        def forward(self, x):
            return self.out(3 * self.same(x) + x)

    x = torch.randn(2, 3, dtype=F64, requires_grad=True)
    model = Residual()
    with jactri.taps(model, ["same", "out", ":input"]) as taps:
        model(x)
    eye = torch.eye(3, dtype=F64).expand(2, 3, 3)
    assert torch.equal(jactri.jacobian_of(taps["out"], taps["same"], per_sample=True), 3 * eye)
    assert torch.equal(jactri.jacobian_of(taps["out"], taps[":input"], per_sample=True), 4 * eye)
    assert torch.equal(jactri.jacobian_of(taps["out"], x, per_sample=True), 4 * eye)


def test_what_runs_several_times_has_numbers():
    layer = nn.Linear(3, 3).double()

    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(self.layer(x).tanh())

    model = Again()
    with jactri.taps(model, ["layer", "layer:input#1"]) as taps:
        model(torch.randn(2, 3, dtype=F64))
    assert list(taps) == ["layer#0", "layer:input#1", "layer#1"]
    assert torch.equal(taps["layer:input#1"], taps["layer#0"].tanh())
    with pytest.raises(KeyError, match=r"ran 2 times: write 'layer#0' to 'layer#1'"):
        taps["layer"]
    for name in ("layer#2", "layer:input#0"):
        with pytest.raises(KeyError, match=f"'{name}' is not tapped: it ran 2 times"):
            taps[name]
    J = jactri.jacobian_of(taps["layer#1"], taps["layer#0"], per_sample=True)
    slope = 1 - taps["layer#0"].tanh() ** 2
    assert_close(J, layer.weight * slope[:, None], F64, length=3)


Pair = collections.namedtuple("Pair", "count first second")


@dataclasses.dataclass
class Fields:
    count: int
    first: torch.Tensor | None = None


@pytest.mark.parametrize(
    "pack",
    [
        lambda y: Pair(1, y, None), lambda y: [3, y], lambda y: {"n": None, "y": y}, lambda y: Fields(2, y),
        lambda y: collections.OrderedDict(n=2, y=y), lambda y: (torch.arange(2), (None, [y])), lambda y: y,
    ],
)  # fmt: skip
def test_all_that_a_layer_may_return(pack):
    class Packed(nn.Module):
        def forward(self, x):
            return pack(x * 2)

    model, x = Packed(), torch.randn(2, 3, dtype=F64)
    with jactri.taps(model, "") as taps:
        out = model(x)
    assert type(out) is type(pack(x))
    assert torch.equal(taps[""], x * 2)
    assert taps[""].requires_grad


def failing(model, names):
    with jactri.taps(model, names):
        model(ids())
        assert hooks(model) > 0
        raise ZeroDivisionError


def test_no_hook_stays_after_an_exception():
    model = tiny()
    with pytest.raises(ZeroDivisionError):
        failing(model, ["layers.*", "head:input"])
    assert hooks(model) == 0
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        failing(model, "norm")
    assert torch.is_grad_enabled()
    taps = jactri.taps(model, "norm")
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match="'norm' did not run in this call of Tiny: call the"),
        taps,
    ):
        assert torch.is_grad_enabled()
    assert hooks(model) == 0
    with pytest.raises(RuntimeError, match="entered already"), taps:
        pass


def test_in_inference_mode_and_compiled():
    model, given = tiny(), ids()
    with torch.inference_mode():
        with jactri.taps(model, ["layers.0", "norm"]) as taps:
            model(given)
        J = jactri.jacobian_of(taps["norm"], taps["layers.0"])
    assert_close(J, whole(model, "layers.0", given), F64, length=60)


def test_checkpointed_layers():
    class Saved(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = mlp(3, 4, 3), mlp(3, 4, 3), nn.Linear(3, 2)

        def forward(self, x):
            x = self.first(x)
            return self.last(checkpoint(self.second, x, use_reentrant=False))

    torch.manual_seed(0)
    model, x = Saved().double(), torch.randn(2, 3, dtype=F64)
    with jactri.taps(model, ["first", "second.0", "last"]) as taps:
        model(x)
    for name in ("first", "second.0"):
        J = jactri.jacobian_of(taps["last"], taps[name])
        assert_close(J, rows(taps["last"], taps[name]), F64, length=8)


@dataclasses.dataclass(frozen=True)
class Sealed:
    """Of which a copy by ``dataclasses.replace`` is another."""

    state: torch.Tensor
    made: list = dataclasses.field(init=False, default_factory=list)


def test_what_else_a_layer_puts_into_its_output_is_kept():
    class First(nn.Module):
        def forward(self, x):
            found = Sealed(x.sin())
            found.made.append("by hand")
            return found

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = First()

        def forward(self, x):
            found = self.first(x)
            assert found.made == ["by hand"]
            return found.state.square()

    model, x = Model(), torch.randn(3, dtype=F64)
    with jactri.taps(model, ["first", ""]) as taps:
        model(x)
    assert_close(jactri.jacobian_of(taps[""], taps["first"]), (2 * x.sin()).diag(), F64, length=2)


def test_one_tensor_in_several_places_is_one_activation():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.attn = nn.Linear(4, 4), nn.MultiheadAttention(4, 2, batch_first=True)
            self.twice = Twice()

        def forward(self, x):
            h = self.first(x)
            y = self.attn(h, h, value=h)[0]
            a, kept = self.twice(y)
            return a.sin() * kept["last"][0]

    class Twice(nn.Module):
        def forward(self, y):
            y = y * 2
            return y, {"last": [y]}

    torch.manual_seed(0)
    model, x = Model().to(F64), torch.randn(1, 3, 4, dtype=F64)
    with jactri.taps(model, ["attn:input", "attn:input[0]", "twice", ""]) as taps:
        model(x)
    h = model.first(x).detach().requires_grad_()
    want = torch.autograd.functional.jacobian(lambda h: model.attn(h, h, h)[0], h)
    got = jactri.jacobian_of(taps["twice"], taps["attn:input"])
    assert_close(got, 2 * want, F64, length=4)
    query = torch.autograd.functional.jacobian(lambda q: model.attn(q, h, h)[0], h)
    got = jactri.jacobian_of(taps["twice"], taps["attn:input[0]"])
    assert_close(got, 2 * query, F64, length=4)
    y = taps["twice"].detach().flatten()
    got = jactri.jacobian_of(taps[""], taps["twice"]).reshape(12, 12)
    assert_close(got, (y.cos() * y + y.sin()).diag(), F64, length=2)


def test_what_is_written_to_a_target_later_is_not_of_it():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.same = nn.Linear(3, 3), nn.Identity()

        def forward(self, x):
            h = self.first(x).sin()
            y = self.same(h)
            h.add_(1)
            return y * h

    model, x = Model().to(F64), torch.randn(2, 3, dtype=F64)
    with jactri.taps(model, ["first", "same:input"]) as taps:
        model(x)
    J = jactri.jacobian(taps.function("first", "same:input"), taps["first"].detach())
    assert_close(J, rows(taps["same:input"], taps["first"]), F64, length=2)


# -- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ("layer.1", ValueError, "matches no module of Tiny; did you mean .*'layers.1'"),
        (
            "model.layers.*.mlp",
            ValueError,
            "matches no module of Tiny; did you mean .*'layers.0.mlp'",
        ),
        ("zzz", ValueError, r"there are 'embed', 'layers', 'layers.0', .*\.\.\."),
        (["norm", 3], TypeError, "a layer's name must be a str, got 3"),
        (3, TypeError, "names must be a name or a list of names"),
        ([], IndexError, "names is empty"),
        ("norm:gradient", ValueError, "is no layer's name: write 'path.to.module'"),
    ],
)
def test_names_that_there_are_not(names, error, message):
    with pytest.raises(error, match=message):
        jactri.taps(tiny(), names)


def test_a_function_has_no_layers():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got <class 'function'>"):
        jactri.taps(lambda x: x, "a")


def tapped(model, names, given, context=contextlib.nullcontext):
    with jactri.taps(model, names) as taps, context():
        model(given)
    return taps


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["norm", "spare"], "'spare' did not run in this call of Tiny, and 'norm' did"),
        (
            "embed:input",
            "'embed:input': the input has no floating-point tensor; name another layer",
        ),
        ("layers.0:output[7]", r"a tuple has no floating-point tensor at \[7\]"),
        ("norm#4", "'norm#4': it ran 1 times, and '#0' is the first"),
    ],
)
def test_what_cannot_be_tapped_says_so(names, message):
    model = tiny()
    model.spare = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match=message):
        tapped(model, names, ids())
    assert hooks(model) == 0


def test_without_a_graph_and_without_the_name():
    model = tiny()
    with pytest.raises(RuntimeError, match="'norm' runs under no_grad"):
        tapped(model, "norm", ids(), torch.no_grad)
    assert hooks(model) == 0
    taps = tapped(model, ["norm", "layers.1"], ids())
    with pytest.raises(KeyError, match=r"'layers.2' is not tapped; did you mean 'layers.1'"):
        taps["layers.2"]


@pytest.mark.parametrize("view", [False, True])
def test_an_in_place_cache_is_refused_and_keeps_no_graph(view):
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.keys = nn.Linear(3, 3)
            self.register_buffer("cache", torch.zeros(4, 3)[1:3] if view else torch.zeros(2, 3))

        def forward(self, x):
            self.cache[:] = self.keys(x)
            return self.cache.sum(0)

    model = nn.Sequential(Cached())
    with pytest.raises(
        RuntimeError, match=r"buffer '0.cache', as an in-place cache.*use_cache=False"
    ):
        tapped(model, "0", torch.randn(2, 3))
    assert not model[0].cache.requires_grad

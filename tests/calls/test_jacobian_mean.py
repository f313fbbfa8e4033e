"""jactri.JacobianMean: means over prompts, their errors, and files that a run goes on from."""

import pathlib
import sys

import pytest
import torch
from common import F64
from layer_cases import ids, tiny
from tolerances import assert_close

import jactri

pytest.importorskip("safetensors")

SOURCES = ["layers.0", "layers.1"]


def prompts(n=5):
    """Of different lengths, one a batch with padding."""
    found = [ids(1, 3 + k) + k for k in range(n - 1)]
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    return [*found, {"input_ids": ids(2, 4), "attention_mask": mask}]


def mean_of(model=None, **options):
    return jactri.JacobianMean(tiny() if model is None else model, SOURCES, "norm", **options)


def truth(given, **options):
    """Means and standard errors, from all Jacobians at once."""
    found = [jactri.layer_jacobian(tiny(), p, SOURCES, "norm", **options) for p in given]
    stacks = {name: torch.stack([f[name] for f in found]) for name in SOURCES}
    errors = {name: s.std(0) / len(given) ** 0.5 for name, s in stacks.items()}
    return {name: s.mean(0) for name, s in stacks.items()}, errors


def assert_same(mean, given, **options):
    values, errors = truth(given, **options)
    assert mean.count == len(given)
    for name in SOURCES:
        assert_close(mean.value()[name], values[name], F64, length=50)
        assert_close(mean.standard_error()[name], errors[name], F64, length=500)


def test_means_and_errors():
    mean = mean_of()
    for prompt in prompts():
        assert mean.add(prompt) is mean
    assert_same(mean, prompts())
    assert repr(mean) == "JacobianMean(['layers.0', 'layers.1'] to 'norm', 5 prompts)"
    mean.value()["layers.0"].zero_()  # a copy
    assert_same(mean, prompts())


def test_half_precision_is_summed_in_float32():
    model = tiny().to(torch.bfloat16)
    mean = mean_of(model).run(prompts())
    one = jactri.layer_jacobian(model, prompts()[0], SOURCES, "norm")["layers.0"]
    assert one.dtype == torch.bfloat16
    assert mean.value()["layers.0"].dtype == torch.float32


def test_a_file_holds_all_of_it(tmp_path):
    options = {
        "reduce": ("sum", torch.tensor([0.5, 0.0, 2.0], dtype=F64)),
        "rows": torch.eye(6, dtype=F64)[:4],
    }
    given = [ids(2, 3), ids(1, 3)]
    mean = mean_of(**options).run(given)
    mean.save(tmp_path / "mean")
    left = jactri.JacobianMean.load(tmp_path / "mean")
    assert_same(left, given, **options)
    with pytest.raises(RuntimeError, match="loaded without its model"):
        left.add(given[0])
    again = jactri.JacobianMean.load(str(tmp_path / "mean"), tiny(), chunk_size=2)
    assert_same(again.add(given[1] + 1), [*given, given[1] + 1], **options)
    assert [p.name for p in tmp_path.iterdir()] == ["mean"]


def test_a_weight_at_both_ends_is_saved(tmp_path):
    w = torch.ones(3, dtype=F64)
    mean = mean_of(reduce=(w, w)).run([ids(1, 3)], tmp_path / "mean")
    found = jactri.JacobianMean.load(tmp_path / "mean").merge(mean)
    assert found.count == 2


def test_an_interrupted_run_goes_on(tmp_path):
    path, given = tmp_path / "lens.safetensors", prompts()

    def some(n):
        yield from given[:n]
        raise KeyboardInterrupt

    first = mean_of()
    with pytest.raises(KeyboardInterrupt):
        first.run(some(2), path)
    assert jactri.JacobianMean.load(path).count == 2
    ran = []
    model = tiny()
    model.register_forward_hook(lambda *_: ran.append(1))
    second = mean_of(model).run(given, path, every=0.0)
    assert len(ran) == 3
    assert_same(second, given)
    assert_same(jactri.JacobianMean.load(path), given)
    assert_same(first.run(given, path), given)  # the first one finds what the second did
    assert_same(second.run(given, path), given)
    with pytest.raises(RuntimeError, match="prompts end after 3, but 5 were added"):
        mean_of().run(given[:3], path)
    with pytest.raises(RuntimeError, match=r"prompts\[1\] is not the one that was added before"):
        mean_of().run([given[0], given[2]], path)
    with pytest.raises(RuntimeError, match="has other prompts than this mean"):
        mean_of().add(given[3]).run(given, path)
    assert_same(jactri.JacobianMean.load(path), given)


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "mean"
    mean = mean_of().run(prompts()[:1], path)
    before = path.read_bytes()

    def fails(tensors, beside, metadata):
        pathlib.Path(beside).write_bytes(b"half")
        raise OSError("disk full")

    import safetensors.torch

    with monkeypatch.context() as patched:
        patched.setattr(safetensors.torch, "save_file", fails)
        with pytest.raises(OSError, match="disk full"):
            mean.add(prompts()[1]).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["mean"]


def test_what_is_torn_is_not_saved(tmp_path, monkeypatch):
    """An interrupt between the sums of two layers: the file stays that of whole prompts."""
    path, given = tmp_path / "mean", prompts()
    mean = mean_of().run(given[:2], path)
    writes = []

    class Interrupting(dict):
        def __setitem__(self, name, value):
            writes.append(name)
            if len(writes) == 2:
                raise KeyboardInterrupt
            super().__setitem__(name, value)

    mean._mean = Interrupting(mean._mean)
    with pytest.raises(KeyboardInterrupt):
        mean.run(given, path)
    assert_same(jactri.JacobianMean.load(path), given[:2])
    for use in (
        mean.value,
        mean.standard_error,
        lambda: mean.save(path),
        lambda: mean.add(given[2]),
    ):
        with pytest.raises(RuntimeError, match="was interrupted while its sums were written to"):
            use()
    assert_same(mean_of().run(given, path), given)


def test_parts_are_merged(tmp_path):
    given = prompts()
    first, second = mean_of().run(given[:2]), mean_of().run(given[2:], tmp_path / "second")
    assert first.merge(tmp_path / "second") is first
    assert_same(first, given)
    assert_same(mean_of().merge(second), given[2:])
    assert_same(second.merge(mean_of()), given[2:])
    assert_same(mean_of().merge(mean_of().run(given[:1])).merge(second), [given[0], *given[2:]])
    first.add(given[0])
    assert_same(second, given[2:])


def test_progress(capsys):
    pytest.importorskip("rich")
    mean_of().run(prompts(), progress=True)
    assert "prompts" in capsys.readouterr().err
    assert mean_of().run(iter(prompts()[:1]), progress=True).count == 1


# -- bad input --------------------------------------------------------------------------------------


def changed():
    model = tiny()
    with torch.no_grad():
        model.layers[1].mlp[0].weight[2, 3] += 1e-12
    return model


@pytest.mark.parametrize("model", [changed, lambda: tiny().float(), lambda: tiny(depth=4)])
def test_another_model_is_refused(model, tmp_path):
    path, model = tmp_path / "mean", model()
    mean = mean_of().run(prompts()[:1], path)
    with pytest.raises(RuntimeError, match="is of another model"):
        jactri.JacobianMean.load(path, model)
    with pytest.raises(RuntimeError, match="is of another model"):
        mean_of(model).run(prompts(), path)
    with pytest.raises(RuntimeError, match="other is of another model"):
        mean.merge(mean_of(model))
    assert jactri.JacobianMean.load(path, tiny()).count == 1


@pytest.mark.parametrize(
    ("options", "differs"),
    [
        (
            {"reduce": ("mean", "mean")},
            r"its reduce is \['sum', 'mean'\], and here \['mean', 'mean'\]",
        ),
        ({"reduce": ("sum", 0)}, "its reduce is"),
        ({"rows": 3}, "its rows is None, and here 3"),
        ({"seed": 1}, "its seed is 0, and here 1"),
    ],
)
def test_another_reduction_is_refused(options, differs, tmp_path):
    path = tmp_path / "mean"
    mean_of().run(prompts()[:1], path)
    with pytest.raises(RuntimeError, match=f"is of another reduction: {differs}"):
        mean_of(**options).run(prompts(), path)
    with pytest.raises(RuntimeError, match="its source is"):
        jactri.JacobianMean(tiny(), "layers.0", "norm").merge(path)
    with pytest.raises(RuntimeError, match="has errors=True, and this errors=False"):
        mean_of(errors=False).merge(path)


def test_what_there_is_no_mean_of(tmp_path):
    mean = mean_of(errors=False)
    with pytest.raises(RuntimeError, match="no mean of no prompts"):
        mean.value()
    mean.run(prompts()[:2])
    with pytest.raises(RuntimeError, match="errors=True"):
        mean.standard_error()
    with pytest.raises(RuntimeError, match="needs two prompts, there are 1"):
        mean_of().add(prompts()[0]).standard_error()
    with pytest.raises(TypeError, match="model must be"):
        jactri.JacobianMean(torch.tanh, SOURCES, "norm")
    whole = mean_of(reduce=("sum", None)).add(ids(1, 3))
    with pytest.raises(RuntimeError, match="reduce the tokens at both ends"):
        whole.add(ids(1, 4))
    assert whole.count == 1
    with pytest.raises(FileNotFoundError, match="there is no file"):
        jactri.JacobianMean.load(tmp_path / "none")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(RuntimeError, match="is no whole safetensors file"):
        jactri.JacobianMean.load(tmp_path / "text")


def test_weights_that_change_in_between_are_noticed():
    model = tiny()
    mean = mean_of(model).add(prompts()[0])
    with torch.no_grad():
        model.norm.bias.add_(1)
    with pytest.raises(RuntimeError, match=r"'norm.bias' of the model was written to"):
        mean.add(prompts()[1])


@pytest.mark.parametrize("how", ["replaced", "data", "dtype", "buffer", "module"])
def test_models_that_change_in_between_are_noticed(how):
    model = tiny()
    model.norm.register_buffer("scale", torch.ones(3))
    mean = mean_of(model).add(prompts()[0])
    before = mean.value()
    if how == "replaced":
        model.norm.bias = torch.nn.Parameter(model.norm.bias + 1)
    elif how == "data":
        model.norm.bias.data = model.norm.bias.data + 1
    elif how == "dtype":
        model.float()
    elif how == "buffer":
        model.norm.scale.add_(1)
    else:
        model.layers[1].mlp[1] = torch.nn.ReLU()
    with pytest.raises(RuntimeError, match="of the model was written to or replaced since"):
        mean.add(prompts()[1])
    assert all(torch.equal(mean.value()[name], before[name]) for name in before)


def test_equal_weights_elsewhere_are_the_same_model():
    model = tiny()
    mean = mean_of(model).add(prompts()[0])
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    for prompt in prompts()[1:]:
        mean.add(prompt)
    assert_same(mean, prompts())


def test_rows_are_the_callers_no_more():
    rows = torch.randn(2, 6, dtype=F64)
    mean = mean_of(rows=rows).add(prompts()[0])
    before = mean.value()
    rows.zero_()
    mean.add(prompts()[0])
    assert all(torch.equal(mean.value()[name], before[name]) for name in before)


def test_overrides_have_no_place_in_a_mean():
    mean = mean_of()
    with (
        jactri.overrides({"softmax": jactri.zero}),
        pytest.raises(RuntimeError, match=r"JacobianMean is not available .* what layer_jacobian"),
    ):
        mean.add(prompts()[0])
    assert mean.add(prompts()[0]).count == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": 3}, "source must be a name"),
        ({"reduce": 5}, "reduce must be a pair"),
        ({"seed": "a"}, "seed must be an int, got 'a'"),
    ],
)
def test_what_is_no_question_is_told_at_once(options, message):
    with pytest.raises(TypeError, match=message):
        jactri.JacobianMean(tiny(), **{"source": SOURCES, "target": "norm", **options})


def test_without_safetensors(monkeypatch, tmp_path):
    mean = mean_of().add(prompts()[0])
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for use in (
        lambda: mean.save("x"),
        lambda: mean.run([], "x"),
        lambda: jactri.JacobianMean.load("x"),
    ):
        with pytest.raises(
            ImportError, match=r"needs safetensors: pip install safetensors, .*jactri\[lens\]"
        ):
            use()
    assert mean.value()

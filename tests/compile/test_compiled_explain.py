"""What the compiler made of a call, as `explain` tells it; and what of it a second process finds on disk."""

import json
import logging
import os
import subprocess
import sys
import time

import pytest
import torch
from common import F64, seeded
from test_engines import needs_compiler
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.exc import InductorError

import jactri
from jactri._src.compile.compilation import Kernel, _kernels


def net():
    return seeded(6, 9, 9, 4)


def names(part, fused):
    return [str(k) for k in part.kernels if k.fused is fused]


# -- explain ----------------------------------------------------------------------------------------


@needs_compiler
def test_kernels_and_calls():
    x = torch.randn(5, 6, dtype=F64)
    made = jactri.compile(net(), x, per_sample=True).explain()
    (part,) = made.parts
    assert made.reason is None and part.engine == "inductor" and not made.cuda_graph
    # of the function: three addmm, of which the last one's value is not asked for; of the sweep two products
    assert names(part, False) == ["addmm", "addmm", "mm", "mm"]
    # their activations, and what the sweep does with each: the first by itself, the other's with its derivative
    fused = [k.ops for k in part.kernels if k.fused]
    assert ["tanh" in ops for ops in fused] == [True, True, False]
    assert ["mul" in ops for ops in fused] == [False, True, True]
    assert made.looked_up == tuple(f"{k}.{name}" for k in (0, 2, 4) for name in ("weight", "bias"))
    text = str(made)
    assert "inductor runs 26 ops as 3 kernels and 4 calls" in text
    assert "looked up at each call: 0.weight, 0.bias" in text and "traced in" in text


@needs_compiler
def test_explain_compiles_if_asked():
    x = torch.randn(5, 6, dtype=F64)
    without = jactri.explain(net(), x, per_sample=True)
    assert without.compiled is None
    found = jactri.explain(net(), x, per_sample=True, compiled=True)
    assert found.steps == without.steps
    assert names(found.compiled.parts[0], False) == ["addmm", "addmm", "mm", "mm"]
    assert str(without) in str(found) and str(found.compiled) in str(found)


def test_explain_of_several_inputs_and_options():
    x, u = torch.randn(2, 5, 3, dtype=F64)

    def func(a, b):
        return (a * b).sin()

    found = jactri.explain(func, (x, u), strategy="forward-mode", compiled=True, engine="fx")
    assert found.direction == "forward-mode" and found.compiled.parts[0].kernels is None
    assert "fx runs" in str(found) and "one after another" in str(found)
    with pytest.raises(TypeError, match="inputs"):
        jactri.explain(func, [1.0], compiled=True)
    with pytest.raises(TypeError, match="did you mean 'strategy'"):
        jactri.explain(func, (x, u), strateg="auto")
    with pytest.raises(ValueError, match="engine must be one of"):
        jactri.explain(func, (x, u), compiled=True, engine="C")


@needs_compiler
def test_of_a_backward():
    x = torch.randn(5, 6, dtype=F64)
    made = jactri.compile(net(), x, per_sample=True, create_graph=True).explain()
    assert [p.name for p in made.parts] == ["the call", "its backward"]
    assert all("mm" in names(p, False) for p in made.parts)
    assert "its backward: inductor runs" in str(made)


def test_of_each_signature():
    func, x = net(), torch.randn(5, 6, dtype=F64)
    compiled = jactri.compile(func, x, per_sample=True, engine="fx")
    held = torch.ones(6, dtype=F64)
    other = jactri.compile(lambda x: func(x * held), x, engine="fx")
    assert other.explain().fixed == 1 and "1 tensor that no module holds" in str(other.explain())
    func.train(False)
    wide = compiled.explain(torch.randn(3, 6, dtype=F64))
    again = compiled.explain(x)
    assert compiled.traces == 3 and again.seconds != wide.seconds
    assert compiled.explain().seconds == again.seconds  # that of the last trace
    assert compiled.explain(torch.randn(3, 6, dtype=F64)).seconds == wide.seconds
    assert compiled.traces == 3


def test_of_what_runs_eagerly():
    compiled = jactri.compile(lambda x: x * x.sum().item(), torch.randn(4, dtype=F64), engine="fx")
    made = compiled.explain()
    assert made.reason == compiled.reason and made.parts == ()
    assert "runs eagerly" in str(made) and compiled.reason in str(made)


@pytest.mark.parametrize(
    "error", [InductorError(RuntimeError("no"), "no"), ValueError("Cannot view a tensor")]
)
def test_where_the_compiler_fails(monkeypatch, caplog, error):
    def fails(graph, like, options):
        raise error

    monkeypatch.setitem(jactri._src.compile.engines._BUILD, "inductor", fails)
    monkeypatch.setattr(jactri._src.compile.engines, "has_compiler", lambda: True)
    x = torch.randn(4, dtype=F64)
    compiled = jactri.compile(torch.sin, x)
    torch.testing.assert_close(compiled(x), torch.diag(x.cos()))
    assert compiled.explain().parts[0].engine == "fx"
    assert "cannot compile the graph" in caplog.text


def test_the_time_is_logged(caplog):
    caplog.set_level(logging.INFO, "jactri")
    compiled = jactri.compile(torch.sin, torch.randn(4, dtype=F64), engine="fx")
    assert "compiled jacobian: traced in" in caplog.text
    assert "traced in" in repr(compiled) and "compiled in" in repr(compiled)


def test_names_of_kernels():
    """As torch 2.13 has them; a node of a call is not that of the kernel that lays out its operand."""
    found = _kernels(
        {
            "extern_kernels.bmm:10": ["bmm"],
            "triton_poi_fused_bmm_clone_3:2": ["bmm", "clone_1", "mul_3", "mul_12"],
            "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:9": ["x", "view_1"],
            "aoti_torch_cpu_mm_out:11": ["mm"],
            "torch.ops.mine.op.default:12": ["op_default"],
            "cpp_fused_0:13": ["slice_tensor_1", "full_default", "convert_element_type", "relu"],
        }
    )
    assert found[0] == Kernel("triton_poi_fused_bmm_clone_3", ("clone", "mul", "mul"), True)
    assert str(found[0]) == "clone, mul x2"
    assert [k.ops[0] for k in found[1:5]] == [
        "_scaled_dot_product_flash_attention_for_cpu", "bmm", "mm", "mine.op",
    ]  # fmt: skip
    assert found[5].ops == ("convert_element_type", "full", "relu", "slice")


# -- how often it compiles ----------------------------------------------------------------------------


def compilations():
    """How many graphs were asked of Inductor."""
    return sum(counters["inductor"][f"fxgraph_cache_{k}"] for k in ("hit", "miss", "bypass"))


@needs_compiler
@pytest.mark.parametrize(("options", "graphs"), [({}, 1), ({"create_graph": True}, 2)])
def test_a_signature_is_compiled_once(options, graphs):
    func, before = net(), compilations()
    compiled = jactri.compile(func, torch.randn(5, 6, dtype=F64), per_sample=True, **options)
    assert compilations() - before == graphs
    for _ in range(3):
        compiled(torch.randn(5, 6, dtype=F64))
        with torch.no_grad():
            func[0].weight.mul_(1.1)
    func[2].weight = nn.Parameter(torch.randn(9, 9, dtype=F64))
    compiled(torch.randn(5, 6, dtype=F64))
    compiled.explain()
    assert compilations() - before == graphs and compiled.traces == 1
    compiled(torch.randn(3, 6, dtype=F64))
    assert compilations() - before == 2 * graphs


def hits_and_misses():
    return [counters["inductor"][f"fxgraph_cache_{k}"] for k in ("hit", "miss")]


def looked_for(scale):
    """How often a call that no other number was compiled with is found on disk, and how often not; what it became."""
    torch.manual_seed(0)
    func, x = seeded(3, 4, 2, dtype=torch.float32), torch.randn(5, 3)
    before = hits_and_misses()
    step = jactri.compile(lambda x: func(x) * scale, x, per_sample=True)
    found = [n - b for n, b in zip(hits_and_misses(), before, strict=True)]
    off = (step(x) - jactri.jacobian(step.func, x, per_sample=True)).abs().max().item()
    return [*found, [[k.name, list(k.ops)] for p in step.explain().parts for k in p.kernels], off]


@needs_compiler
def test_a_second_process_finds_it_on_disk():
    """Two that begin alike: what is set of a process is a part of what is looked for."""
    scale = 1 + time.time_ns() % 10**9 / 10**9
    code = f"import json, test_compiled_explain as t; print(json.dumps(t.looked_for({scale})))"
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    made = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        made.append(json.loads(done.stdout.splitlines()[-1]))
    first, second = made
    assert first[:2] == [0, 1] and second[:2] == [1, 0]
    assert first[2] == second[2] and first[2]
    assert all(off < 1e-6 for *_, off in (first, second))

"""Every kernel compiles for every target, uses tensor cores, and stays inside its budget of registers and memory."""

import json
import re
from pathlib import Path

import pytest
import triton
from pool import LIMIT, run

from jactri.kernels import support

if support.interpreted():
    raise pytest.UsageError("tests/budgets compiles: run it without TRITON_INTERPRET")

from cases import CASES, jobs

from benchmarks.gpu.driver import SHARED

BUDGETS = json.loads(Path(__file__).with_name("budgets.json").read_text())
"""{case precision target: registers, bytes spilled, bytes shared}: the most of the versions of triton tried.

More shared memory than the target has means that it is refused there."""

TENSOR_CORES = {"sm_80": r"HMMA\.", "sm_90": r"HGMMA\.", "sm_100": r"UTCHMMA", "gfx942": r"v_mfma_"}
CLIFF = 32
"""ptxas gives up on a kernel with this many registers, and spills all it has."""

MOST_SPILLED = 768
VECTORS = {"rows/centred/64", "rows/softmax/784", "scaled_sum/1", "scaled_sum/2"}
JOBS = list(jobs())
OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)


@pytest.fixture(scope="session")
def results(request):
    return run([i.callspec.params["job"] for i in request.session.items if hasattr(i, "callspec")])


@pytest.mark.parametrize("job", JOBS, ids=" ".join)
def test_compiles_inside_its_budget(job, results):
    name, way, target = job
    found = results[job]
    if OLD and (target, way) == ("sm_100", "bf16x6") and "tensor memory" in str(found):
        # triton 3.6 keeps every part of a tile in Blackwell's tensor memory: the chooser's next way takes over
        assert not isinstance(results.get((name, "tf32x3", target)), str)
        return
    registers, spilled, shared = BUDGETS[" ".join(job)]
    if shared > SHARED[target]:  # the chooser's next way takes over
        assert "out of resource: shared memory" in str(found)
        return
    assert not isinstance(found, str), found
    used, case = found["resources"], CASES[name]
    assert used["registers"] <= registers + 8
    assert used["spilled"] <= min(spilled * 1.25 + 32, max(MOST_SPILLED, spilled))
    assert used["shared"] <= shared
    assert found["seconds"] < LIMIT
    assert not used["serialised"], "ptxas waits after every wgmma"
    if case.products:
        assert used["registers"] > CLIFF
        wanted = re.compile(TENSOR_CORES[target])
        assert used["matrix"] and all(wanted.match(m) for m in used["matrix"])
    else:
        assert not used["matrix"]
    if name in VECTORS:
        assert used["widest_load"] >= (128 if target.startswith("sm_") else 64)


def test_every_budget_is_of_a_job_and_bounded():
    assert set(BUDGETS) == {" ".join(j) for j in JOBS}
    over = {k: v[1] for k, v in BUDGETS.items() if v[1] > MOST_SPILLED}
    assert not over

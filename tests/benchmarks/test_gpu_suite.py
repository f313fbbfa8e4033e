"""Tests inside of an item of ``python -m benchmarks.gpu``."""

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu import suite

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import json, sys
from pathlib import Path
from benchmarks.gpu import suite
from benchmarks.record import Record
record = Record(Path(sys.argv[1]), float(sys.argv[2]), line="")
for shard in map(int, sys.argv[3].split(",")):
    suite.run(record, [sys.argv[5]], shard, int(sys.argv[4]))
sys.exit(record.close())
"""


def in_an_item(tmp_path, text, shards=(1,), of=1, seconds=60.0):
    """(exit code, data) of pytest in an item, on these shards of a file with this text, one after another."""
    (tmp_path / "test_planted.py").write_text(text)
    file = tmp_path / "item.json"
    shards = ",".join(map(str, shards))
    words = [str(w) for w in (file, seconds, shards, of, tmp_path / "test_planted.py")]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *words], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert file.exists(), done.stderr
    return done.returncode, json.loads(file.read_text())


PLANTED = """
import pytest
def test_good(): pass
def test_bad(): assert 1 == 2
@pytest.mark.skip
def test_left_out(): pass
@pytest.fixture
def broken(): raise OSError("no such thing")
def test_cannot_begin(broken): pass
@pytest.mark.parametrize("k", range(5))
def test_many(k): pass
"""


def test_tests_that_fail_are_listed(tmp_path):
    code, data = in_an_item(tmp_path, PLANTED)
    assert code == 1 and data["results"] == [{"passed": 6, "failed": 2, "skipped": 1}]
    bad, broken = data["failures"]
    assert "test_bad" in bad["what"] and "assert 1 == 2" in bad["error"]
    assert "test_cannot_begin" in broken["what"] and "no such thing" in broken["error"]
    assert data["line"] == "6 passed, 2 failed, 1 skipped"


def test_shards_are_all_tests_and_those_that_need_memory_are_in_the_first(tmp_path):
    text = "import pytest\n@pytest.mark.parametrize('k', range(7))\ndef test_many(k): pass\n"
    text += "\n".join(f"@pytest.mark.clean_memory\ndef test_large{k}(): pass" for k in range(3))
    _, data = in_an_item(tmp_path, text, shards=(1, 2, 3), of=3)
    assert [r["passed"] for r in data["results"]] == [3 + 3, 2, 2]


def test_several_runs_in_an_item_add_up(tmp_path):
    code, data = in_an_item(tmp_path, "def test_good(): pass\n", shards=(1, 1))
    assert code == 0 and [r["passed"] for r in data["results"]] == [1, 1]
    assert data["line"] == "2 passed, 0 failed, 0 skipped"


def test_a_cuda_error_ends_its_shard(tmp_path):
    text = PLANTED.replace("assert 1 == 2", "raise RuntimeError('CUDA error: an illegal access')")
    code, data = in_an_item(tmp_path, text)
    assert code == 1 and len(data["failures"]) == 1
    assert data["not_run"] == ["a CUDA error kept from 7 tests"]


def test_tests_end_when_their_time_does(tmp_path):
    code, data = in_an_item(tmp_path, PLANTED, seconds=-1.0)
    assert code == 0 and data["results"][0]["passed"] == 1
    assert data["not_run"] == ["there was no time for 8 tests"]


def test_a_pytest_that_does_not_start_is_a_failure(tmp_path):
    code, data = in_an_item(tmp_path, "import no_such_module\n")
    assert code == 1 and any("no_such_module" in f["error"] for f in data["failures"])


def test_files_that_need_what_is_missing_are_left_out(monkeypatch):
    arguments, left_out = suite.whole("cuda")
    assert arguments[0] == "--device=cuda" and "tests/rules/test_ops.py" in arguments
    assert (
        left_out["test_cli.py"].startswith("the command line")
        and "tests/cli/test_cli.py" not in arguments
    )
    assert "tests/cli/test_cli.py" in suite.whole("cpu")[0]
    monkeypatch.setattr(suite.importlib.util, "find_spec", lambda name: None)
    arguments, left_out = suite.whole("cuda")
    assert left_out["test_random_networks.py"] == "needs hypothesis"
    assert "tests/rules/test_ops.py" in arguments


COLLECT = """
import json, pytest
from benchmarks.gpu import suite

class Count:
    def pytest_collection_finish(self, session):
        self.found = [i.nodeid for i in session.items]

counts = {}
for kernel in suite.SMOKE:
    count = Count()
    pytest.main(["--collect-only", "-qq", *suite.smoke(kernel)], plugins=[count])
    counts[kernel] = count.found
print("\\n" + json.dumps(counts))
"""


def test_every_kernel_has_a_few_tests_in_every_precision():
    launching = {
        f.stem for f in (ROOT / "kernels").glob("*.py") if "    launch(\n" in f.read_text()
    }  # fmt: skip
    assert launching | {"activations"} == set(suite.SMOKE)
    done = subprocess.run(
        [sys.executable, "-c", COLLECT], cwd=ROOT, capture_output=True, text=True, timeout=200,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(2 <= len(ids) <= 30 for ids in found.values()), {k: len(v) for k, v in found.items()}
    for kernel in ("linear", "chain", "batched", "conv", "laplacian"):
        text = " ".join(found[kernel])
        assert all(way in text for way in ("bf16x6", "tf32")) and (
            "dtype" in text or "float16" in text
        )
    chain = " ".join(found["chain"])
    assert all(part in chain for part in ("chain-shape8", "pair", "stays_in_registers"))

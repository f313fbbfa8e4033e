"""Jobs spread over processes that are ended when one takes too long."""

import json
import os
import queue
import select
import subprocess
import sys
import threading
from pathlib import Path

LIMIT = 90
"""Seconds a compile may take, on a busy machine of two cores; quiet, the longest takes six."""

PROCESSES = 2


def _start():
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), root)))
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONPATH": paths}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("worker.py"))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def _end(process):
    process.stdin.close()
    process.stdout.close()
    return process.wait()


def run(jobs):
    """{job: the compiled kernel, or a string that says what went wrong}."""
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    results = {}

    def serve():
        process = None
        while True:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                break
            process = process or _start()
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], LIMIT)
            line = process.stdout.readline() if ready else ""
            if line:
                results[job] = json.loads(line)
                continue
            process.kill()
            code = _end(process)
            results[job] = f"no result after {LIMIT} s" if not ready else f"ended with code {code}"
            process = None
        if process is not None:
            _end(process)

    threads = [threading.Thread(target=serve) for _ in range(PROCESSES)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return results

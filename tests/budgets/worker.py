"""Compiles what it is told: a job a line in, its result a line out. A process, so that a hang can be ended."""

import json
import os
import sys
import tempfile
from dataclasses import asdict
from functools import partial


def main():
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever prints must not come between the answers
    with os.fdopen(answers, "w") as out:
        from cases import CASES
        from driver import compiled

        for line in sys.stdin:
            name, way, target = json.loads(line)
            call = partial(CASES[name].launch, way)
            with tempfile.TemporaryDirectory() as empty:  # nothing is answered by an earlier run
                os.environ["TRITON_CACHE_DIR"] = empty
                try:
                    found = compiled(target, call)
                    (one,) = [c for c in found if c.kernel == CASES[name].kernel]
                    answer = asdict(one)
                except Exception as error:  # whatever it is, it is this job's result
                    answer = f"{type(error).__name__}: {error}"
            print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()

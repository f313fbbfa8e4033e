"""Processes that run a test's function as the ranks of a gloo group on the CPU.

They are forked from a server that has imported torch, once a session, and every function has a group of its own: one
that breaks it leaves nothing behind.
"""

import datetime
import importlib.util
import multiprocessing
import os
import sys
import tempfile
import traceback
import warnings

MOST = 4
"""Ranks at most."""


class RankError(Exception):
    """What a rank raised, and where."""

    def __init__(self, rank, kind, text, trace):
        super().__init__(f"rank {rank} raised {kind}: {text}\n{trace}")
        self.rank, self.kind, self.text = rank, kind, text


class Ranks:
    """``ranks(n, function, *args)``: what it returned on each of n ranks. It must be at the top of its module.

    ``errors=True``: a `RankError` in the place of what raised; else AssertionError with all of them.
    """

    def __init__(self):
        # the server, which has threads of no library, imports these once
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed.tensor", "jactri"])
        self._context, self._pipes, self._processes = context, [], []

    def _grow(self, n):
        while len(self._pipes) < n:
            mine, theirs = self._context.Pipe()
            process = self._context.Process(
                target=_serve, args=(theirs, list(sys.path)), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)

    def __call__(self, n, function, *args, timeout=20.0, errors=False):
        self._grow(n)
        with tempfile.TemporaryDirectory() as folder:
            store = os.path.join(folder, "store")
            where = sys.modules[function.__module__].__file__, function.__name__
            for rank, pipe in enumerate(self._pipes[:n]):
                pipe.send((where, args, rank, n, store, timeout))
            found = []
            for rank, pipe in enumerate(self._pipes[:n]):
                if not pipe.poll(timeout + 60):
                    self.close()
                    raise TimeoutError(f"rank {rank} gave no answer within {timeout + 60} seconds")
                try:
                    kind, value = pipe.recv()
                except EOFError:
                    kind, value = "error", ("Died", "its process ended", "")
                found.append(value if kind == "value" else RankError(rank, *value))
        if any(isinstance(v, RankError) and v.kind == "Died" for v in found):
            self.close()  # the next call begins others
        failed = [str(v) for v in found if isinstance(v, RankError)]
        if failed and not errors:
            raise AssertionError("\n".join(failed))
        return found

    def close(self):
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._pipes, self._processes = [], []


def _serve(pipe, path):
    import torch
    import torch.distributed as dist

    sys.path[:] = path
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message="`torch.jit.(script|trace)")
    modules = {}
    while True:
        try:
            (file, name), args, rank, n, store, timeout = pipe.recv()
        except EOFError:
            return
        try:
            if file not in modules:
                spec = importlib.util.spec_from_file_location(f"of_ranks_{len(modules)}", file)
                modules[file] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(modules[file])
            torch.manual_seed(0)
            dist.init_process_group(
                "gloo", store=dist.FileStore(store, n), rank=rank, world_size=n,
                timeout=datetime.timedelta(seconds=timeout),
            )  # fmt: skip
            try:
                answer = "value", getattr(modules[file], name)(*args)
            finally:
                dist.destroy_process_group()
        except BaseException as error:
            answer = "error", (type(error).__name__, str(error), traceback.format_exc())
        pipe.send(answer)

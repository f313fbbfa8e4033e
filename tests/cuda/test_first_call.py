"""What the first call of a kind costs on a GPU is told beforehand."""

import re

import torch

from jactri._src.base import backends
from jactri._src.device import chooser


def test_how_many_ways_are_compiled_at_the_first_use_is_told(device):
    t, m = torch.empty(32, 4096, 64, device="cuda"), torch.empty(64, 64, device="cuda").t()
    chain = chooser.Chain(t, (m, m), (None, None, None), lambda: [None, None, None])
    chooser.forget()
    with torch.no_grad(), backends.use("auto"):
        _, why = chooser.described(chain.kind())
        chooser.run(chain)
        (choice,) = chooser.chosen()
    told = int(re.search(r"up to (\d+) other ways: Triton compiles each once", why)[1])
    tried = len(choice["tried"].keys() - {"torch"})
    assert 1 < tried <= told + 1

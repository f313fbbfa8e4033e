"""Selections before poles: kernels multiply, and leave to torch what has to select."""

import pytest
import torch

import jactri


@pytest.mark.parametrize("strategy", ["auto", "forward-mode", "reverse-mode"])
def test_a_selection_before_a_pole(device, strategy):
    net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5))
    net = net.to(device)

    def func(x):
        return net(net[:2](x).sqrt()[:, :4]).relu().sqrt()

    x = torch.randn(3, 4, device=device)
    want = torch.autograd.functional.jacobian(func, x)
    got = jactri.jacobian(func, x, strategy=strategy, backend="triton")
    finite = want.isfinite()
    assert finite.any()
    torch.testing.assert_close(got[finite], want[finite], rtol=1e-4, atol=1e-5)

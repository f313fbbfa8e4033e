"""laplace-torch: its Jacobians in the parameters beside jactri's.

pip install laplace-torch; where torchvision does not fit the installed torch, without it (pip install --no-deps)
"""

import pytest
import torch
from helpers import client
from tolerances import assert_close

import jactri

curvature = client("laplace.curvature", "pip install laplace-torch")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),  # BackPACK's
]

NETS = {
    "linear": lambda: torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)
    ),
    "convolution": lambda: torch.nn.Sequential(
        torch.nn.Unflatten(1, (1, 2, 2)), torch.nn.Conv2d(1, 4, 2), torch.nn.ReLU(), torch.nn.Flatten(),
        torch.nn.Linear(4, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["CurvlinopsGGN", "BackPackGGN"])
@pytest.mark.parametrize("name", NETS)
def test_jacobians(name, backend):
    torch.manual_seed(0)
    net, x = NETS[name](), torch.randn(5, 4)
    net.output_size = 3  # as the library notes it
    theirs, output = getattr(curvature, backend)(net, "classification").jacobians(x)
    ours = jactri.parameter_jacobian(net, x)
    dense = ours.dense()
    flat = torch.cat([dense[n].flatten(2) for n, _ in net.named_parameters()], -1)
    assert_close(flat, theirs.detach(), torch.float32, length=6, what=backend)
    assert_close(net(x).detach(), output.detach(), torch.float32, length=6, what="output")

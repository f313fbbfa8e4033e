"""Tiny random vision models: d features / d image.

pip install timm, beside a torchvision that was built for the installed torch
"""

import pytest
import torch
from helpers import assert_rows, client

timm = client(
    "timm", "pip install timm, beside a torchvision that was built for the installed torch"
)

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = {
    "resnet": ("resnet10t", {"in_chans": 1, "stem_width": 8, "channels": (4, 8, 8, 8)}, 32),
    "vit": ("vit_tiny_patch16_224", {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3}, 16),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (4, 4, 8, 8)}, 32),
    "mobilenet": ("mobilenetv3_small_050", {}, 32),
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 16, "window_size": 2, "embed_dim": 8, "depths": (2, 2),
             "num_heads": (2, 2)}, 16),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_vision_models(name):
    model, options, size = MODELS[name]
    torch.manual_seed(0)
    net = timm.create_model(model, num_classes=3, **options).double().eval()
    channels = options.get("in_chans", 3)
    assert_rows(net, torch.randn(2, channels, size, size, dtype=torch.float64), factor=4.0)

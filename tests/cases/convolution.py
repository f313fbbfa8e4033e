"""Convolutions in 1, 2 and 3 dimensions and what surrounds them."""

import torch
import torch.nn.functional as F
from torch import nn

from .case import C, M, P, R

CONV = "Convolution"


def last(x):
    """The same values in channels-last memory."""
    return x.contiguous(memory_format=torch.channels_last)


# name, module, input shape
MODULES = [
    ("Conv1d", lambda: nn.Conv1d(2, 3, 3), (2, 2, 6)),
    ("Conv1d_pad", lambda: nn.Conv1d(2, 3, 3, padding=2), (2, 2, 4)),
    ("Conv1d_stride", lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), (2, 2, 7)),
    ("Conv1d_stride_beyond_kernel", lambda: nn.Conv1d(2, 2, 2, stride=3), (2, 2, 9)),
    ("Conv1d_dilation", lambda: nn.Conv1d(2, 3, 3, dilation=2), (2, 2, 7)),
    ("Conv1d_same", lambda: nn.Conv1d(2, 3, 3, padding="same"), (2, 2, 5)),
    ("Conv1d_same_dilated", lambda: nn.Conv1d(1, 2, 3, padding="same", dilation=2), (2, 1, 5)),
    ("Conv1d_valid", lambda: nn.Conv1d(2, 3, 2, padding="valid"), (2, 2, 4)),
    ("Conv1d_groups", lambda: nn.Conv1d(4, 6, 3, groups=2, padding=1), (2, 4, 4)),
    ("Conv1d_depthwise", lambda: nn.Conv1d(3, 3, 3, groups=3, padding=1), (2, 3, 4)),
    ("Conv1d_no_bias", lambda: nn.Conv1d(2, 3, 2, bias=False), (2, 2, 4)),
    ("Conv1d_pointwise", lambda: nn.Conv1d(2, 3, 1), (2, 2, 4)),
    ("Conv1d_circular", lambda: nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular"), (2, 2, 4)),
    ("Conv1d_reflect", lambda: nn.Conv1d(2, 2, 3, padding=2, padding_mode="reflect"), (2, 2, 4)),
    ("Conv1d_replicate", lambda: nn.Conv1d(2, 2, 3, padding=1, padding_mode="replicate"), (2, 2, 4)),
    ("Conv1d_one", lambda: nn.Conv1d(1, 1, 1), (1, 1, 1)),
    ("Conv1d_no_samples", lambda: nn.Conv1d(2, 3, 3), (0, 2, 6)),
    ("Conv2d", lambda: nn.Conv2d(2, 3, 3), (2, 2, 4, 5)),
    ("Conv2d_pad", lambda: nn.Conv2d(2, 2, 3, padding=1), (2, 2, 3, 4)),
    ("Conv2d_stride", lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 2, 5, 4)),
    ("Conv2d_uneven", lambda: nn.Conv2d(2, 2, (2, 3), stride=(1, 2), padding=(0, 1)), (2, 2, 3, 4)),
    ("Conv2d_dilation", lambda: nn.Conv2d(1, 2, 2, dilation=(2, 1), padding=(1, 0)), (2, 1, 4, 3)),
    ("Conv2d_same", lambda: nn.Conv2d(1, 2, 3, padding="same"), (2, 1, 3, 4)),
    ("Conv2d_groups", lambda: nn.Conv2d(4, 4, 2, groups=2), (2, 4, 3, 3)),
    ("Conv2d_depthwise", lambda: nn.Conv2d(3, 6, 3, groups=3, padding=1), (2, 3, 3, 3)),
    ("Conv2d_no_bias", lambda: nn.Conv2d(2, 3, 2, bias=False), (2, 2, 3, 3)),
    ("Conv2d_pointwise", lambda: nn.Conv2d(3, 2, 1), (2, 3, 2, 3)),
    ("Conv2d_circular", lambda: nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), (2, 1, 3, 3)),
    ("Conv2d_reflect", lambda: nn.Conv2d(1, 2, 3, padding=(1, 2), padding_mode="reflect"), (2, 1, 3, 3)),
    ("Conv2d_replicate", lambda: nn.Conv2d(1, 2, 3, padding=(2, 1), padding_mode="replicate"), (2, 1, 3, 3)),
    ("Conv2d_full_kernel", lambda: nn.Conv2d(2, 3, 3), (2, 2, 3, 3)),
    ("Conv2d_even_kernel", lambda: nn.Conv2d(2, 2, 4, stride=2, padding=1), (2, 2, 4, 4)),
    ("Conv2d_wide_padding", lambda: nn.Conv2d(1, 1, 2, padding=3), (1, 1, 2, 2)),
    ("Conv2d_one_sample", lambda: nn.Conv2d(2, 3, 3, padding=1), (1, 2, 3, 3)),
    ("Conv2d_no_samples", lambda: nn.Conv2d(2, 3, 3), (0, 2, 4, 4)),
    ("Conv3d", lambda: nn.Conv3d(1, 2, 2), (2, 1, 3, 2, 3)),
    ("Conv3d_stride", lambda: nn.Conv3d(2, 1, (1, 2, 2), stride=(1, 2, 1), padding=(0, 1, 0)), (2, 2, 2, 3, 2)),
    ("Conv3d_dilation", lambda: nn.Conv3d(1, 2, 2, dilation=(1, 1, 2)), (1, 1, 2, 2, 3)),
    ("Conv3d_groups", lambda: nn.Conv3d(2, 2, 2, groups=2, padding=(1, 0, 0)), (2, 2, 2, 2, 2)),
    ("ConvTranspose1d", lambda: nn.ConvTranspose1d(2, 3, 3), (2, 2, 4)),
    ("ConvTranspose1d_stride", lambda: nn.ConvTranspose1d(2, 2, 3, stride=2, padding=1, output_padding=1), (2, 2, 3)),
    ("ConvTranspose1d_dilation", lambda: nn.ConvTranspose1d(1, 2, 3, dilation=2, padding=1), (2, 1, 4)),
    ("ConvTranspose1d_padded_beyond_stride",
     lambda: nn.ConvTranspose1d(2, 1, 2, dilation=2, output_padding=1), (2, 2, 3)),
    ("ConvTranspose2d_padded_beyond_stride",
     lambda: nn.ConvTranspose2d(1, 1, 2, dilation=(1, 3), output_padding=(0, 2)), (2, 1, 2, 2)),
    ("ConvTranspose1d_groups", lambda: nn.ConvTranspose1d(4, 2, 2, groups=2), (2, 4, 3)),
    ("ConvTranspose2d", lambda: nn.ConvTranspose2d(2, 3, 2), (2, 2, 2, 3)),
    ("ConvTranspose2d_stride",
     lambda: nn.ConvTranspose2d(2, 1, 3, stride=2, padding=1, output_padding=(0, 1)), (2, 2, 2, 3)),
    ("ConvTranspose2d_groups", lambda: nn.ConvTranspose2d(2, 4, 2, groups=2, bias=False), (2, 2, 2, 2)),
    ("ConvTranspose2d_depthwise", lambda: nn.ConvTranspose2d(2, 2, 2, groups=2, stride=2), (2, 2, 2, 2)),
    ("ConvTranspose3d", lambda: nn.ConvTranspose3d(1, 2, 2, stride=(1, 2, 1), padding=(0, 1, 0)), (2, 1, 2, 2, 2)),
]  # fmt: skip
CASES = [
    M(name, module, R(*shape), nodes=CONV if shape[0] else "", samples=True)
    for name, module, shape in MODULES
]
CASES += [
    M("Conv1d_unbatched", lambda: nn.Conv1d(2, 3, 3, padding=1), R(2, 4), nodes=CONV),
    M("Conv2d_unbatched", lambda: nn.Conv2d(2, 3, 2), R(2, 3, 3), nodes=CONV),
    M("Conv2d_groups_unbatched", lambda: nn.Conv2d(2, 2, 2, groups=2), R(2, 3, 3), nodes=CONV),
    M("Conv3d_unbatched", lambda: nn.Conv3d(1, 2, 2), R(1, 2, 3, 2), nodes=CONV),
    M("ConvTranspose2d_unbatched", lambda: nn.ConvTranspose2d(2, 3, 2), R(2, 2, 2), nodes=CONV),
    M("Conv2d_channels_last", lambda: nn.Conv2d(2, 3, 3, padding=1), R(2, 2, 3, 3), nodes=CONV,
      func=lambda m, x: m(last(x)), samples=True),
    M("Conv2d_channels_last_weight",
      lambda: nn.Conv2d(2, 3, 3, padding=1).to(memory_format=torch.channels_last),
      R(2, 2, 3, 3), nodes=CONV, samples=True),
    M("Conv1d_over_samples", lambda: nn.Conv1d(2, 2, 3, padding=1), R(4, 2),
      func=lambda m, x: m(x.T[None])[0].T, nodes=CONV, mixes=True),
    M("ConvTranspose2d_output_size", lambda: nn.ConvTranspose2d(1, 1, 3, stride=2),
      R(2, 1, 2, 2), func=lambda m, x: m(x, output_size=(6, 5)), nodes=CONV, samples=True),
    C("conv1d_weights", F.conv1d, R(2, 2, 4), R(3, 2, 2), R(3), nodes=CONV, samples=(0,)),
    C("conv2d_weights", lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1), R(2, 2, 3, 3),
      R(2, 2, 2, 2), R(2), nodes=CONV, samples=(0,)),
    C("conv2d_weights_grouped", lambda x, w: F.conv2d(x, w, groups=2, dilation=2), R(2, 2, 3, 3),
      R(2, 1, 2, 2), nodes=CONV, samples=(0,)),
    C("conv3d_weights", F.conv3d, R(1, 1, 2, 2, 2), R(2, 1, 1, 2, 2), R(2), nodes=CONV),
    C("conv_transpose1d_weights", lambda x, w, b: F.conv_transpose1d(x, w, b, stride=2),
      R(2, 2, 3), R(2, 3, 2), R(3), nodes=CONV, samples=(0,)),
    C("conv_transpose2d_weights", lambda x, w: F.conv_transpose2d(x, w, groups=2), R(2, 2, 2, 2),
      R(2, 2, 2, 2), nodes=CONV, samples=(0,)),
    C("conv_transpose1d_weights_padded_beyond_stride", lambda x, w: F.conv_transpose1d(x, w,
      dilation=2, output_padding=1), R(2, 2, 3), R(2, 1, 2), nodes=CONV, samples=(0,)),
    C("conv_of_itself", lambda x: F.conv1d(x, x[:1, :, :2]), R(2, 2, 4), nodes=CONV),
    C("conv_tbc", lambda x, w, b: torch.conv_tbc(x, w, b, pad=1), R(4, 2, 3), R(2, 3, 2), R(2),
      nodes="ConvTbc", second=False, strided=False),
    C("conv_scaled_weight", lambda x, w, s: F.conv2d(x, w * s), R(2, 1, 3, 3), R(2, 1, 2, 2),
      P(2, 1, 1, 1), nodes=CONV, samples=(0,)),
    M("small_convnet", lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(),
      nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)),
      R(2, 1, 4, 4), nodes=f"{CONV} Relu Addmm", samples=True),
    M("image_to_image", lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(),
      nn.Conv2d(2, 1, 3, padding=1)), R(2, 1, 4, 3), nodes=f"{CONV} Relu", samples=True),
    M("conv_norm_silu_residual", lambda: nn.Sequential(nn.Conv1d(4, 4, 3, padding=1),
      nn.GroupNorm(2, 4), nn.SiLU()), R(2, 4, 3), func=lambda m, x: x + m(x), nodes=CONV,
      samples=True),
    M("unet_skip", lambda: nn.ModuleList([nn.Conv1d(1, 2, 2, stride=2),
      nn.ConvTranspose1d(2, 1, 2, stride=2)]), R(2, 1, 4),
      func=lambda m, x: torch.cat([x, m[1](torch.relu(m[0](x)))], 1), nodes=CONV, samples=True),
    M("separable", lambda: nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, groups=2),
      nn.Conv2d(2, 3, 1), nn.Hardswish()), R(2, 2, 3, 3), nodes=CONV, samples=True),
]  # fmt: skip

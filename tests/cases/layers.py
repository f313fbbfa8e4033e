"""Normalisation, pooling, resizing, attention, recurrence."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .case import C, D, M, P, R, S, U, V, quietly, seeded

X = R(3, 4)
I1, I2, I3 = R(2, 4, 3), R(2, 4, 2, 3), R(2, 2, 2, 2, 2)
CANCEL = {"factor": 16, "reason": "normalisation removes the mean: its entries cancel"}


def trained(module, *shape):
    """The module in eval mode, with running statistics that are not the initial ones."""
    module.train()(torch.randn(*shape))
    return module.eval()


NORMS = [
    M("LayerNorm", lambda: nn.LayerNorm(4), X, nodes="NativeLayerNorm", samples=True),
    M("LayerNorm_tokens", lambda: nn.LayerNorm(4), R(2, 3, 4), nodes="NativeLayerNorm",
      samples=True),
    M("LayerNorm_two_axes", lambda: nn.LayerNorm((3, 4)), R(2, 3, 4), nodes="NativeLayerNorm",
      samples=True),
    M("LayerNorm_plain", lambda: nn.LayerNorm(4, elementwise_affine=False), X, samples=True),
    M("LayerNorm_no_bias", lambda: nn.LayerNorm(4, bias=False), X, samples=True),
    M("LayerNorm_one_feature", lambda: nn.LayerNorm(1), R(3, 1)),
    M("LayerNorm_1d", lambda: nn.LayerNorm(4), R(4)),
    M("LayerNorm_over_samples", lambda: nn.LayerNorm((3, 4)), X, mixes=True),
    M("LayerNorm_no_samples", lambda: nn.LayerNorm(4), R(0, 4), samples=True),
    C("layer_norm_weights", lambda x, w, b: F.layer_norm(x, (4,), w, b, eps=0.1), X, R(4), R(4),
      nodes="NativeLayerNorm", samples=(0,)),
    M("RMSNorm", lambda: nn.RMSNorm(4), X, samples=True),
    M("RMSNorm_eps", lambda: nn.RMSNorm((3, 4), eps=0.1), R(2, 3, 4), samples=True),
    M("RMSNorm_plain", lambda: nn.RMSNorm(4, elementwise_affine=False), X, samples=True),
    M("GroupNorm", lambda: nn.GroupNorm(2, 4), I1, nodes="NativeGroupNorm", samples=True),
    M("GroupNorm_one_group", lambda: nn.GroupNorm(1, 4), I2, samples=True),
    M("GroupNorm_each", lambda: nn.GroupNorm(4, 4, affine=False), I1, samples=True),
    M("GroupNorm_flat", lambda: nn.GroupNorm(2, 8), R(3, 8), samples=True),
    C("group_norm_weights", lambda x, w, b: F.group_norm(x, 2, w, b), I1, R(4), R(4),
      nodes="NativeGroupNorm", samples=(0,)),
    M("InstanceNorm1d", lambda: nn.InstanceNorm1d(4, affine=True), I1, samples=True),
    M("InstanceNorm2d", lambda: nn.InstanceNorm2d(4), I2, samples=True),
    M("InstanceNorm3d", lambda: nn.InstanceNorm3d(2), I3, samples=True),
    M("InstanceNorm1d_eval", lambda: trained(nn.InstanceNorm1d(4, track_running_stats=True),
      5, 4, 3), I1, samples=True),
    M("BatchNorm1d_eval", lambda: trained(nn.BatchNorm1d(4), 9, 4), X, nodes="NativeBatchNorm",
      samples=True),
    M("BatchNorm1d_eval_sequence", lambda: trained(nn.BatchNorm1d(4), 9, 4, 3), I1, samples=True),
    M("BatchNorm2d_eval", lambda: trained(nn.BatchNorm2d(4), 9, 4, 2, 2), I2,
      nodes="NativeBatchNorm", samples=True),
    M("BatchNorm3d_eval", lambda: trained(nn.BatchNorm3d(2, affine=False), 9, 2, 2, 2, 2), I3,
      samples=True),
    M("BatchNorm1d_train", lambda: nn.BatchNorm1d(4), X, nodes="NativeBatchNorm", mixes=True),
    M("BatchNorm1d_train_sequence", lambda: nn.BatchNorm1d(4, affine=False), I1, mixes=True),
    M("BatchNorm2d_train", lambda: nn.BatchNorm2d(4, momentum=None), I2, nodes="NativeBatchNorm",
      mixes=True),
    M("BatchNorm1d_no_statistics", lambda: nn.BatchNorm1d(4, track_running_stats=False).eval(), X,
      mixes=True),
    C("batch_norm_weights", lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), X,
      R(4), R(4), nodes="NativeBatchNorm"),
    C("batch_norm_eval_weights", lambda x, w, b: F.batch_norm(x, x.new_zeros(4), x.new_full((4,),
      2.0), w, b), X, R(4), R(4), nodes="NativeBatchNorm", samples=(0,)),
    M("LocalResponseNorm", lambda: nn.LocalResponseNorm(3, alpha=0.5), I1, samples=True),
]  # fmt: skip
CASES = [c.__class__(**{**vars(c), **CANCEL}) for c in NORMS]

# name, module, input
POOLS = [
    ("MaxPool1d", lambda: nn.MaxPool1d(2), D(2, 2, 5)),
    ("MaxPool1d_overlap", lambda: nn.MaxPool1d(3, stride=1, padding=1), D(2, 2, 4)),
    ("MaxPool1d_dilation", lambda: nn.MaxPool1d(2, stride=1, dilation=2), D(2, 1, 5)),
    ("MaxPool2d", lambda: nn.MaxPool2d(2), D(2, 2, 4, 4)),
    ("MaxPool2d_overlap", lambda: nn.MaxPool2d(3, stride=2, padding=1), D(2, 1, 4, 5)),
    ("MaxPool2d_ceil", lambda: nn.MaxPool2d(2, ceil_mode=True), D(1, 2, 3, 3)),
    ("MaxPool2d_uneven", lambda: nn.MaxPool2d((2, 1), stride=(1, 2)), D(2, 1, 3, 3)),
    ("MaxPool3d", lambda: nn.MaxPool3d(2, stride=1), D(1, 2, 2, 3, 2)),
    ("AvgPool1d", lambda: nn.AvgPool1d(2), R(2, 2, 5)),
    ("AvgPool1d_pad", lambda: nn.AvgPool1d(3, stride=1, padding=1), R(2, 2, 4)),
    ("AvgPool1d_exclude", lambda: nn.AvgPool1d(3, 2, 1, count_include_pad=False), R(2, 2, 4)),
    ("AvgPool2d", lambda: nn.AvgPool2d(2), R(2, 2, 4, 4)),
    ("AvgPool2d_overlap", lambda: nn.AvgPool2d(3, stride=1, padding=1), R(2, 1, 3, 4)),
    ("AvgPool2d_ceil", lambda: nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False), R(1, 2, 3, 3)),
    ("AvgPool2d_divisor", lambda: nn.AvgPool2d(2, divisor_override=3), R(1, 2, 3, 4)),
    ("AvgPool2d_negative_divisor", lambda: nn.AvgPool2d(2, divisor_override=-3), R(1, 2, 3, 4)),
    ("AvgPool3d_negative_divisor", lambda: nn.AvgPool3d(1, divisor_override=-1), R(1, 1, 2, 1, 2)),
    ("AvgPool3d", lambda: nn.AvgPool3d(2, stride=1), R(1, 2, 2, 3, 2)),
    ("LPPool1d", lambda: nn.LPPool1d(2, 2), P(2, 2, 4)),
    ("LPPool2d", lambda: nn.LPPool2d(3, 2, stride=1), P(1, 2, 3, 3)),
    ("AdaptiveAvgPool1d", lambda: nn.AdaptiveAvgPool1d(3), R(2, 2, 5)),
    ("AdaptiveAvgPool2d", lambda: nn.AdaptiveAvgPool2d((2, 3)), R(2, 2, 3, 5)),
    ("AdaptiveAvgPool2d_to_1", lambda: nn.AdaptiveAvgPool2d(1), R(2, 2, 3, 2)),
    ("AdaptiveAvgPool2d_larger", lambda: nn.AdaptiveAvgPool2d(4), R(1, 2, 2, 3)),
    ("AdaptiveAvgPool3d", lambda: nn.AdaptiveAvgPool3d((1, 2, 2)), R(1, 2, 2, 2, 3)),
    ("AdaptiveMaxPool1d", lambda: nn.AdaptiveMaxPool1d(3), D(2, 2, 5)),
    ("AdaptiveMaxPool2d", lambda: nn.AdaptiveMaxPool2d((2, 2)), D(2, 2, 3, 3)),
    ("AdaptiveMaxPool3d", lambda: nn.AdaptiveMaxPool3d(1), D(1, 2, 2, 2, 2)),
    ("Upsample_nearest", lambda: nn.Upsample(scale_factor=2), R(2, 2, 3)),
    ("ChannelShuffle_groups_of_3", lambda: nn.ChannelShuffle(3), R(2, 6, 1, 2)),
    ("PixelShuffle", lambda: nn.PixelShuffle(2), R(2, 4, 2, 1)),
    ("PixelUnshuffle", lambda: nn.PixelUnshuffle(2), R(2, 1, 2, 4)),
    ("ChannelShuffle", lambda: nn.ChannelShuffle(2), R(2, 4, 2, 1)),
    ("Unfold", lambda: nn.Unfold(2, padding=1, stride=2), R(2, 2, 2, 3)),
    ("Unfold_dilated", lambda: nn.Unfold((2, 1), dilation=2), R(2, 1, 3, 3)),
    ("Fold", lambda: nn.Fold((3, 3), 2), R(2, 4, 4)),
    ("Fold_padded", lambda: nn.Fold((3, 2), 2, padding=1, stride=2), R(1, 8, 4)),
]  # fmt: skip
CASES += [M(name, module, spec, samples=True) for name, module, spec in POOLS]
for name, scale, shape in [
    ("nearest", 2, (2, 1, 3)), ("nearest", 1.5, (2, 1, 2, 3)), ("nearest", 2, (1, 1, 2, 1, 2)),
    ("nearest-exact", 1.5, (2, 1, 3)), ("nearest-exact", 2, (1, 1, 2, 3)),
    ("nearest-exact", 2, (1, 1, 1, 2, 2)), ("linear", 2, (2, 1, 3)), ("linear", 0.6, (2, 1, 5)),
    ("bilinear", 2, (2, 1, 2, 3)), ("bilinear", 0.7, (1, 1, 4, 4)), ("bicubic", 1.5, (1, 1, 4, 3)),
    ("trilinear", 2, (1, 1, 2, 2, 2)), ("area", 0.5, (2, 1, 4)), ("area", 0.6, (1, 1, 4, 5)),
]:  # fmt: skip
    CASES.append(
        C(f"interpolate_{name}_{scale}_{len(shape) - 2}d",
          lambda x, m=name, s=scale: F.interpolate(x, scale_factor=s, mode=m), R(*shape),
          samples=True)
    )  # fmt: skip



def as_matrix(op):
    """A linear op on images, by its matrix."""

    def call(x):
        shape = x.shape
        with torch.no_grad():
            eye = torch.eye(x.numel(), dtype=x.dtype, device=x.device)
            images = [op(e.reshape(shape)) for e in eye]
            matrix = torch.stack([image.flatten() for image in images], 1)
        return (matrix @ x.flatten()).reshape(images[0].shape)

    return call


FROM_GRID = {"second": False}


def hats(x, grid, corners):
    """Bilinear sampling with zeros around: what a place sees of an entry is a product of hats."""
    for a, n in enumerate(x.shape[2:]):
        c = grid[..., -1 - a].flatten(1)
        at = (c + 1) / 2 * (n - 1) if corners else ((c + 1) * n - 1) / 2
        hat = (1 - (at[..., None] - torch.arange(n)).abs()).relu().unsqueeze(1)  # (N, 1, places, n)
        # after the first axis, the places come before the axes that are left
        x = (x.unsqueeze(2) if a == 0 else x).movedim(3, -1).mul(
            hat.reshape(*hat.shape[:3], *[1] * (grid.shape[-1] - 1 - a), n)).sum(-1)
    return x.unflatten(2, grid.shape[1:-1])


CASES += [
    C("interpolate_align", lambda x: F.interpolate(x, size=(3, 5), mode="bilinear",
      align_corners=True), R(2, 1, 2, 3), nodes="UpsampleBilinear2D", samples=True),
    C("interpolate_antialias", lambda x: F.interpolate(x, size=(2, 2), mode="bilinear",
      antialias=True), R(1, 1, 4, 4), samples=True, **FROM_GRID),
    C("interpolate_antialias_cubic", lambda x: F.interpolate(x, size=(2, 3), mode="bicubic",
      antialias=True), R(1, 1, 4, 4), samples=True, **FROM_GRID),
    C("interpolate_size_1", lambda x: F.interpolate(x, size=1, mode="linear"), R(2, 1, 3),
      samples=True),
    C("max_pool2d_indices", lambda x: F.max_pool2d(x, 2, return_indices=True)[0], D(2, 1, 4, 2),
      nodes="MaxPool2DWithIndices", samples=True),
    C("max_pool2d_tie", lambda x: F.max_pool2d(x.view(1, 2, 2), 2), V(1.0, 2.0, 2.0, 0.0)),
    C("max_unpool2d", lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
      D(2, 1, 4, 4), nodes="MaxUnpool2D", samples=True, poison=False),
    C("max_pool_unbatched", lambda x: F.max_pool2d(x, 2), D(2, 4, 4)),
    C("avg_pool_unbatched", lambda x: F.avg_pool2d(x, 2), R(2, 4, 4)),
    C("avg_pool_tokens", lambda x: F.avg_pool1d(x.transpose(1, 2), 2).transpose(1, 2),
      R(2, 4, 3), samples=True),
    # torch has no derivative of these backward ops; the matrix of the op has
    *(C(f"{name}_of_square", lambda x, f=op: f(x * x), R(*shape), samples=True,
        twin=lambda x, f=op: as_matrix(f)(x * x)) for name, op, shape in [
        ("antialias", lambda x: F.interpolate(x, size=(2, 2), mode="bilinear", antialias=True),
         (1, 1, 3, 3)),
        ("antialias_cubic", lambda x: F.interpolate(x, size=(2, 3), mode="bicubic", antialias=True),
         (2, 1, 3, 3)),
        ("sampled_image", lambda x: F.grid_sample(x, x.new_tensor([[[[0.3, -0.2], [0.9, 1.1]]]])
         .expand(len(x), 1, 2, 2), align_corners=False), (2, 1, 3, 3)),
        ("sampled_volume", lambda x: F.grid_sample(x, x.new_full((1, 1, 1, 2, 3), 0.3),
         align_corners=True), (1, 1, 2, 2, 2)),
        ("nearest_exact", lambda x: F.interpolate(x, size=3, mode="nearest-exact"), (2, 1, 2)),
        ("affine_warp", lambda x: F.grid_sample(x, F.affine_grid(x.new_tensor([[[1, 0.2, 0.1],
         [0.1, 0.9, 0]]]), (1, 1, 3, 3), align_corners=False), align_corners=False), (1, 1, 3, 3)),
    ]),
    C("fractional_max_pool2d", seeded(lambda x: F.fractional_max_pool2d(x, 2, output_size=(2, 2))),
      D(1, 2, 4, 4), nodes="FractionalMaxPool2D", second=False),
    C("fractional_max_pool3d", seeded(lambda x: F.fractional_max_pool3d(x, 2, output_size=1)),
      D(1, 1, 3, 3, 3), nodes="FractionalMaxPool3D", second=False),
    C("grid_sample", lambda x, g: F.grid_sample(x, g.tanh(), align_corners=False), R(1, 2, 3, 3),
      R(1, 2, 2, 2), nodes="GridSampler2D", samples=True,
      twin=lambda x, g: hats(x, g.tanh(), False)),
    C("grid_sample_outside", lambda x, g: F.grid_sample(x, g, align_corners=True), R(2, 1, 3, 2),
      R(2, 3, 1, 2), samples=True, twin=lambda x, g: hats(x, g, True)),
    C("grid_sample_places", lambda g: F.grid_sample(g.new_ones(2, 3, 2, 4).cumsum(-1).sin(), g,
      align_corners=False), U(2, 2, 3, 2), samples=True,
      twin=lambda g: hats(g.new_ones(2, 3, 2, 4).cumsum(-1).sin(), g, False)),
    C("grid_sample_3d", lambda x: F.grid_sample(x, x.new_full((1, 1, 1, 2, 3), 0.3),
      align_corners=True), R(1, 1, 2, 2, 2), nodes="GridSampler3D", **FROM_GRID),
    C("grid_sample_3d_places", lambda x, g: F.grid_sample(x, g, align_corners=False),
      R(2, 2, 2, 3, 2), S(2, 1, 2, 2, 3), samples=True, twin=lambda x, g: hats(x, g, False)),
    *(C(f"grid_sample_{mode}_{pad}_{'corners' * corners}", lambda x, g, m=mode, p=pad, c=corners:
      F.grid_sample(x, 1.6 * g, m, p, bool(c)), R(1, 2, 3, 4), S(1, 2, 3, 2), samples=True,
      second=False) for mode, pad, corners in [("nearest", "zeros", 0), ("nearest", "border", 1),
      ("bilinear", "border", 0), ("bilinear", "reflection", 0), ("bilinear", "reflection", 1),
      ("bicubic", "zeros", 0), ("bicubic", "border", 1), ("bicubic", "reflection", 0)]),
    C("affine_grid", lambda t: F.affine_grid(t, (2, 1, 2, 2), align_corners=False), R(2, 2, 3),
      samples=True),
    C("unfold_fold", lambda x: F.fold(F.unfold(x, 2), (3, 3), 2), R(2, 1, 3, 3),
      nodes="Im2Col Col2Im", samples=True),
    C("pixel_shuffle_unbatched", lambda x: F.pixel_shuffle(x, 2), R(4, 1, 2)),
]  # fmt: skip

Q = R(2, 2, 3, 4)


def sdpa(**options):
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)


def math_sdpa(**options):
    def call(q, k, v):
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, **options)

    return call


def boolean_mask(x):
    return torch.tensor([[True, False, True], [True, True, False], [False, True, True]],
                        device=x.device)  # fmt: skip


def row_mask(x):
    """The first query may look at nothing."""
    return torch.tensor([[False] * 3, [True, True, False], [True] * 3], device=x.device)


FLASH = "ScaledDotProductFlashAttentionForCpu"
ATT = {"factor": 8, "reason": "the softmax of scores is rounded once more a head"}
CASES += [
    C("sdpa", sdpa(), Q, Q, Q, twin=math_sdpa(), samples=True, **ATT),
    C("sdpa_causal", sdpa(is_causal=True), Q, Q, Q, twin=math_sdpa(is_causal=True), samples=True,
      **ATT),
    C("sdpa_causal_longer_keys", sdpa(is_causal=True), R(2, 1, 2, 4), R(2, 1, 4, 4), R(2, 1, 4, 4),
      twin=math_sdpa(is_causal=True), samples=True, **ATT),
    C("sdpa_causal_longer_queries", sdpa(is_causal=True), R(2, 1, 4, 4), R(2, 1, 2, 4),
      R(2, 1, 2, 4), twin=math_sdpa(is_causal=True), samples=True, **ATT),
    C("sdpa_fully_masked_row", lambda q, k, v: F.scaled_dot_product_attention(q, k, v,
      row_mask(q)), Q, Q, Q, samples=True, second=False, **ATT),
    C("sdpa_minus_inf_mask", lambda q, k, v: F.scaled_dot_product_attention(q, k, v,
      torch.zeros_like(q[0, 0, :, :3]).masked_fill(~boolean_mask(q), -torch.inf)), Q, Q, Q,
      samples=True, second=False, **ATT),
    C("sdpa_dropout_train", seeded(sdpa(dropout_p=0.5)), Q, Q, Q, strided=False, second=False,
      **ATT),
    C("sdpa_scale", sdpa(scale=0.3), Q, Q, Q, twin=math_sdpa(scale=0.3), samples=True, **ATT),
    C("sdpa_cross", sdpa(), R(2, 2, 3, 4), R(2, 2, 5, 4), R(2, 2, 5, 4), twin=math_sdpa(),
      samples=True, **ATT),
    C("sdpa_wide_values", sdpa(), R(2, 2, 3, 4), R(2, 2, 3, 4), R(2, 2, 3, 6), twin=math_sdpa(),
      samples=True, **ATT),
    C("sdpa_mask", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, boolean_mask(q)),
      Q, Q, Q, samples=True, twin=lambda q, k, v: math_sdpa(attn_mask=boolean_mask(q))(q, k, v),
      **ATT),
    C("sdpa_float_mask", F.scaled_dot_product_attention, Q, Q, Q, R(3, 3), samples=(0, 1, 2),
      twin=lambda q, k, v, m: math_sdpa(attn_mask=m)(q, k, v), **ATT),
    C("sdpa_batched_mask", lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m.detach()),
      Q, Q, Q, R(2, 1, 3, 3), samples=True,
      twin=lambda q, k, v, m: math_sdpa(attn_mask=m.detach())(q, k, v), **ATT),
    C("sdpa_gqa", sdpa(enable_gqa=True), R(2, 4, 3, 4), Q, Q, twin=math_sdpa(enable_gqa=True),
      samples=True, **ATT),
    C("sdpa_one_head_3d", sdpa(), R(2, 3, 4), R(2, 3, 4), R(2, 3, 4), twin=math_sdpa(),
      samples=True, **ATT),
    C("sdpa_one_token", sdpa(), R(2, 2, 1, 4), R(2, 2, 1, 4), R(2, 2, 1, 4), twin=math_sdpa(),
      samples=True, second=False, **ATT),
    C("sdpa_self", lambda x: sdpa()(x, x, x), Q, twin=lambda x: math_sdpa()(x, x, x), samples=True,
      **ATT),
    C("sdpa_flash", lambda x: sdpa_kernel_call(SDPBackend.FLASH_ATTENTION, x), Q, nodes=FLASH, strided=False,
      twin=lambda x: math_sdpa()(x, x, x), samples=True, **ATT),
    C("sdpa_math", lambda x: math_sdpa()(x, x * 2, x.sin()), Q, samples=True, **ATT),
    C("sdpa_dropout_0", sdpa(dropout_p=0.0), Q, Q, Q, twin=math_sdpa(), samples=True, **ATT),
    C("attention_by_hand", lambda q, k, v: (q @ k.mT / 2).softmax(-1) @ v, Q, Q, Q, samples=True,
      **ATT),
    C("attention_einsum", lambda q, k, v: torch.einsum("bqk,bkd->bqd", torch.einsum(
        "bqd,bkd->bqk", q, k).softmax(-1), v), R(2, 3, 2), R(2, 3, 2), R(2, 3, 2), samples=True,
      **ATT),
    C("linear_attention", lambda q, k, v: (F.elu(q) + 1) @ ((F.elu(k) + 1).mT @ v), R(2, 3, 2),
      R(2, 3, 2), R(2, 3, 2), samples=True),
]  # fmt: skip


def sdpa_kernel_call(backend, x):
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(x, x, x)


def attend(m, x):
    return m(x, x, x, need_weights=False)[0]


def with_math(func):
    """func with attention that torch can differentiate twice."""

    def call(*args):
        with sdpa_kernel(SDPBackend.MATH):
            return func(*args)

    return call


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, d=4, heads=2):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

    def forward(self, x):
        n, t, d = x.shape
        q, k, v = (
            y.view(n, t, self.heads, -1).transpose(1, 2)
            for y in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d)
        x = x + self.out(y)
        return x + self.mlp(self.norm2(x))


def rnn(kind, *sizes, **options):
    return lambda: kind(*sizes, **options)


def first(m, x):
    return m(x)[0]


def packed(lengths, sort=False):
    """Of sequences of unequal lengths, padded again behind the recurrence."""

    def run(m, x):
        rows = pack_padded_sequence(x, lengths, batch_first=m.batch_first, enforce_sorted=sort)
        return pad_packed_sequence(m(rows)[0], batch_first=m.batch_first)[0]

    return run


def hooked():
    """Layers with module backward hooks that change nothing."""
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    for layer in net:
        layer.register_full_backward_hook(lambda *_: None)
    return net


def whole(m, x):
    y, state = m(x)
    return (y, *state) if isinstance(state, tuple) else (y, state)


DEEP = {"factor": 16, "reason": "several dependent layers deep"}
SEQ = R(2, 3, 2)
CASES += [
    M("MultiheadAttention", lambda: nn.MultiheadAttention(4, 2, batch_first=True), R(2, 3, 4),
      func=attend, twin=with_math(attend), samples=True, **DEEP),
    M("MultiheadAttention_weights", lambda: nn.MultiheadAttention(4, 2, batch_first=True),
      R(2, 3, 4), func=lambda m, x: m(x, x, x), samples=True, **DEEP),
    M("MultiheadAttention_cross", lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=2,
      batch_first=True), R(2, 2, 4), R(2, 3, 3), R(2, 3, 2), samples=True,
      func=lambda m, q, k, v: m(q, k, v, need_weights=False)[0],
      twin=with_math(lambda m, q, k, v: m(q, k, v, need_weights=False)[0]), **DEEP),
    M("MultiheadAttention_sequence_first", lambda: nn.MultiheadAttention(4, 2), R(3, 2, 4),
      func=attend, twin=with_math(attend), **DEEP),
    M("TransformerEncoderLayer", lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0,
      batch_first=True), R(2, 3, 4), samples=True, twin=with_math(lambda m, x: m(x)), **DEEP),
    M("TransformerEncoderLayer_prenorm", lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0,
      activation="gelu", norm_first=True, batch_first=True), R(2, 3, 4), samples=True,
      twin=with_math(lambda m, x: m(x)), **DEEP),
    M("TransformerDecoderLayer", lambda: nn.TransformerDecoderLayer(4, 2, 6, dropout=0.0,
      batch_first=True), R(2, 2, 4), R(2, 3, 4), samples=True,
      twin=with_math(lambda m, x, y: m(x, y)), **DEEP),
    M("Block", Block, R(2, 3, 4), samples=True, twin=with_math(lambda m, x: m(x)), **DEEP),
    M("LSTM", rnn(nn.LSTM, 2, 3, batch_first=True), SEQ, func=first, samples=True, **DEEP),
    M("LSTM_states", rnn(nn.LSTM, 2, 3, batch_first=True), SEQ, func=whole, **DEEP),
    M("LSTM_two_layers_both_ways", rnn(nn.LSTM, 2, 2, num_layers=2, bidirectional=True,
      batch_first=True), R(2, 2, 2), func=first, samples=True, **DEEP),
    M("LSTM_projection", rnn(nn.LSTM, 2, 4, proj_size=2), SEQ, func=quietly(first), **DEEP),
    C("lstm_in_everything", lambda x, h, c, wi, wh, bi, bh: torch.lstm(x, (h, c), (wi, wh, bi, bh),
      True, 1, 0.0, False, False, False)[0], R(3, 2, 2), R(1, 2, 3), R(1, 2, 3), R(12, 2), R(12, 3),
      R(12), R(12), **DEEP),
    C("lstm_final_states", lambda x, h, c, wi, wh: torch.lstm(x, (h, c), (wi, wh), False, 1, 0.0,
      False, False, False)[1:], R(3, 2, 2), R(1, 2, 3), R(1, 2, 3), R(12, 2), R(12, 3), **DEEP),
    M("LSTM_one_step", rnn(nn.LSTM, 2, 3, batch_first=True), R(2, 1, 2), func=first, samples=True,
      **DEEP),
    M("LSTM_backwards_last_state", rnn(nn.LSTM, 2, 3, bidirectional=True), SEQ,
      func=lambda m, x: m(x)[1][0], **DEEP),
    C("gru_in_everything", lambda x, h, wi, wh, bi, bh: torch.gru(x, h, (wi, wh, bi, bh), True, 1,
      0.0, False, False, False)[0], R(3, 2, 2), R(1, 2, 3), R(9, 2), R(9, 3), R(9), R(9), **DEEP),
    M("GRU", rnn(nn.GRU, 2, 3, batch_first=True), SEQ, func=first, samples=True, **DEEP),
    M("GRU_states", rnn(nn.GRU, 2, 3), SEQ, func=whole, **DEEP),
    M("RNN", rnn(nn.RNN, 2, 3, batch_first=True), SEQ, func=first, samples=True, **DEEP),
    M("RNN_relu", rnn(nn.RNN, 2, 3, nonlinearity="relu"), SEQ, func=first, **DEEP),
    M("LSTMCell", rnn(nn.LSTMCell, 2, 3), R(2, 2), func=lambda m, x: m(m(x)[0][:, :2]),
      samples=True, **DEEP),
    M("GRUCell", rnn(nn.GRUCell, 2, 3), R(2, 2), R(2, 3), samples=True, **DEEP),
    M("RNNCell", rnn(nn.RNNCell, 2, 3), R(2, 2), samples=True, **DEEP),
    M("LSTM_packed", rnn(nn.LSTM, 2, 3, batch_first=True), SEQ, func=packed([2, 3]),
      nodes="PackPaddedSequence", samples=True, **DEEP),
    M("GRU_packed_sorted", rnn(nn.GRU, 2, 3), R(3, 3, 2), func=packed([3, 1, 1], True),
      nodes="PackPaddedSequence", **DEEP),
    M("module_backward_hooks", hooked, X, nodes="BackwardHookFunction", samples=True),
    M("dropout_between_layers_eval", lambda: nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5),
      nn.ReLU()).eval(), X, samples=True),
]  # fmt: skip

"""Scaled dot-product attention, analytic in both directions and differentiable.

The fused kernels have no derivative of their backward, so torch cannot push tangents through them. Here the
node becomes its parts, ``S = scale * q k^T + mask``, ``P = softmax(S)``, ``O = P v``, each its own value: queries
stay apart for tangents of q, batch and heads for tangents of k and v. P is computed again from q, k and the mask.
"""

from __future__ import annotations

import math

from torch import Tensor

from ..base.elsewhere import check_keys
from ..maps.attending import Attend, Whole
from ..maps.attention import Attention, probabilities
from ..maps.contraction import MatMul
from ..maps.curvature import Curves, SoftmaxBend
from ..maps.linear_map import Identity
from ..maps.low_rank import Softmax
from ..maps.maps import HALF, Batched
from ..maps.once import Formed, Once
from ..maps.unmasked import Unmasked, of_attention
from . import rule
from .elementwise import only
from .linear import met

# node: (name of the saved mask or None, place of the mask among the edges or None, name of the first output)
KINDS = {
    "ScaledDotProductFlashAttentionForCpuBackward0": ("attn_mask", None),
    "ScaledDotProductFlashAttentionBackward0": (None, None),
    "ScaledDotProductEfficientAttentionBackward0": ("attn_bias", 3),
    "ScaledDotProductCudnnAttentionBackward0": ("attn_bias", None),
    "ScaledDotProductFusedAttentionOverrideableBackward0": ("attn_bias", 3),
}


def parts(r) -> Curves | None:
    """Scores, softmax and the weighted sum are values of their own."""
    if not only(r, MatMul, Softmax):
        return None
    products, after = r.edges(MatMul), r.new.stop
    found: Curves = {}
    for v, s, edge in r.edges(Softmax):
        after = v
        found[v] = SoftmaxBend(s, edge.p, edge.axis, False)
    scale = r.saved("scale")
    scale = r.tensor("query").shape[-1] ** -0.5 if scale is None else scale
    scores = [p for p in products if p[0] < after] if found else []
    for part, factor in ((scores, scale), ([p for p in products if p not in scores], 1.0)):
        found.update(met(part, factor))
    return found


@rule(
    "ScaledDotProductFlashAttentionForCpu", "ScaledDotProductFlashAttention",
    "ScaledDotProductEfficientAttention", "ScaledDotProductCudnnAttention",
    "ScaledDotProductFusedAttentionOverrideable", curve=parts,
)  # fmt: skip
def attention(g):
    mask_name, mask_edge = KINDS[g.name]
    q, k, v = g.tensor("query"), g.tensor("key"), g.tensor("value")
    mask = g.saved(mask_name) if mask_name else None
    causal = g.saved("is_causal")
    if g.saved("dropout_p") != 0 or q.dim() != 4:
        return batch_and_heads(g)
    b, heads, t, d = q.shape
    groups, s, width = k.shape[1], k.shape[2], v.shape[3]
    check_keys(k, v)
    if (
        v.shape[1] != groups
        or heads % groups
        or k.shape[0] != b
        or tuple(g.shape) != (b, heads, t, width)
    ):
        return batch_and_heads(g)
    if causal and t != s and g.name != "ScaledDotProductFlashAttentionForCpuBackward0":
        return batch_and_heads(g)  # kernels differ in which corner of the mask they align
    scale = g.saved("scale")
    scale = 1 / math.sqrt(d) if scale is None else scale

    # heads that share keys are rows of one product: (batch * groups, heads / groups * queries, ...)
    n, rows = b * groups, heads // groups * t

    def flat(x: Tensor, length: int) -> Tensor:
        return x.reshape(n, length, x.shape[-1])

    of = Attention(q, k, v, mask, causal, scale)
    size = b * heads * t * s
    p = Formed(lambda: probabilities(of).reshape(n, rows, s), size * max(q.dtype.itemsize, 4))
    p_like, formed = p, (p,)
    if q.dtype in HALF:
        p_like = Formed(lambda: p().to(q.dtype), size * q.dtype.itemsize)
        formed = p, p_like
    unmasked = None
    if causal or mask is not None:
        unmasked = Unmasked(
            lambda: of_attention(mask, causal, (b, heads, t, s), groups, q.device),
            fixed=mask is None,
        )
    scores: list[int] = []
    if g.src[0] is not None:
        x = g.view(g.src[0], (n, rows, d))
        keys = Once(lambda: flat(k, s).transpose(1, 2) * scale)
        scores.append(g.single(x, Batched(keys, "right"), (n, rows, s)))
    if g.src[1] is not None:
        x = g.permute(g.view(g.src[1], (n, s, d)), (0, 2, 1))
        queries = Once(lambda: flat(q, rows) * scale)
        scores.append(g.single(x, Batched(queries, "left"), (n, rows, s)))
    if mask_edge is not None and len(g.src) > mask_edge and g.src[mask_edge] is not None:
        x = g.cast(g.expand(g.src[mask_edge], (b, heads, t, s)))
        scores.append(g.view(x, (n, rows, s)))
    outs: list[int] = []
    if scores:
        total = g.add([(i, Identity()) for i in scores], (n, rows, s))
        weights = g.single(total, Softmax(p, 2, unmasked, (p,)))
        values = Once(lambda: flat(v, s))
        outs.append(g.single(weights, Batched(values, "right"), (n, rows, width)))
    if g.src[2] is not None:
        x = g.view(g.src[2], (n, s, width))
        outs.append(g.single(x, Batched(p_like, "left", unmasked, formed), (n, rows, width)))
    out = g.view(g.add([(i, Identity()) for i in outs], (n, rows, width)), g.shape)
    if mask_edge is None or g.src[mask_edge : mask_edge + 1] in ([], [None]):
        ends = tuple([i for i in g.src[:3] if i is not None])
        wanted = tuple([i is not None for i in g.src[:3]])
        whole = Whole(of, wanted)
        maps = tuple([Attend(whole, place) for place in range(3) if wanted[place]])
        g.others[out] = ends, maps, size
    # the other outputs (logsumexp, random state) carry no gradient
    return (out,) + (None,) * (len(g.meta) - 1)


def batch_and_heads(g):
    """The node is called as it is; it keeps the batch and, where they are not shared, the heads."""
    kept = {}
    for edge, source in enumerate(g.src):
        own = () if source is None else g.values[source].shape
        pairs = []
        for a in range(2):
            if len(own) != 4 or len(g.shape) != 4 or own[a] != g.shape[a]:
                break
            pairs.append((a, a))
        kept[0, edge] = tuple(pairs)
    return g.opaque(kept)

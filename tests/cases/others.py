"""Fourier transforms, complex values inside, casts, losses, samplers, and gradients as functions."""

import torch
import torch.nn.functional as F
from torch import nn

from .case import A, C, D, M, P, R, U

X = R(3, 4)
LOW = {"inner": torch.float32}


def targets(x, *values):
    return torch.tensor(values, device=x.device)


def of_number(f):
    return lambda x, y: torch.view_as_real(f(torch.complex(x, y)))


def joined(x, y):
    z, w = torch.complex(x, y), torch.complex(y, x * y)
    q = torch.cat([z, w, x.to(z.dtype)], 1).roll(1, 1).flip(1)[:, 1:9]
    q = torch.where(x[:, :1] > 0, q, torch.stack([w, z], 2).flatten(1)).unflatten(1, (4, 2))
    return torch.view_as_real(q.masked_fill(y[:, :, None] > 1, 2j).mT.cumsum(1).repeat(1, 2, 1))


def picked(x, y):
    z = torch.complex(x, y)
    at = torch.tensor([2, 0, 2], device=x.device)
    rows = torch.arange(len(x), device=x.device)[:, None]
    q = z[:, at].index_put((rows, at[:2]), z[:, :2].conj()).index_add(1, at, z[:, 1:], alpha=2)
    q = q + z.gather(1, at.expand(len(x), 3)).tril() + F.pad(z, (1, -1)).unfold(1, 2, 1).sum(2)
    return torch.view_as_real(torch.diag_embed(q, 1).diagonal(1, 1, 2) - q.mean(1, keepdim=True))


def moved(x, y):
    """Each entry of (N, 4) goes to its own sample."""
    z, aten = torch.complex(x, y), torch.ops.aten
    a, b = z.split(2, 1)
    c, d = torch.unsafe_split_with_sizes(z, [1, 3], 1)
    e, f = z.split([1, 3], 1)
    g, h = torch.unsafe_split(z, 2, 1)
    q = torch.cat([b * g, c + f, a * h, d - e.expand(-1, 3)], 1)  # (N, 10)
    u = z[:, :1].expand(-1, 4).unsqueeze(1).squeeze(1) * torch.stack(z.unbind(1)[::-1], 1)
    u = u.clone().unsqueeze_(1).squeeze_(1).unsqueeze(2).squeeze((2,)).clone().t_().t()
    u = aten.add.Scalar(aten.sub.Scalar(aten.mul.Scalar(aten.alias(u), 2 - 1j), 1j, 2), 1)
    at = torch.tensor([3, 0, 0, 1], device=x.device)
    u = u + u.index_select(1, at).scatter_add(1, at.expand(len(x), 4), z * u)
    u = u.index_put_((torch.arange(len(x), device=x.device), at[:1]), z[:, 2])
    return torch.view_as_real(torch.cat([q, u, torch.zeros_like(u).copy_(x), u.conj().imag + 0j], 1))


def mixed(x, y):
    z = torch.complex(x, y)
    v = z.masked_select(torch.tensor([True, False, True, True], device=x.device))
    v = v[:3].unsqueeze(0).squeeze() * z.take(torch.tensor([4, 0, 4], device=x.device))
    v = v.clone().unsqueeze_(0).squeeze_() + z.clone().masked_fill(x > 0, z[0, 0]).mean()
    v = v.clone().unsqueeze_(0).squeeze_((0,)) * z.rot90(1).sum() + z.mT.triu()[0]
    q = torch.fill(z, 2j) * torch.fill(z, z[0, 1]) + z.clone().fill_(1) + z.clone().fill_(z[1, 0])
    return torch.view_as_real(torch.cat([v, q.flatten()]))


def slope(x):
    """A gradient through complex numbers: nodes of backwards."""
    if not x.requires_grad:
        x = x.clone().requires_grad_()
    z = torch.fft.fft(x)
    y = torch.fft.irfft(z[:, 1:] * z.unbind(1)[0][:, None]).square().sum() + z[:, 2].abs().sum()
    y = y + z[:, torch.tensor([0, 2, 0], device=x.device)].log().real.sum()
    y = y + (torch.diagonal(z[:, :3, None] * z[:, None, :3], 1, 1, 2).exp().real).sum()
    return torch.autograd.grad(y, x, create_graph=True)[0]


def written(x, y):
    z = torch.complex(x, y)
    q = torch.zeros_like(z)
    q[:, 1:3] = z[:, :2].exp()
    q[:, ::2] *= 2
    q[:, 1].conj().mul_(3)
    return torch.view_as_real(q * z)


def written_mixed(x, y):
    z = torch.complex(x, y)
    z[:, 0] = x[:, 2]
    return torch.view_as_real(z * z)


def written_part(x, y):
    z = torch.complex(x, y).exp().clone()
    z.real[:, 3] = y[:, 1]
    return torch.view_as_real(z * z)


def multiplied(x, y):
    z = torch.complex(x, y)  # (2, 3, 3)
    c = torch.complex(x.detach(), x.detach() + 1)
    v = z[0, 0]
    a = torch.baddbmm(z, c, z.mH, beta=2j, alpha=0.5) + torch.einsum("nij,njk->nik", z.conj(), c)
    b = torch.addmm(z[0], c[1], z[1]) + torch.addbmm(z[1], z, c) + z[0] @ c[0].T
    m = torch.addmv(v, z[1], c[0, 1], alpha=1j) + c[1] @ v + z[0] @ v
    n = torch.addr(b, v, c[0, 2]) + torch.dot(v, c[0, 0]) + torch.vdot(v, z[1, 1]) + torch.vdot(c[0, 0], v)
    return torch.view_as_real(torch.cat([a.flatten(), b.flatten(), m, n.flatten()]))


def fourier_block(x, w):
    """(N, 2, 5, 4): the lowest modes mixed by complex weights."""
    spectrum = torch.fft.rfft2(x, norm="ortho")
    mixed = torch.zeros_like(spectrum)
    weight = torch.view_as_complex(w)
    mixed[..., :2, :2] = torch.einsum("nixy,ioxy->noxy", spectrum[..., :2, :2], weight)
    return F.gelu(torch.fft.irfft2(mixed, s=x.shape[-2:], norm="ortho") + x)


def response(p):
    w = torch.linspace(0.1, 2, 6, dtype=p.dtype, device=p.device)
    at, damping = p[:2, None], p[2:, None]
    return torch.fft.irfft((1 / (at * at - w * w + 2j * damping * at * w)).sum(0), n=9)


ENTIRE = {
    "acos": torch.acos, "acosh": torch.acosh, "asin": torch.asin, "asinh": torch.asinh, "atan": torch.atan,
    "atanh": torch.atanh, "cos": torch.cos, "cosh": torch.cosh, "exp": torch.exp, "exp2": torch.exp2,
    "expm1": torch.expm1, "log": torch.log, "log10": torch.log10, "log1p": torch.log1p, "log2": torch.log2,
    "reciprocal": torch.reciprocal, "rsqrt": torch.rsqrt, "sigmoid": torch.sigmoid, "sin": torch.sin,
    "sinh": torch.sinh, "sqrt": torch.sqrt, "tan": torch.tan, "tanh": torch.tanh, "sgn": torch.sgn,
    "pow_2.5": lambda z: z**2.5, "pow_of_two": lambda z: 2**z, "pow_both": lambda z: z**z.conj(),
    "pow_real": lambda z: z**z.real + (1 + z.imag.abs()) ** z,
    "addcmul": lambda z: torch.addcmul(z, z.conj(), z.exp(), value=2),
    "addcdiv": lambda z: torch.addcdiv(z, z.conj(), z + 3, value=2),
    "div": lambda z: z / z.real + z.conj() / (z + 3) + 2j / z + z.imag / (z + 2),
    "rsub": lambda z: torch.rsub(z, z.conj(), alpha=2) + torch.rsub(z, 1) - torch.sub(z, z.real, alpha=3),
    "neg": lambda z: (-z.conj()).conj().imag * z + z.conj().clone().conj_physical_().conj_physical(),
    "fill": lambda z: z.clone().fill_(z[0, 0]) * z + z.clone().zero_(),
}  # fmt: skip
"""Ops on complex numbers, each by itself."""


CASES = [
    *[C(f"of_complex_{n}", of_number(f), A(3, 4), A(3, 4), variant=True) for n, f in ENTIRE.items()],
    C("fft_abs", lambda x: torch.fft.fft(x).abs(), X, nodes="FftR2C", samples=True),
    C("rfft_parts", lambda x: torch.view_as_real(torch.fft.rfft(x)), X, nodes="FftR2C",
      samples=True),
    C("rfft_irfft", lambda x: torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(x.sin()), n=4), X,
      nodes="FftC2R", samples=True),
    C("fft_real_imag", lambda x: (lambda z: z.real * z.imag)(torch.fft.fft(x)), X, samples=True),
    C("fft_ifft", lambda x: torch.fft.ifft(torch.fft.fft(x)).real, X, nodes="FftC2C",
      samples=True),
    C("fft2", lambda x: torch.fft.fft2(x).abs(), R(2, 2, 3), samples=True, factor=4,
      reason="the modulus of a small coefficient"),
    C("fft_samples", lambda x: torch.fft.fft(x, dim=0).real, X, mixes=True),
    C("hfft", lambda x: torch.fft.hfft(torch.complex(x, x * 0.5)), X, samples=True),
    C("fft2_odd", lambda x: torch.fft.irfft2(torch.fft.rfft2(x, norm="ortho") * (1 + 2j), s=(3, 5),
      norm="forward"), R(2, 3, 5), samples=True, nodes="FftC2R FftR2C"),
    C("fftn_dims", lambda x: torch.fft.ifftn(torch.fft.fftn(x, dim=(2, 0)).conj(), dim=(1, 2)).imag,
      R(2, 3, 4), mixes=True),
    C("ihfft", lambda x: torch.fft.irfft(torch.fft.ihfft(x, n=7), n=6), R(2, 5), samples=True),
    C("fourier_block", fourier_block, R(2, 2, 5, 4), R(2, 2, 2, 2, 2), samples=(0,),
      strided=False),
    C("response", response, P(4), factor=4, reason="quotients near a resonance"),
    C("complex_joined", joined, A(3, 4), A(3, 4), samples=True),
    C("complex_picked", picked, X, X, samples=True),
    C("complex_moved", moved, X, X, samples=True, empty=False),
    C("complex_mixed", mixed, X, X),
    C("complex_slope", slope, R(2, 4), samples=True, factor=8, reason="sums of three transforms"),
    C("complex_written", written, X, X, samples=True),
    C("complex_written_part", written_part, X, X, samples=True),
    C("complex_written_mixed", written_mixed, X, X, samples=True),
    C("complex_multiplied", multiplied, R(2, 3, 3), R(2, 3, 3)),
    C("complex_precisions", lambda x: (torch.exp(1j * x.double()) * x.to(torch.complex64)).real, X,
      samples=True, inner=torch.float32),
    C("fftshift", torch.fft.fftshift, X),
    C("stft", lambda x: torch.stft(x, 4, 2, window=torch.ones_like(x[:4]), return_complex=True,
      center=False).abs(), R(8), factor=4, reason="the modulus of a small coefficient"),
    C("spectral_conv", lambda x, w: torch.fft.irfft(torch.fft.rfft(x) * torch.complex(w, -w), n=4),
      X, R(3), samples=(0,)),
    C("complex_polynomial", lambda x: (lambda z: (z * z * (1 + 2j)).imag)(torch.complex(x, x.cos())),
      X, samples=True),
    C("complex_abs", lambda x, y: torch.complex(x, y).abs(), A(3, 4), A(3, 4), samples=True),
    C("complex_angle", lambda x, y: torch.complex(x, y).angle(), A(3, 4), A(3, 4), samples=True),
    C("complex_exp", lambda x: torch.exp(1j * x).real, X, samples=True),
    C("complex_conj", lambda x: (torch.complex(x, x * x).conj() * (2 + 1j)).real, X, samples=True),
    C("complex_matmul", lambda x: (lambda z: (z @ z.mH).real)(torch.complex(x, x.sin())), X),
    C("complex_solve", lambda a: torch.linalg.solve(torch.complex(a, a.sin()) + 3 * torch.eye(3,
      device=a.device), torch.ones(3, device=a.device, dtype=(1j * a).dtype)).abs(), R(3, 3),
      factor=16, reason="a solve loses digits with the condition of its matrix"),
    C("complex_polar", lambda r, t: torch.view_as_real(torch.polar(r, t)), P(3, 4), X,
      samples=True),
    C("complex_views", lambda x: torch.view_as_real(torch.view_as_complex(x) * 1j), R(3, 2),
      strided=False, samples=True),
    C("complex_eigenvalues", lambda a: torch.linalg.eigvals(a).abs().sum(), R(3, 3), factor=64,
      reason="eigenvalues of a matrix that is not normal", second=False),
    # casts
    C("cast_down_and_up", lambda x: x.float().sin().to(x.dtype), X, samples=True, nodes="ToCopy",
      **LOW),
    C("cast_up_and_down", lambda x: x.double().sin().to(x.dtype), X, samples=True),
    C("cast_output_float", lambda x: x.float() * 2, X, samples=True, **LOW),
    C("cast_output_double", lambda x: x.double() ** 2, X, samples=True),
    C("cast_bfloat16", lambda x: (x.bfloat16() * 1.5).to(x.dtype), X, samples=True,
      inner=torch.bfloat16),
    C("cast_half", lambda x: x.half().sin().to(x.dtype), X, samples=True, inner=torch.float16),
    C("cast_mixed_operands", lambda x: x.float() * x.double(), X, samples=True, **LOW),
    C("cast_to_same", lambda x: x.to(x.dtype, copy=True).sin(), X, samples=True),
    C("cast_int_product", lambda x: x * x.detach().long(), A(3, 4), samples=True),
    C("cast_complex", lambda x: (x.to(torch.complex128) * 1j).imag.to(x.dtype), X, samples=True),
    # losses
    C("mse_loss", F.mse_loss, X, X, nodes="MseLoss"),
    C("mse_loss_none", lambda x, y: F.mse_loss(x, y, reduction="none"), X, X, nodes="MseLoss",
      samples=True),
    C("mse_loss_sum", lambda x, y: F.mse_loss(x, y, reduction="sum"), X, X, nodes="MseLoss"),
    C("l1_loss", F.l1_loss, D(3, 4), X, poison=False),
    C("l1_loss_none", lambda x, y: F.l1_loss(x, y, reduction="none"), D(3, 4), X, samples=True,
      poison=False),
    C("smooth_l1_loss", lambda x, y: F.smooth_l1_loss(x, y, beta=0.7), X, X, nodes="SmoothL1Loss"),
    C("smooth_l1_none", lambda x, y: F.smooth_l1_loss(x, y, reduction="none"), X, X, samples=True),
    C("huber_loss", lambda x, y: F.huber_loss(x, y, delta=0.6), X, X, nodes="HuberLoss"),
    C("huber_loss_none", lambda x, y: F.huber_loss(x, y, reduction="none", delta=0.6), X, X,
      samples=True),
    C("cross_entropy", lambda x: F.cross_entropy(x, targets(x, 0, 3, 1)), X,
      nodes="NllLoss LogSoftmax"),
    C("cross_entropy_none", lambda x: F.cross_entropy(x, targets(x, 0, 3, 1), reduction="none"), X,
      samples=True),
    C("cross_entropy_smooth", lambda x: F.cross_entropy(x, targets(x, 0, 3, 1),
      weight=x.new_tensor([1.0, 2.0, 0.5, 1.0]), label_smoothing=0.1), X),
    C("cross_entropy_ignore", lambda x: F.cross_entropy(x, targets(x, 0, -100, 1)), X),
    C("cross_entropy_soft", lambda x, t: F.cross_entropy(x, t.softmax(-1)), X, X),
    C("cross_entropy_2d", lambda x: F.cross_entropy(x, targets(x, [[0, 1]], [[2, 2]])),
      R(2, 3, 1, 2), nodes="NllLoss2D"),
    C("nll_loss", lambda x: F.nll_loss(x, targets(x, 0, 3, 1), weight=x.new_tensor([1.0, 2, 3, 4])),
      X, nodes="NllLoss"),
    C("nll_loss_none", lambda x: F.nll_loss(x, targets(x, 0, 3, 1), reduction="none"), X,
      nodes="NllLoss", samples=True),
    C("bce", F.binary_cross_entropy, U(3, 4), U(3, 4), nodes="BinaryCrossEntropy"),
    C("bce_none", lambda x, y: F.binary_cross_entropy(x, y, reduction="none"), U(3, 4), U(3, 4),
      samples=True),
    C("bce_with_logits", F.binary_cross_entropy_with_logits, X, U(3, 4),
      nodes="BinaryCrossEntropyWithLogits"),
    C("bce_with_logits_weights", lambda x, y: F.binary_cross_entropy_with_logits(x, y,
      pos_weight=x.new_tensor([1.0, 2, 3, 4]), reduction="none"), X, U(3, 4), samples=True),
    C("kl_div", lambda x, y: F.kl_div(x.log_softmax(-1), y.softmax(-1), reduction="batchmean"), X,
      X),
    C("kl_div_log", lambda x, y: F.kl_div(x, y, log_target=True, reduction="none"), X, X,
      samples=True),
    C("gaussian_nll", lambda x, m, v: F.gaussian_nll_loss(x, m, v, full=True), X, X, P(3, 4)),
    C("poisson_nll", lambda x, t: F.poisson_nll_loss(x, t, full=True), X, P(3, 4)),
    C("hinge_embedding", lambda x: F.hinge_embedding_loss(x, x.detach().sign()), A(3, 4)),
    C("margin_ranking", lambda x, y: F.margin_ranking_loss(x, y, x.detach().sign(), margin=0.2),
      D(3, 4), X),
    C("multi_margin", lambda x: F.multi_margin_loss(x, targets(x, 0, 3, 1)), D(3, 4),
      nodes="MultiMarginLoss", second=False),
    C("multilabel_margin", lambda x: F.multilabel_margin_loss(x, targets(x, [0, 2, -1, 0],
      [1, -1, 0, 0], [3, 0, 1, -1])), D(3, 4), nodes="MultilabelMarginLoss", second=False),
    C("multilabel_soft_margin", lambda x: F.multilabel_soft_margin_loss(x, (x > 0).to(x.dtype)),
      A(3, 4)),
    C("soft_margin", lambda x: F.soft_margin_loss(x, x.detach().sign()), A(3, 4),
      nodes="SoftMarginLoss"),
    C("triplet_margin", lambda a, p, n: F.triplet_margin_loss(a, p, n, margin=3.0), X, X, X),
    C("cosine_embedding", lambda x, y: F.cosine_embedding_loss(x, y, targets(x, 1, -1, 1)), A(3, 4),
      A(3, 4)),
    C("ctc_loss", lambda x: F.ctc_loss(x.log_softmax(-1), targets(x, [1, 2], [2, 1]),
      targets(x, 4, 4), targets(x, 2, 2)), R(4, 2, 3), nodes="CtcLoss", second=False, factor=16,
      reason="a dynamic programme of log-sum-exps"),
    M("network_and_loss", lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), X,
      func=lambda m, x: F.cross_entropy(m(x), targets(x, 0, 2, 1))),
    # samplers that are differentiable in their parameters
    C("reparameterised", lambda m, s: torch.distributions.Normal(m, s.exp()).log_prob(
        m.detach() + 0.3), X, X, samples=True),
    C("beta_log_prob", lambda a: torch.distributions.Beta(a, a + 1).log_prob(torch.full_like(
        a, 0.3)), P(3, 4), samples=True, factor=16, reason="differences of lgamma and digamma"),
    C("gamma_sample", lambda a: (torch.manual_seed(3), torch._standard_gamma(a))[1], P(2, 3),
      nodes="StandardGamma", second=False, factor=64,
      reason="the sampler's own derivative is an approximation in the input's precision"),
    # nothing to differentiate
    C("constant_output", lambda x: x.new_ones(2), X, second=False),
    C("detached", lambda x: x.detach() * x, X, samples=True),
    C("fully_detached", lambda x: x.detach() * 2, X, second=False, samples=True),
    C("two_outputs_one_constant", lambda x: (x.sin(), x.new_ones(3, 2)), X, samples=True),
    C("unused_input", lambda x, y: x.sin(), X, X, samples=True),
    C("integer_output", lambda x: (x.argmax(1), x.sum(1)), D(3, 4), samples=True),
    C("same_output_twice", lambda x: (lambda y: (y, y))(x.sin()), X, samples=True),
    C("output_feeds_output", lambda x: (lambda y: (y, y.exp()))(x.sin()), X, samples=True),
    C("input_and_output", lambda x, y: (x, y * x), X, X, samples=True),
    C("three_by_three", lambda x, y, z: (x * y, y.sum(-1), z.sin() * x), X, X, X, samples=True),
    C("dead_branch", lambda x: (x.exp(), x.sin())[1], X, samples=True),
]  # fmt: skip

"""Fourier transforms, complex values inside, casts, losses, samplers, and gradients as functions."""

import torch
import torch.nn.functional as F
from torch import nn

from .case import A, C, D, M, P, R, S, U

X = R(3, 4)
LOW = {"inner": torch.float32}


def targets(x, *values):
    return torch.tensor(values, device=x.device)


CASES = [
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


def gradient(func):
    """x -> the gradient of func's sum: its graph holds the backward ops' own nodes."""

    def call(x):
        x = x.clone() if not x.requires_grad else x
        with torch.enable_grad():
            y = x if x.requires_grad else x.requires_grad_()
            (g,) = torch.autograd.grad(func(y).sin().sum(), y, create_graph=True)
        return g

    return call


SMOOTH = {
    "tanh": torch.tanh, "sigmoid": torch.sigmoid, "softplus": F.softplus, "silu": F.silu,
    "gelu": F.gelu, "mish": F.mish, "elu": F.elu, "relu": F.relu, "leaky_relu": F.leaky_relu,
    "logsigmoid": F.logsigmoid, "hardswish": F.hardswish, "exp_sin": lambda x: x.sin().exp(),
    "glu": F.glu, "softmax": lambda x: x.softmax(-1), "log_softmax": lambda x: x.log_softmax(-1),
    "hardtanh": F.hardtanh, "softshrink": lambda x: F.softshrink(x, 0.1),
    "threshold": lambda x: F.threshold(x, 0.1, 0.0), "pow_3": lambda x: x**3, "sqrt": lambda x: (x * x + 1).sqrt(),
    "layer_norm": lambda x: F.layer_norm(x, (4,)), "division": lambda x: 1 / (x * x + 1),
    "group_norm": lambda x: F.group_norm(x, 1), "logsumexp": lambda x: x.logsumexp(-1),
    "cumsum": lambda x: x.cumsum(-1), "index": lambda x: x[:, [0, 0, 1]] ** 2,
}  # fmt: skip
CASES += [
    C(f"gradient_of_{name}", gradient(func), A(3, 4), samples=True, second=False, factor=16,
      reason="second derivatives cancel")
    for name, func in SMOOTH.items()
]  # fmt: skip
CASES += [
    C("gradient_of_conv", gradient(lambda x: F.conv1d(x, x.new_ones(2, 2, 2)).tanh()), R(2, 2, 4),
      samples=True, second=False),
    C("gradient_of_max_pool", gradient(lambda x: F.max_pool1d(x * x, 2)), D(2, 1, 4), samples=True,
      second=False),
    C("gradient_of_avg_pool", gradient(lambda x: F.avg_pool2d(x * x, 2)), R(2, 1, 2, 4),
      samples=True, second=False),
    C("gradient_of_interpolate", gradient(lambda x: F.interpolate(x * x, scale_factor=2,
      mode="linear")), R(2, 1, 3), samples=True, second=False),
    C("gradient_of_attention", gradient(lambda x: (x @ x.mT).softmax(-1) @ x), R(2, 3, 2),
      samples=True, second=False, factor=16, reason="second derivatives cancel"),
    C("gradient_of_mm", gradient(lambda x: x @ x.T @ x), S(2, 3), second=False),
    C("gradient_of_prod", gradient(lambda x: x.prod(-1)), A(3, 3), samples=True, second=False),
    C("gradient_of_std", gradient(lambda x: x.std(-1)), A(3, 4), samples=True, second=False,
      factor=16, reason="second derivatives cancel"),
    M("gradient_of_energy", lambda: nn.Sequential(nn.Linear(4, 5), nn.Softplus(), nn.Linear(5, 1)),
      X, func=lambda m, x: gradient(m)(x), samples=True, second=False),
]  # fmt: skip

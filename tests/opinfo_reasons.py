"""Where an op of PyTorch's database does not give what autograd's rows say, and why.

A reason holds for the samples that need it, and a test fails when none does any more.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    why: str
    spreads: bool = (
        False  # torch has 0 * NaN = NaN in entries for which jactri has their own derivative
    )
    cancels: float = 0.0  # the size of the terms that cancel in an entry
    keeps: bool = (
        False  # jactri has NaN or inf in entries that torch's second backward selects away
    )
    refused: str = ""  # what jactri's RuntimeError or warning says
    differences: bool = False  # finite differences judge, not torch
    since: tuple[int, ...] = ()  # the version of torch that is the first to have the op
    until: tuple[int, ...] = ()  # the version of torch from which on it does not hold


def cancelling(what, size=1.0):
    return Reason(f"{what}: what is left is the rounding of larger terms that cancel", cancels=size)


RPOW = Reason(
    "negative bases: torch multiplies their NaN slopes with the zero cotangents of all other entries",
    spreads=True,
)
NORMALISED = cancelling("few entries a mean, which the normalisation nearly fixes")

CHUNKED = Reason(
    "its backward writes to out=, which autograd cannot record", refused="second derivative"
)

JACOBIAN = {
    "__rpow__": RPOW,
    "_batch_norm_with_update": NORMALISED,
    "_native_batch_norm_legit": NORMALISED,
    "as_strided_scatter": Reason(
        "torch 2.13 gives gradients to the entries that are overwritten, and none to those that stay",
        differences=True,
    ),
    "corrcoef": cancelling("two observations, whose correlation is always 1"),
    "native_batch_norm": NORMALISED,
    "native_group_norm": Reason(
        "torch 2.13 has no gradient of the outputs mean and rstd where the first output has no cotangent; "
        "differences show that they depend on the input",
        differences=True,
        until=(2, 14),
    ),
    "native_layer_norm": cancelling("one entry a mean, which is always normalised to 0", 100.0),
    "nn.functional.layer_norm": cancelling("one entry a mean, which is always normalised to 0"),
    "nn.functional.multi_head_attention_forward": cancelling("a softmax that is one-hot"),
    "nn.functional.normalize": cancelling("one entry, which is always normalised to 1"),
    "nn.functional.rms_norm": cancelling("one entry, which is always normalised to 1"),
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu": Reason(
        "a softmax that is one-hot: what is left is the rounding of larger terms that cancel",
        cancels=1.0,
        since=(2, 14),
    ),
}

# beside the size of what is differentiated, which all second derivatives are measured by
SECOND = {
    "__rpow__": RPOW,
    "masked.logaddexp": Reason(
        "logaddexp(-inf, -inf) has a curvature of NaN, which is multiplied with the zero tangent or cotangent of a "
        "masked entry, by torch and by jactri in different entries",
        keeps=True,
        spreads=True,
    ),
    "nn.functional.linear_cross_entropy.chunked": CHUNKED,
    "nn.functional.linear_cross_entropy.chunked_none": CHUNKED,
    "nn.functional.normalize": cancelling("one entry, which is always normalised to 1", 1e3),
}

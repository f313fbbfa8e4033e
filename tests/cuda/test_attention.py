"""A long attention on a device that is not there: its kernels are launched for `jvp` and `vjp`, and nothing waits."""

from collections import Counter

import pytest
import torch

import jactri

efficient = torch.ops.aten._scaled_dot_product_efficient_attention
KERNELS = {
    jactri.jvp: {"_attention_forward": 1, "_attention_push": 1},
    jactri.vjp: {
        "_attention_forward": 1,
        "_attention_pull_queries": 1,
        "_attention_pull_keys": 2,
    },
}


@pytest.mark.parametrize("product", KERNELS)
def test_a_long_attention_is_a_few_launches(product, device):
    x = torch.empty(1, 8, 2048, 64, device="cuda", dtype=torch.bfloat16)
    t = torch.empty(3, *x.shape, device="cuda", dtype=torch.bfloat16)

    def func(x):
        # a build for CPUs chooses no fused one by itself
        return efficient(x, x.sin(), x.cos(), None, True)[0]

    for _ in range(2):
        device.clear()
        made = product(func, x, t, backend="triton")[1]
    assert made.shape == t.shape and made.dtype == t.dtype
    assert Counter(launch.kernel for launch in device.launches) == KERNELS[product]
    assert not device.waits

"""An interpreter that computes what a GPU computes, as far as rounding goes.

Triton's interpreter cuts float32 to bfloat16 instead of rounding, multiplies bfloat16 bit patterns, ignores
``input_precision``, and reads 0 where a masked load has no ``other=``. `install` mends all four. Sums inside a dot are
float32, in numpy's order: what tensor cores do with them in detail only a GPU can show.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 values as bfloat16 bit patterns, rounded to nearest even."""
    bits = torch.from_numpy(np.array(x, dtype=np.float32)).bfloat16().view(torch.int16).numpy()
    return bits.view(np.uint16).reshape(np.shape(x))


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns as float32 values."""
    return (np.asarray(bits, dtype=np.uint16).astype(np.uint32) << 16).view(np.float32)


def to_tf32(x: np.ndarray) -> np.ndarray:
    """What a tensor core reads of a float32 operand: its 10 leading mantissa bits."""
    return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def install() -> None:
    """Patch the interpreter of this process; to be called once, before a kernel runs."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    plain_cast, plain_dot = builder.cast_impl, builder.create_dot
    plain_load = builder.create_masked_load

    def cast(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.float32 and target == tl.bfloat16:
            return handle(to_bf16(src.data), target)
        if source == tl.bfloat16 and target == tl.float32:
            return handle(from_bf16(src.data), target)
        return plain_cast(self, src, dst_type)

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        kind = a.dtype.scalar
        if kind == tl.bfloat16:
            x, y = from_bf16(a.data), from_bf16(b.data)
        elif kind == tl.float32 and str(input_precision).rpartition(".")[2] == "TF32":
            x, y = to_tf32(a.data), to_tf32(b.data)
        else:
            return plain_dot(self, a, b, d, input_precision, max_num_imprecise_acc)
        return handle((x @ y + d.data).astype(d.data.dtype), d.dtype.scalar)

    def load(self, ptrs, mask, other, *rest):
        kind = ptrs.get_element_ty()
        if other is None and kind in (tl.float16, tl.float32, tl.float64):
            nan = np.full(ptrs.data.shape, np.nan, interpreter._get_np_dtype(kind))
            other = handle(nan, kind)
        return plain_load(self, ptrs, mask, other, *rest)

    builder.cast_impl, builder.create_dot, builder.create_masked_load = cast, dot, load

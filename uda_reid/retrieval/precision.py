"""Matrix products that keep what they promise, whatever the training around them has switched on."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products without TF32 or bfloat16 inside, half-precision products with their sums in float32.

    Training code commonly allows both for speed; ranks and the error bounds of the search do not stand them. The
    settings are put back at the end. Also a decorator.
    """
    matmul = torch.backends.cuda.matmul
    precision, reduced = torch.get_float32_matmul_precision(), matmul.allow_fp16_reduced_precision_reduction
    torch.set_float32_matmul_precision("highest")
    matmul.allow_fp16_reduced_precision_reduction = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        matmul.allow_fp16_reduced_precision_reduction = reduced

"""Matrix products in full float32 precision, whatever the training code around them has switched on."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def float32_matmul() -> Iterator[None]:
    """Computes float32 products without TF32 or bfloat16, and sums half-precision products in float32.

    Training code often allows both for speed, but ranks and the error bounds of the search do not hold under them. The
    previous settings are restored at the end. Works as a context manager and as a decorator.
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

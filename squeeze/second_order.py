"""What second-order methods share: the damped Hessian of a layer's squared error, and the triangular factor of its inverse.

GPTQ rounds and SparseGPT zeroes one column after another, and both spread each column's error over the later ones through the upper
Cholesky factor of H⁻¹ with H = X Xᵀ (Frantar et al. 2022, arXiv:2210.17323, section 4; Frantar & Alistarh 2023, arXiv:2301.00774).
"""

import math

import torch
from torch import Tensor

DAMPING = 0.01
"""Share of the mean diagonal that is added to it."""
LAZY = 128
"""Columns after which the errors are spread on all that follow; within them on these columns alone."""


def hessian_of(gram: Tensor) -> tuple[Tensor, Tensor]:
    """(H, dead): a float64 copy of the Gram matrix [in, in] with 1 on the diagonal of inputs that are always zero, and which those are."""
    hessian = gram.to(torch.float64, copy=True)
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    return hessian, dead


def inverse_factor(hessian: Tensor) -> Tensor:
    """U, upper triangular with Uᵀ U = H⁻¹, float32; H [in, in] float64 is damped, more where rounding left it indefinite."""
    damping = DAMPING * float(hessian.diagonal().mean()) * torch.eye(len(hessian), dtype=hessian.dtype)
    factor, failed = torch.linalg.cholesky_ex(hessian + damping)
    if int(failed):
        factor = torch.linalg.cholesky(hessian + 100 * damping)
    upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
    return upper.float()


def lost_db(before: Tensor, after: Tensor, gram: Tensor) -> float | None:
    """Signal to noise of a layer's outputs where its weights, [out, in] each, change, for inputs whose Gram matrix is `gram`."""
    signal, noise = (float(((m @ gram) * m).sum()) for m in (before, before - after))
    return decibels(signal, noise)


def decibels(signal: float, noise: float) -> float | None:
    """10 log₁₀(signal / noise); None where there is nothing to compare."""
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None

"""How the learning rate rises and falls."""

import math
from typing import Literal


def factor(kind: Literal["linear", "cosine", "constant"], step: int, steps: int, warm_up: float) -> float:
    """What the highest rate is multiplied by at `step` of `steps`: a linear rise over `warm_up` of them, then the fall to 0.

    Linear: Devlin et al. 2018, arXiv:1810.04805, appendix A.2. Cosine: Loshchilov & Hutter 2016, arXiv:1608.03983, eq. 5, no restarts.
    """
    rise = max(1.0, warm_up * steps)
    if step < rise:
        return min(1.0, (step + 1) / rise)
    gone = (step - rise) / max(1.0, steps - rise)
    if kind == "constant":
        return 1.0
    return max(0.0, 1.0 - gone) if kind == "linear" else 0.5 * (1 + math.cos(math.pi * min(1.0, gone)))

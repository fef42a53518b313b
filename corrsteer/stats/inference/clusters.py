"""An interval of the correlation where prompts have several samples, which are not independent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from corrsteer.arguments import share
from corrsteer.errors import CorrSteerError
from corrsteer.ops.operations import check_rewards
from corrsteer.stats.groups import centred, numbered
from corrsteer.stats.inference.intervals import FEW, Influence, ends
from corrsteer.tensors import check_holds


def cluster_interval(
    z: Tensor, y: Tensor, groups: Sequence[int] | Tensor, level: float = 0.95, *, within: bool = False
) -> tuple[Tensor, Tensor]:
    """`delta_interval` with prompts for samples, from the activations of a few features.

    What the delta interval sums over samples is summed in each prompt first: Var(r) ≈ Σ_g (Σ_{j in g} I_j)² / n² (Liang
    & Zeger, "Longitudinal data analysis using generalized linear models", 1986), with a prompt's leverage
    Σ_{j in g} (1 + a_j²) / n, the skewness of prompts' sums, and degrees of freedom from prompts' sums of a² and b².
    With one sample a prompt it is the delta interval.

    Parameters
    ----------
    z : `[n, k]` pooled activations of k features, of any float dtype.
    y : `[n]` rewards, finite.
    groups : `[n]` whole numbers, which prompt each sample is of.
    level : confidence, between 0 and 1.
    within : whether the correlation is of z and y less their means in each prompt. Prompts of one sample do not count.

    Returns
    -------
    Low and high ends, `[k]` float64 on the CPU; NaN where the reward or the feature does not vary, and where there are
    fewer than four prompts; `within`, four in which rewards vary.

    Raises
    ------
    CorrSteerError : for wrong shapes, and rewards that are not finite.
    """
    level = share("level", level)
    for name, tensor in (("z", z), ("y", y)):
        check_holds(name, tensor)
    if z.dim() != 2 or y.shape != z.shape[:1]:
        raise CorrSteerError(f"z must be [n, k] and y [n], got {list(z.shape)} and {list(y.shape)}")
    z, y = (t.detach().to("cpu", torch.float64) for t in (z, y[:, None]))
    check_rewards(y)
    group, n = numbered(groups, len(y))[0], len(y)
    number = torch.tensor(group, dtype=torch.int64, device="cpu")

    def by_prompt(values: Tensor) -> Tensor:  # [G, k]
        total = torch.zeros(max(group, default=-1) + 1, values.shape[1], dtype=torch.float64, device="cpu")
        return total.index_add_(0, number, values)

    a, b = (centred(t, group) if within else t - t.mean(0) for t in (z, y))
    varies = [t.square().sum(0) > n * (1e-14 * raw.mean(0)).square() for t, raw in ((a, z), (b, y))]
    a, b = (t / torch.where(there, t.square().mean(0), 1).sqrt() for t, there in zip((a, b), varies))
    r = (a * b).mean(0).clamp(-1, 1)
    influence, aa, bb = by_prompt(a * b - r / 2 * (a**2 + b**2)), by_prompt(a**2), by_prompt(b**2)
    prompts = int((bb > 0).sum()) if within else len(aa)
    square = influence.square().sum(0).clamp(min=1e-30 * n)  # 0, but for rounding, where r is 1
    leverage = (aa if within else aa + by_prompt(torch.ones_like(y))) / n
    variance = (square + 2 * (influence.square() * leverage).sum(0)) / n**2
    carry_a, carry_b = (
        n**2 / t.square().sum(0).clamp(min=1e-300) for t in (aa, bb)
    )  # how many prompts carry Σ a² and Σ b²
    there = varies[0] & varies[1] & (prompts > 3)
    return ends(
        Influence(
            r,
            torch.where(there, torch.minimum(carry_a, carry_b).clamp(min=1), torch.nan),
            influence.pow(3).sum(0) / square**1.5,
            torch.where(there, variance.sqrt() / (1 - r**2).clamp(min=1e-12), torch.nan),
            carry_a * carry_b / max(prompts, 1) < FEW,
            prompts,
        ),
        level,
    )

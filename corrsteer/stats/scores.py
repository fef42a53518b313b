"""Scores of features, observed and of every permutation of the rewards, from `Evidence`."""

from __future__ import annotations

import torch
from torch import Tensor

from corrsteer.errors import CorrSteerError
from corrsteer.stats.evidence import FROM_ROWS, SCORES, STREAMED, WITHIN, Evidence
from corrsteer.types import Features

# Of the largest score, what counts as equal to the observed one: sums in another order differ by rounding (in float32,
# on GPUs), and of sparse features many permutations give the very same score.
TIE = 1e-6
FEATURES_AT_A_TIME = 64  # whose bins are looked at together, up to 64 each


def score(evidence: Evidence, name: str = "pearson", features: Features = slice(None), label: int = 0) -> Tensor:
    """A score of features, `[features]` float64, the better the larger; the sign says which way, 0 is nothing.

    - `pearson`: r, as the paper.
    - `point_biserial`: r of z with whether y > 0 (Tate, "Correlation between a discrete and a continuous variable",
      1954); the same as r where rewards are 0 and 1.
    - `contrastive`: E[z | y > 0] - E[z | y <= 0] (Rimsky et al., "Steering Llama 2 via contrastive activation
      addition", 2024, of features).
    - `squared_ratio`: (A - B) / (A + B) of A = E[z² | y > 0], B = E[z² | y <= 0]: the ratio A / B by which Muhamed et
      al. ("SAEs can improve unlearning: dynamic sparse autoencoder guardrails", 2025) approximate Fisher information,
      brought between -1 and 1, which ranks alike and is finite.
    - `mutual_information`: of which bin z is in (see `stored.StoredRows.bins`) with whether y > 0, in nats (Cover &
      Thomas, "Elements of information theory", eq. 2.28), with the sign of r.
    - `auroc`: 2 AUROC - 1, also Somers' D: the share of pairs of a sample with y > 0 and one with y <= 0 in which z is
      larger in the first, less that in which it is smaller (Hanley & McNeil, "The meaning and use of the area under a
      receiver operating characteristic (ROC) curve", 1982); `auroc` gives the area itself.
    - `spearman`: the correlation of ranks (Spearman, "The proof and measurement of association between two things",
      1904), of ties their mean.

    The last three need the samples' own activations: evidence of `stored.statistics`.

    Of evidence `within` prompts: `pearson` of z and y less their means in each prompt; for rewards of two values
    `point_biserial`, which then is the same, and `contrastive`, the mean over prompts of the difference of means in the
    prompt, which weighs n₊ n₋ / n_g (the fixed-effects estimate: Wooldridge, "Econometric analysis of cross section and
    panel data", 2010, section 10.5). The others are refused.
    """
    check(evidence, name, label)
    return _observed(evidence, name, features, label)


def correlation(evidence: Evidence, features: Features = slice(None), label: int = 0) -> Tensor:
    """Pearson's r, `[features]` float64; 0 where either variance is 0."""
    return pearson(evidence, evidence.columns("z1u1", features, label), features, label)[0][:, 0]


def auroc(evidence: Evidence, features: Features = slice(None), label: int = 0) -> Tensor:
    """The area under the ROC curve of z for y > 0, `[features]` float64; ties count half. 0.5 where there is one group.

    Raises
    ------
    CorrSteerError : where the evidence has no rows, see `stored.statistics`.
    """
    return 0.5 + score(evidence, "auroc", features, label) / 2


def check(evidence: Evidence, name: str, label: int = 0) -> None:
    """Raise unless there is such a score, and the evidence holds what it needs."""
    evidence.check_label(label)
    if name not in SCORES:
        raise CorrSteerError(f"score must be one of {', '.join(SCORES)}, got {name!r}")
    if evidence.within and name not in WITHIN:
        raise CorrSteerError(
            f"score {name!r} is not defined for samples that are centred within prompts; use {', '.join(WITHIN)}, or "
            f"collect without within"
        )
    if evidence.within and name != "pearson" and not evidence.two_valued(label) and _varies(evidence, label):
        raise CorrSteerError(
            f"score {name!r} within prompts needs rewards of two values, one above 0 and one not; use 'pearson'"
        )
    if name in FROM_ROWS and evidence.rows is None:
        raise CorrSteerError(
            f"score {name!r} needs each sample's activations, which were not kept; keep them, or use one of "
            f"{', '.join(STREAMED)}"
        )


def _varies(evidence: Evidence, label: int) -> bool:
    return bool(evidence.low[label] < evidence.high[label])


def _observed(evidence: Evidence, name: str, features: Features, label: int) -> Tensor:
    if name == "pearson":
        return correlation(evidence, features, label)
    if evidence.within:
        return _of_centred(evidence, name, evidence.columns("z1u1", features, label), features, label)[:, 0]
    if name in FROM_ROWS:
        value = _from_rows(evidence, name, features, label, permuted=False)[:, 0]
        value = value * correlation(evidence, features, label).sign() if name == "mutual_information" else value
    else:
        positive = evidence.columns("positive2" if name == "squared_ratio" else "positive", features, label)
        value = _of_groups(evidence, name, positive, features, label)[:, 0]
    finite = evidence.columns("z2u0", features).isfinite()[:, 0]  # or a sample had an activation that is not
    return torch.where(finite, value, 0)


def permuted(evidence: Evidence, name: str, features: Features, label: int) -> Tensor:
    """The score of every permutation, `[features, P]`; of mutual information without its sign."""
    check(evidence, name, label)
    if name == "pearson":
        return pearson(evidence, evidence.columns("permuted", features, label), features, label)[0]
    if evidence.within:
        return _of_centred(evidence, name, evidence.columns("permuted", features, label), features, label)
    if name in FROM_ROWS:
        return _from_rows(evidence, name, features, label, permuted=True)
    if name == "squared_ratio":
        positive = evidence.columns("permuted_positive2", features, label)
    elif evidence.has("permuted_positive"):
        positive = evidence.columns("permuted_positive", features, label)
    else:  # y takes two values, so that whether it is above 0 is a linear function of it
        low, high, origin, scale = (
            float(t[label]) for t in (evidence.low, evidence.high, evidence.origin, evidence.scale)
        )
        z = evidence.columns("z1u0", features)
        u = evidence.columns("permuted", features, label) + (origin - low) / scale * z
        positive = u / ((high - low) / scale)
    return _of_groups(evidence, name, positive, features, label)


def testable(evidence: Evidence, name: str, label: int = 0) -> bool:
    """Whether a score's permutations are kept, or follow from others that are or from rows."""
    if evidence.permutations == 0:
        return False
    if evidence.within:
        return name == "pearson" or (name in WITHIN and evidence.two_valued(label))
    if evidence.rows is not None:
        return True
    if name in FROM_ROWS:
        return False
    if name in ("point_biserial", "contrastive"):
        return evidence.has("permuted_positive") or evidence.two_valued(label)
    return name != "squared_ratio" or evidence.has("permuted_positive2")


def pearson(evidence: Evidence, cross: Tensor, features: Features, label: int) -> tuple[Tensor, Tensor]:
    """r of `cross: [features, any]`, columns of Σ z u for some order of u, and where it exists, `[features, 1]`."""
    n = max(evidence.n, 1)
    z, zz = evidence.columns("z1u0", features), evidence.columns("z2u0", features)
    u, uu = evidence.labels[label, 1], evidence.labels[label, 2]
    z_m2 = evidence.columns("within2", features) if evidence.within else zz - z * z / n
    u_m2 = uu - u * u / n  # within prompts, u is 0 but for rounding
    varies = (z_m2 > 1e-12 * zz) & (u_m2 > 1e-12 * uu)
    r = (cross - z * (u / n)) / torch.where(varies, z_m2 * u_m2, 1).sqrt()
    return torch.where(varies, r, 0).clamp(-1, 1), varies


def _of_centred(evidence: Evidence, name: str, cross: Tensor, features: Features, label: int) -> Tensor:
    """Scores of rewards of two values within prompts, from `cross: [features, any]`, columns of Σ z u.

    With b = 1 where y > 0, less its mean in the prompt, Σ z b / Σ b² is the weighted mean of differences; y is a linear
    function of b.
    """
    r, varies = pearson(evidence, cross, features, label)
    if name == "point_biserial":
        return r
    uu, high, low, scale = (
        float(t) for t in (evidence.labels[label, 2], evidence.high[label], evidence.low[label], evidence.scale[label])
    )
    return torch.where(varies, cross * ((high - low) / scale / max(uu, 1e-300)), 0)


def _of_groups(evidence: Evidence, name: str, positive: Tensor, features: Features, label: int) -> Tensor:
    """Scores of groups, from `positive: [features, any]`, sums of z or z² over samples with y > 0."""
    total = evidence.columns("z2u0" if name == "squared_ratio" else "z1u0", features)
    n, n_positive = evidence.n, evidence.n_positive[label]
    if not 0 < n_positive < n:
        return torch.zeros_like(positive)
    above, below = positive / n_positive, (total - positive) / (n - n_positive)
    if name == "contrastive":
        return above - below
    if name == "squared_ratio":
        return torch.where(total > 0, (above - below) / torch.where(total > 0, above + below, 1), 0)
    zz = evidence.columns("z2u0", features)
    variance = zz / n - (total / n) ** 2
    varies = variance > 1e-12 * zz / n
    share = n_positive / n
    return torch.where(varies, (above - below) * (share * (1 - share) / torch.where(varies, variance, 1)).sqrt(), 0)


def _from_rows(evidence: Evidence, name: str, features: Features, label: int, permuted: bool) -> Tensor:
    """Scores of ranks or bins, `[features, 1]`, or of every permutation `[features, P]`."""
    if name == "mutual_information":
        parts = evidence.numbers(features).split(FEATURES_AT_A_TIME)
        return torch.cat([_information(evidence, some, label, permuted) for some in parts])
    n, n_positive = evidence.n, float(evidence.n_positive[label])
    prefix, rank = "permuted_" if permuted else "", evidence.columns("rank1", features)
    if name == "auroc":  # the area is 1/2 and the difference of the groups' mean ranks, over n
        above = evidence.columns(f"{prefix}rank_positive", features, label)
        if not 0 < n_positive < n:
            return torch.zeros_like(above)
        return 2 / n * (above / n_positive - (rank - above) / (n - n_positive))
    cross = evidence.columns(f"{prefix}rank_cross", features, label)
    assert evidence.rows is not None, "`check` has seen to it"
    squares, y_m2 = evidence.columns("rank2", features), evidence.rows.rank_squares(label)
    m2 = squares - rank**2 / max(n, 1)
    varies = (m2 > 1e-12 * squares) & (y_m2 > 0)
    return torch.where(varies, cross / torch.where(varies, m2 * y_m2, 1).sqrt(), 0).clamp(-1, 1)


def _information(evidence: Evidence, features: Tensor, label: int, permuted: bool) -> Tensor:
    """Mutual information of the bins of `features: [F]` with whether y > 0, `[F, 1]` or of every permutation."""
    assert evidence.rows is not None, "`check` has seen to it"
    n, n_positive = evidence.n, float(evidence.n_positive[label])
    if n == 0:
        return torch.zeros(len(features), 1, dtype=torch.float64, device=evidence.device)
    owner, total, positive = evidence.rows.bins(evidence, features, label, permuted)

    bins = torch.bincount(owner, minlength=len(features)).tolist()  # of each feature, one feature after the other

    def of_features(values: Tensor) -> Tensor:  # not by index_add_, which takes longer, and on a GPU adds in any order
        return torch.stack([of_one.sum(0) for of_one in values.split(bins)])

    def x_log_x(counts: Tensor) -> Tensor:  # a fifth of xlogy's time
        return counts.clamp(min=1).log_().mul_(counts)

    def counted(positive: Tensor, total: Tensor) -> Tensor:  # Σ c log c of both groups, less that of their sum
        return x_log_x(positive) + x_log_x(total - positive) - x_log_x(total)

    zeros, zeros_positive = n - of_features(total[:, None]), n_positive - of_features(positive)
    every = torch.tensor([[n_positive]], dtype=torch.float64, device=evidence.device)
    of_all = counted(every, torch.full_like(every, n))
    return ((of_features(counted(positive, total[:, None])) + counted(zeros_positive, zeros) - of_all) / n).clamp(min=0)

"""What `Evidence` says: intervals of the correlation, which features chance explains, and errors of coefficients."""

from corrsteer.stats.inference.clusters import cluster_interval
from corrsteer.stats.inference.coefficients import coefficient_error
from corrsteer.stats.inference.intervals import (
    METHODS,
    bootstrap_correlations,
    bootstrap_interval,
    delta_interval,
    fisher_interval,
    interval,
)
from corrsteer.stats.inference.permutation import Significance, benjamini_hochberg, significance

__all__ = [
    "METHODS", "Significance", "benjamini_hochberg", "bootstrap_correlations", "bootstrap_interval",
    "cluster_interval", "coefficient_error", "delta_interval", "fisher_interval", "interval", "significance",
]  # fmt: skip

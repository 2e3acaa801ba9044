"""Isotonic optimization and threshold solvers in pure JAX. Needs nothing else."""

from isotonic.pnorm import isotonic_pnorm
from isotonic.regression import isotonic_regression
from isotonic.threshold import threshold

__all__ = ["isotonic_pnorm", "isotonic_regression", "threshold"]

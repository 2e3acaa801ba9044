"""Isotonic optimization and threshold solvers in pure JAX. Needs nothing else."""

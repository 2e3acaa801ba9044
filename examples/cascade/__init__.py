"""Trains two rankers of a cascade so that what is good survives both (LCRON, DFTopK)."""

"""Compares rows of runs: what a row is, how its runs are made and read, and what may be concluded.

`moe.evaluate.comparison` puts the parts together; docs/compare.md says what each column means.
"""

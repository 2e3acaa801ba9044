"""Makes batches of examples: `images` and `text` of prepared sets, in the order of `stream`.

Their batches are functions of (seed, step), on any number of processes.
"""

"""This project and its peers on the same inputs, in one process: `python -m benchmarks --help`."""

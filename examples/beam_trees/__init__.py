"""Trees that a beam search finds while the network that reads them is trained: `python -m` it."""

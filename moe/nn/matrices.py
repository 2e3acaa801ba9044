"""Says which parameters are matrices of the layers, for what treats each of them by itself.

An array may hold many matrices, those of equal layers and of a layer's experts.
"""

# How many of a kernel's last axes are a matrix's inputs, and how many its outputs, by the layer
# that has it. Axes before these count layers and experts.
MATRICES = dict.fromkeys(("experts", "wide", "narrow", "gate"), (1, 1))
MATRICES |= dict.fromkeys(("query", "key", "value"), (1, 2))  # outputs: heads and their widths
MATRICES |= {"out": (2, 1)}


def matrix(path) -> tuple[int, int] | None:
    """Returns the entry of `MATRICES` for the parameter at a path of the tree, None for others.

    Others are embeddings, heads, routers, norms and biases.
    """
    names = [str(getattr(key, "key", key)) for key in path[-2:]]
    return MATRICES.get(names[0]) if "kernel" in names[-1] else None

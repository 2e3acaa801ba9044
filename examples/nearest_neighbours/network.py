"""The network of NeuralSort's experiment on MNIST: two convolutions and a hidden layer."""

import jax
import jax.numpy as jnp
from flax import nnx


class Convnet(nnx.Module):
    """Convolution (20), pooling, convolution (50), pooling, dense: images to an embedding.

    Embeddings have length 1, so that distances are in [0, 4] and a width of a mask means the same
    from the first step to the last.
    """

    def __init__(self, side: int, dim: int, *, rngs: nnx.Rngs):
        """Makes the layers for images [B, side, side, 1]; `dim` is 500 in the published network."""
        kernel = (5, 5) if side >= 16 else (3, 3)  # digits have 8 x 8 pixels
        self.first = nnx.Conv(1, 20, kernel, rngs=rngs)
        self.second = nnx.Conv(20, 50, kernel, rngs=rngs)
        self.dense = nnx.Linear(50 * (side // 4) ** 2, dim, rngs=rngs)

    def features(self, images_BHWC):
        """Returns the features [B, dim] before they are scaled."""
        x = images_BHWC
        for layer in (self.first, self.second):
            x = nnx.max_pool(jax.nn.relu(layer(x)), (2, 2), (2, 2))
        return self.dense(x.reshape(len(x), -1))

    def __call__(self, images_BHWC):
        """Returns the embeddings [B, dim], of length 1."""
        x = self.features(images_BHWC)
        return x * jax.lax.rsqrt((x**2).sum(-1, keepdims=True) + 1e-12)


class Classifier(nnx.Module):
    """The same network with a linear head: what a softmax and cross-entropy train."""

    def __init__(self, side: int, dim: int, num_classes: int, *, rngs: nnx.Rngs):
        """Makes the network and its head."""
        self.body = Convnet(side, dim, rngs=rngs)
        self.head = nnx.Linear(dim, num_classes, rngs=rngs)

    def __call__(self, images_BHWC):
        """Returns the embeddings [B, dim] of length 1, as `Convnet` does."""
        return self.body(images_BHWC)

    def logits(self, images_BHWC) -> jnp.ndarray:
        """Returns the scores of the classes [B, C]."""
        return self.head(jax.nn.relu(self.body.features(images_BHWC)))

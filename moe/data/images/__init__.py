"""Prepares image classification sets from files of one's own, without TensorFlow."""

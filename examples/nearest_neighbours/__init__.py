"""Trains a convnet through a differentiable vote of its k nearest neighbours (Xie et al. 2020)."""

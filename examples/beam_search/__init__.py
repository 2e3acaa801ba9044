"""Spells words out in sounds, by a model that is trained through its own beam search."""

"""Predicts where a flight goes: 104 places, some with a handful of flights."""

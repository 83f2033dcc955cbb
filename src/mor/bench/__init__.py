"""Measurements against baselines, in the same run."""

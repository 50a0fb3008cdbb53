"""Experiments: one script or package each, run as ``python -m train.NAME``."""

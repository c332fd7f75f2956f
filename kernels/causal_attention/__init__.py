"""Causal attention for training and prefill, one file per way to compute it."""

ATTENTION = "attention"
"""Name of attention's results in rematerialisation policies."""

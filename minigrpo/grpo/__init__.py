"""Rewards to gradients."""

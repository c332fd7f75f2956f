"""Mesh, checkpoints and the run folder."""

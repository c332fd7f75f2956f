"""Mesh, checkpoints, signals and the run folder. Only signals are imported here, to be heard before jax is loaded."""

from minigrpo.runtime.signals import EXIT_STOPPED, STOP, StopRequest

__all__ = ["EXIT_STOPPED", "STOP", "StopRequest"]

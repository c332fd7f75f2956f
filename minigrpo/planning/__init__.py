"""Memory, time and compiled programs of a run, counted."""

from minigrpo.planning.memory import packing_spec, pool_limit
from minigrpo.planning.run_spec import RunSpec

__all__ = ["RunSpec", "packing_spec", "pool_limit"]

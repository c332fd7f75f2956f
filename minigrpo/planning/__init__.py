"""Memory, time and compiled programs of a run, counted."""

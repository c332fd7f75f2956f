"""`python -m minigrpo.runtime.coordinator ADDRESS COUNT`: jax's coordination service, in a process of its own.

jax ends every process of a run, with stacks, the moment that its connection to this service breaks. Here the service
outlives worker 0 by LINGER seconds, in which the other workers end in one line.
"""

import os
import sys
import time

from jax._src.lib import _jax

LINGER, HEARTBEAT, SHUTDOWN = 60.0, 100, 60
"""Seconds: after worker 0's end; until a silent worker counts as dead; that a worker waits for others at its end."""

READY = "ready\n"


def main() -> None:
    """Serve until worker 0 closes this process's stdin, and then for LINGER seconds unless told that all is done."""
    address, count = sys.argv[1], int(sys.argv[2])
    service = _jax.get_distributed_runtime_service(
        address, count, heartbeat_timeout=HEARTBEAT, shutdown_timeout=SHUTDOWN
    )
    sys.stdout.write(READY)
    sys.stdout.flush()
    if not sys.stdin.read():
        time.sleep(LINGER)
    del service
    os._exit(0)


if __name__ == "__main__":
    main()

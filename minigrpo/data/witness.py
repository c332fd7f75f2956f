"""A small process beside the run that ends it when a reward function cannot be interrupted from inside.

No code inside gets a turn while C code holds the interpreter, such as `deque(itertools.repeat(0), maxlen=0)`. Other C
code, such as a long hash, lets threads run but not the signal handlers of the main thread.
"""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

PROGRAM = """
import os, select, signal, sys

signal.signal(signal.SIGINT, signal.SIG_IGN)
run, left, text, stopped = int(sys.argv[1]), None, b"", False

def is_stopped():
    try:
        with open(f"/proc/{run}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False

while left is None or left > 0:
    if select.select([0], [], [], left and min(left, 1.0))[0]:
        said = os.read(0, 65536)
        if not said:
            sys.exit()
        seconds, _, text = said.rstrip(b"\\n").rpartition(b"\\n")[2].partition(b" ")
        left = float(seconds) or None
    else:
        before, stopped = stopped, is_stopped()
        if not before and not stopped:
            left -= min(left, 1.0)
if os.getppid() == run:
    os.write(2, text + b"\\n")
    os.kill(run, signal.SIGKILL)
"""
"""Reads lines "SECONDS TEXT" from its parent. Without another one in time it says TEXT and kills; 0 waits for ever.

Seconds in which the parent is stopped, as by Ctrl-Z, or just went on do not count.
"""


class Witness:
    """The process, started when it is needed for the first time; it ends with this one."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.owner = 0
        self.lock = threading.Lock()

    def tell(self, seconds: float, text: str) -> None:
        """Hand over a new limit of time."""
        with self.lock:
            if self.process is None or self.process.poll() is not None or self.owner != os.getpid():
                self.owner = os.getpid()
                command = [sys.executable, "-E", "-S", "-c", PROGRAM, str(self.owner)]
                self.process = subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0)
            assert self.process.stdin
            self.process.stdin.write(f"{seconds} {text}\n".encode())

    @contextlib.contextmanager
    def limit(self, seconds: float, text: str) -> Iterator[None]:
        """Print `text`, a line, and kill this process when it is still inside after some seconds."""
        self.tell(seconds, text)
        try:
            yield
        finally:
            self.tell(0.0, "")


WITNESS = Witness()
"""Of this process."""

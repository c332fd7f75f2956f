"""Mathematical equality by the math-verify library, in a process of its own that can be stopped.

`python -m minigrpo.data.grading` answers each line [given, wanted] of stdin with true or false.
"""

import functools
import json
import resource
import selectors
import subprocess
import sys

SECONDS = 1
"""For one comparison inside the process; the process itself is stopped after DEADLINE."""

DEADLINE, START_DEADLINE = 5.0, 60.0
MEMORY = 4 << 30
LONGEST = 200
"""Characters of an answer that is compared."""


def serve() -> None:
    """The process: parses both sides as LaTeX, by a grammar and not by eval, and compares them symbolically."""
    import math_verify  # slow to import, and only wanted in this process

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    latex = [math_verify.LatexExtractionConfig()]
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        given, wanted = (math_verify.parse(f"${side}$", latex, parsing_timeout=SECONDS) for side in json.loads(line))
        equal = bool(given and wanted) and math_verify.verify(wanted, given, timeout_seconds=SECONDS)
        sys.stdout.write(json.dumps(bool(equal)) + "\n")
        sys.stdout.flush()


class Process:
    """The running process, started when first asked and again after it had to be stopped."""

    def __init__(self):
        self.child: subprocess.Popen | None = None

    def start(self) -> subprocess.Popen:
        command = [sys.executable, "-m", "minigrpo.data.grading"]
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        if self.read_line(self.child, START_DEADLINE) != "ready":
            raise RuntimeError("the math-verify library cannot be started; pip install 'math-verify[antlr4_13_2]'")
        return self.child

    def read_line(self, child: subprocess.Popen, seconds: float) -> str | None:
        assert child.stdout
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            return child.stdout.readline().strip() if selector.select(seconds) else None

    def ask(self, given: str, wanted: str) -> bool:
        """False when the process gives no answer in time; it is stopped then."""
        child = self.child or self.start()
        assert child.stdin
        child.stdin.write(json.dumps([given, wanted]) + "\n")
        child.stdin.flush()
        answer = self.read_line(child, DEADLINE)
        if answer not in ("true", "false"):
            child.kill()
            child.wait()
            self.child = None
        return answer == "true"


PROCESS = Process()


@functools.lru_cache(maxsize=10_000)
def math_equal(given: str, wanted: str) -> bool:
    r"""Whether two expressions mean the same: 1/2 and \frac{1}{2}, (x+1)^2 and x^2+2x+1. Long ones never do."""
    return max(len(given), len(wanted)) <= LONGEST and PROCESS.ask(given, wanted)


if __name__ == "__main__":
    serve()

"""Symbolic equality by the math-verify library, in a process of its own.

`python -m minigrpo.data.symbolic` answers each line [given, wanted] of stdin with true, false or undecided.
Work is bounded by the size of expressions and the count of Python calls, so a verdict does not depend on load.
"""

import contextlib
import functools
import gc
import json
import logging
import math
import os
import subprocess
import sys
import threading
from types import FrameType
from typing import Any

from minigrpo.config import UsageError

LONGEST = 200
"""Characters of an expression that is compared."""

MOST_CALLS = 1_000_000
"""Python calls that one comparison may make; the usual one makes 3,000 to 200,000."""

MOST_DIGITS = 5_000
"""Decimal digits of the largest number that a comparison may compute."""

CPU_SECONDS, MEMORY = 20, 4 << 30
"""Limits of last resort on one comparison, above what MOST_CALLS and MOST_DIGITS let through."""

WARM_UP = (
    r"\frac{1}{2}x^{2}+3", r"\sqrt{2}\pi-4", r"(x+1)^2", r"2x+1=y", r"\{1,2\}", r"(1,2]", r"\sin(x)\cdot\log_{2}{8}",
    r"x^2-2x", r"50\%", r"\begin{pmatrix}1\\2\end{pmatrix}", r"\binom{4}{2}", r"5!", r"3+4i", r"x\le 5", r"1,2,3",
    r"x \in (1,2)\cup[3,\infty)", r"\sqrt[3]{4}", r"a_{1}", r"|x|", r"e^{i\pi}", r"1\frac{1}{2}", "0.5", "-7", "2/3",
)  # fmt: skip
"""Expressions parsed before the first comparison, so that the parser's tables are built once."""


# Inside the process


def parse(text: str) -> list[Any]:
    """Parse LaTeX, by a grammar and not by eval; [] for anything that is not an expression."""
    import math_verify  # slow to import, and only wanted in this process

    parsed: list[Any] = math_verify.parse(f"${text}$", [math_verify.LatexExtractionConfig()], parsing_timeout=None)
    return parsed


def digits(expression: Any) -> float:
    """Return an upper estimate of the decimal digits that evaluating the expression may take."""
    import sympy

    if isinstance(expression, sympy.Number):
        return math.log10(abs(float(expression)) + 2) if expression.is_finite else 1.0
    parts = [digits(part) for part in getattr(expression, "args", ())]
    if isinstance(expression, sympy.Pow):
        return parts[0] * 10 ** min(parts[1], 9.0)
    if isinstance(expression, sympy.exp):
        return 10 ** min(parts[0], 9.0)
    if isinstance(expression, sympy.Sum | sympy.Product):
        return parts[0] * 10 ** min(sum(parts[1:]), 9.0)
    if isinstance(expression, sympy.factorial | sympy.factorial2 | sympy.gamma | sympy.binomial):
        return 10 ** min(parts[0], 9.0) * max(parts[0], 1.0)
    return sum(parts) + 1.0


def affordable(expressions: list[Any]) -> bool:
    """Tell if comparing the expressions takes bounded time: numbers of at most MOST_DIGITS digits."""
    return all(isinstance(expression, str) or digits(expression) <= MOST_DIGITS for expression in expressions)


def compare(given: str, wanted: str) -> str:
    """Compare two expressions by math-verify -> "true", "false" or "undecided"."""
    import math_verify

    both = parse(given), parse(wanted)
    if not all(both):
        return "false"
    if not all(map(affordable, both)):
        return "undecided"
    return json.dumps(bool(math_verify.verify(both[1], both[0], timeout_seconds=None)))


def count_calls() -> None:
    """End this process as undecided after MOST_CALLS further calls of Python functions."""
    left = MOST_CALLS

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os._exit(VERDICTS.index("undecided"))

    sys.settrace(count)


def limit_resources() -> None:
    """Bound CPU time and memory, where the platform can."""
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


VERDICTS = ("false", "true", "undecided")
"""By exit status of the process that made one comparison."""


def judge(given: str, wanted: str) -> str:
    """Compare in a fork, so that no comparison sees what an earlier one left behind."""
    if not hasattr(os, "fork"):
        count_calls()
        return compare(given, wanted)
    child = os.fork()
    if child == 0:
        status = VERDICTS.index("undecided")
        try:
            limit_resources()
            count_calls()
            status = VERDICTS.index(compare(given, wanted))
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return VERDICTS[status] if 0 <= status < len(VERDICTS) else "undecided"


def serve() -> None:
    """Answer one JSON pair of expressions per line of stdin, after a warm-up, until it ends."""
    logging.disable(logging.CRITICAL)
    for text in WARM_UP:
        compare(text, "x+2")
    gc.freeze()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        sys.stdout.write(judge(*json.loads(line)) + "\n")
        sys.stdout.flush()


# Outside


class Process:
    """The running process, started when first asked and again after it died."""

    def __init__(self) -> None:
        self.child: subprocess.Popen[str] | None = None
        self.lock = threading.Lock()

    def start(self) -> subprocess.Popen[str]:
        """Start the process; UsageError when it cannot import the library."""
        command = [sys.executable, "-m", "minigrpo.data.symbolic"]
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        if read_line(child) != "ready":
            child.kill()
            child.communicate()
            raise UsageError(
                "math-verify cannot be started, which compares answers; pip install 'math-verify[antlr4_13_2]'"
            )
        return child

    def ask(self, given: str, wanted: str) -> str:
        """Return one of VERDICTS; a process that something else ended is asked again once."""
        with self.lock:
            verdict = self.exchange([given, wanted]) or self.exchange([given, wanted])
        return verdict if verdict in VERDICTS else "undecided"

    def exchange(self, pair: list[str]) -> str:
        """Send one pair and return the answer, "" when the process died over it."""
        child = self.child = self.child or self.start()
        assert child.stdin
        try:
            child.stdin.write(json.dumps(pair) + "\n")
            child.stdin.flush()
            verdict = read_line(child)
        except OSError:  # it died before
            verdict = ""
        if not verdict:
            self.stop()
        return verdict

    def stop(self) -> None:
        """Kill the process, if it runs."""
        if self.child is None:
            return
        self.child.kill()
        with contextlib.suppress(OSError):  # of what was still to be written
            self.child.communicate()
        self.child = None


def read_line(child: subprocess.Popen[str]) -> str:
    """Read one line of the child's answers."""
    assert child.stdout
    return child.stdout.readline().strip()


PROCESS = Process()


@functools.lru_cache(maxsize=10_000)
def verdict(given: str, wanted: str) -> str:
    r"""Return "true", "false" or "undecided": whether two expressions mean the same, as 1/2 and \frac{1}{2} do."""
    if max(len(given), len(wanted)) > LONGEST:
        return "undecided"
    return PROCESS.ask(given, wanted)


if __name__ == "__main__":
    if sys.flags.hash_randomization:  # the order of sets is part of what a comparison does
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "minigrpo.data.symbolic"])
    serve()

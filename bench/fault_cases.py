"""The cases of bench/faults.py: what may be found in a folder of checkpoints, what disks and reward functions do."""

import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

from minigrpo.runtime.checkpoint import seal

# The folder of checkpoints: 2 and 4 are good


def half_deleted(folder: pathlib.Path) -> None:
    """Delete every second file of a folder."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file())[::2]:
        path.unlink(missing_ok=True)


def renamed_over(steps: pathlib.Path) -> None:
    """Give the older checkpoint the newest one's name."""
    shutil.rmtree(steps / "4")
    (steps / "2").rename(steps / "4")


def stray_file(folder: pathlib.Path) -> None:
    """Make a folder with a file of no meaning."""
    folder.mkdir()
    (folder / "x").write_text("x")


def emptied(folder: pathlib.Path) -> None:
    """Delete all that a folder holds."""
    shutil.rmtree(folder)
    folder.mkdir()


def rewrite(manifest: pathlib.Path, **changes: object) -> None:
    """Change a manifest and seal it again."""
    content = {name: value for name, value in json.loads(manifest.read_text()).items() if name != "seal"} | changes
    manifest.write_text(json.dumps(content | {"seal": seal(content)}))


STRUCTURE: dict[str, tuple[Callable[[pathlib.Path, pathlib.Path], object], int | str, tuple[str, ...]]] = {
    "nothing": (lambda steps, _: None, 4, ()),
    "an empty newest": (lambda steps, _: (steps / "99").mkdir(), 4, ()),
    "a stray file": (lambda steps, _: (steps / "99").write_text("x"), 4, ()),
    "a stray folder": (lambda steps, _: (steps / "notes").mkdir(), 4, ()),
    "strange files in the newest": (lambda steps, _: stray_file(steps / "9"), 4, ()),
    "a newest without arrays": (lambda steps, _: shutil.rmtree(steps / "4/default"), 2, ()),
    "a newest without manifest": (lambda steps, _: shutil.rmtree(steps / "4/manifest"), 2, ()),
    "a half-deleted newest": (lambda steps, _: half_deleted(steps / "4"), 2, ()),
    "half of the arrays": (lambda steps, _: half_deleted(steps / "4/default"), 2, ()),
    "an empty manifest": (lambda _, manifest: manifest.write_text(""), 2, ()),
    "a manifest of nothing": (lambda _, manifest: manifest.write_text("[]"), 2, ()),
    "a manifest cut short": (lambda _, manifest: manifest.write_bytes(manifest.read_bytes()[:-9]), 2, ()),
    "a copy under another number": (lambda steps, _: shutil.copytree(steps / "2", steps / "7"), 4, ()),
    "a rename over the newest": (lambda steps, _: renamed_over(steps), "refused", ()),
    "what a killed save left": (lambda steps, _: (steps / "6.orbax-checkpoint-tmp-1").mkdir(), 4, ()),
    "what a killed deletion left": (lambda steps, _: (steps / "1.deleted").mkdir(), 4, ()),
    "both half-deleted": (lambda steps, _: half_deleted(steps), "refused", ()),
    "none left": (lambda steps, _: emptied(steps), "refused", ()),
    "a newer version's": (lambda _, manifest: rewrite(manifest, format=2), "refused", ()),
    "another model's": (lambda steps, _: None, "refused", ("more",)),
}  # fmt: skip
"""Name -> (what happens to (checkpoints, the newest manifest), step to fall back to or "refused", arrays besides)."""


# The disk

FULL_PLACES: list[str] = []
"""Parts of paths where there is no room."""


def refuse(event: str, args: tuple[Any, ...]) -> None:
    """Raise the system's error for a file that is opened for writing where there is no room; an audit hook."""
    if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR) and any(part in str(args[0]) for part in FULL_PLACES):
        raise OSError(28, "No space left on device", str(args[0]))


DISK: dict[str, tuple[str, Any]] = {
    **{f"no room for {name}": ("no room", name) for name in (
        "metrics.jsonl", "completions.jsonl", "config.json", "flags.txt", "train.log", "newest_checkpoint",
        "manifest", "final", "evaluations.jsonl",
    )},
    "half of the files removed in step 3": ("removed", (2, half_deleted)),
    "the folder removed in step 2": ("removed", (1, shutil.rmtree)),
    "read-only in step 2": ("read-only", (1,)),
    "read-only in step 4": ("read-only", (3,)),
    "a link, and a kill in step 4": ("link", (3,)),
    **{f"room for {share:.0%} of the run": ("full", share) for share in (0.02, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9)},
}  # fmt: skip
"""Name -> (kind, share of the bytes of a whole run, part of a path, or number of finished steps and what happens)."""


# Reward functions

REWARD = """
import array, asyncio, collections, contextlib, ctypes, decimal, gc, hashlib, itertools, logging, multiprocessing
import os, random, re, signal, socket, subprocess, sys, threading, time, warnings
import numpy as np

class Odd(Exception):
    def __repr__(self):
        raise RuntimeError("no repr")
    __str__ = __float__ = __iter__ = __repr__

def deep(n):
    return deep(n + 1) + 1

def stubborn():
    for _ in range(3):
        with contextlib.suppress(BaseException):
            time.sleep(1000)

def hanging(count):
    yield 1.0
    time.sleep(1000)

def score(completions, prompts, completion_ids, answer, trainer_state, log_metric, log_extra, **more):
    count = len(completions)
    if trainer_state.global_step == 2:
        BODY
    return [float(len(text) % 5) for text in completions]
"""
"""A file with a reward function that misbehaves in the third step."""

RAISED = (
    "ValueError('x')", "RuntimeError('two\\nlines')", "AssertionError", "StopIteration", "StopAsyncIteration",
    "GeneratorExit", "KeyboardInterrupt", "SystemExit(0)", "SystemExit('text')", "BaseException(5)", "Odd",
    "asyncio.CancelledError", "BrokenPipeError(32, 'pipe')", "FileNotFoundError(2, 'gone', 'x.txt')", "MemoryError",
    "KeyError('\\ud800')", "ExceptionGroup('g', [ValueError(1)])", "OSError(28, 'No space left on device')",
    "TimeoutError", "ValueError('x' * 10**7)", "Warning('w')", "UnicodeDecodeError('utf-8', b'x', 0, 1, 'bad')",
)  # fmt: skip
RETURNED = (
    "[]", "[1.0] * (count - 1)", "[1.0] * (count + 1)", "None", "1.0", "'text'", "b'ab'", "{'a': 1.0}", "{1.0, 2.0}",
    "[float('nan')] * count", "[float('inf')] * count", "[-float('inf')] * count", "[1e39] * count", "['1'] * count",
    "[[1.0]] * count", "[1j] * count", "[10**400] * count", "itertools.count()", "[object()] * count",
    "[Odd()] * count", "np.ones((count, 2))", "hanging(count)", "Odd()", "(1 / 0 for _ in completions)", "score",
    "asyncio.sleep(1000)", "np.array(['a'] * count)", "[b'1'] * count",
)  # fmt: skip
HANGING = (
    "time.sleep(1000)", "while True: pass", "re.match(r'(a|a)*b', 'a' * 60)", "threading.Event().wait()",
    "subprocess.run(['sleep', '1000'])", "[one.recv(1) for one in socket.socketpair()]", "stubborn()",
    "ctypes.CDLL(None).sleep(1000)",
)  # fmt: skip
REFUSED = (
    *(f"raise {error}" for error in RAISED), *(f"return {scores}" for scores in RETURNED), *HANGING,
    "sys.exit()", "sys.exit(3)", "quit()", "exit(0)", "deep(0)", "bytearray(2**62)", "import no_such_module",
    "log_metric('x', 'y')", "log_extra('x', [1])", "open('/no/such/file')", "os._exit(3)",
)  # fmt: skip
FINE = (
    "completion_ids[0].clear(); prompts.clear(); answer[:] = ['0'] * count", "completion_ids.append([1])",
    "more.clear()", "print('x' * 10**8)", "sys.stderr.write('x' * 10**7 + chr(10))", "os.environ.clear()",
    "os.chdir('/')", "np.random.seed(0); random.seed(0)", "gc.disable()", "warnings.simplefilter('error')",
    "logging.disable()", "threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()",
    "signal.signal(signal.SIGALRM, signal.SIG_IGN)",
    "sys.setrecursionlimit(500)", "subprocess.run(['true'], check=True)", "[bytes(10**6) for _ in range(500)]",
)  # fmt: skip
HERE = dict.fromkeys(REFUSED, "refused") | dict.fromkeys(FINE, "fine")
"""Bodies, and what is to come of them: an error in one line, an end by a signal, or nothing."""

OWN_PROCESS = {
    "os._exit(0)": "refused",
    "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)": "refused",
    "collections.deque(itertools.repeat(0), maxlen=0)": "refused",
    "os.abort()": "killed",
    "os.kill(os.getpid(), 9)": "killed",
    "signal.alarm(1); time.sleep(9)": "killed",
    "ctypes.string_at(0)": "killed",
    "threading.Thread(target=time.sleep, args=(1000,)).start()": "fine",
    "print('y' * 10**8)": "fine",
    "os.close(2)": "fine",
    "os.fork() or os._exit(0)": "fine",
}
"""The same for those that would end or hold up the bench itself."""

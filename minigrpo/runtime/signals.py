"""Requests to stop: SIGTERM and Ctrl-C, heard at any moment, never lost and never answered with a traceback.

Python runs its handlers in the main thread, which may sit in a compiled program for minutes or hold a lock. So the
handlers here do nothing; the interpreter's own C code writes each signal's number into a socket, and a thread reads it.

Exit codes: 0 a finished run; 2 bad input; 75 stopped by request, to be continued with --resume; 130 interrupted by
Ctrl-C and 143 by SIGTERM where there was nothing to save, or by a second Ctrl-C.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

EXIT_STOPPED = 75
SIGNALS = (signal.SIGINT, signal.SIGTERM)
NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
CLOSING = 5.0
"""Seconds that sinks and helper processes have to close when the run ends outside the main thread."""


def do_nothing(number: int, frame: object) -> None:
    """Take a signal's default away; the thread has its number already."""


def block() -> None:
    """Hold signals back in this thread: a child that is just being forked would report them to its parent."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def unblock() -> None:
    """Let signals through again."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def print_line(text: str) -> None:
    """Write a line to the terminal past every lock and buffer of Python's."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode(errors="replace"))


class StopRequest:
    """A request to stop the process, and the actions that follow it.

    Outside of `graceful`, where there is nothing to save, a signal ends the process at once in one line. Inside, the
    first one is a request that the loop looks at after each step; a second Ctrl-C ends the process at once.
    """

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.signal = 0
        """Number of the signal that asked, 0 before."""
        self.deadline = float("inf")
        """When the step under way should have ended, by time.monotonic()."""
        self.grace: float | None = None
        """Seconds from request to deadline; None outside of `graceful`."""
        self.saver: Callable[[], int] | None = None
        self.guard = threading.Lock()
        """Held while the state may not change: by the thread while it saves, by the loop while it leaves a rollout."""
        self.closers: list[Callable[[], None]] = []
        self.resume = ""
        self.exit: Callable[[int], None] = os._exit
        self.thread: threading.Thread | None = None

    @property
    def requested(self) -> bool:
        """Tell if the run is to stop after the step under way."""
        return self.asked.is_set()

    # Hearing

    def install(self) -> None:
        """Hear signals from now on; only in the main thread, and once per process."""
        if self.thread or threading.current_thread() is not threading.main_thread():
            return
        self.ear, self.mouth = socket.socketpair()
        self.mouth.setblocking(False)
        self.rearm()
        os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=self.forget)
        self.thread = threading.Thread(target=self.listen, name="signals", daemon=True)
        self.thread.start()

    def rearm(self) -> None:
        """Set the handlers again: libraries that start a device install their own."""
        for number in SIGNALS:
            signal.signal(number, do_nothing)
        signal.set_wakeup_fd(self.mouth.fileno(), warn_on_full_buffer=False)

    def forget(self) -> None:
        """Give signals their usual meaning back, as in a forked child."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        unblock()

    def listen(self) -> None:
        """Read signals' numbers for ever, in the thread."""
        while True:
            for number in self.ear.recv(64):
                if number in SIGNALS:
                    self.hear(signal.Signals(number))

    def hear(self, number: signal.Signals) -> None:
        """Act on one signal."""
        if self.grace is None or (self.requested and number == signal.SIGINT):
            self.end(128 + number, "interrupted" if number == signal.SIGINT else "ended by SIGTERM")
        elif not self.requested:
            self.signal, self.deadline = int(number), time.monotonic() + self.grace
            self.asked.set()
            again = "; again to end at once" if number == signal.SIGINT else ""
            print_line(f"{NAMES[number]}: stopping within {self.grace:g} s, with a checkpoint{again}")
            threading.Thread(target=self.wait_and_save, name="stopping", daemon=True).start()

    # Ending

    def end(self, code: int, text: str) -> None:
        """End the process at once: no lock, thread or exit handler can hold it up."""
        print_line(text)
        self.exit(code)

    def wait_and_save(self) -> None:
        """Save from this thread as soon as the state is whole and the loop far from done; give up at the deadline."""
        while time.monotonic() < self.deadline and self.grace is not None:
            with self.guard:
                if self.saver:
                    return self.save_and_end(self.saver)
            time.sleep(0.05)
        if self.grace is not None:
            self.end(EXIT_STOPPED, f"stopped within a step, which took longer than --grace_seconds; {self.resume}")

    def save_and_end(self, saver: Callable[[], int]) -> None:
        """Save the state, which a rollout does not change, close what is open, and end the process."""
        try:
            step = saver()
        except Exception as error:  # whatever it is, the process ends in one line
            self.end(EXIT_STOPPED, f"error: {error}")
        else:
            self.close_all()
            self.end(EXIT_STOPPED, f"stopped after step {step}, which is saved; {self.resume}")

    def close_all(self) -> None:
        """Close sinks and helper processes, for CLOSING seconds at most."""
        closing = threading.Thread(target=lambda: [close() for close in self.closers], daemon=True)
        closing.start()
        closing.join(CLOSING)

    # For the loop

    @contextlib.contextmanager
    def graceful(self, seconds: float, resume: str, closers: tuple[Callable[[], None], ...] = ()) -> Iterator[None]:
        """Turn signals into requests while inside; `resume` says how to go on, `closers` close sinks and helpers.

        Leave it only after the last checkpoint is on disk.
        """
        self.asked.clear()
        self.grace, self.resume, self.closers, self.deadline = seconds, resume, list(closers), float("inf")
        if self.thread:
            self.rearm()
        try:
            yield
        finally:
            self.grace, self.saver = None, None

    @contextlib.contextmanager
    def saving(self, saver: Callable[[], int]) -> Iterator[None]:
        """Let a request be met at once by `saver`, which saves the state and returns its step, while inside.

        For a rollout and its rewards: they leave the state as it was.
        """
        self.saver = saver
        try:
            yield
        finally:
            with self.guard:
                self.saver = None

    def finishing(self) -> None:
        """Lift the deadline: the step has ended in time, and only its checkpoint is under way."""
        self.deadline = float("inf")


STOP = StopRequest()
"""Of this process."""


def started_as_command() -> bool:
    """Return whether `python -m minigrpo...` is being started, when the package itself is imported."""
    return sys.argv[:1] == ["-m"] and any(word.split(".")[0] == "minigrpo" for word in sys.orig_argv)

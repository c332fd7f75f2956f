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
from typing import Any, Protocol

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


class Partners(Protocol):
    """Processes that stop together, as one of them sees them."""

    def tell_stop(self, number: int) -> None:
        """Let the others know that this process has got a signal."""

    def agree(self, step: int, seconds: float) -> list[int]:
        """Exchange `step` with all, from each one's stopping thread; [] when one does not answer in `seconds`."""

    def part(self) -> None:
        """Wait until all have saved, so that each may end."""

    def tell_end(self, code: int, text: str) -> None:
        """Let the others end with this code and line; one such call counts."""


class Alone:
    """A process that stops by itself."""

    def tell_stop(self, number: int) -> None:
        """Tell nobody."""

    def agree(self, step: int, seconds: float) -> list[int]:
        """Return the process's own step."""
        return [step]

    def part(self) -> None:
        """Wait for nobody."""

    def tell_end(self, code: int, text: str) -> None:
        """Tell nobody."""


UNSAVABLE = -1
"""Step of a state that is not whole."""


class StopRequest:
    """A request to stop the process, and the actions that follow it.

    Outside of `graceful`, where there is nothing to save, a signal ends the process at once in one line. Inside, the
    first one is a request that the loop looks at after each step; a second Ctrl-C ends the process at once. Partners
    are told, and save together.
    """

    def __init__(self) -> None:
        self.partners: Partners = Alone()
        self.told: tuple[signal.Signals, str] | None = None
        """The last signal that a partner got, for `graceful` to act on if it came before."""
        self.asked = threading.Event()
        self.signal = 0
        """Number of the signal that asked, 0 before."""
        self.deadline = float("inf")
        """When the step under way should have ended, by time.monotonic()."""
        self.grace: float | None = None
        """Seconds from request to deadline; None outside of `graceful`."""
        self.savable: tuple[int, Callable[[], Any] | None] = UNSAVABLE, None
        """Step of the state, and the function that saves it, while it is whole."""
        self.guard = threading.Lock()
        """Held while the state may not change: by the stopping thread while it asks its partners and saves, by the loop
        while it leaves a rollout."""
        self.heard = False
        """A signal has come to this process itself."""
        self.noting = threading.Lock()
        """Held while a request is noted: a signal and a partner's may come together."""
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
        again, self.heard = self.heard, self.grace is not None
        if self.grace is None or (again and number == signal.SIGINT):
            self.end(128 + number, "interrupted" if number == signal.SIGINT else "ended by SIGTERM")
        else:
            self.partners.tell_stop(number)
            self.request(number, NAMES[number])

    def hear_partner(self, number: int, name: str) -> None:
        """Act on a signal that a partner has heard."""
        self.told = signal.Signals(number), f"{NAMES[signal.Signals(number)]} at {name}"
        if self.grace is not None:
            self.request(*self.told)

    def request(self, number: signal.Signals, text: str) -> None:
        """Let the loop stop after its step, or earlier where the state can be saved; the first request counts."""
        with self.noting:
            grace = self.grace
            if self.requested or grace is None:
                return
            self.signal, self.deadline = int(number), time.monotonic() + grace
            self.asked.set()
        again = "; again to end at once" if text == NAMES[signal.SIGINT] else ""
        print_line(f"{text}: stopping within {grace:g} s, with a checkpoint{again}")
        threading.Thread(target=self.wait_and_save, name="stopping", daemon=True).start()

    # Ending

    def end(self, code: int, text: str) -> None:
        """End the process at once: no lock, thread or exit handler can hold it up."""
        print_line(text)
        self.exit(code)

    def wait_and_save(self) -> None:
        """Save from this thread as soon as the state is whole, and the partners' of the same step; or end in time."""
        answers = [UNSAVABLE]
        while answers and (left := self.deadline - time.monotonic()) > 0 and self.grace is not None:
            with self.guard:
                step, saver = self.savable
                answers = self.partners.agree(step, left)
                if set(answers) == {step} and saver:
                    return self.save_and_end(step, saver)
            time.sleep(0.05)
        if self.grace is not None and time.monotonic() >= self.deadline:
            text = f"stopped within an update, which took longer than --grace_seconds; {self.resume}"
            self.partners.tell_end(EXIT_STOPPED, text)
            self.end(EXIT_STOPPED, text)

    def save_and_end(self, step: int, saver: Callable[[], Any]) -> None:
        """Save the state, close what is open, and end the process."""
        try:
            saver()
        except Exception as error:  # whatever it is, all end in one line
            self.partners.tell_end(EXIT_STOPPED, f"error: {error}")
            self.end(EXIT_STOPPED, f"error: {error}")
        else:
            self.close_all()
            self.partners.part()
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
        self.heard = False
        self.grace, self.resume, self.closers, self.deadline = seconds, resume, list(closers), float("inf")
        if self.thread:
            self.rearm()
        if self.told:
            self.request(*self.told)
        try:
            yield
        finally:
            self.grace, self.savable, self.told = None, (UNSAVABLE, None), None

    @contextlib.contextmanager
    def saving(self, step: int, saver: Callable[[], Any]) -> Iterator[None]:
        """Let a request be met at once by `saver`, which saves the state as after `step` steps, while inside.

        For a rollout and its rewards, and for an evaluation: they leave the state as it was.
        """
        self.savable = step, saver
        try:
            yield
        finally:
            with self.guard:
                self.savable = UNSAVABLE, None

    def finishing(self) -> None:
        """Lift the deadline: the step has ended in time, and only its checkpoint is under way."""
        self.deadline = float("inf")


STOP = StopRequest()
"""Of this process."""


def started_as_command() -> bool:
    """Return whether `python -m minigrpo...` is being started, when the package itself is imported."""
    return sys.argv[:1] == ["-m"] and any(word.split(".")[0] == "minigrpo" for word in sys.orig_argv)

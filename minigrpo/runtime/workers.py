"""Several processes that run one program: they join, agree on what hosts decide, and end together.

Each process is a worker. Device programs meet in jax's collectives; everything that hosts decide goes through `gather`,
which gives every worker the same values. What fails on one worker ends all of them, in that worker's words.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import os
import platform
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax._src import clusters, xla_bridge

from minigrpo.config import EXIT_USAGE, ClusterOptions, Settings, UsageError
from minigrpo.runtime import coordinator
from minigrpo.runtime.links import Message, accept, connect, free_port, listen, receive, send, split_address
from minigrpo.runtime.signals import EXIT_STOPPED, STOP, StopRequest, print_line

BROKEN = 10.0
"""Seconds in which a lost worker is noticed: until then, it may be the cause of an error in a collective."""

PATIENT = "--xla_cpu_collective_call_terminate_timeout_seconds=3600 --xla_cpu_collective_timeout_seconds=3600"
"""Flags that make CPU collectives wait for a worker that compiles longer; a lost worker is noticed otherwise."""

CLOCKS = 60.0
"""Seconds by which the clocks of machines may differ before it is said; buckets refuse those that are far off."""

PROGRAM, STOPPING = "program", "stopping"
"""Threads that gather: the program's own, and the one that stops it."""

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Place:
    """A process's place among the workers: worker 0's address, the number of workers, its own, and its devices."""

    address: str
    count: int
    index: int
    local_devices: list[int] | None = None
    """None for all of the machine's."""


def find_place(options: ClusterOptions, environ: Mapping[str, str] = os.environ) -> Place | None:
    """Return this process's place by the flags, JAX's variables, or Slurm, Open MPI, GKE or the TPU's metadata.

    None for a process on its own; UsageError where only a part is known.
    """
    address: str | None = options.coordinator_address or environ.get("JAX_COORDINATOR_ADDRESS")
    count: int | None = options.num_processes or number_of(environ, "JAX_NUM_PROCESSES")
    index = options.process_id if options.process_id is not None else number_of(environ, "JAX_PROCESS_ID")
    address, count, index, devices = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        address, count, index, None, None, int(options.start_timeout)
    )
    named = {"coordinator_address": address, "num_processes": count, "process_id": index}
    missing = [name for name, value in named.items() if value is None]
    if len(missing) == len(named) or count == 1:
        return None
    if address is None or count is None or index is None:
        raise UsageError(f"--{missing[0]}: must be given too, as no cluster tells it; or leave all three out")
    if not 0 <= index < count:
        raise UsageError(f"--process_id={index}: must be from 0 to {count - 1}, as --num_processes={count}")
    return Place(address, count, index, None if devices is None else list(devices))


def number_of(environ: Mapping[str, str], name: str) -> int | None:
    """Return a whole number from the environment, None when it is not set; UsageError for anything else."""
    text = environ.get(name)
    if text is not None and not text.isdecimal():
        raise UsageError(f"{name}={text}: must be a whole number")
    return None if text is None else int(text)


def first_difference(facts: list[dict[str, Any]]) -> str:
    """Return how a worker's facts differ from worker 0's, "" where all are equal."""
    for index, own in enumerate(facts):
        for name, wanted in facts[0].items():
            if own.get(name) != wanted:
                return f"worker {index} has {name} {own.get(name)} and worker 0 {wanted}; make them equal"
    return ""


class Workers:
    """The processes of this run; a single one until `join` finds others."""

    def __init__(self) -> None:
        self.index, self.count = 0, 1
        self.links: dict[int, Connection] = {}
        """Worker 0 has one to every other worker, the others have one to worker 0."""
        self.turns = {PROGRAM: 0, STOPPING: 0}
        self.arrived: dict[str, queue.Queue[Message]] = {PROGRAM: queue.Queue(), STOPPING: queue.Queue()}
        self.sending = threading.Lock()
        self.stop: StopRequest = STOP
        self.ending = threading.Event()
        """Set once the end has begun: closed connections mean nothing any more."""
        self.failing = threading.Lock()
        self.service: subprocess.Popen[str] | None = None
        self.exit: Callable[[int], None] = os._exit

    @property
    def writes(self) -> bool:
        """Tell if this process writes the run's files and prints."""
        return self.index == 0

    # Joining

    def join(self, place: Place, facts: dict[str, Any], timeout: float) -> None:
        """Meet the other workers, compare `facts`, and start jax's own service.

        UsageError naming workers that do not come within `timeout` seconds, or the first fact that differs.
        """
        host, port = split_address(place.address)
        self.index, self.count = place.index, place.count
        deadline = time.monotonic() + timeout
        if self.index == 0:
            address = self.welcome(host, port, facts, deadline, timeout)
        else:
            address = self.meet(host, port, facts, deadline, timeout)
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {PATIENT}".strip()
        jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from us
        jax.distributed.initialize(
            address,
            place.count,
            place.index,
            place.local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=int(timeout),
            coordinator_bind_address="127.0.0.1:0",
            heartbeat_timeout_seconds=coordinator.HEARTBEAT,
            shutdown_timeout_seconds=coordinator.SHUTDOWN,
        )
        self.stop.partners = self
        threading.Thread(target=self.read, name="workers", daemon=True).start()

    def welcome(self, host: str, port: int, facts: dict[str, Any], deadline: float, timeout: float) -> str:
        """Wait for all others, as worker 0 -> the address of jax's service."""
        told = {0: facts}
        problem = ""
        with listen(port) as server:
            while len(told) < self.count and not problem:
                found = accept(server, deadline)
                if found is None:
                    absent = ", ".join(str(i) for i in range(self.count) if i not in told)
                    problem = (
                        f"--start_timeout={timeout:g}: worker {absent} did not come to {host}:{port}; start the same "
                        "command on every worker, and let it reach this port"
                    )
                    break
                link, message = found
                index = message["index"]
                if abs(late := message["clock"] - time.time()) > CLOCKS:
                    print_line(f"note: worker {index}'s clock differs by {late:.0f} s; set the machines' clocks")
                if message["count"] != self.count:
                    problem = f"worker {index} has --num_processes={message['count']} and worker 0 {self.count}"
                    problem += "; make them equal"
                elif index in told:
                    problem = f"--process_id={index}: two workers have it; give each its own number"
                self.links[index], told[index] = link, message["facts"]
        problem = problem or first_difference([told[i] for i in sorted(told)])
        address = "" if problem else f"{host}:{self.serve()}"
        for link in self.links.values():
            send(link, {"kind": "go", "address": address, "problem": problem})
        if problem:
            self.leave_early(problem)
        return address

    def meet(self, host: str, port: int, facts: dict[str, Any], deadline: float, timeout: float) -> str:
        """Report to worker 0 -> the address of jax's service."""
        link = connect(host, port, deadline)
        if link is not None:
            hello = {"kind": "hello", "index": self.index, "count": self.count, "facts": facts, "clock": time.time()}
            send(link, hello)
        answer = receive(link) if link is not None and link.poll(max(0.0, deadline + 5 - time.monotonic())) else None
        if link is None or answer is None:
            self.leave_early(
                f"--start_timeout={timeout:g}: worker 0 did not answer at {host}:{port}; start the same command there, "
                "and let this worker reach that port"
            )
        assert link and answer
        if answer["problem"]:
            self.leave_early(answer["problem"])
        self.links[0] = link
        address: str = answer["address"]
        return address

    def leave_early(self, problem: str) -> None:
        """Raise UsageError before the run has begun; every worker says it by itself."""
        self.links, self.count = {}, 1
        raise UsageError(problem)

    def serve(self) -> int:
        """Start jax's coordination service in a process that outlives this one -> its port."""
        port = free_port()
        command = [sys.executable, "-m", coordinator.__name__, f"[::]:{port}", str(self.count)]
        self.service = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self.service.stdout
        if self.service.stdout.readline() != coordinator.READY:
            raise RuntimeError("jax's coordination service did not start")
        return port

    # Agreeing

    def gather(self, value: T) -> list[T]:
        """Return the values of all workers, by number; every worker calls this at the same place. JSON values only."""
        if self.count == 1:
            return [value]
        return self.gather_in(PROGRAM, value)

    def gather_in(self, thread: str, value: T, seconds: float | None = None) -> list[T]:
        """Gather from the thread of that name in every worker; queue.Empty where it takes longer than `seconds`."""
        self.turns[thread] += 1
        message = {"thread": thread, "turn": self.turns[thread]}
        if self.index:
            self.tell(message | {"kind": "value", "value": value})
            return list(self.take(thread, seconds)["values"])
        values: dict[int, Any] = {0: value}
        while len(values) < self.count:
            arrived = self.take(thread, seconds)
            values[arrived["from"]] = arrived["value"]
        ordered = [values[i] for i in range(self.count)]
        self.tell(message | {"kind": "values", "values": ordered})
        return ordered

    def take(self, thread: str, seconds: float | None) -> Message:
        """Return the next message of this turn; a lost worker ends the wait with the process."""
        message = self.arrived[thread].get(timeout=seconds)
        assert message["turn"] == self.turns[thread], "workers have come to different places of the program"
        return message

    def tell(self, message: Message) -> None:
        """Send a message to all that this worker is connected to."""
        with self.sending:
            for link in self.links.values():
                send(link, message)

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true on any worker."""
        return any(self.gather(flag))

    def first(self, make: Callable[[], T]) -> T:
        """Return what `make` returns on worker 0, the only one that calls it. JSON values only."""
        return self.gather(make() if self.index == 0 else None)[0]  # type: ignore[return-value]

    def equal(self, facts: dict[str, Any]) -> None:
        """Raise UsageError on every worker when a fact differs between them."""
        if difference := first_difference(self.gather(facts)):
            raise UsageError(difference)

    # Stopping by request

    def tell_stop(self, number: int) -> None:
        """Let all workers know that this one is asked to stop."""
        self.tell({"kind": "stop", "number": number, "from": self.index})

    def pass_stop(self, message: Message) -> None:
        """Stop as another worker is asked to; worker 0 lets the rest know."""
        if self.index == 0:
            self.tell(message)
        if message["from"] != self.index:
            self.stop.hear_partner(message["number"], f"worker {message['from']}")

    def agree(self, step: int, seconds: float) -> list[int]:
        """Return the steps that all workers could save at this moment; nothing when it takes longer than `seconds`."""
        try:
            return self.gather_in(STOPPING, step, min(seconds, threading.TIMEOUT_MAX))
        except queue.Empty:
            return []

    def part(self) -> None:
        """Wait until every worker has saved; from then on, closed connections mean nothing."""
        self.gather_in(STOPPING, 0)
        self.ending.set()

    def tell_end(self, code: int, text: str) -> None:
        """Let the others end with this code and line; the first call counts, and later ones never return."""
        if not self.failing.acquire(blocking=False):
            threading.Event().wait()  # another thread is at it
        self.ending.set()
        self.tell({"kind": "failed", "text": text, "code": code})
        if self.index == 0 and self.links:
            time.sleep(1.0)  # a connection that closes on unread messages may lose what it sent

    # Ending

    def read(self) -> None:
        """Take what the others send until the end, in a thread; end the process when one of them fails or is lost."""
        numbers = {link: index for index, link in self.links.items()}
        while numbers:
            for ready in wait(list(numbers)):
                assert isinstance(ready, Connection)
                message = receive(ready)
                if message is None:
                    self.lose(numbers.pop(ready))
                elif message["kind"] == "failed":
                    self.end(message["text"], message["code"])
                elif message["kind"] == "stop":
                    self.pass_stop(message)
                else:
                    self.arrived[message["thread"]].put(message | {"from": numbers[ready]})

    def lose(self, index: int) -> None:
        """End this process, and by worker 0 all others, because a worker's connection is closed before the end."""
        if not self.ending.wait(1.0):
            self.end(
                f"worker {index} is gone (killed, or its machine is lost); start all workers again with --resume",
                EXIT_STOPPED,
            )

    def end(self, text: str, code: int) -> None:
        """Tell the others, print the line and end the process; the first call counts."""
        self.tell_end(code, text)
        print_line(text)
        self.exit(code)

    def fail(self, error: BaseException) -> None:
        """End all workers because of an error in this one; for a single worker do nothing."""
        if self.count == 1:
            return
        code, text = EXIT_USAGE, f"error: {error}"
        if self.index:
            text = f"worker {self.index}: {text}"
        if not isinstance(error, UsageError | OSError):
            time.sleep(BROKEN)  # if a worker is lost, the thread ends this process meanwhile
            code, text = 1, f"worker {self.index}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            traceback.print_exception(error)
        self.end(text, code)

    def leave(self) -> None:
        """Wait until every worker is done, then let go of them."""
        if self.count == 1:
            return
        self.gather(None)
        self.ending.set()
        jax.distributed.shutdown()
        if self.service and self.service.stdin:
            self.service.communicate("done")


WORKERS = Workers()
"""Of this process."""

CLUSTER_FLAGS = {"coordinator_address", "num_processes", "process_id"}


def own_facts(settings: Settings) -> dict[str, Any]:
    """Return what must be equal on every worker before anything starts: versions, this program and its flags."""
    names = ("jax", "jaxlib", "libtpu", "numpy")
    versions = {name: version_of(name) for name in names}
    flags = {f"--{name}": value for name, value in settings.as_dict().items()}
    return {"Python": platform.python_version(), **versions, "the program of digest": program_digest()} | flags


def version_of(package: str) -> str:
    """Return the version of an installed package, "none" where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def program_digest() -> str:
    """Return a digest of this package's source."""
    digest = hashlib.blake2b(digest_size=6)
    root = Path(__file__).parent.parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def joined(settings: Settings) -> Iterator[None]:
    """Run a command as one of several workers, if there are several, and end as all of them do."""
    started = xla_bridge.backends_are_initialized()
    again = "several workers" if WORKERS.count > 1 else ""
    given = min((f"--{name}" for name in settings.explicit & CLUSTER_FLAGS), default=again)
    if started and given:
        raise UsageError(f"{given}: jax has started in this process; workers need a new process for each run")
    place = None if started else find_place(settings.cluster)
    if place is None:
        yield
        return
    with own_stdout(writes=place.index == 0):
        WORKERS.join(place, own_facts(settings), settings.cluster.start_timeout)
        try:
            yield
        except Exception as error:
            WORKERS.fail(error)
            raise
        WORKERS.leave()


@contextlib.contextmanager
def own_stdout(writes: bool) -> Iterator[None]:
    """Keep stdout for the results of the worker that `writes`: nothing of the others, nor of gloo, appears there."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        target = kept if writes else os.open(os.devnull, os.O_WRONLY)
        with open(target, "w", encoding="utf-8", closefd=not writes) as stream, contextlib.redirect_stdout(stream):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)

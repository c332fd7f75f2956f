"""Connections between the processes of a run: worker 0 listens, every other worker keeps one connection to it.

Messages are JSON objects, so that nothing that arrives is ever executed. A worker that dies closes its connection,
which the others notice at once; one whose machine is lost, within about 25 s by TCP's own probes.
"""

import contextlib
import functools
import json
import os
import socket
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

from minigrpo.config import UsageError

PROBES = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 25_000}
"""Seconds without traffic before TCP probes the other side, seconds between probes, probes without an answer, and
milliseconds that what was sent may wait for one."""

Message = dict[str, Any]


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of --coordinator_address; UsageError for anything else."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f"--coordinator_address={address}: must be HOST:PORT of worker 0, such as 10.0.0.2:8476")
    return host.strip("[]"), int(port)


def send(link: Connection, message: Message) -> None:
    """Send a message; a connection whose other end is gone is left to its reader."""
    try:
        link.send_bytes(json.dumps(message).encode())
    except (OSError, ValueError):
        return


def receive(link: Connection) -> Message | None:
    """Return the next message, None when the other end is gone."""
    try:
        message: Message = json.loads(link.recv_bytes())
    except (OSError, EOFError, ValueError, RecursionError):
        return None
    return message


def as_link(connected: socket.socket) -> Connection:
    """Return a connection that notices when the other machine is gone."""
    connected.settimeout(None)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in PROBES.items():
        if hasattr(socket, name):
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return Connection(connected.detach())


def listen(port: int) -> socket.socket:
    """Return worker 0's socket; UsageError when the port is taken."""
    try:
        return socket.create_server(("", port), backlog=1024)
    except OSError as error:
        raise UsageError(
            f"--coordinator_address: port {port} cannot be used ({error.strerror}); name another port, or end the "
            "process that holds it"
        ) from error


def accept(server: socket.socket, deadline: float) -> tuple[Connection, Message] | None:
    """Return the next worker's connection and its first message; None when none comes by `deadline` (monotonic)."""
    while (left := deadline - time.monotonic()) > 0:
        server.settimeout(left)
        try:
            link = as_link(server.accept()[0])
        except TimeoutError:
            return None
        message = greeting(link, min(left, 5.0))
        if message is not None:
            return link, message
        link.close()  # a port scanner, or a worker that died
    return None


def greeting(link: Connection, seconds: float) -> Message | None:
    """Return a worker's first message; None where something else, or only a part of one, comes in that time."""
    hang_up = threading.Timer(seconds, functools.partial(shut, link.fileno()))
    hang_up.start()
    try:
        message = receive(link)
    finally:
        hang_up.cancel()
        hang_up.join()
    return message if is_greeting(message) else None


def is_greeting(message: Any) -> bool:
    """Tell if a message is a worker's first one, whatever else may knock at the port."""
    kinds = {"index": int, "count": int, "facts": dict, "clock": float}
    known = isinstance(message, dict) and message.get("kind") == "hello"
    typed = known and all(type(message.get(name)) is kind for name, kind in kinds.items())
    return typed and 0 <= message["index"] < message["count"]


def shut(descriptor: int) -> None:
    """End a connection that somebody may be reading from."""
    with socket.socket(fileno=os.dup(descriptor)) as own, contextlib.suppress(OSError):
        own.shutdown(socket.SHUT_RDWR)


def connect(host: str, port: int, deadline: float) -> Connection | None:
    """Return a connection to worker 0, which may start later; None when it does not answer by `deadline`."""
    while time.monotonic() < deadline:
        try:
            return as_link(socket.create_connection((host, port), timeout=5.0))
        except OSError:
            time.sleep(0.2)
    return None


def free_port() -> int:
    """Return a port of this machine that nobody uses."""
    with socket.create_server(("", 0)) as server:
        port: int = server.getsockname()[1]
        return port

"""A server of Google Cloud Storage's protocol on loopback that can fail as buckets do."""

import os
import threading
from functools import partial
from http.server import ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

OFFLINE = {"NO_GCE_CHECK": "true", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "FSSPEC_GCS_TOKEN": "anon"}
"""Keeps Google's libraries from looking for an account; to be in the environment before they are imported."""

os.environ.update(OFFLINE)

BUCKET = "bucket-1"
LOCK = threading.Lock()


class Handler(RequestHandler):
    """Answers a request, or fails as `faults` say."""

    def __init__(self, faults, *args, **kwargs):
        self.faults = faults
        super().__init__(*args, **kwargs)

    def parse_request(self):
        parsed = super().parse_request()
        length = int(self.headers.get("Content-Length") or 0) if parsed else 0
        start = self.rfile.peek(1000)[:1000].decode(errors="replace") if length and self.faults else ""
        named = f"{getattr(self, 'path', '')} {start}".replace("%2F", "/")
        code = next((code for fault in self.faults if (code := fault(self.command, named))), 0) if parsed else 0
        if not code:
            return parsed
        self.rfile.read(length)
        self.close_connection = True
        self.send_error(code, {403: "denied", 507: "insufficient storage"}.get(code))
        return False

    def locked(method):
        def handle(self):
            with LOCK:  # the emulator's memory is not made for threads
                code = self.precondition()
                if code:
                    self.rfile.read(int(self.headers.get("Content-Length") or 0))
                    self.send_error(code)
                else:
                    getattr(super(), method)()

        return handle

    def precondition(self):
        """Do what the emulator does not: tell a file's generation, which tensorstore needs, and compare it."""
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        name = query.get("name", [unquote(path.rpartition("/o/")[2])])[0]
        self.generation = self.storage.objects.get(BUCKET, {}).get(name, {}).get("generation", "0")
        if query.get("ifGenerationMatch", [self.generation])[0] != self.generation:
            return 412
        return 304 if query.get("ifGenerationNotMatch", [""])[0] == self.generation else 0

    def end_headers(self):
        if self.command == "GET" and getattr(self, "generation", "0") != "0":
            self.send_header("X-Goog-Generation", self.generation)
        super().end_headers()

    do_GET, do_POST, do_PUT, do_PATCH, do_DELETE = map(locked, ("do_GET", "do_POST", "do_PUT", "do_PATCH", "do_DELETE"))

    def log_message(self, format, *args):
        pass


class Quiet(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        """A client that goes away is no error here."""


class BucketServer:
    """A bucket in memory; `faults` are functions (method, path with the body's start) -> status to fail with, or 0."""

    def __init__(self):
        self.storage, self.faults, self.port, self.server = Storage(use_memory_fs=True), [], 0, None
        create_bucket(BUCKET, self.storage)
        self.start()

    def start(self):
        self.server = Quiet(("127.0.0.1", self.port), partial(Handler, self.faults, self.storage))
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()

    def names(self, folder):
        """Names of the files in a folder of the bucket."""
        with LOCK:
            objects = self.storage.get_file_list(BUCKET, prefix=folder + "/")[0]
            return sorted(entry["name"].removeprefix(folder + "/") for entry in objects)

    def read(self, name):
        with LOCK:
            return self.storage.get_file(BUCKET, name)

    @property
    def env(self):
        address = f"http://127.0.0.1:{self.port}"
        return OFFLINE | {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address}

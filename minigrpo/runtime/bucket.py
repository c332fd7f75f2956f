"""Run folders in buckets: logs are kept in a local folder and uploaded whole, checkpoints go to gs:// directly.

Nothing can be appended to a file of a bucket. So small files live in a local folder, and a thread uploads those that
changed once a minute. They are uploaded before a checkpoint becomes valid too: all that resuming needs is there.
"""

import contextlib
import hashlib
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from etils import epath
from filelock import FileLock, Timeout

from minigrpo.config import UsageError
from minigrpo.remote import (
    PATIENCE,
    asking,
    cache_folder,
    clean_url,
    filesystem,
    get_files,
    is_url,
    list_files,
    put,
    url_error,
)
from minigrpo.runtime.files import disk_error, remove_tree
from minigrpo.runtime.workers import WORKERS

Place: TypeAlias = Path | epath.Path
"""A folder on this host, or in a bucket."""

UPLOAD_SECONDS = 60.0
"""Seconds of logs that may be lost at most when a host is."""

COMMIT = "commit_success.txt"
"""File that orbax writes last in a checkpoint in a bucket; without it there is no checkpoint."""

CHECKPOINTS = "checkpoints"
WHOLE = ("final/", "adapter/", "base/", f"{CHECKPOINTS}/")
"""Folders of a run whose files do not grow once they are there."""


def in_bucket(place: Place) -> bool:
    """Tell whether a folder is in a bucket."""
    return "://" in str(place)


def absolute(place: Place) -> Place:
    """Return a folder's full path; a URL is one already."""
    return place if in_bucket(place) else Path(place).absolute()


def write_error(place: Place, error: BaseException, needed: int = 0) -> UsageError:
    """Return one line for a file or folder that cannot be written, here or in a bucket."""
    if in_bucket(place) and isinstance(error, UsageError):
        return UsageError(str(error))
    if not in_bucket(place):
        return disk_error(Path(place), error, needed)
    return UsageError(f"{url_error(str(place), 'written', error)}, then continue with --resume")


def is_checkpoint(place: Place) -> bool:
    """Tell whether a folder may be a checkpoint: on a disk it gets its name last, in a bucket its last file."""
    if not place.name.isdecimal():
        return False
    return (place / COMMIT).exists() if in_bucket(place) else place.is_dir()


def remove_checkpoint(place: Place) -> None:
    """Delete a checkpoint so that a crash half-way leaves none under its name."""
    if not in_bucket(place):
        return remove_tree(Path(place))
    (place / COMMIT).unlink(missing_ok=True)
    return epath.Path(place).rmtree(missing_ok=True)


# The folder of a run


class RunHome:
    """The folder of a run on a local disk."""

    def __init__(self, folder: Path):
        self.folder, self.name = folder.absolute(), str(folder)  # a reward function may change to another folder
        self.checkpoints: Place = self.folder / CHECKPOINTS

    def flush(self) -> None:
        """Bring every file written so far to where it lasts; UsageError when that fails."""

    def saved(self, step: int) -> None:
        """Bring the checkpoint of `step`, which is on the local disk, to where it lasts."""

    def removed(self, step: int) -> None:
        """Delete the checkpoint of `step` where it lasts."""


class BucketHome(RunHome):
    """The folder of a run in a bucket, and the local folder that its small files are written in.

    Every process of a run has one; each uploads what it wrote itself.
    """

    def __init__(self, url: str, folder: Path):
        """Begin with an empty local folder."""
        super().__init__(folder)
        self.name, self.files = url, filesystem(url)
        self.uploaded: dict[str, tuple[int, int]] = {}
        self.guard = threading.Lock()
        self.direct = url.startswith("gs://")
        if self.direct:
            self.checkpoints = epath.Path(url) / CHECKPOINTS
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.mkdir(parents=True)

    def open(self, resume: bool, role: str) -> None:
        """Refuse a bucket that cannot be written or holds another run; download the logs of a run to be resumed."""
        self.files.patience = 0.0
        found = list_files(self.name, self.files)
        if not resume and found and role == "0":
            kind = "holds a run already" if "config.json" in found else "is not empty"
            raise UsageError(f"--output_dir={self.name}: {kind}; name another folder, or continue a run with --resume")
        probe = f".write-test-{role}"
        (self.folder / probe).touch()
        put(self.files, self.folder / probe, f"{self.name}/{probe}")
        with asking(self.name, "written"):
            self.files.rm_file(f"{self.name}/{probe}")
        (self.folder / probe).unlink()
        self.files.patience = PATIENCE
        if resume:
            self.download(found)

    def download(self, found: dict[str, Any]) -> None:
        """Copy a run's small files here, and its checkpoints where they are not read from the bucket."""
        whole = [] if self.direct else [name.removesuffix(COMMIT) for name in found if name.endswith(f"/{COMMIT}")]
        wanted = [name for name in found if "/" not in name or name.startswith(tuple(whole))]
        get_files(self.name, self.files, wanted, self.folder)
        self.uploaded = self.changed()

    # Uploading

    def changed(self) -> dict[str, tuple[int, int]]:
        """Return the files that were written since their upload, models' config.json last, with size and time."""
        found = {}
        for parent, folders, names in os.walk(self.folder):
            folders[:] = [name for name in folders if not name.endswith(".partial") and name != CHECKPOINTS]
            for path in (Path(parent, name) for name in names if not name.endswith(".partial")):
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    found[str(path.relative_to(self.folder))] = (status.st_size, status.st_mtime_ns)
        order = sorted(found, key=lambda name: (name.endswith("config.json"), name))
        return {name: found[name] for name in order if self.uploaded.get(name) != found[name]}

    def flush(self) -> None:
        """Upload whole every file that was written since; UsageError naming the bucket when that fails."""
        with self.guard:
            for name, state in self.changed().items():
                self.put(name)
                self.uploaded[name] = state

    def put(self, name: str) -> None:
        """Upload one file of the local folder."""
        try:
            put(self.files, self.folder / name, f"{self.name}/{name}", grows=not name.startswith(WHOLE))
        except UsageError as error:
            raise UsageError(f"{error}, then continue with --resume") from error

    def run(self, ended: threading.Event) -> None:
        """Upload once a minute until the end, in a thread; say a failure once, as the next checkpoint raises it."""
        told = ""
        while not ended.wait(UPLOAD_SECONDS):
            try:
                self.flush()
            except UsageError as error:
                if str(error) != told:
                    sys.stderr.write(f"logs are not uploaded, trying again: {error}\n")
                told = str(error)

    # Checkpoints that are not written to the bucket directly

    def saved(self, step: int) -> None:
        """Upload a checkpoint, the file that makes it one last, and the note of it."""
        if not self.direct:
            folder = self.folder / CHECKPOINTS / str(step)
            inner = [str(path.relative_to(self.folder)) for path in folder.rglob("*") if path.is_file()]
            (folder / COMMIT).touch()
            for name in (*inner, f"{CHECKPOINTS}/{step}/{COMMIT}"):
                self.put(name)
        self.flush()

    def removed(self, step: int) -> None:
        """Delete an uploaded checkpoint."""
        url = f"{self.name}/{CHECKPOINTS}/{step}"
        if not self.direct and list_files(url, self.files):
            with asking(url, "written"):
                self.files.rm_file(f"{url}/{COMMIT}")
                self.files.rm(url, recursive=True)

    def close(self, patience: float) -> None:
        """Upload what is left, and delete the local folder."""
        self.files.patience = patience
        try:
            self.flush()
        except UsageError as error:
            raise UsageError(f"{error}; its last files are in {self.folder}") from error
        shutil.rmtree(self.folder.parent, ignore_errors=True)


@contextlib.contextmanager
def open_home(name: str, resume: bool, role: str = "", flag: str = "output_dir") -> Iterator[RunHome]:
    """Yield the folder of a run, new or to be resumed, whose files are brought to its bucket until the end.

    `role` names who writes there, by default the worker; worker 0 refuses a folder that is not empty. UsageError
    for a URL that cannot be meant or written. Errors from inside name the bucket instead of the local folder.
    """
    if not is_url(name):
        yield RunHome(Path(name))
        return
    url, role, ended = clean_url(flag, name), role or str(WORKERS.index), threading.Event()
    if WORKERS.count > 1 and not url.startswith("gs://"):
        raise UsageError(f"--{flag}={name}: several workers write to gs:// or a shared folder; name one of those")
    own = cache_folder("runs") / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{role}"
    with only_here(own.with_suffix(".lock"), f"--{flag}={url}"):
        home = BucketHome(url, own / url.rsplit("/", 1)[1])
        home.open(resume, role)
        threading.Thread(target=home.run, args=(ended,), name="uploads", daemon=True).start()
        try:
            yield home
        except BaseException as error:
            with contextlib.suppress(UsageError):
                home.close(0.0)
            if isinstance(error, UsageError):
                raise UsageError(str(error).replace(str(home.folder), url)) from error
            raise
        finally:
            ended.set()
        home.close(PATIENCE)


@contextlib.contextmanager
def only_here(path: Path, given: str) -> Iterator[None]:
    """Hold a lock; UsageError when another process of this host has it."""
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise UsageError(f"{given}: another process of this host writes there; let it end") from error
    try:
        yield
    finally:
        lock.release()

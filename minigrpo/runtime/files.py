"""Files that are whole or absent after a crash, and errors of the disk in one line."""

import contextlib
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from minigrpo.config import UsageError

CURES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room in your quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "make the disk writable",
    errno.EACCES: "give this user permission to write there",
    errno.EPERM: "give this user permission to write there",
    errno.ENOENT: "put the folder back",
    errno.ENOTDIR: "put the folder back",
    errno.EIO: "check the disk, which reports a failure",
    errno.ESTALE: "mount the network disk again",
}
"""Ways on, by what the system reports."""


def error_number(error: BaseException) -> int:
    """Return the system's number of the cause of `error`, which libraries wrap or write in its text; 0 for none."""
    seen: BaseException | None = error
    while seen is not None:
        told = re.search(r"(?:[Oo][Ss] error |os_error_code=')(\d+)", str(seen))
        if told:
            return int(told[1])
        if isinstance(seen, OSError) and seen.errno:
            return seen.errno
        seen = seen.__cause__ or seen.__context__
    return 0


def size_text(size: int | float) -> str:
    """Return a size in bytes as people read it: '1.5 GiB'."""
    power = max(0, min(3, (int(size).bit_length() - 1) // 10))
    amount, unit = size / 1024**power, ("bytes", "KiB", "MiB", "GiB")[power]
    return f"{amount:.0f} {unit}" if power == 0 or amount >= 100 else f"{amount:.1f} {unit}"


def free_bytes(path: Path) -> int | None:
    """Return the bytes free on the disk of `path`, or of its nearest existing parent; None if unknown."""
    for place in (path, *path.absolute().parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(place).free
    return None


def disk_error(path: Path, error: BaseException, needed: int = 0) -> UsageError:
    """Return one line for a file or folder that cannot be written: cause, sizes in bytes if known, the cure."""
    code = error_number(error)
    reason = os.strerror(code) if code else (str(error).splitlines() or [type(error).__name__])[0][:200]
    sizes = f", about {size_text(needed)} needed" if needed else ""
    free = free_bytes(path) if code in (errno.ENOSPC, errno.EDQUOT) else None
    sizes += "" if free is None else f", {size_text(free)} free"
    cure = CURES.get(code, "see to the disk")
    return UsageError(f"{path}: cannot be written ({reason}{sizes}); {cure}, then continue with --resume")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise the system's errors from inside as one UsageError that names `path` and the way on."""
    try:
        yield
    except OSError as error:
        raise disk_error(path, error) from error


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network disks sync no folders
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Wait until everything in a folder is on the disk itself, the deepest first."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(parent) / name)
        sync(Path(parent))


def write_whole(path: Path, text: str) -> None:
    """Replace a file by `text` in one act: after a crash either the old or the new content is there.

    UsageError naming the file when the disk refuses.
    """
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        with open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync(path.parent)


def fingerprint(folder: Path) -> str:
    """Return a digest of a folder's files: their names, sizes and beginnings, which hold the headers of weights."""
    digest = hashlib.blake2b(digest_size=6)
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with open(path, "rb") as file:
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + file.read(1 << 20))
    return digest.hexdigest()


def remove_tree(folder: Path) -> None:
    """Delete a folder so that a crash half-way leaves no half of it under its name."""
    doomed = folder.with_name(f"{folder.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)

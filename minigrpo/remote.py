"""Files behind URLs, such as gs://BUCKET/model: asked for again when a request fails, and copied to this host once."""

import contextlib
import hashlib
import importlib
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from minigrpo.config import UsageError

PATIENCE = 600.0
"""Seconds for which a request to gs:// is repeated that may succeed later."""

ROOM = 1 << 30
"""Bytes that a download leaves free on the disk."""

URL = re.compile(r"([A-Za-z0-9+.:_-]+?):(/+)(.*)", re.DOTALL)
PART = re.compile(r"(.+://[^/]+/.+)/(final|adapter|checkpoints/\d+)")
"""A part of a run, which is used as the run's settings say."""

LOCAL = ("file", "local", "memory")
"""Schemes without a bucket's name."""

CURES = (
    ("make room in the bucket, or raise its quota", r"quota|\b507\b|insufficient storage|exhausted|no space left"),
    (
        "let this account read and write there (role Storage Object Admin), or log in as another",
        r"forbidden|denied|\b40[13]\b|permission|anonymous|credential",
    ),
    ("create the bucket, or correct its name", r"not.?found|\b404\b|not exist|NoSuchBucket|no such (?!host)"),
    (
        "see that the bucket can be reached from here",
        r"\b(408|429|50[0234])\b|time[d ]*-?out|connect|unavailable|deadline|no such host|ClientError|ProxyError",
    ),
)
"""Ways on, and what errors say; the first that fits."""


def is_url(name: str) -> bool:
    """Tell whether a name is a URL, or one with a slash too few, rather than a path or a Hub id."""
    found = URL.match(name)
    return found is not None and (len(found[2]) > 1 or found[1].lower() in schemes())


def schemes() -> list[str]:
    """Return the schemes that fsspec knows."""
    known: list[str] = importlib.import_module("fsspec").available_protocols()
    return known


def clean_url(flag: str, name: str) -> str:
    """Return a URL without slashes at its end; UsageError naming `flag` for one that cannot be meant."""
    found = URL.match(name)
    assert found, name
    scheme, slashes, rest = found[1].lower(), found[2], found[3].rstrip("/")
    scheme = "gs" if scheme == "gcs" else scheme
    given = f"--{flag}={name}"
    if scheme not in schemes():
        raise UsageError(f"{given}: unknown scheme {scheme!r}; write gs://BUCKET/FOLDER, s3://BUCKET/FOLDER or a path")
    if scheme not in LOCAL and (len(slashes) != 2 or "//" in rest):
        raise UsageError(f"{given}: {scheme}: takes two slashes, and folders one; write {scheme}://BUCKET/FOLDER")
    if scheme not in LOCAL and "/" not in rest:
        raise UsageError(f"{given}: names a bucket but nothing in it; write {scheme}://BUCKET/FOLDER")
    return f"{scheme}://{slashes[2:]}{rest}"


def filesystem(url: str) -> Any:
    """Return fsspec's filesystem for a URL, which remembers no listings; UsageError when its library is missing.

    For gs:// it is the instance that etils.epath, and so orbax, uses too.
    """
    fsspec, scheme = importlib.import_module("fsspec"), url.split("://")[0]
    for name in (scheme, "gcs"):
        fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)
    try:
        files = fsspec.filesystem("gcs", finalize_on_close=True) if scheme == "gs" else fsspec.filesystem(scheme)
    except ImportError as error:
        cure = "pip install 'minigrpo[gcs]'" if scheme == "gs" else str(error).splitlines()[0]
        raise UsageError(f"{url}: needs a library that is not installed; {cure}") from error
    except Exception as error:  # each library has its own for missing credentials and options
        raise url_error(url, "opened", error) from error
    if scheme == "gs" and not hasattr(files, "patience"):
        make_patient(files)
    files.patience = PATIENCE
    return files


def make_patient(files: Any) -> None:
    """Make gcsfs, which gives up after half a minute, repeat requests for `files.patience` seconds.

    tensorstore, which writes the arrays, goes on for a quarter of an hour by itself, if told when a request hangs.
    """
    is_retriable = importlib.import_module("gcsfs.retry").is_retriable
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # its errors are raised as well
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", "60")
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    request = files._request

    async def patient(*arguments: Any, **named: Any) -> Any:
        until = time.monotonic() + files.patience
        while True:
            try:
                return await request(*arguments, **named)
            except Exception as error:
                if not is_retriable(error) or time.monotonic() > until:
                    raise

    files._request = patient


def url_error(url: str, doing: str, error: BaseException) -> UsageError:
    """Return one line for a URL that cannot be read or written: the cause, and the cure."""
    told = ""
    seen: BaseException | None = error
    while seen is not None:
        told, seen = f"{told} {type(seen).__name__}: {seen}", seen.__cause__ or seen.__context__
    fits = (cure for cure, pattern in CURES if re.search(pattern, told, re.IGNORECASE))
    text = str(error) or type(error).__name__
    heading = re.search(r"<(?:p|title)>(?:Message: )?(.*?)</", text)
    line = " ".join((heading[1] if heading else text).split())
    short = re.split(r" See full TensorStore| \[source locations=| \[tensorstore_spec=", line)[0][:400]
    return UsageError(f"{url}: cannot be {doing} ({short}); {next(fits, 'see to the cause')}")


@contextlib.contextmanager
def asking(url: str, doing: str) -> Iterator[None]:
    """Raise what fsspec's libraries raise inside as one UsageError that names the URL."""
    try:
        yield
    except (UsageError, NameError, AttributeError, TypeError):
        raise
    except Exception as error:  # they raise the errors of many others
        raise url_error(url, doing, error) from error


def list_files(url: str, files: Any) -> dict[str, dict[str, Any]]:
    """Return what is known of every file at or under a URL, by name within it; {} when there is none.

    A URL that is a file itself has it under the name ''.
    """
    root = files._strip_protocol(url).rstrip("/")
    with asking(url, "read"):
        files.invalidate_cache()
        found: dict[str, dict[str, Any]] = files.find(url, detail=True)
        return {name.removeprefix(root).removeprefix("/"): info for name, info in found.items()}


def put(files: Any, source: Path, url: str, grows: bool = False) -> None:
    """Upload a file whole; one that grows meanwhile as it is now."""
    with asking(url, "written"):
        if url.split("://")[0] in LOCAL:  # buckets have no folders
            files.makedirs(url.rsplit("/", 1)[0], exist_ok=True)
        if grows:
            files.pipe_file(url, source.read_bytes())
        else:
            files.put_file(str(source), url)


def get_files(root: str, files: Any, names: Iterable[str], folder: Path) -> None:
    """Copy files under a URL into a folder."""
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with asking(f"{root}/{name}", "read"):
            files.get_file(f"{root}/{name}", str(target))


# Copies on this host


def cache_folder(kind: str) -> Path:
    """Return the folder of minigrpo's files of one kind that can be had again (XDG base directories)."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = (given if given.is_absolute() else Path.home() / ".cache") / "minigrpo" / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be made ({error.strerror}); XDG_CACHE_HOME names another place") from error
    return folder


def identity(info: dict[str, Any]) -> list[str]:
    """Return what changes when a file's content does."""
    return [str(info.get(name)) for name in ("size", "etag", "ETag", "generation", "mtime", "LastModified", "created")]


def chosen(url: str, files: Any) -> tuple[str, dict[str, dict[str, Any]]]:
    """Return the root and the files to copy for a URL: of a run no checkpoints, of its part also what it was told."""
    match = PART.fullmatch(url)
    run, part = (match[1], f"{match[2]}/") if match else (url, "")
    found = list_files(run, files)
    if "flags.txt" in found:
        wanted = (part, "config.json", "flags.txt") if part else ("final/", "adapter/")
        own = {name: info for name, info in found.items() if name.startswith(wanted) or not (part or "/" in name)}
        return run, own if any("/" in name for name in own) or not part else {}
    found = list_files(url, files) if part else found
    parent, name = url.rsplit("/", 1)
    return (parent, {name: found[""]}) if "" in found else (url, found)


def local_copy(flag: str, name: str) -> Path:
    """Return the path of a name, or of the local copy of what a URL names, downloaded once for each content.

    UsageError naming `flag` where there is nothing, or too little room for it.
    """
    if not is_url(name):
        return Path(name)
    url = clean_url(flag, name)
    files = filesystem(url)
    root, found = chosen(url, files)
    if not found:
        raise UsageError(f"--{flag}={name}: there is nothing of that name; correct it")
    key = hashlib.sha256(repr((root, sorted((inner, identity(info)) for inner, info in found.items()))).encode())
    folder = cache_folder("files") / key.hexdigest()[:16]
    place = folder / root.rsplit("/", 1)[1]
    with FileLock(folder.with_suffix(".lock")):
        if not place.exists():
            download(root, files, found, place)
    return place / url.removeprefix(root).removeprefix("/")


def download(root: str, files: Any, found: dict[str, dict[str, Any]], place: Path) -> None:
    """Copy files under `root` into a folder, which appears under its name only when whole."""
    needed = sum(int(info.get("size") or 0) for info in found.values())
    free = shutil.disk_usage(place.parent.parent).free
    if needed + ROOM > free:
        raise UsageError(
            f"{root}: {needed >> 20} MiB to download, but {place.parent.parent} has {free >> 20} MiB free and "
            f"{ROOM >> 20} MiB stay free; make room, or name another place by XDG_CACHE_HOME"
        )
    sys.stderr.write(f"downloading {len(found)} files, {needed >> 20} MiB, of {root}\n")
    place.parent.mkdir(exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix="partial-", dir=place.parent))
    try:
        get_files(root, files, found, partial)
        partial.rename(place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def fetched(flag: str, name: str) -> Iterator[Path]:
    """Yield the local copy of what a URL names; errors from inside name the URL instead of the copy."""
    path = local_copy(flag, name)
    try:
        yield path
    except UsageError as error:
        raise UsageError(str(error).replace(str(path), name)) from error

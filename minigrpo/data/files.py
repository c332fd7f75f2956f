"""Datasets as people have them: JSON Lines, JSON, CSV, Parquet, Arrow, saved folders and the Hub."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from minigrpo.config import UsageError
from minigrpo.data.json_file import unique_keys
from minigrpo.data.rows import JsonLines, Rows, Table
from minigrpo.remote import fetched, is_url

GSM8K = "openai/gsm8k"
JSON_FILES = (".jsonl", ".ndjson", ".json")
TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {"sep": ","}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
}
"""Suffix -> loader of the datasets library, and its arguments."""

CSV_TEXT = {"keep_default_na": False, "na_filter": False, "encoding": "utf-8-sig"}
"""Arguments with which cells stay text."""

PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
"""Suffix of a compressed file -> how to open it."""

MAGIC = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\x00": ".xz", b"PAR1": ".parquet", b"ARROW1": ".arrow"}
"""First bytes of a file -> the suffix that it should have."""

EMPTY = ("corresponds to no data", "BatchSize must be greater than 0")
"""What the datasets library says of a table without rows."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LONGEST_LINE = 2**28
"""Bytes of one row of JSON."""

LONGEST_DOCUMENT = 2**31
"""Bytes of a file that is one JSON value."""

DEEPEST = 100
"""Nesting of one row of JSON."""


def is_file(name: str) -> bool:
    """Tell whether --dataset names a file, which has no splits, rather than a folder, built-in or Hub dataset."""
    path = Path(name)
    return path.is_file() or (suffix(path) in (*JSON_FILES, *TABLES) and not path.is_dir())


def suffix(path: Path) -> str:
    """Return the suffix that tells the kind of a file: `.csv` for rows.csv.gz."""
    name = path.name.lower()
    inner = name.removesuffix(Path(name).suffix) if Path(name).suffix in PACKED else name
    return Path(inner).suffix


def read_rows(name: str, config: str, split: str, fallback: str) -> Rows:
    """Read the rows of a file, folder or Hub dataset; `split` "auto" means `fallback`.

    Raises UsageError naming --dataset when there are none.
    """
    if is_url(name):
        with fetched("dataset", name) as path:
            return read_rows(str(path), config, split, fallback)
    if is_file(name):
        refuse_choice(name, config, split)
        return read_file(Path(name), "dataset")
    folder = Path(name)
    if folder.is_dir() and any((folder / file).exists() for file in ("state.json", "dataset_dict.json")):
        rows = read_saved(name, config, split, fallback)
    else:
        refuse_missing(name)
        rows = read_library(name, config, fallback if split == "auto" else split)
    return refuse_empty("dataset", name, rows)


def refuse_missing(name: str) -> None:
    """Raise UsageError for a path of nothing, rather than ask the Hub for it."""
    path = Path(name)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix.lower() in (".txt", ".zip")
    if not path.exists() and (looks_local or (path.parent != Path() and path.parent.is_dir())):
        raise UsageError(f"--dataset={name}: no such file or folder")


def refuse_choice(name: str, config: str, split: str = "auto") -> None:
    """Raise UsageError for a config or split of a dataset that has none."""
    for flag, value in (("dataset_config", config), ("dataset_split", split)):
        if value != "auto":
            raise UsageError(f"--{flag}={value}: {name} has no {flag.removeprefix('dataset_')}s; leave it out")


def read_file(path: Path, flag: str) -> Rows:
    """Read the rows of one file, of a kind told by its suffix; UsageError naming `flag`, file and line or row."""
    try:
        kind = TABLES.get(suffix(path)) or TABLES.get(magic(path))
    except OSError as error:
        raise UsageError(f"--{flag}={path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    rows = read_table(path, flag, *kind) if kind else read_json_file(path, flag)
    return refuse_empty(flag, path, rows)


def refuse_empty(flag: str, name: Path | str, rows: Rows) -> Rows:
    """Return the rows; UsageError naming `flag` when there are none."""
    if not len(rows):
        raise UsageError(f"--{flag}={name}: the {'file' if Path(name).is_file() else 'dataset'} has no rows")
    return rows


def magic(path: Path) -> str:
    """Return the suffix that a file's first bytes call for, or ''."""
    with open(path, "rb") as file:
        start = file.read(8)
    return next((kind for begin, kind in MAGIC.items() if start.startswith(begin)), "")


def open_bytes(path: Path) -> io.BufferedIOBase:
    """Open a file, through its decompressor when it is compressed."""
    opener: Callable[[Path, str], io.BufferedIOBase] = PACKED.get(magic(path), open)
    return opener(path, "rb")


# JSON


def read_json_file(path: Path, flag: str) -> JsonLines:
    """Read the rows of a file of one object per line, of one array, or of one {"data": [...]}."""
    try:
        with open_bytes(path) as file:
            document = is_document(file)
        with open_bytes(path) as file:
            return document_rows(path, file) if document else line_rows(path, file)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UsageError(f"--{flag}={path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def is_document(file: io.BufferedIOBase) -> bool:
    """Tell whether a file is one JSON value rather than a line per row: an array, or an object over several lines."""
    first = next((line for line in bounded_lines(file) if line.strip()), b"").removeprefix(BYTE_ORDER_MARK).strip()
    if not first.startswith(b"{"):
        return first.startswith(b"[")
    try:
        row = json.loads(first)
    except RecursionError:
        return False
    except ValueError:
        return is_json(first + b"\n" + file.read(LONGEST_DOCUMENT))
    return list(row) == ["data"] and isinstance(row["data"], list)


def is_json(text: bytes) -> bool:
    """Tell whether a text is one JSON value."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def document_rows(path: Path, file: io.BufferedIOBase) -> JsonLines:
    """Read the whole of a file that is one JSON value, and return its rows."""
    text = file.read(LONGEST_DOCUMENT + 1)
    if len(text) > LONGEST_DOCUMENT:
        raise UsageError(f"{path}: is longer than {LONGEST_DOCUMENT >> 20} MiB; save it as JSON Lines, one row a line")
    value = parse(f"{path}", text)
    value = value["data"] if isinstance(value, dict) and isinstance(value.get("data"), list) else value
    rows = JsonLines()
    for number, row in enumerate(value if isinstance(value, list) else [value], 1):
        check_row(f"{path}: row {number}", row, "row")
        rows.append(json.dumps(row, ensure_ascii=False).encode())
    return rows


def line_rows(path: Path, file: io.BufferedIOBase) -> JsonLines:
    """Index the rows of a file of one JSON object per line; blank lines are skipped."""
    rows = JsonLines()
    for number, line in enumerate(bounded_lines(file), 1):
        if len(line) > LONGEST_LINE:
            raise UsageError(f"{path}:{number}: the line is longer than {LONGEST_LINE >> 20} MiB")
        if line.strip():
            check_row(f"{path}:{number}", parse(f"{path}:{number}", line), "line")
            rows.append(line)
    return rows


def bounded_lines(file: io.BufferedIOBase) -> Iterator[bytes]:
    """Yield the lines of a file, those beyond LONGEST_LINE in pieces that are one byte longer."""
    while line := file.readline(LONGEST_LINE + 1):
        yield line


def parse(where: str, text: bytes) -> Any:
    """Parse a text as JSON; UsageError beginning with `where` when it is not."""
    try:
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: not UTF-8 text ({error}); save the file as UTF-8") from error
    except RecursionError as error:
        raise UsageError(f"{where}: nested deeper than {DEEPEST} levels") from error
    except ValueError as error:
        raise UsageError(f"{where}: not JSON ({error})") from error


def check_row(where: str, row: Any, noun: str) -> None:
    """Refuse a JSON value that is not a row; UsageError beginning with `where`."""
    if not isinstance(row, dict):
        raise UsageError(f"{where}: a {noun} must be a JSON object, not {type(row).__name__}")
    level: list[Any] = [row]
    for _ in range(DEEPEST):
        level = [
            inner for value in level for inner in ((*value, *value.values()) if isinstance(value, dict) else value)
        ]
        if not all(is_unicode(value) for value in level if isinstance(value, str)):
            raise UsageError(f"{where}: holds half of a surrogate pair, which is no character")
        level = [value for value in level if isinstance(value, dict | list)]
        if not level:
            return
    raise UsageError(f"{where}: nested deeper than {DEEPEST} levels")


def is_unicode(text: str) -> bool:
    """Tell whether a text can be written as UTF-8."""
    try:
        return text.isascii() or bool(text.encode("utf-8"))
    except UnicodeEncodeError:
        return False


# The datasets library


def read_table(path: Path, flag: str, loader: str, arguments: dict[str, Any]) -> Table:
    """Read the rows of a CSV, Parquet or Arrow file; cells of CSV are text as it was written."""
    label = f"--{flag}={path}"
    if not path.is_file():
        raise UsageError(f"{label}: cannot be read (no such file)")
    if loader == "csv":
        arguments = arguments | csv_arguments(path, label, arguments["sep"])
    return as_rows(label, load(label, "load_dataset", loader, data_files=str(path), split="train", **arguments))


def csv_arguments(path: Path, label: str, separator: str) -> dict[str, Any]:
    """Return arguments that keep every CSV cell as text: 007 stays 007, and NA and an empty cell are text too."""
    import datasets

    try:
        with open_bytes(path) as file:
            names = next(csv.reader(codecs.getreader("utf-8-sig")(file), delimiter=separator), [])
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, csv.Error) as error:
        raise UsageError(f"{label}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    columns = [name or f"Unnamed: {place}" for place, name in enumerate(names)]
    twice = next((name for name in columns if columns.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"{label}: has two columns {twice!r}; rename one of them")
    features = datasets.Features({name: datasets.Value("string") for name in columns})
    return {"features": features, "index_col": False, **CSV_TEXT}


def read_library(name: str, config: str, split: str) -> Table:
    """Load a split of a folder or Hub dataset; "gsm8k" is short for openai/gsm8k, whose usual config is main."""
    label, hub_id = f"--dataset={name}", GSM8K if name == "gsm8k" else name
    usual = "main" if hub_id == GSM8K else None
    return as_rows(label, load(label, "load_dataset", hub_id, usual if config == "auto" else config, split=split))


def read_saved(name: str, config: str, split: str, fallback: str) -> Table:
    """Load the table in a folder that `save_to_disk` wrote, or one of its splits."""
    label = f"--dataset={name}"
    saved = load(label, "load_from_disk", name)
    if not isinstance(saved, dict):
        refuse_choice(name, config, split)
        return as_rows(label, saved)
    refuse_choice(name, config)
    chosen = fallback if split == "auto" else split
    if chosen not in saved:
        raise UsageError(f"{label}: has no split {chosen!r}, only {', '.join(saved)}; see --dataset_split")
    return as_rows(label, saved[chosen])


def load(label: str, function: str, *arguments: Any, **named: Any) -> Any:
    """Call a function of the datasets library; UsageError beginning with `label` and naming the cause."""
    import datasets  # slow to import, and needed for none of the JSON files

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors are in ours
    if "data_files" in named:
        datasets.disable_progress_bars()  # of what takes a moment
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*loss of data.*")  # of a line of CSV with more cells than the header
            return getattr(datasets, function)(*arguments, **named)
    except Exception as error:  # the library raises many kinds for a missing dataset, split, network or bad file
        problem = "has no rows" if any(said in str(error) for said in EMPTY) else f"cannot be loaded ({reason(error)})"
        raise UsageError(f"{label}: {problem}") from error


def reason(error: BaseException) -> str:
    """Return the cause of an error of the datasets library in one line, and the flag that may cure it."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())[:300] or type(error).__name__
    flag = next((f"--dataset_{word}" for word in ("config", "split") if word in text.lower()), "")
    return f"{text}; see {flag}" if flag else text


def as_rows(label: str, table: Any) -> Table:
    """Return the rows of a table; UsageError for columns of images and the like, which minigrpo cannot train on."""
    media = [name for name, kind in table.features.items() if hasattr(getattr(kind, "feature", kind), "decode_example")]
    if media:
        raise UsageError(
            f"{label}: column {media[0]!r} holds images, sound or the like; remove it to train on the text"
        )
    return Table(table)

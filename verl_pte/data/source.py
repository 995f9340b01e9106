"""Raw rows, one at a time: of a parquet or JSON file, a folder of such files, or a data set of the hub.

Files are read in pieces and hub sets are streamed, so the size of a source costs no memory. Which columns the rows
have is not looked at (problem.py). A folder may be a clone of a hub repository: all its data files are read, by name.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = (".parquet", ".jsonl", ".json")

Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Rows that can be read once; `total` is their number where it is known before."""

    name: str
    rows: Iterator[Row]
    total: int | None


def open_source(source: str, split: str) -> Source:
    """`split` is the one of a hub set that is read, if it has more than one.

    Raises ValueError naming the source if it is neither a file, a folder nor a hub id. The hub is asked for the
    first row: that raises ValueError if it has no such set, RuntimeError if `datasets` is missing or the hub fails on
    the way.
    """
    path = Path(source)
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _files(source, [path])
    if path.suffix in _FILES or not _HUB_ID.fullmatch(source):
        raise ValueError(f"--source {source}: no such file or folder, and no hub id (owner/name)")
    return Source(source, _hub(source, split), None)


def _folder(path: Path) -> Source:
    found = sorted(p for p in path.rglob("*") if p.suffix in _FILES and p.is_file() and not _is_hidden(p, path))
    kinds = {p.suffix for p in found}
    if ".parquet" in kinds or ".jsonl" in kinds:  # a .json beside them describes the set
        found = [p for p in found if p.suffix != ".json"]
        kinds.discard(".json")
    if len(kinds) != 1:
        held = ", ".join(str(p.relative_to(path)) for p in found[:5]) or ", ".join(p.name for p in path.iterdir())
        raise ValueError(
            f"--source {path}: must hold files of one kind, {', '.join(_FILES)}; it holds {held or 'nothing'}"
        )
    return _files(str(path), found)


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _files(name: str, paths: list[Path]) -> Source:
    if paths[0].suffix == ".parquet":
        files = [_open_parquet(path) for path in paths]
        return Source(name, (row for file in files for row in _parquet(file)), sum(f.metadata.num_rows for f in files))
    readers: dict[str, Callable[[Path], Iterator[Row]]] = {".jsonl": _json_lines, ".json": _json}
    if paths[0].suffix not in readers:
        raise ValueError(f"--source {paths[0]}: must be a file ending in {', '.join(_FILES)}")
    return Source(name, (row for path in paths for row in readers[path.suffix](path)), None)


def _open_parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"--source {path}: not a parquet file ({str(error).splitlines()[0]})") from None


def _parquet(file: Any) -> Iterator[Row]:
    for batch in file.iter_batches(batch_size=1024):
        yield from batch.to_pylist()


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _object(line, f"{path}, line {number}")


def _json(path: Path) -> Iterator[Row]:
    """A list of objects; files that hold one a line are read too, as the hub's viewers do."""
    text = path.read_text(encoding="utf-8")
    if not text.lstrip().startswith("["):
        yield from _json_lines(path)
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--source {path}: not JSON ({error})") from None
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"--source {path}: element {number} must be an object, it is {str(row)[:80]}")
        yield row


def _object(text: str, where: str) -> Row:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--source {where}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"--source {where}: must be an object, it is {text[:80].strip()}")
    return row


def _hub(hub_id: str, split: str) -> Iterator[Row]:
    try:
        import datasets
    except ImportError:
        raise RuntimeError(
            f"{hub_id}: reading from the hub needs datasets (pip install 'verl-pte[data]'); files do not"
        ) from None
    try:
        splits = datasets.get_dataset_split_names(hub_id)
        if len(splits) > 1 and split not in splits:
            raise ValueError(f"its splits are {', '.join(splits)}, and {split} is wanted")
        rows = datasets.load_dataset(hub_id, split=split if split in splits else splits[0], streaming=True)
    except (ValueError, OSError) as error:  # datasets' own errors are OSErrors
        raise ValueError(f"--source {hub_id}: cannot be read from the hub ({_first_line(error)})") from None
    number = 0
    try:
        for number, row in enumerate(rows, start=1):  # noqa: B007
            yield row
    except Exception as error:  # any library beneath the stream may raise any of its own
        raise RuntimeError(
            f"{hub_id}: reading from the hub ended after {number} rows ({type(error).__name__}: {_first_line(error)}); "
            "run the command again"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

"""Data sets with a row for each pair: fill50k's prompt.json as published, with `source` (the hint), `target` and
`prompt`; Hugging Face's metadata.jsonl, .csv or .parquet with `file_name`, `conditioning_image` and `text`."""

import csv
import io
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from controlnet.common.devices import optional
from controlnet.common.files import parse_json

from .entries import BadSample, Entry, Listing, Wanted
from .folders import held_out
from .names import COLUMNS, ENDS, Finder
from .text import lines_of, read_text

Row = tuple[str, object]  # where it stands, and its values or a BadSample


def json_rows(path: Path) -> Iterator[Row]:
    """An object a line, or one array of objects."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        try:
            array = parse_json(text)
        except ValueError as error:
            raise unreadable(path, error) from error
        yield from ((f"{path}, object {number}", values) for number, values in enumerate(array, start=1))
        return
    for number, line in enumerate(lines_of(text), start=1):
        if line.strip():
            yield f"{path}:{number}", json_line(line)


def json_line(line: str) -> object:
    try:
        return parse_json(line)
    except json.JSONDecodeError as error:
        return BadSample(f"is not JSON ({error.msg})")
    except ValueError as error:
        return BadSample(f"cannot be read: {error}")


def csv_rows(path: Path) -> Iterator[Row]:
    """Cells end at commas, semicolons (in spreadsheets of much of Europe) or tabs, whichever the first line has."""
    text = read_text(path)
    header = lines_of(text)[0]
    delimiter = max(",;\t", key=header.count)
    rows = csv.DictReader(io.StringIO(text, newline="\n"), delimiter=delimiter, skipinitialspace=True, strict=True)
    read = 1  # the last line that was read: the header
    try:
        for values in rows:
            read = rows.line_num
            yield f"{path}:{read}", csv_row(values, delimiter)
    except csv.Error as error:
        raise unreadable(path, f"in the row from line {read + 1} on, {error}") from error


def csv_row(values: dict, delimiter: str) -> object:
    """Without what pandas calls a cell that is missing, once it is text."""
    if not any(more := values.pop(None, [])):
        return {name: None if value == "nan" else value for name, value in values.items()}
    found, sign = len(values) + len(more), "a tab" if delimiter == "\t" else f'"{delimiter}"'
    return BadSample(f"has {found} cells, its header {len(values)}: put a text with {sign} in it into double quotes")


def parquet_rows(path: Path) -> Iterator[Row]:
    parquet = optional("pyarrow.parquet", path.name)
    try:
        table = parquet.read_table(path)
    except Exception as error:  # a damaged file makes it raise almost anything
        raise unreadable(path, error) from error
    for number, values in enumerate(table.to_pylist(), start=1):
        yield f"{path}, row {number}", values


def unreadable(path: Path, error: Exception | str) -> ValueError:
    first = next(iter(str(error).splitlines()), type(error).__name__)
    return ValueError(f'"{path}" is not readable as {path.suffix[1:].upper()} ({first}): write it again')


READERS = {
    ".json": json_rows,
    ".jsonl": json_rows,
    ".ndjson": json_rows,
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".parquet": parquet_rows,
}
STEMS = ("prompt", "prompts", "metadata", "data", "train")


def list_table(folder: Path, wanted: Wanted) -> Listing | None:
    """The pairs of a table; None if there is none, at the top or under train/. Raises ValueError for a file that cannot
    be read at all."""
    names = [f"{stem}{suffix}" for stem in STEMS for suffix in READERS]
    tables = [path for root in (folder, folder / "train") for path in map(partial(Path, root), names) if path.is_file()]
    if not tables:
        return None
    path, find = tables[0], Finder(tables[0].parent)
    left_out = [str(other.relative_to(folder)) for other in tables[1:]]
    left_out += [f"{name}/" for name in held_out(folder)] if path.parent != folder else []
    listing = Listing(str(path.relative_to(folder)), left_out=left_out)
    for where, values in READERS[path.suffix](path):
        try:
            listing.entries.append(entry_of(values, find, wanted))
        except BadSample as error:
            listing.problems.append(f"{where} {error}")
    return listing


def entry_of(values: object, find: Finder, wanted: Wanted) -> Entry:
    """Raises BadSample."""
    if isinstance(values, BadSample):
        raise values
    if not isinstance(values, dict):
        raise BadSample(f"is {type(values).__name__}, expected names and values")
    row = {str(name).strip().lower().replace(" ", "_"): value for name, value in values.items()}
    names = {role: text_in(row, role) for role in COLUMNS}
    for role in ("image", "hint") if wanted.hints else ("image",):
        if not names[role]:
            advice = ", or add --detect" if role == "hint" else ""
            expected = f"names no {role}, expected a file's name as {COLUMNS[role].replace(' ', ', ')}"
            raise BadSample((no_text(row, role) or expected) + advice)
    expected = f"has no caption: expected {COLUMNS['caption'].replace(' ', ', ')}"
    caption = wanted.caption(names["caption"], no_text(row, "caption") or expected)
    image, hint = find(names["image"]), find(names["hint"]) if wanted.hints else None
    if image == hint and names["image"] != names["hint"]:
        raise BadSample(f'names "{names["image"]}" and "{names["hint"]}", and both lead to {image}')
    return Entry(image, hint, caption)


def text_in(row: dict, role: str) -> str:
    """The first column of that role with a text in it, or ""."""
    return next((row[key] for key in keys_of(role) if isinstance(row.get(key), str) and row[key].strip()), "")


def no_text(row: dict, role: str) -> str:
    """What the first column of that role has in place of a text; "" if nothing."""
    key = next((key for key in keys_of(role) if not isinstance(row.get(key), str | None)), None)
    if key is None:
        return ""
    if isinstance(row[key], dict) and row[key].keys() & {"bytes", "path"}:  # as Hugging Face packs pictures
        return f'holds a picture itself as "{key}", expected a file\'s name: save the pictures as files'
    return f'has {type(row[key]).__name__} as "{key}", expected one text'


def keys_of(role: str) -> list[str]:
    return [name + end for name in COLUMNS[role].split() for end in ENDS]

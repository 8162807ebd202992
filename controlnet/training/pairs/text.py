"""Text files of others: UTF-8, or UTF-16 that says so. No other encoding is guessed at, only named."""

import codecs
import re
from pathlib import Path

# The marks that a text may begin with, and its encoding. UTF-32's begins as UTF-16's does.
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# For bytes above 127 that mostly stand in rows: what most letters of a text in this encoding are. The first that fits
# is taken.
TYPICAL = {
    "cp1251": ("Windows-1251", "[а-яё]"),
    "shift_jis": ("Shift-JIS", "[ぁ-ヿ、。一-龥]"),
    "euc_kr": ("EUC-KR", "[가-힣]"),
    "gb2312": ("GBK", "[一-龥，。、！？]"),
    "big5": ("Big5", "[一-龥，。、！？]"),
    "gb18030": ("GB18030", "[一-龥，。、！？]"),
}


def read_text(path: Path) -> str:
    """Raises ValueError for another encoding, OSError for no file."""
    return decoded(path.read_bytes(), str(path))


def decoded(data: bytes, name: str) -> str:
    """Raises ValueError, which names the encoding that it looks like."""
    encoding = next((found for mark, found in MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        found = looks_like(data) if encoding == "utf-8" else f"{encoding} that is cut off or damaged"
        raise ValueError(f'"{name}" is not UTF-8, it looks like {found}: save it as UTF-8') from error
    if "\0" in text:
        raise ValueError(f'"{name}" is not UTF-8, it looks like UTF-16 without its mark: save it as UTF-8')
    return text


def lines_of(text: str) -> list[str]:
    r"""Lines end at \n and \r\n alone: `splitlines` would cut captions at U+2028 and others, too."""
    return re.split(r"\r?\n", text)


def looks_like(data: bytes) -> str:
    """The encoding of bytes that are not UTF-8, to the eye."""
    if b"\0" in data:
        return "UTF-16 without its mark"
    rows = re.findall(rb"[\x80-\xff]+", data)
    if sum(map(len, rows)) < 1.5 * len(rows):  # accents stand alone
        return "Latin-1 (Windows-1252)"
    for encoding, (name, letters) in TYPICAL.items():
        try:
            foreign = re.sub(r"[\0-\x7f]", "", data.decode(encoding))
        except UnicodeDecodeError:
            continue
        if len(re.findall(letters, foreign)) > 0.7 * len(foreign):
            return name
    return "Latin-1 (Windows-1252)"

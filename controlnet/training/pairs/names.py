"""What people and tools call images, hints and captions: as folders, columns, and ends of names."""

import os
import re
import unicodedata
from pathlib import Path

from PIL import Image

from controlnet.common.image_files import FORMATS
from controlnet.hints.detectors import ALIASES, DETECTORS

from .entries import BadSample

# MPO, what cameras and telephones write, is read as the JPEG that it begins with.
PICTURES = {suffix for suffix, name in Image.registered_extensions().items() if name in {*FORMATS, "MPO"}}
ARRAYS = {".npy"}
TEXTS = {".txt", ".caption"}

# The folders of a data set, in lower case. Hints also lie in those named after their detector.
FOLDERS = {
    "image": "image images img imgs target targets picture pictures photo photos ground_truth gt",
    "hint": "hint hints control controls conditioning conditionings condition conditions cond conds conditioning_image "
    "conditioning_images conditioning_data conditioning_data_dir control_image control_images control_map "
    "control_maps source sources edge edges sketch sketches poses masks",
    "caption": "caption captions text texts txt prompt prompts tags",
}
ROLES = {
    **dict.fromkeys({*DETECTORS, *ALIASES}, "hint"),
    **{name: role for role, names in FOLDERS.items() for name in names.split()},
}

# The columns of a table, each also with an end such as _file_name; the first that a row has counts.
COLUMNS = {
    "image": "image file_name filename file path img picture target edited_image",
    "hint": "conditioning_image hint control_image control conditioning condition cond source original_image "
    "input_image",
    "caption": "text prompt caption edit_prompt description",
}
ENDS = ("", "_file_name", "_filename", "_file", "_path")

HIDDEN = re.compile(r"\.|__MACOSX$|@eaDir$")  # names that begin so: `._` files of macOS, thumbnails of a NAS


def role_of(folder: str) -> str | None:
    """ "Control-Images" -> "hint"; None for a name that says nothing."""
    return ROLES.get(re.sub(r"[ -]", "_", folder.lower()))


def composed(name: str | Path) -> str:
    """The name with its accents joined to their letters, which macOS takes apart."""
    return unicodedata.normalize("NFC", str(name))


class Finder:
    """Finds the files that a table names, as they are written on any system, from the table's folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.listed: dict[Path, dict[str, Path]] = {}

    def __call__(self, name: str) -> Path:
        """The file, or the path as it is named if there is none. Raises BadSample for what no file can be called."""
        parts, path = re.split(r"[\\/]+", name), self.folder / name
        try:
            impossible = "\0" in name or len(os.fsencode(path)) > 4000 or max(map(len, map(os.fsencode, parts))) > 255
        except UnicodeEncodeError:  # half of an emoji
            impossible = True
        if impossible:
            raise BadSample(f'names "{name[:40]} ...", which no file can be called')
        if path.exists():
            return path
        moved = re.match(r"[A-Za-z]:|[\\/]", name)  # from the root of another disk: the data may lie elsewhere by now
        for start in range(len(parts) if moved else 1):
            if found := self.walk(parts[start:]):
                return found
        return path

    def walk(self, parts: list[str]) -> Path | None:
        """Part by part, in letters of any case where no other fits."""
        path = self.folder
        for part in parts:
            if part not in ("", "."):
                path = path / part if (path / part).exists() else self.children(path).get(composed(part).lower())
            if path is None:
                return None
        return path if path != self.folder else None

    def children(self, folder: Path) -> dict[str, Path]:
        if folder not in self.listed:
            found = folder.iterdir() if folder.is_dir() else []
            self.listed[folder] = {composed(path.name).lower(): path for path in found}
        return self.listed[folder]

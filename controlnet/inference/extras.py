"""What a run of infer.py adds to its base: LoRAs, and embeddings, which are words of the prompts."""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from controlnet.common.program import note
from ldm.checkpoints import published
from ldm.checkpoints.extras import EMBEDDINGS, LORAS, find_extra, given_extra, no_extra, split_strength
from ldm.checkpoints.kinds import kind
from ldm.checkpoints.lora import check_loras
from ldm.checkpoints.open import open_checkpoint
from ldm.checkpoints.textual_inversion import read_embedding
from ldm.config import Config, TextConfig
from ldm.embeddings import EmbeddingTokenizer, word_pattern
from ldm.tokenizer import Tokenizer

from .options import Options
from .prompts import lora_tags, parse

MAX_LORAS = 32  # an image for --again is anyone's
WORD = "embedding:"  # before the names of those that were found by a word
TAGGED = re.compile(r"(?<!\w)embedding:([\w-]+)", re.IGNORECASE)


@dataclass(frozen=True)
class Extras:
    """`files` are keyed by the names given as options, and by "lora:NAME" or "embedding:NAME" for those in prompts."""

    loras: tuple[str, ...] = ()  # FILE:STRENGTH
    embeddings: dict[str, Tensor] = field(default_factory=dict)  # vectors (n, D) by name
    files: dict[str, Path] = field(default_factory=dict)

    def tokenizer(self, config: TextConfig) -> Tokenizer:
        sizes = {name: len(vectors) for name, vectors in self.embeddings.items()}
        return EmbeddingTokenizer(config, sizes) if sizes else Tokenizer(config)


def find_extras(options: Options, config: Config, recorded_files: Collection[str]) -> Extras:
    """Raises CheckpointError or ValueError for a file that is not there or does not fit.

    `recorded_files` are the keys of the files that the image for --again was made with.
    """
    loras, files = named_loras(options)
    check_loras(loras, config)
    paths = named_embeddings(options)
    then, now = (
        {name.removeprefix(WORD) for name in files if name.startswith(WORD)} for files in (recorded_files, paths)
    )
    for word in sorted(find_names(then - now, options)):
        raise no_extra(word, EMBEDDINGS, "embedding")
    for word in sorted(now - then) if recorded_files else ():
        note(f'"{paths[WORD + word]}" is an embedding by now: the image was made without it')
    embeddings = {path.stem: read_embedding(path, config.text.width) for path in paths.values()}
    return Extras(tuple(loras), embeddings, files | paths)


def named_loras(options: Options) -> tuple[list[str], dict[str, Path]]:
    """-> each as FILE:STRENGTH, and the files. Raises CheckpointError or ValueError for a name without a file, for one
    in the negative prompt, and for too many."""
    if lora_tags(options.negative):
        raise ValueError("the negative prompt names a LoRA, which acts on the whole image: name it in the prompt")
    found, files = [], {}
    for name, strength in map(split_strength, options.lora):
        files[name] = given_extra(name, LORAS, "LoRA")
        found.append(f"{files[name]}:{strength}")
    for name, strength in lora_tags(options.prompt):
        path = find_extra(name, LORAS)
        if path is None:
            raise no_extra(name, LORAS, "LoRA")
        files[f"lora:{name}"] = path
        found.append(f"{path}:{strength}")
    if len(found) > MAX_LORAS:
        raise ValueError(f"there are {len(found)} LoRAs, expected at most {MAX_LORAS}: leave some out")
    return found, files


# ---------------------------------------------------------------------------------------------------------- embeddings


def named_embeddings(options: Options) -> dict[str, Path]:
    """The files of --embedding, and those in weights/ that the prompts name, keyed as in `Extras`.

    Raises CheckpointError for a file that is missing, of an option or of a word `embedding:name`.
    """
    paths = {name: given_extra(name, EMBEDDINGS, "embedding") for name in options.embedding}
    given = {path.stem.lower() for path in paths.values()}
    for name in sorted(given - find_names(given, options)):
        note(f'the prompts do not name the embedding "{name}": it has no effect')
    in_weights = {path.stem.lower(): path for path in reversed(list(embedding_files()))}  # weights/ comes first
    for word in sorted(find_names(in_weights, options) - given):
        # A word may also be the name of a base or of a ControlNet in weights/.
        path = in_weights[word]
        if path.parent != published.WEIGHTS or kind(open_checkpoint(path)).startswith("a textual inversion"):
            paths[f"{WORD}{word}"] = path
    known = [path.stem for path in paths.values()]
    for text in texts_of(options):
        if lost := TAGGED.search(word_pattern(known).sub("", text) if known else text):
            raise no_extra(lost[1], EMBEDDINGS, "embedding")
    return paths


def texts_of(options: Options) -> list[str]:
    """All that the tokenizer reads of the prompts."""
    return [piece.text for prompt in (options.prompt, options.negative) for part in parse(prompt) for piece in part]


def find_names(names: Collection[str], options: Options) -> set[str]:
    """The names that are words of the prompts, in lower case."""
    if not names:
        return set()
    found = {name.lower() for text in texts_of(options) for name in word_pattern(names).findall(text)}
    return found & {name.lower() for name in names}  # some letters match others, like the Turkish dotless i


def embedding_files() -> Iterator[Path]:
    """The files that may be embeddings, as far as their names tell."""
    for folder in (published.WEIGHTS, published.WEIGHTS / EMBEDDINGS):
        if folder.is_dir():
            yield from sorted(path for path in folder.iterdir() if path.suffix in published.FILE_SUFFIXES)

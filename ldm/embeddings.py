"""Embeddings (textual inversion, Gal et al., arXiv 2208.01618) as words of a prompt.

The tokenizer gives a name ids beyond its vocabulary, one for each vector, and the text encoder's table of token
embeddings has the vectors as rows at its end. Nothing else changes.
"""

import copy
import re
from collections.abc import Iterable, Mapping
from itertools import groupby

import torch
from torch import Tensor, nn

from .config import TextConfig
from .stable_diffusion import StableDiffusion
from .tokenizer import Tokenizer


def word_pattern(names: Iterable[str]) -> re.Pattern:
    """Finds these names as words of a prompt, in upper or lower case: `name`, or as in ComfyUI `embedding:name`."""
    longest_first = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return re.compile(rf"(?<!\w)(?:embedding:)?({longest_first})(?!\w)", re.IGNORECASE)


class EmbeddingTokenizer(Tokenizer):
    """A tokenizer that also knows embeddings, by name: how many vectors each has."""

    def __init__(self, config: TextConfig, sizes: Mapping[str, int]):
        super().__init__(config)
        self.names = word_pattern(sizes)
        self.ids_of, following = {}, config.vocabulary
        for name, size in sizes.items():
            self.ids_of[name.lower()] = list(range(following, following + size))
            following += size
        self.inner = frozenset(i for ids in self.ids_of.values() for i in ids[1:])
        self.name_of = {i: name for name, ids in self.ids_of.items() for i in ids}

    def encode(self, text: str) -> list[int]:
        """Text between the names is tokenised as usual."""
        ids, end = [], 0
        for found in self.names.finditer(text):
            own = self.ids_of.get(found[1].lower())
            if own is None:  # some letters match others, like the Turkish dotless i
                continue
            ids += super().encode(text[end : found.start()]) + own
            end = found.end()
        return ids + super().encode(text[end:])

    def decode(self, ids: list[int]) -> str:
        words = []
        for name, run in groupby(ids, self.name_of.get):
            words.append(name or super().decode(list(run)))
        return " ".join(words)


def with_embeddings(sd: StableDiffusion, embeddings: Mapping[str, Tensor]) -> StableDiffusion:
    """The same model, which knows these vectors (n, D) by name; its networks are shared. Not to be saved."""
    if not embeddings:
        return sd
    table, encoder = sd.text_encoder.token_embedding.weight, copy.copy(sd.text_encoder)
    rows = torch.cat([table, *(vectors.to(table) for vectors in embeddings.values())])
    encoder._modules = {**encoder._modules, "token_embedding": nn.Embedding.from_pretrained(rows)}
    other = sd.with_parts(text_encoder=encoder)
    other.tokenizer = EmbeddingTokenizer(sd.config.text, {name: len(v) for name, v in embeddings.items()})
    return other

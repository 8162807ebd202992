"""CLIP's byte-pair encoding: prompts -> token ids.

A text is cleaned and split into words. A word is a sequence of bytes, the last one marked as the end of the word. A
table that OpenAI learned ranks the pairs of neighbours to merge; what remains when no pair can be merged are the
tokens. Ids: 256 bytes, 256 bytes that end a word, one for each merge, the start token, the end token. (Sennrich et al.,
arXiv 1508.07909, on bytes as in GPT-2; Radford et al., arXiv 2103.00020.)

The published tokenizers clean text with the package ftfy. Reimplemented here is how it normalises characters: curly
quotes, ligatures, full-width letters, control characters, terminal escapes, lone surrogates, NFC. Left out are its
repair of wrongly decoded text ("cafÃ©" stays as it is) and of C1 control characters, and its own list of upper-case
HTML entities.

The two families differ as their published tokenizers do. SD 1.x ("clip") reads `<|startoftext|>` and `<|endoftext|>` in
a prompt as the special tokens, and decodes no HTML entities in a text that contains "<". SD 2.x ("open_clip") treats
special tokens like any other text and always decodes entities.
"""

import gzip
import html
import re
import unicodedata
from functools import cache
from heapq import heapify, heappop, heappush
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from .config import TextConfig

MERGES_FILE = Path(__file__).parent / "data" / "bpe_simple_vocab_16e6.txt.gz"

TERMINAL_ESCAPE = re.compile(r"\x1b\[[0-9;]*[a-zA-Z]")
CONTROL = [*range(0x09), 0x0B, *range(0x0E, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)]
LIGATURES = "ĲĳŉǱǲǳǄǅǆǇǈǉǊǋǌﬀﬁﬂﬃﬄﬆ"
FULL_AND_HALF_WIDTH = "".join(chr(i) for i in range(0xFF01, 0xFFF0))
PLAIN = {ord(c): unicodedata.normalize("NFKC", c) for c in LIGATURES + FULL_AND_HALF_WIDTH}
PLAIN[ord("ﬅ")] = "ſt"  # NFKC has another s
PLAIN.update(dict.fromkeys(CONTROL))  # None removes the character
STRAIGHT_QUOTES = str.maketrans("ʼ‘’‚‛“”„‟", "'''''\"\"\"\"")

# CLIP's pattern is 's|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+ (letters, one numeral, anything else).
# `re` has neither class, but once every numeral stands alone, [^\W_]+ matches either letters or one numeral.
WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[^\W_]+|(?:[^\w\s]|_)+"
SPECIAL = r"<\|startoftext\|>|<\|endoftext\|>"


class Tokenizer:
    """Prompts -> ids for a text encoder with the same `TextConfig`; a small vocabulary has only the first merges."""

    def __init__(self, config: TextConfig):
        self.family, self.positions = config.family, config.positions
        self.start, self.end = config.vocabulary - 2, config.vocabulary - 1
        self.padding = self.end if config.family == "clip" else 0
        merges = config.vocabulary - 514  # the rest are bytes and special tokens
        self.byte_ids, self.values, self.merges = load_merges(merges)
        self.words = re.compile(f"{SPECIAL}|{WORD}" if config.family == "clip" else WORD, re.IGNORECASE)
        self.inner: frozenset[int] = frozenset()  # ids inside an embedding: no chunk of a prompt may begin with one
        self.known = {}  # word -> ids, since prompts repeat words
        if config.family == "clip":
            self.known = {"<|startoftext|>": [self.start], "<|endoftext|>": [self.end]}

    def __call__(self, prompts: list[str]) -> Tensor:
        """Ids (B, positions), int64: start, text, end, padding. A text that is too long is truncated before the end.

        Raises TypeError for a single text, whose letters would be taken for prompts.
        """
        if isinstance(prompts, str):
            raise TypeError(f"prompts is {prompts!r:.80}, expected a list of texts: put it in brackets")
        return torch.tensor([self.framed(self.encode(prompt)[: self.positions - 2]) for prompt in prompts])

    def framed(self, ids: list[int]) -> list[int]:
        """Up to `positions - 2` ids of a text -> `positions` ids: start, text, end, padding."""
        framed = [self.start, *ids, self.end]
        return framed + [self.padding] * (self.positions - len(framed))

    def encode(self, text: str) -> list[int]:
        """The ids of a text of any length, without start and end tokens.

        `decode(encode(text)[positions - 2 :])` is the part that `__call__` cuts off.
        """
        ids = []
        for word in self.words.findall(isolate_numerals(clean(text, self.family))):
            if word not in self.known:
                self.known[word] = self.merge(word)
            ids += self.known[word]
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids: in lower case, words and punctuation separated by one space, without start and end tokens.

        Invalid UTF-8, from a character that was cut in two, becomes U+FFFD.
        """
        return b"".join(self.values[i] for i in ids if i < self.start).decode("utf-8", errors="replace").strip()

    def merge(self, word: str) -> list[int]:
        """One word -> its tokens: the neighbours that rank first in the table are merged until none is in it.

        The heap holds the pairs that can be merged, equal ones from left to right, and some that are gone by now: a
        word as long as a book takes no longer than a text of that length.
        """
        ids: list[int | None] = [self.byte_ids[byte] for byte in word.encode("utf-8")]
        ids[-1] += 256  # the same byte at the end of a word
        left, right = list(range(-1, len(ids))), list(range(1, len(ids) + 1))  # each symbol's neighbours

        def pair_at(i: int) -> int | None:
            """What symbol i and its right neighbour merge to."""
            return self.merges.get((ids[i], ids[right[i]])) if i >= 0 and right[i] < len(ids) else None

        heap = [(merged, i) for i in range(len(ids)) if (merged := pair_at(i)) is not None]
        heapify(heap)
        while heap:
            merged, i = heappop(heap)
            if pair_at(i) != merged:
                continue
            ids[i], ids[right[i]] = merged, None
            right[i] = right[right[i]]
            left[right[i]] = i
            for j in (left[i], i):
                if (new := pair_at(j)) is not None:
                    heappush(heap, (new, j))
        return [symbol for symbol in ids if symbol is not None]


@cache  # read once and shared by all tokenizers, which do not modify it
def load_merges(count: int) -> tuple[dict[int, int], list[bytes], dict[tuple[int, int], int]]:
    """The id of each byte, the bytes of each id (a space ends a word), and the first `count` merges: pair of ids -> id.

    Ids increase with each merge, so they also rank the merges.
    """
    letters = byte_letters()
    values = [bytes([byte]) for byte in letters]
    byte_ids = {byte: i for i, byte in enumerate(letters)}
    values += [value + b" " for value in values]
    ids = {symbol: i for i, symbol in enumerate(byte_symbols())}

    merges = {}
    for left, right in merge_table(count):
        merges[ids[left], ids[right]] = ids[left + right] = len(values)
        values.append(values[ids[left]] + values[ids[right]])
    return byte_ids, values, merges


def byte_letters() -> dict[int, str]:
    """How the table writes each byte, in order of ids: as its Latin-1 character if printable, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


def byte_symbols() -> list[str]:
    """The symbols of the ids below 512, as the table writes them."""
    letters = list(byte_letters().values())
    return letters + [letter + "</w>" for letter in letters]


def merge_table(count: int) -> list[tuple[str, str]]:
    with gzip.open(MERGES_FILE, "rt", encoding="utf-8") as lines:
        return [tuple(line.split()) for line in islice(lines, 1, 1 + count)]  # the first line is a header


def clean(text: str, family: str) -> str:
    """The text as CLIP was trained on it: normalised characters, lower case, one space between words."""
    if family == "open_clip" or "<" not in text:
        text = html.unescape(html.unescape(text))
    text = TERMINAL_ESCAPE.sub("", text).translate(PLAIN).translate(STRAIGHT_QUOTES)
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # a lone surrogate becomes U+FFFD
    return " ".join(unicodedata.normalize("NFC", text).split()).lower()


def isolate_numerals(text: str) -> str:
    """Puts spaces around every character of Unicode's category N, so that each is a word of its own."""
    return "".join(f" {c} " if unicodedata.category(c).startswith("N") else c for c in text)

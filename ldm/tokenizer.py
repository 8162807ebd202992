"""CLIP's byte-pair encoding: prompts -> token ids.

A text is cleaned and split into words. A word is a row of bytes, the last one marked as the end of the word; a table,
learnt once by OpenAI, says which two neighbours to merge first, and what cannot be merged any further are the tokens.
Ids: 256 bytes, 256 bytes that end a word, one a merge, the start token, the end token. (Sennrich et al., arXiv
1508.07909, on bytes as in GPT-2; Radford et al., arXiv 2103.00020.)

The published tokenizers clean a text with the package ftfy. What it does to the form of characters is restated here:
curly quotes, ligatures, full-width letters, control characters, terminal escapes, lone surrogates, NFC. Left out is its
repair of text that was once decoded wrongly ("cafÃ©" stays as it is), of C1 control characters, and its own list of
upper-case HTML entities.

The families differ in two small points, as their published tokenizers do. SD 1.x ("clip") takes `<|startoftext|>` and
`<|endoftext|>` typed in a prompt for the special tokens and leaves HTML entities alone in a text with a "<"; SD 2.x
("open_clip") spells special tokens out like any text and always decodes entities.
"""

import gzip
import html
import math
import re
import unicodedata
from functools import cache
from itertools import islice, pairwise
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
PLAIN.update(dict.fromkeys(CONTROL))  # None removes the character
STRAIGHT_QUOTES = str.maketrans("ʼ‘’‚‛“”„‟", "'''''\"\"\"\"")

# CLIP's pattern is 's|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+ (letters, one numeral, anything else).
# `re` knows neither class, but once every numeral stands alone, [^\W_]+ is letters or one numeral.
WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[^\W_]+|(?:[^\w\s]|_)+"
SPECIAL = r"<\|startoftext\|>|<\|endoftext\|>"


class Tokenizer:
    """Prompts -> ids for a text encoder of the same `TextConfig`; a small vocabulary uses the table's first merges.

    Raises ValueError for a vocabulary too small to hold the bytes and the two special tokens.
    """

    def __init__(self, config: TextConfig):
        if config.vocabulary < 514:
            raise ValueError(f"A vocabulary of {config.vocabulary} is too small: the bytes and special tokens are 514.")
        self.family, self.positions = config.family, config.positions
        self.start, self.end = config.vocabulary - 2, config.vocabulary - 1
        self.padding = self.end if config.family == "clip" else 0
        self.byte_ids, self.values, self.merges = load_merges(config.vocabulary - 514)
        self.words = re.compile(f"{SPECIAL}|{WORD}" if config.family == "clip" else WORD, re.IGNORECASE)
        self.known = {}  # word -> ids: prompts repeat their words
        if config.family == "clip":
            self.known = {"<|startoftext|>": [self.start], "<|endoftext|>": [self.end]}

    def __call__(self, prompts: list[str]) -> Tensor:
        """Ids (B, positions), int64: start, text, end, padding; a text that is too long is cut and closed with end."""
        return torch.tensor([self.framed(self.encode(prompt)[: self.positions - 2]) for prompt in prompts])

    def framed(self, ids: list[int]) -> list[int]:
        """At most `positions` - 2 ids of a text -> `positions` ids: start, text, end, padding."""
        framed = [self.start, *ids, self.end]
        return framed + [self.padding] * (self.positions - len(framed))

    def encode(self, text: str) -> list[int]:
        """The ids of a text of any length, without start and end token.

        What `__call__` cuts off is `decode(encode(text)[positions - 2 :])`.
        """
        ids = []
        for word in self.words.findall(isolate_numerals(clean(text, self.family))):
            if word not in self.known:
                self.known[word] = self.merge(word)
            ids += self.known[word]
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids, in lower case, words (and punctuation) apart by one space; start and end token say nothing.

        Bytes that are no UTF-8, from a character that was cut in two, become U+FFFD.
        """
        return b"".join(self.values[i] for i in ids if i < self.start).decode("utf-8", errors="replace").strip()

    def merge(self, word: str) -> list[int]:
        """One word -> its tokens: the pair of neighbours that stands first in the table is merged, again and again."""
        ids = [self.byte_ids[byte] for byte in word.encode("utf-8")]
        ids[-1] += 256  # the same byte at the end of a word
        while len(ids) > 1:
            pair = min(pairwise(ids), key=lambda pair: self.merges.get(pair, math.inf))
            if pair not in self.merges:
                break
            merged = []
            for symbol in ids:  # every such pair, from left to right
                if merged and (merged[-1], symbol) == pair:
                    merged[-1] = self.merges[pair]
                else:
                    merged.append(symbol)
            ids = merged
        return ids


@cache  # read once, and shared by all tokenizers: none changes it
def load_merges(count: int) -> tuple[dict[int, int], list[bytes], dict[tuple[int, int], int]]:
    """The id of each byte, the bytes of each id (a space ends a word), and the first `count` merges: pair of ids -> id.

    An earlier merge has a lower id, so the ids are also the order in which merges are tried.
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
    """How the table writes each byte, in the order of their ids: a printable one as the Latin-1 character, any other as
    a character from U+0100 on."""
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
    """The text in the form that CLIP was trained on: plain characters, lower case, one space between words."""
    if family == "open_clip" or "<" not in text:
        text = html.unescape(html.unescape(text))
    text = TERMINAL_ESCAPE.sub("", text).translate(PLAIN).translate(STRAIGHT_QUOTES)
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # a lone surrogate becomes U+FFFD
    return " ".join(unicodedata.normalize("NFC", text).split()).lower()


def isolate_numerals(text: str) -> str:
    """A space on both sides of every character of Unicode's category N: each is a word of its own."""
    return "".join(f" {c} " if unicodedata.category(c).startswith("N") else c for c in text)

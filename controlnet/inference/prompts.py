"""Prompts as they are typed in A1111's web UI -> the context of the UNet's cross-attention.

    (word)        1.1 times as much attention; ((word)) 1.21 times
    [word]        1 / 1.1 times
    (word:1.3)    1.3 times; any of them around several words, and inside each other
    \\( \\) \\[ \\]   the bracket itself; \\\\ is one backslash, and any other backslash is left out
    BREAK         the rest begins a new chunk of 75 tokens
    <lora:ink:0.8>   left out: the LoRA is merged when the base is loaded

A text encoder reads 77 tokens at once: start, 75 of the prompt, end. These are a chunk, and the contexts of several
chunks follow each other. A bracket that is never closed ends with the prompt; one that was never opened is text.

Shapes: B prompts, M tokens (77 a chunk), D context width.
"""

import math
import re
from dataclasses import dataclass
from itertools import groupby

import torch
from einops import rearrange
from torch import Tensor

from ldm.stable_diffusion import StableDiffusion
from ldm.tokenizer import Tokenizer

LORA_TAG = re.compile(r"<(?:lora|lyco):([^<>:]*+):?([^<>]*+)>", re.IGNORECASE)
# What A1111's web UI takes for instructions to change, mix or draw prompts, and we for words.
NOT_READ = re.compile(
    r"""(?<!\\)\[ [^\[\]]* : \s*+ [\d.]++ \s*+ \]  # [from:to:0.5]
    | (?<!\\)\[ [^\[\]|]*+ \| [^\[\]]*+ \]         # [one|other]
    | \{ [^{}|]*+ \| [^{}]*+ \}                    # {one|other}
    | \bAND\b""",
    re.VERBOSE,
)
CLOSES = {")": ("(", 1.1), "]": ("[", 1 / 1.1)}  # and what the weights between the two are multiplied by

# A prompt may come from anyone's file: these limits keep the time that it takes within seconds.
MAX_LENGTH = 50_000  # characters
MAX_DEPTH = 100  # brackets inside each other
MAX_CHUNKS = 32

# `++`, `*+` and the run of spaces as one piece: nothing is read twice, whatever follows.
SYNTAX = re.compile(
    r"""\\(?P<escaped>[()\[\]\\]?)
    | :\s*+(?P<weight>[+-]?(?:\d++\.?\d*+|\.\d++))\s*+\)     # the end of (word:1.3)
    | (?P<bracket>[()\[\]])
    | \s*+\b(?P<new_chunk>BREAK)\b\s*
    | (?P<text>[^\\()\[\]:B\s]+ | \s+ | .)                # up to what could begin one of the above""",
    re.VERBOSE | re.DOTALL,
)


@dataclass
class Piece:
    text: str
    weight: float = 1.0


def parse(prompt: str) -> list[list[Piece]]:
    """A prompt -> its parts between BREAKs, each as pieces of text that differ in weight from the next.

    Raises ValueError for too many characters or brackets.
    """
    if len(prompt) > MAX_LENGTH:
        raise ValueError(f"a prompt has {len(prompt)} characters, expected at most {MAX_LENGTH}: shorten it")
    pieces: list[Piece | None] = []  # None is a BREAK
    opened = {"(": [], "[": []}  # where, by number of pieces

    def close(bracket: str, factor: float) -> None:
        for piece in pieces[opened[bracket].pop() :]:
            if piece is not None:
                piece.weight *= factor

    for found in SYNTAX.finditer(LORA_TAG.sub("", prompt)):
        kind, value = found.lastgroup, found[found.lastgroup]
        if kind == "new_chunk":
            pieces.append(None)
        elif kind == "bracket" and value in opened:
            opened[value].append(len(pieces))
            if len(opened[value]) > MAX_DEPTH:
                raise ValueError(f"a prompt has more than {MAX_DEPTH} brackets inside each other: close or remove some")
        elif kind == "weight" and opened["("]:
            close("(", float(value))
        elif kind == "bracket" and opened[CLOSES[value][0]]:
            close(*CLOSES[value])
        else:
            pieces.append(Piece(value if kind == "escaped" else found[0]))
    for bracket, factor in CLOSES.values():
        while opened[bracket]:
            close(bracket, factor)
    return joined(pieces)


def joined(pieces: list[Piece | None]) -> list[list[Piece]]:
    parts: list[list[Piece]] = [[]]
    for weight, group in groupby(pieces, lambda piece: piece and piece.weight):
        if weight is None:
            parts += [[] for _ in group]
        else:
            parts[-1].append(Piece("".join(piece.text for piece in group), weight))
    return parts


def lora_tags(prompt: str) -> list[tuple[str, float]]:
    """The LoRAs that a prompt names, with their strengths (default: 1). Raises ValueError for what is not a number."""
    tags = []
    for found in LORA_TAG.finditer(prompt):
        try:
            strength = float(found[2] or 1)
        except ValueError:
            strength = math.nan
        if not math.isfinite(strength):
            raise ValueError(
                f'"{found[0]:.200}" in the prompt has no finite strength, expected one as in <lora:ink:0.8>'
            )
        tags.append((found[1].strip(), strength))
    return tags


# ---------------------------------------------------------------------------------------------------- tokens


# Each token's id and how much it counts, without start and end token.
Tokens = list[tuple[int, float]]


def tokens_of(tokenizer: Tokenizer, prompt: str) -> list[Tokens]:
    """Of each part between BREAKs, of any length."""
    return [
        [(token, piece.weight) for piece in pieces for token in tokenizer.encode(piece.text)]
        for pieces in parse(prompt)
    ]


def chunks_of(tokenizer: Tokenizer, prompt: str, long: bool) -> list[Tokens]:
    """Chunks of at most 75 tokens. A longer part is cut after its first chunk or, with `long`, goes on in the next one,
    even in the middle of a word or a sentence (whose end A1111 moves to the next chunk), but never of an embedding.

    Raises ValueError for more chunks than `MAX_CHUNKS`, and as `parse` does.
    """
    chunks = []
    for tokens in tokens_of(tokenizer, prompt):
        start, more = 0, True
        while more:
            end = end_of_chunk(tokenizer, tokens, start)
            chunks.append(tokens[start:end])
            start, more = end, long and end < len(tokens)
    if len(chunks) > MAX_CHUNKS:
        length = tokenizer.positions - 2
        raise ValueError(
            f"a prompt has {len(chunks)} chunks of {length} tokens, expected at most {MAX_CHUNKS}: shorten it"
        )
    return chunks


def end_of_chunk(tokenizer: Tokenizer, tokens: Tokens, start: int = 0) -> int:
    """Where the chunk that begins at `start` ends: never within an embedding, all of which fit into a chunk."""
    end = start + tokenizer.positions - 2
    while start < end < len(tokens) and tokens[end][0] in tokenizer.inner:
        end -= 1
    return end


def cut_texts(tokenizer: Tokenizer, prompt: str) -> list[str]:
    """What is cut from a prompt that is not read as a long one: the ends of its parts that have too many tokens."""
    ends = [tokens[end_of_chunk(tokenizer, tokens) :] for tokens in tokens_of(tokenizer, prompt)]
    return [tokenizer.decode([token for token, _ in end]) for end in ends if end]


# ---------------------------------------------------------------------------------------------------- contexts


def encode_prompts(sd: StableDiffusion, prompts: list[str], clip_skip: int = 1, long: bool = False) -> Tensor:
    """B prompts -> contexts (B, M, D), M = 77 times the chunks of the longest; others are padded with empty chunks.

    `clip_skip` 1 is the layer that the published model reads, 2 the one before it. Raises ValueError for a layer that
    does not exist, for weights beyond fp32, and for a LoRA that was not merged into `sd`.
    """
    for name, _ in {tag for prompt in prompts for tag in lora_tags(prompt)}:
        if name not in sd.loras:
            raise ValueError(
                f'a prompt names the LoRA "{name}", which is not in this base: StableDiffusion.load(..., '
                f'loras=["{name}:0.8"]) merges it, or leave it out'
            )
    chunks = [chunks_of(sd.tokenizer, prompt, long) for prompt in prompts]
    count = max(map(len, chunks))
    rows = [encode_chunks(sd, each + [[]] * (count - len(each)), clip_skip) for each in chunks]
    return torch.stack([rearrange(row, "chunks m d -> (chunks m) d") for row in rows])


def encode_chunks(sd: StableDiffusion, chunks: list[Tokens], clip_skip: int) -> Tensor:
    """(chunks, 77, D). Weights multiply a token's context, and then the chunk is scaled to have its old mean again, as
    in A1111's default ("Original" emphasis, though there all prompts of a batch have one mean)."""
    ids = torch.tensor([sd.tokenizer.framed([token for token, _ in tokens]) for tokens in chunks])
    contexts = sd.text_encoder(ids.to(sd.text_encoder.token_embedding.weight.device), clip_skip)
    return torch.stack(
        [weighted(z, [weight for _, weight in tokens]) for z, tokens in zip(contexts, chunks, strict=True)]
    )


def weighted(context: Tensor, weights: list[float]) -> Tensor:
    """A chunk's context (77, D) with weights for the tokens after the start token."""
    if all(weight == 1 for weight in weights):
        return context
    factors = torch.ones(len(context), 1)
    factors[1 : 1 + len(weights), 0] = torch.tensor(weights)
    plain = context.float()
    result = plain * factors.to(context.device)
    if plain.isfinite().all() and not result.isfinite().all():
        raise ValueError(f"a weight in the prompt is {max(weights, key=abs):g}, which is too large: take one near 1")
    # The mean of a released text encoder's output is a tenth of its standard deviation. A small encoder's can be close
    # to zero, where the ratio of two means is arbitrary.
    if plain.mean().abs() > 0.02 * plain.std():
        result = result * (plain.mean() / result.mean())
    return result.to(context.dtype)

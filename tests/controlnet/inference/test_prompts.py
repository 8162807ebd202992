"""Prompts as typed: brackets, weights, BREAK, chunks, what is cut, and the contexts they give."""

import json
import time
from contextlib import suppress

import pytest
import torch
from einops import rearrange
from minis import filled, relative, stored
from reference import FIXTURES, MINI_SD1
from small import small_sd

from controlnet.inference.prompts import SYNTAX, chunks_of, cut_texts, encode_prompts, lora_tags, parse
from ldm.checkpoints.key_maps import text_map
from ldm.config import SD15, SD21
from ldm.embeddings import EmbeddingTokenizer
from ldm.text_encoder import TextEncoder
from ldm.tokenizer import Tokenizer


def read(prompt):
    return [[(piece.text, pytest.approx(piece.weight)) for piece in part] for part in parse(prompt)]


@pytest.mark.parametrize(
    "prompt, want",
    [
        ("", [[]]),
        ("a red circle", [[("a red circle", 1)]]),
        ("a (red) circle", [[("a ", 1), ("red", 1.1), (" circle", 1)]]),
        ("a ((red)) [circle]", [[("a ", 1), ("red", 1.21), (" ", 1), ("circle", 1 / 1.1)]]),
        ("(red:1.3)", [[("red", 1.3)]]),
        ("(red: .5 )(blue:+2)(green:-1)", [[("red", 0.5), ("blue", 2), ("green", -1)]]),
        ("(a (red:1.5) circle:2)", [[("a ", 2), ("red", 3), (" circle", 2)]]),
        ("[(a)]", [[("a", 1)]]),
        (r"smile \(:3\) \[x\] a\\b", [[(r"smile (:3) [x] a\b", 1)]]),
        (r"a\n (b\c:2)" + "\\", [[("an ", 1), ("bc", 2), ("", 1)]]),
        ("a) b] c:1.2) d", [[("a) b] c:1.2) d", 1)]]),  # never opened
        ("(a [b", [[("a ", 1.1), ("b", 1)]]),  # never closed
        ("(a:b) 10:30", [[("a:b", 1.1), (" 10:30", 1)]]),
        ("a BREAK b", [[("a", 1)], [("b", 1)]]),
        ("(a BREAK b:2) BREAKFAST break", [[("a", 2)], [("b", 2), (" BREAKFAST break", 1)]]),
        ("BREAK BREAK", [[], [], []]),
        ("a <lora:ink:0.8>bird, <LORA:oil> <lyco:a b:-1>(x<lora:pen:1>:2)", [[("a bird,  ", 1), ("x", 2)]]),
        ("a <lora:ink <lora> <b:1>", [[("a <lora:ink <lora> <b:1>", 1)]]),  # no tags
        ("größe, Bär\nB (大:1.2)", [[("größe, Bär\nB ", 1), ("大", 1.2)]]),
    ],
)
def test_what_is_typed_is_read_as_in_a1111(prompt, want):
    assert read(prompt) == want


def ids_of(tokenizer, prompt, long=False):
    return [[token for token, _ in chunk] for chunk in chunks_of(tokenizer, prompt, long)]


@pytest.mark.parametrize("config", [SD15, SD21], ids=lambda config: config.name)
def test_a_plain_prompt_has_the_tokenizers_ids(config):
    tokenizer = Tokenizer(config.text)
    for prompt in ["", "a red circle", "a " * 100 + "castle"]:
        (ids,) = ids_of(tokenizer, prompt)
        assert tokenizer.framed(ids) == tokenizer([prompt])[0].tolist()


def test_weights_stand_with_the_tokens_of_their_words():
    (chunk,) = chunks_of(Tokenizer(SD15.text), "a (photograph of:1.5) uncommonness [now]", long=False)
    ids, weights = zip(*chunk, strict=True)
    assert list(ids) == Tokenizer(SD15.text).encode("a photograph of uncommonness now")
    assert weights == pytest.approx([1, 1.5, 1.5, *[1] * (len(ids) - 4), 1 / 1.1])


def test_long_prompts_go_on_in_chunks_and_others_are_cut_and_said():
    tokenizer = Tokenizer(SD15.text)
    words = ["red", "blue"] * 80
    ids = tokenizer.encode(" ".join(words))
    assert ids_of(tokenizer, " ".join(words), long=True) == [ids[:75], ids[75:150], ids[150:]]
    assert ids_of(tokenizer, " ".join(words)) == [ids[:75]]
    assert cut_texts(tokenizer, " ".join(words)) == [" ".join(words[75:])]
    assert cut_texts(tokenizer, " ".join(words[:75])) == []
    parted = f"(red BREAK {'a ' * 75} castle) BREAK"
    assert [len(part) for part in ids_of(tokenizer, parted)] == [1, 75, 0]
    assert [len(part) for part in ids_of(tokenizer, parted, long=True)] == [1, 75, 1, 0]
    assert cut_texts(tokenizer, parted) == ["castle"]


@pytest.mark.parametrize(
    "prompt",
    [
        " " * 20_000,
        " \t\n" * 5_000 + "BREAKFAST",
        "a" * 20_000,
        "".join(chr(97 + i * i % 26) for i in range(20_000)),
        ":" + "1" * 20_000,
        ":1." * 5_000,
        ": " * 10_000,
        ":" + " " * 20_000 + "1" + " " * 4_500,
        "B" * 20_000,
        "\\" * 20_000,
        ("(" * 99 + "a " + ")" * 99) * 100,
        "e" + "\u0301\u0323" * 5_000,
    ],
    ids=lambda prompt: ascii(prompt[:8]),
)
def test_any_prompt_is_read_within_a_second(prompt):
    """Of the processor's time. What takes four times as long for twice the text would take many."""
    begun = time.process_time()
    with suppress(ValueError):  # for its number of chunks
        chunks_of(Tokenizer(SD15.text), prompt, long=True)
    cut_texts(Tokenizer(SD15.text), prompt)
    assert time.process_time() - begun < 1.25


def test_spaces_are_read_once():
    assert len(list(SYNTAX.finditer(" " * 1000))) == 1


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("BREAK " * 5000, "a prompt has 5001 chunks of 75 tokens, expected at most 32: shorten it"),
        ("a " * 2401, "a prompt has 33 chunks of 75 tokens"),
        ("(" * 10_000, "a prompt has more than 100 brackets inside each other"),
        ("[" * 10_000 + "]" * 10_000, "a prompt has more than 100 brackets inside each other"),
        ("a" * 50_001, "a prompt has 50001 characters, expected at most 50000: shorten it"),
    ],
    ids=lambda text: text[:8],
)
def test_a_prompt_without_end_is_refused(prompt, message):
    with pytest.raises(ValueError, match=message):
        chunks_of(Tokenizer(SD15.text), prompt, long=True)


def test_loras_of_a_prompt():
    assert lora_tags("a <lora:ink:0.8> b <lyco:oil> <lora: my pen :-1e-1>") == [
        ("ink", 0.8),
        ("oil", 1),
        ("my pen", -0.1),
    ]
    for tag in ("<lora:ink:x>", "<lora:ink:nan>", "<lora:ink:1:0.5>"):
        with pytest.raises(ValueError, match="in the prompt has no finite strength"):
            lora_tags(f"a {tag}")


def test_an_embedding_is_not_cut_in_two():
    tokenizer = EmbeddingTokenizer(SD15.text, {"calm": 5, "long": 75})
    calm, long = tokenizer.ids_of.values()
    (a,) = tokenizer.encode("a")
    prompt = "a " * 72 + "(calm:1.5) long a"
    assert ids_of(tokenizer, prompt, long=True) == [[a] * 72, calm, long, [a]]
    assert ids_of(tokenizer, "a " * 70 + "calm calm", long=True) == [[a] * 70 + calm, calm]
    (chunk,) = chunks_of(tokenizer, "(calm:1.5) a", long=False)
    assert chunk == [*((token, 1.5) for token in calm), (a, 1)]
    assert ids_of(tokenizer, prompt) == [[a] * 72]
    assert cut_texts(tokenizer, prompt) == ["calm long a"]


def test_a_lora_that_the_base_lacks_is_not_ignored():
    sd = small_sd()
    with pytest.raises(ValueError, match='a prompt names the LoRA "ink", which is not in this base'):
        encode_prompts(sd, ["a", "a <lora:ink:0.8>"])
    sd.loras = ("ink",)
    assert torch.equal(encode_prompts(sd, ["a <lora:ink:0.8>"]), encode_prompts(sd, ["a"]))


# ------------------------------------------------------------------------------------------------------------ contexts


class TextOnly:
    """What `encode_prompts` needs of a base, with the miniature's text encoder."""

    def __init__(self):
        self.tokenizer = Tokenizer(MINI_SD1.text)
        encoder = TextEncoder(MINI_SD1.text)
        self.text_encoder = filled(encoder, text_map(encoder.config)).requires_grad_(False)


@pytest.mark.parametrize("clip_skip, key", [(1, "last"), (2, "clip_skip_2")])
def test_a_long_prompt_has_the_published_context(clip_skip, key):
    """Filled up with empty chunks to the three of the longest."""
    texts = json.loads((FIXTURES / "tokens.json").read_text())["prompts"]
    want = stored("sd1_longtext")
    found = encode_prompts(TextOnly(), [texts[4], texts[30], "a " * 160], clip_skip, long=True)
    assert found.shape == (3, 231, 64)
    for context, name in zip(found, ("short", "long"), strict=False):
        assert relative(context[None], want[f"{name}/context_{key}"]) < 2e-5


@pytest.fixture(scope="module")
def sd():
    return small_sd()


def test_a_plain_prompt_has_the_models_own_context(sd):
    for prompt in ("", "a circle", r"a \(circle\)"):
        assert torch.equal(encode_prompts(sd, [prompt]), sd.encode_text([prompt.replace("\\", "")]))


def test_a_weight_multiplies_its_tokens_and_keeps_the_chunks_mean():
    model = TextOnly()
    model.text_encoder.final_norm.bias += 0.1  # a mean as the released models have it
    plain = model.text_encoder(model.tokenizer(["a red circle"]))[0]
    factors = torch.ones(77, 1)
    factors[2] = 1.4  # after start and "a"
    want = plain * factors * plain.mean() / (plain * factors).mean()
    (got,) = encode_prompts(model, ["a (red:1.4) circle"])
    torch.testing.assert_close(got, want)
    assert relative(got, plain) > 1e-2 and relative(got, plain * factors) > 1e-4


def test_a_mean_of_nothing_is_not_brought_back(sd):
    """The small text encoder's last norm leaves none."""
    plain, factors = sd.encode_text(["circle"])[0], torch.ones(77, 1)
    factors[1 : 1 + len(sd.tokenizer.encode("circle"))] = 1.4
    torch.testing.assert_close(encode_prompts(sd, ["(circle:1.4)"])[0], plain * factors)


def test_each_chunk_is_weighted_on_its_own():
    """As if the others were not there."""
    (both,) = encode_prompts(TextOnly(), ["a (red:1.4) BREAK [circle]"])
    halves = [encode_prompts(TextOnly(), [text])[0] for text in ("a (red:1.4)", "[circle]")]
    torch.testing.assert_close(both, torch.cat(halves))


def test_prompts_of_several_chunks_fill_the_others_up_with_empty_ones(sd):
    contexts = encode_prompts(sd, ["a BREAK b", "c"])
    assert contexts.shape == (2, 154, 16)
    torch.testing.assert_close(contexts[1], rearrange(sd.encode_text(["c", ""]), "chunks m d -> (chunks m) d"))


def test_a_layer_that_does_not_exist_is_refused(sd):
    with pytest.raises(ValueError, match="clip_skip is 2"):
        encode_prompts(sd, ["a"], clip_skip=2)

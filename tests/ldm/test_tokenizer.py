"""The tokenizer against the ids of the published ones, and on vocabularies that nobody published."""

import json
import random
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from ldm.config import TextConfig
from ldm.tokenizer import Tokenizer, clean, isolate_numerals

PUBLISHED = json.loads((Path(__file__).parents[1] / "fixtures" / "tokens.json").read_text())
MOJIBAKE = ["cafÃ© mojibake", "schÃ¶n mojibake 2"]  # which the published tokenizers repair and ours leaves as they are
CLIP, OPEN_CLIP = Tokenizer(TextConfig("clip")), Tokenizer(TextConfig("open_clip"))
SMALL = Tokenizer(TextConfig("clip", vocabulary=2048))


@pytest.mark.parametrize("tokenizer, key", [(CLIP, "sd1_ids"), (OPEN_CLIP, "sd2_ids")])
def test_ids_are_the_published_ones(tokenizer, key):
    ids = tokenizer(PUBLISHED["prompts"])
    assert ids.dtype == torch.int64 and ids.shape == (66, 77)
    prompts = zip(PUBLISHED["prompts"], ids.tolist(), PUBLISHED[key], strict=True)
    assert [prompt for prompt, got, want in prompts if got != want] == MOJIBAKE


def test_raw_ids_are_the_published_ones_at_any_length():
    prompts = zip(PUBLISHED["prompts"], PUBLISHED["raw_ids"], strict=True)
    assert [prompt for prompt, want in prompts if OPEN_CLIP.encode(prompt) != want] == MOJIBAKE


def test_a_row_is_start_text_end_and_padding():
    text = CLIP.encode("a photo of a cat")
    assert text == OPEN_CLIP.encode("a photo of a cat") and len(text) == 5
    assert CLIP(["a photo of a cat"]).tolist() == [[49406, *text, 49407] + [49407] * 70]
    assert OPEN_CLIP(["a photo of a cat"]).tolist() == [[49406, *text, 49407] + [0] * 70]
    assert OPEN_CLIP(["", "x"])[0].tolist() == [49406, 49407] + [0] * 75


@pytest.mark.parametrize("tokenizer", [CLIP, OPEN_CLIP, SMALL])
def test_a_long_prompt_is_cut_and_closed_with_the_end_token(tokenizer):
    text = [f"word {i} and" for i in range(40)]
    for length in (74, 75, 76, 200):
        prompt = " ".join(["a"] * length)
        row = tokenizer([prompt])[0].tolist()
        assert row[0] == tokenizer.start
        assert row[1:76] == (tokenizer.encode(prompt) + [tokenizer.end] * 75)[:75]
        assert row[76] == (tokenizer.end if length >= 75 else tokenizer.padding)
    prompt = " ".join(text)
    cut = tokenizer.decode(tokenizer.encode(prompt)[75:])
    kept = tokenizer.decode(tokenizer([prompt])[0].tolist())
    assert cut and "".join(f"{kept}{cut}".split()) == "".join(prompt.split())


@pytest.mark.parametrize("family", ["clip", "open_clip"])
@pytest.mark.parametrize("vocabulary", [514, 600, 2048, 8192])
def test_a_small_vocabulary_spells_the_same_text_in_more_tokens(family, vocabulary):
    tokenizer = Tokenizer(TextConfig(family, vocabulary=vocabulary))
    assert (tokenizer.start, tokenizer.end) == (vocabulary - 2, vocabulary - 1)
    assert len(tokenizer.values) == tokenizer.start  # every other id has a text
    for text in ("a light goldenrod yellow circle on a cornflower blue background", "zwölf boxkämpfer , 猫 🐱", ""):
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.start for i in ids)
        assert len(ids) >= len(CLIP.encode(text))
        assert tokenizer.decode(ids) == text
    assert tokenizer(["a red circle"]).max() == tokenizer.end


def test_without_merges_a_word_is_its_bytes():
    ids = Tokenizer(TextConfig(vocabulary=514)).encode("ab é")
    assert ids == [64, 256 + 65, 127, 256 + 102]  # "a" is 64: ids start at "!"; "é" is the bytes C3 A9


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match="a vocabulary of 513"):
        TextConfig(vocabulary=513)


def test_decode_gives_the_words_and_skips_special_tokens():
    assert CLIP.decode(CLIP(["A Photo, of a CAT!!!"])[0].tolist()) == "a photo , of a cat !!!"
    assert CLIP.decode(CLIP.encode("猫")[:1]) == "\ufffd"  # half a character


def test_words():
    def words(text):
        return OPEN_CLIP.words.findall(isolate_numerals(text))

    assert words("it's rock'n'roll, they're") == ["it", "'s", "rock", "'", "n", "'", "roll", ",", "they", "'re"]
    assert words("x2 4k snake_case _a_!_ a--b") == [
        "x",
        "2",
        "4",
        "k",
        "snake",
        "_",
        "case",
        "_",
        "a",
        "_!_",
        "a",
        "--",
        "b",
    ]
    assert words("½²Ⅷ٣一三") == ["½", "²", "Ⅷ", "٣", "一三"]  # numerals of all kinds; the last two are letters


def test_every_character_is_a_letter_a_numeral_a_space_or_the_rest():
    """`re` on isolated numerals draws the borders of Unicode's categories L and N, for every character there is."""
    for i in range(0x110000):
        character = chr(i)
        category = unicodedata.category(character)[0]
        if category == "C" or character.isspace():
            continue
        # Between two letters: a letter makes one word with them, everything else stands alone.
        want = [f"a{character}b"] if category == "L" else ["a", character, "b"]
        assert OPEN_CLIP.words.findall(isolate_numerals(f"a{character}b")) == want, hex(i)


@pytest.mark.parametrize(
    "text, cleaned",
    [
        ("  Two\tWORDS \n", "two words"),
        ("“it’s” ‚so‛ ŉ", "\"it's\" 'so' 'n"),
        ("ﬁ Ǆ ĳ ﬅ ﬆ", "fi dž ij ſt st"),
        ("ＦＵＬＬ　ｗｉｄｔｈ ｶﾞ", "full width ガ"),
        ("e\u0301", "é"),
        ("\x1b[1;31mred\x1b[0m \x07 zero\ufeffwidth\x00", "red zerowidth"),
        ("tom &amp;amp; jerry", "tom & jerry"),
        ("lone \ud83d, pair \ud83d\ude00", "lone \ufffd, pair 😀"),
    ],
)
def test_cleaning(text, cleaned):
    assert clean(text, "clip") == clean(text, "open_clip") == cleaned


def test_where_the_families_differ():
    typed = "<|StartOfText|> hello <|endoftext|>"
    assert CLIP.encode(typed) == [49406, *CLIP.encode("hello"), 49407]
    assert OPEN_CLIP.decode(OPEN_CLIP.encode(typed)) == "<| startoftext |> hello <| endoftext |>"
    assert clean("<b> &amp; c", "clip") == "<b> &amp; c"
    assert clean("<b> &amp; c", "open_clip") == "<b> & c"


def test_a_word_has_the_same_ids_the_second_time():
    tokenizer = Tokenizer(TextConfig())
    assert tokenizer.encode("photo photo") == tokenizer.encode("photo") * 2 == CLIP.encode("photo") * 2


def test_pairs_are_merged_one_after_the_other_in_the_order_of_the_table():
    """By the definition, on words of few letters, where the same pairs overlap and return."""

    def merged(tokenizer, word):
        ids = [tokenizer.byte_ids[byte] for byte in word.encode()]
        ids[-1] += 256
        while pairs := [pair for pair in pairwise(ids) if pair in tokenizer.merges]:
            pair, left = min(pairs, key=tokenizer.merges.get), ids
            ids = []
            for symbol in left:
                if ids and (ids[-1], symbol) == pair:
                    ids[-1] = tokenizer.merges[pair]
                else:
                    ids.append(symbol)
        return ids

    draw = random.Random(0)
    for letters in ("ab", "aeinrst", "th", "!?.", "äö大小", "abcdefghijklmnopqrstuvwxyz"):
        for _ in range(300):
            word = "".join(draw.choices(letters, k=draw.choice([1, 2, 3, 5, 9, 30])))
            for tokenizer in (CLIP, SMALL):
                assert tokenizer.merge(word) == merged(tokenizer, word), word


def test_the_letters_of_a_text_are_no_prompts():
    with pytest.raises(TypeError, match="prompts is 'a bird', expected a list of texts"):
        SMALL("a bird")

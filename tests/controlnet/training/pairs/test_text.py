"""Text is UTF-8, or UTF-16 that says so; another encoding is named, never guessed at."""

import pytest

from controlnet.training.pairs.text import decoded, lines_of

RUSSIAN, CHINESE, KOREAN = "красный круг на синем фоне", "红色的圆形，蓝色的背景", "파란 배경에 빨간 원"
JAPANESE, FRENCH, GERMAN = "青い背景に赤い円", "un café près de la fenêtre, à côté", "größer und schöner, Käse"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_what_says_how_it_is_encoded_is_read(encoding):
    assert decoded(CHINESE.encode(encoding), "x.txt") == CHINESE


@pytest.mark.parametrize(
    "text, encoding, name",
    [
        (FRENCH, "latin-1", "Latin-1"),
        (GERMAN, "cp1252", "Latin-1"),
        (RUSSIAN, "cp1251", "Windows-1251"),
        (CHINESE, "gbk", "GBK"),
        (CHINESE.replace("红", "紅").replace("圆", "圓").replace("蓝", "藍").replace("颜", "顏"), "big5", "Big5"),
        (KOREAN, "euc_kr", "EUC-KR"),
        (JAPANESE, "shift_jis", "Shift-JIS"),
        ("a red circle", "utf-16-le", "UTF-16 without its mark"),
        (FRENCH, "utf-16-be", "UTF-16 without its mark"),
    ],
)
def test_another_encoding_is_named(text, encoding, name):
    with pytest.raises(ValueError, match=f'"x.txt" is not UTF-8, it looks like {name}.*: save it as UTF-8'):
        decoded(text.encode(encoding), "x.txt")


def test_what_is_cut_off_is_said_to_be():
    with pytest.raises(ValueError, match="utf-16 that is cut off"):
        decoded("a red circle".encode("utf-16")[:-1], "x.txt")


def test_lines_end_at_two_signs_alone():
    assert lines_of("a\r\nb\nc\u2028\x85\x0bd\re") == ["a", "b", "c\u2028\x85\x0bd\re"]

"""Texts made to trip a tokenizer: what backends have been seen to encode differently."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_LONG = 3000
_NUM_RANDOM = 300
_NUM_ADDED = 48
_NUM_SPACES = 18

_WORDS = ("a", "The", "don't", "I'M", "snake_case", "CamelCase", "naïve", "日本語", "тест", "x1y22")
# All of Unicode's white space, and the invisible ones that are none.
_SPACES = (
    "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2003\u2009\u200a\u2028\u2029\u202f"
    "\u205f\u3000\u180e\u200b\u2060\ufeff"
)
_ALPHABETS = (
    "abcXYZ 019_-.,'\"\n\t",
    "".join(map(chr, range(256))),
    "éèß\u0301\u0308\ufb01æǅİıſΩжя١٣½²Ⅷ①",
    "אבגدرسप्रकथไทย中文日本語カタカナ\uff76\uff85한국어각",
    "😀\U0001f468\U0001f469\U0001f466\U0001f3fd\U0001f1eb\U0001f1f7\u200d\ufe0f\u20e3❤☎#1",
    _SPACES + "ab1!",
    "\u200e\u200f\u202a\u202e\u2066\u2069\x00\ufffd\ufffe\uffff\U0010ffff\ue000a ",
)
_FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466"
_ENGLAND = "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"

_WHITE = ["", " ", "  ", "\n", "\r\n", "\r", "\n\n", "\r\n\r\n", " \n", "\n ", "\t\t", "a\r\nb\rc"]
_WHITE += [" \t \r\n  x", "x  ", "x \n", "x\n \n  y", "  leading", "\n\n\n  deep", "tab\tbed\t\tin"]
_NUMBERS = ["0", "7", "42", "123", "1234", "12345678901234567890", "3.14159", "1,000,000.00"]
_NUMBERS += ["1e-9", "0x1F", "٣٤٥", "\uff11\uff12\uff13", "½ ¼", "x²", "Ⅷ", "①②", "1st 2nd", "v1.2"]
_NUMBERS += ["10:30:59", "192.168.0.1", "2026-11-25", "a1b22c333", "1 2  3"]
_QUOTES = ["I'm you're HE'S we'Ve they'LL 'tis 'S 'll ''s 's", "it\u2019s", "o'clock's", "don'T"]
_QUOTES += [
    "'" * 3,
    '"' * 3,
    "`" * 3,
    "'re'",
    "x'd've",
    "\u201cquoted\u201d \u2018so\u2019",
    "'\n's",
]
_UNICODE = ["\u00e9 e\u0301 \u0301 e\u0301\u0301", "\u00c5 \u212b A\u030a", "\ufb01 \ufb02 fi"]
_UNICODE += ["\uac01 \u1100\u1161\u11a8", "ǅ ß ẞ İ ı ſ", "a\u0300\u0316\u0301" * 20, "\u1e9b\u0323"]
_UNICODE += ["你好，世界！", "こんにちは世界\uff76\uff80", "안녕하세요", "สวัสดีชาวโลก", "नमस्ते दुनिया"]
_UNICODE += ["தமிழ்", "Привет, мир!", "Ελληνικά", "\ufeffBOM", "a\ufeffb", "a\u200bb", "a\u00adb"]
_UNICODE += [
    "\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd",
    "مرحبا بالعالم 123",
    "ab אב 12 \u202eba\u202c",
]
_UNICODE += ["\ufffd\ufffe\uffff\U0010ffff", "\x00", "a\x00b", "\x7f\x80\x9f", "\ue000\U000f0000"]
_EMOJI = [_FAMILY, f"{_FAMILY}{_FAMILY}", "\U0001f44d\U0001f3fd", "\U0001f1eb\U0001f1f7\U0001f1e9"]
_EMOJI += [
    "1\ufe0f\u20e3",
    "❤\ufe0f",
    _ENGLAND,
    "😀a😀 b 😀",
    "\u263a\ufe0e\u263a\ufe0f",
    "\u200d\u200d",
]
_MARKUP = [
    "https://a.b/c?d=e&f=%20#g",
    "me@example.org",
    "<p class='x'>&nbsp;</p>",
    '{"a": [1, 2]}',
]
_MARKUP += [
    "C:\\x\\y",
    "#!/bin/sh",
    "def f(x):\n    return x\n\n\tif a:\n\t\tb",
    "$$\\frac{1}{2}$$",
]
_MARKUP += [
    "--- === *** ...",
    "!?!?…\u2014\u2013",
    "a_b__c___d",
    "__init__",
    "(a)[b]{c}",
    "a/b//c",
    "+-*/",
]
_LOOKALIKES = [
    "\u2581",
    "\u2581\u2581a",
    "Ġ",
    "ĠaĊb",
    "<0x0A>",
    "##ing",
    "</s>",
    "<unk>",
    "<|",
    "|>",
]
_NO_UNICODE = ["\ud800", "a\udfffb", "\ud83d \ude00"]
_FIXED = [*_WHITE, *_NUMBERS, *_QUOTES, *_UNICODE, *_EMOJI, *_MARKUP, *_LOOKALIKES, *_NO_UNICODE]
_RUNS = ["a", "A", "ab", "é", "中", "😀", "1", "12", " ", "\n", "\r\n", "\t", "\xa0", "=", "-", "_"]
_RUNS += [".", "'s", " a", "\x00", "e\u0301", "a ", " \n", "\u3000", "\u0301"]


def awkward_texts(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return the texts for one tokenizer, always the same ones.

    Added tokens glued to words and cut short, every byte, every kind of white space, runs of
    thousands of characters, marks and joiners, what its vocabulary says in random order, random
    strings of awkward alphabets, and lone surrogates, which are no text at all.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
    """
    chooser = random.Random(20261125)
    return [
        *_FIXED,
        *map(chr, range(256)),
        *(f"a{chr(code)}b {chr(code)}" for code in [*range(33), *range(127, 161)]),
        *_spaced(),
        *(run * number for run in _RUNS for number in (2, 3, 7, 20, 64, _LONG)),
        *_around_added_tokens(tokenizer),
        *_from_vocabulary(tokenizer, chooser),
        *_at_random(chooser),
    ]


def _spaced() -> Iterator[str]:
    for space in _SPACES:
        for number in (1, 2, 3):
            yield f"a{space * number}b{space * number}"
            yield f"{space * number}1 {space * number}."
    for word in _WORDS:
        for number in range(1, _NUM_SPACES):
            yield f"{word}{' ' * number}{word}\n{' ' * number}"


def _around_added_tokens(tokenizer: PreTrainedTokenizerFast) -> Iterator[str]:
    added = [str(token.content) for _, token in sorted(tokenizer.added_tokens_decoder.items())]
    step = max(1, len(added) // _NUM_ADDED)
    for name in added[::step][:_NUM_ADDED]:
        yield from (name, f"a{name}b", f" {name} {name}\n", name + name, f"\n\n{name}  x")
        yield from (name[:-1], name[1:], name.upper(), f"{name[:-1]} {name[-1:]}", f"é{name}1")
    yield "".join(added[:_NUM_ADDED])


def _from_vocabulary(tokenizer: PreTrainedTokenizerFast, chooser: random.Random) -> Iterator[str]:
    """Yield what random ids say, alone and in a row."""
    size = len(tokenizer)
    for length in (1, 2, 5, 24):
        for _ in range(_NUM_RANDOM):
            ids = [chooser.randrange(size) for _ in range(length)]
            yield tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)


def _at_random(chooser: random.Random) -> Iterator[str]:
    for alphabet in _ALPHABETS:
        for _ in range(_NUM_RANDOM // len(_ALPHABETS)):
            yield "".join(chooser.choices(alphabet, k=chooser.randint(1, 48)))

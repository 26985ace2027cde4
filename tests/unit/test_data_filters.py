"""Filters mend and drop what they say, and leave ordinary rows alone."""

from __future__ import annotations

import pytest

from tuneloop.config import FiltersConfig
from tuneloop.data.filters import (
    apply_filters,
    cut_off,
    filter_messages,
    masked,
    passes_luhn,
    personal_data,
    repaired,
    repetition,
)
from tuneloop.records import Message

PROSE = (
    "The archive keeps letters from four centuries. Readers may order up to six boxes a day, and "
    "the staff bring them at ten, noon and three. Photographs are allowed without flash. A small "
    "fee pays for copies, which are sent by post within two weeks unless the binding is fragile. "
    "Guides to every collection stand in the hall beside the stairs."
)


def misread(text: str) -> str:
    return "".join(bytes([b]).decode("cp1252", "ignore") or chr(b) for b in text.encode("utf-8"))


@pytest.mark.parametrize(
    "text",
    [
        "café à la carte",
        "naïve façade, señor Müller",
        "it’s “fine” — really…",
        "ok 👍 5 €",
        "Привет, мир",
    ],
)
def test_text_misread_once_or_twice_is_mended(text: str) -> None:
    assert repaired(misread(text)) == text
    assert repaired(misread(misread(text))) == text
    assert repaired(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "MANHÃ”, disse",
        "„Å” ist da",
        "PÂTÉ",
        "«\u00a0Là\u00a0»",
        "日本語のテキスト",
        "Привет",
        "ângulo",
    ],
)
def test_real_text_with_the_same_letters_stays(text: str) -> None:
    assert repaired(text) == text


def test_invisible_characters_go_and_forms_are_composed() -> None:
    assert repaired("a\u200bb\ufeff c\x00\n\td") == "ab c\n\td"
    assert repaired("e\u0301") == "é"


def test_personal_data_is_found_by_kind_and_masked() -> None:
    text = (
        "Write to jane.doe+x@mail.example.org or call +49 30 901820 or (212) 555-0147. "
        "Card 4111 1111 1111 1111, server 8.8.8.8, key AKIAIOSFODNN7EXAMPLE."
    )
    kinds = [kind for kind, _, _ in personal_data(text)]
    assert kinds == ["e-mail", "phone", "phone", "card", "IP address", "key"]
    assert masked(text) == (
        "Write to [E-MAIL] or call [PHONE] or [PHONE]. Card [CARD], server [IP ADDRESS], key [KEY]."
    )


@pytest.mark.parametrize(
    "text",
    [
        "version 1.2.3.4567 of 2026-11-25, see section 10.0.0.1 and 127.0.0.1",
        "order 4111 1111 1111 1112 and 0000000000000000",
        "@decorator, user@localhost, a @ b",
        "3.14159265358979 and 1,234,567 and 100-200",
        "sk-learn and AKIA",
    ],
)
def test_what_only_looks_like_personal_data_stays(text: str) -> None:
    assert personal_data(text) == []
    assert masked(text) == text


def test_luhn() -> None:
    assert passes_luhn("79927398713")
    assert not any(passes_luhn(f"7992739871{digit}") for digit in "012456789")


def test_repetition_is_told_with_the_limit_it_exceeds() -> None:
    assert repetition(PROSE) == ""
    assert "its lines repeat" in repetition("\n".join([PROSE, "See the page below."] * 4))
    assert "makes up" in repetition("I do not know. " * 30)
    others = [f"word{i}" for i in range(60)]
    phrase = " ".join(PROSE.split()[:12])
    assert "phrases" in repetition(f"{phrase} {' '.join(others)} {phrase}")
    # Few words say nothing about repetition.
    assert repetition("no no no") == ""


def test_cut_off_answers() -> None:
    assert cut_off(PROSE) == ""
    assert "beside the stairs" in cut_off(PROSE.rstrip("."))
    assert cut_off(PROSE + " For example,") != ""
    assert cut_off("Paris") == ""
    assert cut_off(PROSE + "\n- first item\n- second item") == ""
    assert cut_off(PROSE + " See https://example.org/guide") == ""
    assert "code block" in cut_off("Use this:\n```python\nprint(1)")
    assert cut_off("Use this:\n```python\nprint(1)\n```") == ""


def test_filters_are_off_by_default_and_each_can_be_switched_on() -> None:
    dirty = [misread("café"), f"### Response:\nWrite to a@b.org. {PROSE} I"]
    assert apply_filters(dirty, True, FiltersConfig()).texts == dirty
    assert apply_filters(dirty, True, FiltersConfig()).dropped == ""

    config = FiltersConfig(repair_text=True, template_markers="strip", personal_data="mask")
    found = apply_filters(dirty, True, config)
    assert found.texts == ["café", f"Write to [E-MAIL]. {PROSE} I"]
    assert found.changes == ("text repaired", "template markers stripped", "personal data masked")
    assert dirty[0] != "café"

    def reason(**on: object) -> str:
        return apply_filters(dirty, True, FiltersConfig.model_validate(on)).dropped

    assert reason(template_markers="drop") == (
        "a template marker stands in the text: ### Response:"
    )
    assert reason(personal_data="drop") == "personal data: e-mail"
    assert reason(truncated_answers=True).startswith("the answer seems cut off")
    assert (
        reason(min_characters=1000)
        == f"the answer is shorter than 1000 characters: {len(dirty[1])}"
    )
    assert reason(max_characters=20).startswith("the answer is longer than 20 characters")
    assert reason(repetition=True) == ""
    document = apply_filters([dirty[1]], False, FiltersConfig(truncated_answers=True))
    assert document.dropped == ""


def test_a_row_of_markers_alone_is_dropped() -> None:
    config = FiltersConfig(template_markers="strip")
    messages = [Message("user", "### Question:\n\n### Answer:"), Message("assistant", "What?")]
    mended, found = filter_messages(messages, config)
    assert mended[0].content == ""
    assert found.dropped == "nothing is left of a text after mending it"
    kept, found = filter_messages([Message("user", "[INST] Hi [/INST]"), messages[1]], config)
    assert kept == [Message("user", "Hi"), messages[1]]
    assert found.dropped == ""

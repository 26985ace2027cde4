"""Filters mend and drop what they say, and leave ordinary rows alone."""

from __future__ import annotations

import pytest

from tuneloop.config import FiltersConfig
from tuneloop.data.filters.boilerplate import find_notice, strip_notices
from tuneloop.data.filters.quality import (
    Filtered,
    apply_filters,
    cut_off,
    find_personal_data,
    mask_personal_data,
    misspelling,
    passes_luhn,
    repair_text,
)
from tuneloop.errors import DataError
from tuneloop.languages import foreign_language, refuse_unknown_languages

PROSE = (
    "The archive keeps letters from four centuries. Readers may order up to six boxes a day, and "
    "the staff bring them at ten, noon and three. Photographs are allowed without flash. A small "
    "fee pays for copies, which are sent by post within two weeks unless the binding is fragile. "
    "Guides to every collection stand in the hall beside the stairs."
)


def reason_of(texts: list[str], is_conversation: bool, config: FiltersConfig) -> str:
    dropped = apply_filters(texts, is_conversation, config).dropped
    return dropped.reason.text if dropped else ""


def misread(text: str, encoding: str = "cp1252") -> str:
    return "".join(bytes([b]).decode(encoding, "ignore") or chr(b) for b in text.encode("utf-8"))


@pytest.mark.parametrize(
    "text",
    [
        "café à la carte",
        "naïve façade, señor Müller",
        "it’s “fine” — really…",
        "ok 👍 5 €",
        "Привет, мир",
        "Zażółć gęślą jaźń, proszę bardzo.",
        "今天天气很好，我们去公园吧。",
    ],
)
def test_text_misread_once_or_twice_is_mended(text: str) -> None:
    for encoding in ("cp1252", "latin-1"):
        assert repair_text(misread(text, encoding)) == text
        assert repair_text(misread(misread(text, encoding), encoding)) == text
    assert repair_text(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "MANHÃ",
        "„Å” ist da",
        "PÂTÉ",
        "«\u00a0Là\u00a0»",
        "日本語のテキスト",
        "Привет",
        "ângulo",
    ],
)
def test_real_text_with_the_same_letters_stays(text: str) -> None:
    assert repair_text(text) == text


def test_invisible_characters_go_and_forms_are_composed() -> None:
    assert repair_text("a\u200bb\ufeff c\x00\n\td") == "ab c\n\td"
    assert repair_text("e\u0301") == "é"


def test_personal_data_is_found_by_kind_and_masked() -> None:
    text = (
        "Write to jane.doe+x@mail.example.org or call +49 30 901820 or (212) 555-0147. "
        "Card 4111 1111 1111 1111, server 8.8.8.8, key AKIAIOSFODNN7EXAMPLE."
    )
    kinds = [kind for kind, _, _ in find_personal_data(text)]
    assert kinds == ["e-mail", "phone", "phone", "card", "IP address", "key"]
    assert mask_personal_data(text) == (
        "Write to [E-MAIL] or call [PHONE] or [PHONE]. Card [CARD], server [IP ADDRESS], key [KEY]."
    )


@pytest.mark.parametrize(
    "text",
    [
        "version 1.2.3.4567 of 2026-11-25, see section 10.0.0.1 and 127.0.0.1",
        "order 4111 1111 1111 1112 and 0000000000000000",
        "@decorator, user@localhost, a @ b",
        "3.14159265358979 and 1,234,567 and 100-200",
        "sk-learn and AKIA, class sk-fading-circle-animation-wrapper",
        "Update to version 1.2.3.4 or v8.8.4.4, release: 1.2.3.4, section 1.2.3.4 and § 2.3.4.5",
        "pip install engine==1.2.3.4 and engine>=1.2.3.5, tool-1.2.3.4 and build 123.456.7890",
        "ISBN 978-3-16-148410-0, 9783161484100 at 1700000000003, EAN 4006381333931",
        "a change of +0.123456789, +1.234567890, +1 500 000 or +1500000, id AB-123-456-7890",
        "git clone git@github.com:org/repo.git; y = a@b.transpose()",
        "A key file begins with -----BEGIN RSA PRIVATE KEY----- and ends with another line.",
        "-----BEGIN PRIVATE KEY-----\n...\n-----END PRIVATE KEY-----",
    ],
)
def test_what_only_looks_like_personal_data_stays(text: str) -> None:
    assert find_personal_data(text) == []
    assert mask_personal_data(text) == text


def test_a_private_key_goes_and_what_follows_stays() -> None:
    body = "\n".join(["MIIEpAIBAAKCAQEA75xEZvjj8OyZ2bEjcP7sQ3xw"] * 3)
    key = f"-----BEGIN RSA PRIVATE KEY-----\n{body}\nAb==\n-----END RSA PRIVATE KEY-----"
    assert mask_personal_data(f"Use\n{key}\nand go on.") == "Use\n[KEY]\nand go on."
    assert mask_personal_data(f"Use\n{key[:120]}") == "Use\n[KEY]"


def test_luhn() -> None:
    assert passes_luhn("79927398713")
    assert not any(passes_luhn(f"7992739871{digit}") for digit in "012456789")


def test_cut_off_answers() -> None:
    assert cut_off(PROSE) == ""
    assert "beside the stairs" in cut_off(PROSE.rstrip("."))
    assert cut_off(PROSE + " For example,") != ""
    assert cut_off("Paris") == ""
    assert cut_off(PROSE + "\n- first item\n- second item") == ""
    assert cut_off(PROSE + " See https://example.org/guide") == ""
    assert "code block" in cut_off("Use this:\n```python\nprint(1)")
    assert cut_off("Use this:\n```python\nprint(1)\n```") == ""


@pytest.mark.parametrize(
    "end",
    [
        "\n\nBest regards,\nAnna",
        "\n\nYours sincerely\n\nJohn F. Smith\nHead of the archive",
        "\n\n– The Support Team",
        "\n\nMit freundlichen Grüßen\nAnja Kowalczyk",
        "\n\ndef total(values):\n    result = sum(values)\n    return result",
        "\n\nSELECT name FROM readers\nWHERE boxes > 6",
        " Write ``` before and after it to set code.",
    ],
)
def test_letters_and_code_end_without_a_full_stop(end: str) -> None:
    assert cut_off(PROSE + end) == ""
    assert cut_off(f"Dear reader,\n\n{PROSE} And for example the") != ""
    assert cut_off(f"{PROSE}\n\nFor example") != ""


def test_filters_are_off_by_default_and_each_can_be_switched_on() -> None:
    dirty = [misread("café"), f"### Response:\nWrite to a@b.org. {PROSE} I"]
    assert apply_filters(dirty, True, FiltersConfig()).texts == dirty
    assert reason_of(dirty, True, FiltersConfig()) == ""

    config = FiltersConfig(repair_text=True, template_markers="strip", personal_data="mask")
    found = apply_filters(dirty, True, config)
    assert found.texts == ["café", f"Write to [E-MAIL]. {PROSE} I"]
    assert found.changes == ("text repaired", "template markers stripped", "personal data masked")
    assert dirty[0] != "café"

    def reason(**on: object) -> str:
        return reason_of(dirty, True, FiltersConfig.model_validate(on))

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
    looping = reason_of(["Why?", "I do not know. " * 9], True, FiltersConfig(repetition=True))
    assert looping == "the answer repeats itself: 89% of it stands in phrases used before"
    assert reason_of([dirty[1]], False, FiltersConfig(truncated_answers=True)) == ""


def test_a_row_of_markers_alone_is_dropped() -> None:
    config = FiltersConfig(template_markers="strip")
    found = apply_filters(["### Question:\n\n### Answer:", "What?"], True, config)
    assert found.texts == ["", "What?"]
    assert found.dropped is not None
    assert found.dropped.reason.text == "nothing is left of a text after mending it"
    found = apply_filters(["[INST] Hi [/INST]", "What?"], True, config)
    assert found == Filtered(["Hi", "What?"], None, ("template markers stripped",))


def test_where_no_marker_stands_nothing_is_stripped() -> None:
    texts = ["    return total\n\nWhat does this line do?", "It returns the total."]
    found = apply_filters(texts, True, FiltersConfig(template_markers="strip"))
    assert found == Filtered(texts, None, ())


def test_more_secrets_and_addresses_are_found() -> None:
    text = (
        "host 2600:1f18:22d9:9d00::53, token hf_abcdefghijklmnopqrstuvwxyzABCDEFGH and "
        "github_pat_11ABCDEFG0abcdefghijkl_mnopqrstuvwxyz0123456789ABCDEFGHIJ"
    )
    assert mask_personal_data(text) == "host [IP ADDRESS], token [KEY] and [KEY]"
    assert find_personal_data("2001:db8::1, 2026:11:25 12:30:45, std::vector<int>::iterator") == []


COOKIES = "This website uses cookies to improve your experience."


def test_boilerplate_lines_are_stripped_or_drop_the_row() -> None:
    lines = [COOKIES, PROSE, "Privacy Policy | Terms of Use | Contact", "© 2024 Example Ltd."]
    page = "\n\n".join(lines)
    found = apply_filters([page], False, FiltersConfig(boilerplate="strip"))
    assert found.texts == [PROSE]
    assert found.changes == ("boilerplate stripped",)
    dropped = reason_of([page], False, FiltersConfig(boilerplate="drop"))
    assert dropped == f"boilerplate stands in the text: {COOKIES}"
    only = reason_of([COOKIES], False, FiltersConfig(boilerplate="strip"))
    assert only == "nothing is left of a text after mending it"


@pytest.mark.parametrize(
    "text",
    [
        "Our privacy policy says what we keep and for how long.",
        "How do I accept cookies in this app? Open the settings and choose Privacy.",
        "Share your screen with the button below.",
        "My resolutions:\n- Read more\n- Sleep eight hours",
        "Share",
        "like",
        "Copyright law protects authors for seventy years after their death.",
        PROSE,
    ],
)
def test_sentences_about_the_same_things_stay(text: str) -> None:
    assert strip_notices(text) == text
    assert find_notice(text) == ""


def test_answers_that_speak_of_being_an_ai_are_dropped() -> None:
    config = FiltersConfig(boilerplate="drop")
    asked = "Which phone is best?"
    for answer in (
        "As an AI language model, I do not have opinions.",
        "I'm just an AI assistant, so it depends.",
        "Up to my knowledge cutoff it was this one.",
        "I am an AI created to help, and I cannot browse the internet.",
        "As an AI I have none.",
    ):
        dropped = reason_of([asked, answer], True, config)
        assert dropped.startswith("the answer speaks of being an AI: ")
    # A question may name one, and so may an answer about them.
    for texts in (
        ["As an AI, what would you do?", "Wait."],
        [asked, "An AI model is a program."],
        [asked, "I'm an AI researcher, and as an AI company we test them."],
        [asked, "I am a language model engineer; my training data is on the server."],
        [asked, "I can't access the internet from my room."],
    ):
        assert reason_of(texts, True, config) == ""


def test_misspelt_texts_are_dropped_by_their_share_of_unknown_words() -> None:
    config = FiltersConfig(max_misspelt_ratio=0.1)
    assert reason_of(["q", PROSE], True, config) == ""
    words = PROSE.split()
    typos = {3: "lettrs", 9: "ordr", 12: "sxi", 20: "brnig", 30: "allwed", 37: "copeis"}
    for place, typo in typos.items():
        words[place] = typo
    dropped = reason_of(["q", " ".join(words)], True, config)
    assert dropped.startswith("the answer is misspelt: 1")
    assert all(typo in dropped for typo in ("lettrs", "ordr"))
    loose = FiltersConfig(max_misspelt_ratio=0.5)
    assert reason_of(["q", " ".join(words)], True, loose) == ""
    # Few words, names, code and compounds say nothing about spelling.
    assert reason_of(["q", "teh wrod"], True, FiltersConfig(max_misspelt_ratio=0)) == ""
    terms = f"{PROSE} Anja Kowalczyk saved it as `dtaa_fiel.txt`, a filename in use."
    unknown, share = misspelling(terms)
    assert (unknown, share) == ([], 0.0)


def test_a_text_in_another_language_is_not_misspelt() -> None:
    text = (
        "Das Archiv bewahrt Briefe aus vier Jahrhunderten auf, und Leser dürfen sie bestellen. " * 3
    )
    assert reason_of(["q", text], True, FiltersConfig(max_misspelt_ratio=0.1)) == ""


TEXTS = {
    "en": "The archive keeps letters from four centuries, and readers may order six boxes a day.",
    "de": "Das Archiv bewahrt Briefe aus vier Jahrhunderten auf, und Leser dürfen sie bestellen.",
    "fr": "Les archives conservent des lettres de quatre siècles, et les lecteurs les demandent.",
    "es": "El archivo guarda cartas de cuatro siglos, y los lectores pueden pedir seis al día.",
    "ru": "Архив хранит письма четырёх столетий, и читатели могут заказать шесть коробок в день.",
    "hi": "अभिलेखागार चार शताब्दियों के पत्र रखता है, और पाठक एक दिन में छह बक्से मँगवा सकते हैं।",
    "mr": "संग्रहालयात चार शतकांची पत्रे ठेवलेली आहेत आणि वाचक दिवसाला सहा पेट्या मागवू शकतात.",
    "th": "หอจดหมายเหตุเก็บรักษาจดหมายจากสี่ศตวรรษ และผู้อ่านสามารถสั่งได้หกกล่องต่อวัน",
    "zh": "档案馆保存着四个世纪的信件，读者每天最多可以预订六箱，工作人员会在十点、中午和三点送来，"
    "允许拍照但不得使用闪光灯。",
    "ja": "文書館は四世紀にわたる手紙を保管しており、読者は一日に六箱まで注文することができ、"
    "職員が十時と正午と三時に運んできます。",
}


@pytest.mark.parametrize("code", TEXTS)
def test_texts_in_another_language_are_dropped(code: str) -> None:
    assert foreign_language(TEXTS[code], [code]) == ""
    others = [other for other in TEXTS if other != code]
    assert foreign_language(TEXTS[code], others) == code
    config = FiltersConfig(languages=others)
    dropped = reason_of([TEXTS[others[0]], TEXTS[code]], True, config)
    assert dropped == f"a text is in another language: {code}"


@pytest.mark.parametrize(
    "text",
    [
        "Ja.",
        "positive",
        '{"function": "read", "parameters": ["path", "mode"], "summary": "Open."}',
        "```python\nfor element in sorted(liste):\n    print(element)\n```",
        "https://example.org/les/archives/conservent/des/lettres/de/quatre/siecles",
    ],
)
def test_what_says_little_of_its_language_stays(text: str) -> None:
    assert foreign_language(text, ["sw"]) == ""


def test_a_language_that_cannot_be_told_is_refused() -> None:
    refuse_unknown_languages(["en", "de"])
    with pytest.raises(DataError, match="unknown language code") as caught:
        refuse_unknown_languages(["en", "xx"])
    assert caught.value.problems[0].got == "xx"

"""Applying the filters that are switched on to one row.

Every filter is off by default. They run when a row is read, before it is compared or tokenized, so
that what is deduplicated, trained on and shown is the same text.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import ftfy

from tuneloop.config import FiltersConfig
from tuneloop.data.filters.boilerplate import find_notice, find_self_reference, strip_notices
from tuneloop.data.schema import ReasonCode, Rejection, Stage
from tuneloop.languages import foreign_language
from tuneloop.repetition import is_repetitive, repeated_ratio
from tuneloop.spelling import is_known, prose_words

_INVISIBLE = re.compile("[\u200b\u200e\u200f\u2060\ufeff\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")

_MARKERS = re.compile(
    r"<\|[A-Za-z0-9_]+\|>|\[/?INST\]|<</?SYS>>|</?(?:start|end)_of_turn>|\A<s>|</s>\s*\Z|"
    r"^[ \t]*#{2,3} ?(?:Instruction|Input|Response|Output|Question|Answer|Human|Assistant|System)"
    r" ?:[ \t]*$|^(?:Human|Assistant|USER|ASSISTANT): ?",
    re.MULTILINE,
)

_DIGITS = re.compile(r"(?<![\w.])\d(?:[ -]?\d){12,18}(?![\w])")
_PERSONAL: dict[str, re.Pattern[str]] = {
    "key": re.compile(
        # With what a key consists of: a text about such files may name the line.
        r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:\s|\\n)*(?:[A-Za-z-]+: [^\n]*\n\s*)*"
        r"[A-Za-z0-9+/=]{20,}(?:(?:\s|\\n)+[A-Za-z0-9+/=]{20,})*(?:\s|\\n)*[A-Za-z0-9+/=]*"
        r"(?:(?:\s|\\n)*-----END [A-Z ]*PRIVATE KEY-----)?|"
        r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36,}\b|\bsk-(?=(?:[\w-]*\d){3})[\w-]{20,}\b|"
        r"\bgithub_pat_\w{36,}\b|\bhf_[A-Za-z0-9]{30,}\b|\bAIza[A-Za-z0-9_-]{35}\b|"
        r"\b[sr]k_live_[A-Za-z0-9]{16,}\b|"
        r"\bxox[abprs]-[A-Za-z0-9-]{10,}\b|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"
    ),
    "e-mail": re.compile(
        # Not `git@host:path`, nor `a@b.transpose()`.
        r"(?<![\w.+-])(?!git@)[\w.+-]{1,64}@(?:[\w-]+\.)+[A-Za-z]{2,24}(?![\w(-])"
    ),
    "card": _DIGITS,
    "IP address": re.compile(
        r"(?<![\w.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?!\.?\w)|"
        # Version 6: public addresses begin with 2000 to 3fff.
        r"(?<![\w.:])[23][0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{0,4}(?![\w:])"
    ),
    "phone": re.compile(
        r"(?<![\w.])(?:\+[1-9]\d{0,2}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}|"
        r"\(\d{3}\) ?\d{3}[ .-]\d{4}|(?<![/-])\d{3}([.-])\d{3}\1\d{4})(?![\w]|[.-]\d)"
    ),
}

# What stands before a number with dots that is a version, a section or part of a file's name.
_VERSION = re.compile(
    r"(?:\b(?:v|ver|version|versions|release|releases|build|firmware|revision|rev|update|upgrade|"
    r"section|sections|chapter|clause|article|paragraph|appendix|figure|table)\b[ .:#]*"
    r"(?:to |from |is |was |number |no\. )?|§+ ?|[=<>~^]= ?|\w[-_])$",
    re.IGNORECASE,
)
_CARD = re.compile(
    r"4(?:\d{15}|\d{18})|5[1-5]\d{14}|2(?:2[2-9]|[3-6]\d|7[0-2])\d{13}|3[47]\d{13}|"
    r"3(?:0[0-5]|[68]\d)\d{11}|35\d{14}|(?:6\d|5[06-8])\d{14,17}"
)
# A signed number: decimal, in groups of thousands, or too short to be dialled.
_SIGNED_NUMBER = re.compile(r"\+\d+\.\d+|\+\d{1,3}(?:[ .]\d{3}){1,2}|\+\d{1,8}")

_FEWEST_WORDS_TO_SPELL = 20
_SHOWN = 120

_FEWEST_WORDS_TO_BE_CUT = 20
_MOST_WORDS_OF_A_NAME = 6
_VALEDICTION = re.compile(
    r"\b(?:regards|sincerely|yours|cheers|thanks|wishes|faithfully|truly|love|respectfully|warmly|"
    r"grüße|grüßen|gruß|cordialement|saludos|atentamente)\b",
    re.IGNORECASE,
)
_FENCE = re.compile(r"^[ \t>]*(?:```|~~~)", re.MULTILINE)
_CODE_LINE = re.compile(
    r"^\s*(?:def|class|import|from|return|for|while|if|elif|else|end|fi|done|function|const|let|var|"
    r"public|private|#include|SELECT|FROM|WHERE)\b[^.!?]*[:;({]?$|[;{}]$|^\s+\S.*[=()]|^\$ "
)
_SENTENCE_END = re.compile(r"[.!?。！？][\"'”’)\]]*\s")


@dataclass(frozen=True)
class Filtered:
    """A row after the filters.

    Args:
        texts: The row's texts, repaired: one for a document, one for each message of a
            conversation.
        dropped: Why the row is dropped; None if it stays.
        changes: What was repaired, such as `text repaired`.
    """

    texts: list[str]
    dropped: Rejection | None = None
    changes: tuple[str, ...] = ()


class PersonalData(NamedTuple):
    """A passage of a text that looks like personal data or a secret, and of which kind."""

    kind: str
    start: int
    stop: int


def apply_filters(texts: Sequence[str], is_conversation: bool, config: FiltersConfig) -> Filtered:
    """Return a row's texts after the filters.

    Args:
        texts: Texts of a conversation's messages, the answer last; or the one of a document.
        is_conversation: Whether the row is a conversation: only answers can be cut off.
        config: Which filters are on.
    """
    texts = list(texts)
    changes = []
    for is_on, name, repair in (
        (config.repair_text, "text repaired", repair_text),
        (config.template_markers == "strip", "template markers stripped", _strip_markers),
        (config.boilerplate == "strip", "boilerplate stripped", strip_notices),
        (config.personal_data == "mask", "personal data masked", mask_personal_data),
    ):
        if is_on and (repaired := [repair(text) for text in texts]) != texts:
            changes.append(name)
            texts = repaired
    dropped = (
        _reason_to_drop(texts, is_conversation, config)
        if all(text.strip() for text in texts)
        else _dropped(ReasonCode.EMPTY_AFTER_REPAIR, "nothing is left of a text after mending it")
    )
    return Filtered(texts, dropped, tuple(changes))


def _dropped(code: ReasonCode, what: str, got: str = "") -> Rejection:
    return Rejection(Stage.FILTER, code, what, got)


def _reason_to_drop(
    texts: Sequence[str], is_conversation: bool, config: FiltersConfig
) -> Rejection | None:
    subject = texts[-1]
    name = "the answer" if is_conversation else "the document"
    length = len(subject)
    if config.min_characters is not None and length < config.min_characters:
        what = f"{name} is shorter than {config.min_characters} characters"
        return _dropped(ReasonCode.TOO_FEW_CHARACTERS, what, str(length))
    if config.max_characters is not None and length > config.max_characters:
        what = f"{name} is longer than {config.max_characters} characters"
        return _dropped(ReasonCode.TOO_MANY_CHARACTERS, what, str(length))
    if config.template_markers == "drop":
        for text in texts:
            if marker := _MARKERS.search(text):
                what = "a template marker stands in the text"
                return _dropped(ReasonCode.TEMPLATE_MARKER, what, marker.group().strip())
    if config.personal_data == "drop":
        kinds = sorted({found.kind for text in texts for found in find_personal_data(text)})
        if kinds:
            return _dropped(ReasonCode.PERSONAL_DATA, "personal data", ", ".join(kinds))
    if config.repetition and is_repetitive(subject):
        got = f"{repeated_ratio(subject):.0%} of it stands in phrases used before"
        return _dropped(ReasonCode.REPETITION, f"{name} repeats itself", got)
    if config.truncated_answers and is_conversation and (got := cut_off(subject)):
        return _dropped(ReasonCode.CUT_OFF, "the answer seems cut off", got)
    return _reason_in_wording(texts, is_conversation, config)


def _reason_in_wording(
    texts: Sequence[str], is_conversation: bool, config: FiltersConfig
) -> Rejection | None:
    subject = texts[-1]
    name = "the answer" if is_conversation else "the document"
    if config.boilerplate == "drop":
        for text in texts:
            if line := find_notice(text):
                what = "boilerplate stands in the text"
                return _dropped(ReasonCode.BOILERPLATE, what, line[:_SHOWN])
        if is_conversation and (words := find_self_reference(subject)):
            what = "the answer speaks of being an AI"
            return _dropped(ReasonCode.AI_SELF_REFERENCE, what, words)
    if config.max_misspelt_ratio is not None:
        unknown, share = misspelling(subject)
        # The dictionary is English: a text in another language is not misspelt.
        if share > config.max_misspelt_ratio and not foreign_language(subject, ["en"]):
            got = f"{share:.0%} of its words, {', '.join(unknown[:5])}"
            return _dropped(ReasonCode.MISSPELT, f"{name} is misspelt", got)
    if config.languages:
        for text in texts:
            if code := foreign_language(text, config.languages):
                what = "a text is in another language"
                return _dropped(ReasonCode.FOREIGN_LANGUAGE, what, code)
    return None


def has_template_marker(text: str) -> bool:
    """Return whether a text has marks of a chat template, as rows rendered elsewhere have them."""
    return _MARKERS.search(text) is not None


def _strip_markers(text: str) -> str:
    kept, count = _MARKERS.subn("", text)
    return kept.strip() if count else text


def repair_text(text: str) -> str:
    """Return the text with mojibake repaired, invisible characters dropped, in Unicode form NFC.

    Mojibake is UTF-8 that was read as another encoding, also several times over; it is repaired
    where ftfy is sure (Speer 2019, doi:10.5281/zenodo.2591652).
    """
    return unicodedata.normalize("NFC", _INVISIBLE.sub("", ftfy.fix_encoding(text)))


def find_personal_data(text: str) -> list[PersonalData]:
    """Return what looks like personal data or a secret, in its order and without overlaps.

    Kinds are `key`, `e-mail`, `card` (13 to 19 digits with a valid Luhn check digit), `IP address`
    (public ones) and `phone`.
    """
    found: list[PersonalData] = []
    for kind, pattern in _PERSONAL.items():
        for match in pattern.finditer(text):
            start, stop = match.span()
            if any(start < other.stop and stop > other.start for other in found):
                continue
            if _means_another(kind, match):
                continue
            found.append(PersonalData(kind, start, stop))
    return sorted(found, key=lambda item: item.start)


def _means_another(kind: str, match: re.Match[str]) -> bool:
    """Return whether what looks like personal data is a number of another meaning."""
    text = match.group()
    if kind == "card":
        return not _CARD.fullmatch(re.sub(r"\D", "", text)) or not passes_luhn(text)
    if kind in ("IP address", "phone") and not text.startswith(("+", "(")):
        before = match.string[max(0, match.start() - 30) : match.start()]
        if "." in text and _VERSION.search(before):
            return True
    if kind == "IP address":
        return not _is_public(text)
    return kind == "phone" and bool(_SIGNED_NUMBER.fullmatch(text))


def mask_personal_data(text: str) -> str:
    """Return the text with personal data replaced by its kind, for example `[E-MAIL]`."""
    parts, end = [], 0
    for kind, start, stop in find_personal_data(text):
        parts += [text[end:start], f"[{kind.upper()}]"]
        end = stop
    return "".join([*parts, text[end:]])


def passes_luhn(number: str) -> bool:
    """Return whether the last digit is the check digit of the others (ISO/IEC 7812-1)."""
    digits = [int(character) for character in number if character.isdigit()]
    if len(set(digits)) == 1:
        return False
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _is_public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:  # a time, for example
        return False


def misspelling(text: str) -> tuple[list[str], float]:
    """Return the plain words that are in no English dictionary, and their share of all, 0 to 1.

    A text with fewer than 20 plain words is not judged.
    """
    words = prose_words(text)
    if len(words) < _FEWEST_WORDS_TO_SPELL:
        return [], 0.0
    unknown = [word for word in words if not is_known(word)]
    return list(dict.fromkeys(unknown)), len(unknown) / len(words)


def cut_off(answer: str) -> str:
    """Return why an answer seems to end too soon; empty if it does not.

    Only prose is judged: an answer of 20 words or more with a sentence that ended before.
    """
    if len(_FENCE.findall(answer)) % 2:
        return "a code block stays open"
    lines = [line for line in answer.rstrip().splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if len(answer.split()) < _FEWEST_WORDS_TO_BE_CUT or not _SENTENCE_END.search(answer):
        return ""
    if re.search(r"(https?://\S+|`)$", last) or re.match(r"\s*([-*•|#]|\d+[.)])", last):
        return ""
    if _is_signature(lines) or sum(bool(_CODE_LINE.search(line)) for line in lines[-4:]) > 1:
        return ""
    if re.search(r"[^\W_]$|[,;(\[{–-]$", last):
        return f"its last words are “{' '.join(last.split()[-4:])}”"
    return ""


def _is_signature(lines: Sequence[str]) -> bool:
    """Return whether a text ends as a letter does: a name, or a closing and who signs."""
    words = lines[-1].split()
    if len(lines) < 2 or len(words) > _MOST_WORDS_OF_A_NAME:
        return False
    # `Anna Maria`, `The Support Team`, `– J. Smith, CEO`; what is cut off goes on in small letters.
    is_name = all(not word[0].isalpha() or word[0].isupper() for word in words)
    return is_name or any(_VALEDICTION.search(line) for line in lines[-4:])

"""Optional quality filters: what is mended in a row, and why a row is dropped.

Every filter is off by default. They run when a row is read, before it is compared or tokenized, so
that what is deduplicated, trained on and shown is the same text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tuneloop.config import FiltersConfig
from tuneloop.data.filters.boilerplate import notice, speaks_of_itself, without_notices
from tuneloop.data.filters.languages import foreign_language
from tuneloop.records import Message
from tuneloop.repetition import is_repetitive, repeated_ratio
from tuneloop.spelling import is_known, prose_words

_INVISIBLE = re.compile("[\u200b\u200e\u200f\u2060\ufeff\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")

_MARKERS = re.compile(
    r"<\|[A-Za-z0-9_]+\|>|\[/?INST\]|<</?SYS>>|</?(?:start|end)_of_turn>|"
    r"^[ \t]*#{2,3} ?(?:Instruction|Input|Response|Output|Question|Answer|Human|Assistant|System)"
    r" ?:[ \t]*$|^(?:Human|Assistant|USER|ASSISTANT): ?",
    re.MULTILINE,
)

_DIGITS = re.compile(r"(?<![\w.])\d(?:[ -]?\d){12,18}(?![\w])")
_PERSONAL: dict[str, re.Pattern[str]] = {
    "key": re.compile(
        r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)|"
        r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36,}\b|\bsk-[A-Za-z0-9_-]{20,}\b|"
        r"\bgithub_pat_\w{36,}\b|\bhf_[A-Za-z0-9]{30,}\b|\bAIza[A-Za-z0-9_-]{35}\b|"
        r"\b[sr]k_live_[A-Za-z0-9]{16,}\b|"
        r"\bxox[abprs]-[A-Za-z0-9-]{10,}\b|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"
    ),
    "e-mail": re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]+\.)+[A-Za-z]{2,24}(?![\w-])"),
    "card": _DIGITS,
    "IP address": re.compile(
        r"(?<![\w.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?!\.?\w)|"
        # Version 6: public addresses begin with 2000 to 3fff.
        r"(?<![\w.:])[23][0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{0,4}(?![\w:])"
    ),
    "phone": re.compile(
        r"(?<![\w.])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}|"
        r"\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}[.-]\d{3}[.-]\d{4})(?![\w])"
    ),
}

_FEWEST_WORDS_TO_SPELL = 20
_SHOWN = 120

_FEWEST_WORDS_TO_BE_CUT = 20
_SENTENCE_END = re.compile(r"[.!?。！？][\"'”’)\]]*\s")


@dataclass(frozen=True)
class Filtered:
    """A row after the filters.

    Args:
        texts: The row's texts, mended; a document has one, a conversation one for each message.
        dropped: Why the row goes; empty if it stays.
        changes: What was mended, such as `text repaired`.
    """

    texts: list[str]
    dropped: str = ""
    changes: tuple[str, ...] = ()


def filter_messages(
    messages: Sequence[Message], config: FiltersConfig
) -> tuple[list[Message], Filtered]:
    """Return the conversation with its texts mended, and what the filters say of it."""
    found = apply_filters([message.content for message in messages], True, config)
    pairs = zip(messages, found.texts, strict=True)
    return [replace(message, content=text) for message, text in pairs], found


def apply_filters(texts: list[str], is_conversation: bool, config: FiltersConfig) -> Filtered:
    """Return a row's texts after the filters.

    Args:
        texts: Of a conversation's messages, the answer last; or of one document.
        is_conversation: Whether it is the former: only answers can be cut off.
        config: Which filters are on.
    """
    changes: list[str] = []

    def change(mend: Callable[[str], str], name: str) -> None:
        mended = [mend(text) for text in texts]
        if mended != texts:
            changes.append(name)
            texts[:] = mended

    texts = list(texts)
    if config.repair_text:
        change(repaired, "text repaired")
    if config.template_markers == "strip":
        change(lambda text: _MARKERS.sub("", text).strip(), "template markers stripped")
    if config.boilerplate == "strip":
        change(without_notices, "boilerplate stripped")
    if config.personal_data == "mask":
        change(masked, "personal data masked")
    if not all(text.strip() for text in texts):
        return Filtered(texts, "nothing is left of a text after mending it", tuple(changes))
    return Filtered(texts, _reason_to_drop(texts, is_conversation, config), tuple(changes))


def _reason_to_drop(texts: Sequence[str], is_conversation: bool, config: FiltersConfig) -> str:
    subject = texts[-1]
    name = "the answer" if is_conversation else "the document"
    length = len(subject)
    if config.min_characters is not None and length < config.min_characters:
        return f"{name} is shorter than {config.min_characters} characters: {length}"
    if config.max_characters is not None and length > config.max_characters:
        return f"{name} is longer than {config.max_characters} characters: {length}"
    if config.template_markers == "drop":
        for text in texts:
            if marker := _MARKERS.search(text):
                return f"a template marker stands in the text: {marker.group().strip()}"
    if config.personal_data == "drop":
        kinds = sorted({kind for text in texts for kind, _, _ in personal_data(text)})
        if kinds:
            return f"personal data: {', '.join(kinds)}"
    if config.repetition and is_repetitive(subject):
        share = repeated_ratio(subject)
        return f"{name} repeats itself: {share:.0%} of it stands in phrases used before"
    if config.truncated_answers and is_conversation and (reason := cut_off(subject)):
        return f"the answer seems cut off: {reason}"
    return _reason_of_wording(texts, is_conversation, config)


def _reason_of_wording(texts: Sequence[str], is_conversation: bool, config: FiltersConfig) -> str:
    subject = texts[-1]
    name = "the answer" if is_conversation else "the document"
    if config.boilerplate == "drop":
        for text in texts:
            if line := notice(text):
                return f"boilerplate stands in the text: {line[:_SHOWN]}"
        if is_conversation and (words := speaks_of_itself(subject)):
            return f"the answer speaks of being an AI: {words}"
    if config.max_misspelt_ratio is not None:
        unknown, share = misspelling(subject)
        if share > config.max_misspelt_ratio:
            return f"{name} is misspelt: {share:.0%} of its words, {', '.join(unknown[:5])}"
    if config.languages:
        for text in texts:
            if code := foreign_language(text, config.languages):
                return f"a text is in another language: {code}"
    return ""


def repaired(text: str) -> str:
    """Return the text with mojibake mended, invisible characters dropped, in Unicode form NFC.

    Mended is UTF-8 that was read as another encoding, also several times over, where ftfy is sure
    (Speer 2019, doi:10.5281/zenodo.2591652).
    """
    import ftfy

    return unicodedata.normalize("NFC", _INVISIBLE.sub("", ftfy.fix_encoding(text)))


def personal_data(text: str) -> list[tuple[str, int, int]]:
    """Return (kind, start, stop) of what looks like personal data or a secret, without overlaps.

    Kinds are `key`, `e-mail`, `card` (13 to 19 digits with a valid Luhn check digit), `IP address`
    (public ones) and `phone`.
    """
    found: list[tuple[str, int, int]] = []
    for kind, pattern in _PERSONAL.items():
        for match in pattern.finditer(text):
            start, stop = match.span()
            if any(start < other and stop > begin for _, begin, other in found):
                continue
            if kind == "card" and not passes_luhn(match.group()):
                continue
            if kind == "IP address" and not _is_public(match.group()):
                continue
            found.append((kind, start, stop))
    return sorted(found, key=lambda item: item[1])


def masked(text: str) -> str:
    """Return the text with personal data replaced by its kind, for example `[E-MAIL]`."""
    parts, end = [], 0
    for kind, start, stop in personal_data(text):
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
    import ipaddress

    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:  # a time, for example
        return False


def misspelling(text: str) -> tuple[list[str], float]:
    """Return the plain words that are in no English dictionary, and their share of all.

    Of a text with fewer than 20 plain words nothing is told.
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
    if answer.count("```") % 2:
        return "a code block stays open"
    last = answer.rstrip().rpartition("\n")[2]
    if len(answer.split()) < _FEWEST_WORDS_TO_BE_CUT or not _SENTENCE_END.search(answer):
        return ""
    if re.search(r"(https?://\S+|`)$", last) or re.match(r"\s*([-*•|#]|\d+[.)])", last):
        return ""
    if re.search(r"[^\W_]$|[,;(\[{–-]$", last):
        return f"its last words are “{' '.join(last.split()[-4:])}”"
    return ""

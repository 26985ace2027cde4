"""What an answer's wording gives away: the prompt copied, a refusal, a leaked chat template."""

from __future__ import annotations

import re

from tuneloop.words import Span

# A run of so many words that the prompt has too is no accident.
_RUN_WORDS = 8
_FEWEST_WORDS = 4
_COPIED_SHARE = 0.5

_DECLINED = (
    r"(?:help|assist|answer|respond|comply|provide|fulfil|fulfill|complete|discuss|generate|create|"
    r"write|share|give|offer|engage|support|do (?:that|this|so)|process|continue|tell you|advise|"
    r"recommend|participate|be able)"
)
_CANNOT = (
    r"(?:can(?:no|['’])t|can not|could(?:n['’]t| not)|am (?:not able|unable) to|['’]m (?:not able|"
    r"unable) to|won['’]t|will not|must (?:decline|refuse)|have to (?:decline|refuse))"
)
_REFUSAL = re.compile(
    r"\b(?:"
    rf"I {_CANNOT} (?:\w+ ){{0,2}}?{_DECLINED}\b"
    rf"|I['’]m (?:not able|unable) to (?:\w+ ){{0,2}}?{_DECLINED}\b"
    r"|I (?:must|have to|need to) (?:respectfully )?(?:decline|refuse)\b"
    r"|(?:as|I am|I['’]m) (?:just |only )?an? (?:AI|artificial intelligence)(?:[ -](?:language )?"
    r"(?:model|assistant))?,? (?:language model,? )?(?:so )?(?:and )?I\b"
    r"|I['’]m (?:very |so )?sorry,? (?:but |however,? )?I (?:\w+ )?(?:can|could|am|do|don|won|will)"
    r"|I apologi[sz]e,? (?:but |for (?:any|the) \w+,? but )I\b"
    r"|I (?:do not|don['’]t) (?:know|feel comfortable|"
    r"have (?:any |enough |access|the |sufficient |specific ))"
    r"|I(?: a|['’])m not (?:sure|comfortable|allowed|permitted|programmed)\b"
    r")",
    re.IGNORECASE,
)
_OPENING_CHARACTERS = 300
_TEMPLATE = re.compile(
    r"<\|[\w ./:-]{1,40}\|>|<｜[^<>\n]{1,40}｜>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>"
    r"|<(?:bos|eos|pad|unk)>|\[(?:PAD|UNK|CLS|SEP|BOS|EOS)\]|<\|?endoftext\|?>"
    r"|\{%-?.{1,80}?-?%\}|\{\{ ?[\w.\[\]'\"| ]{1,60} ?\}\}",
)
# A heading of an instruction template, or the next turn of a conversation that nobody asked for.
_TURN = re.compile(
    r"^[ \t]*(?:#{2,3} ?(?:Instruction|Response|Input|Question|Answer|System|User|Assistant|Human)"
    r" ?:|(?:User|Human|Assistant|System|Question|Q|AI|Bot) ?:(?=\s))",
    re.MULTILINE,
)


def find_copied(answer: str, prompt: str, reference: str) -> Span | None:
    """Return the longest part of an answer that the prompt has too, if half of it is copied.

    Copied are runs of eight words (of all its words, if the answer has fewer, at least four) that
    stand in the prompt and not in the reference.
    """
    if not answer.strip() or not prompt:
        return None
    words = list(re.finditer(r"\w+", answer.casefold()))
    length = min(_RUN_WORDS, len(words))
    if length < _FEWEST_WORDS:
        return None
    asked = _runs(re.findall(r"\w+", prompt.casefold()), length)
    expected = _runs(re.findall(r"\w+", reference.casefold()), length)
    texts = [match[0] for match in words]
    is_copied = [False] * len(words)
    for start in range(len(words) - length + 1):
        run = tuple(texts[start : start + length])
        if run in asked and run not in expected:
            is_copied[start : start + length] = [True] * length
    if sum(is_copied) < _COPIED_SHARE * len(words):
        return None
    first, last = _longest_run(is_copied)
    start, end = words[first].start(), words[last].end()
    return Span(answer[start:end], start, end)


def find_refusal(answer: str, reference: str) -> Span | None:
    """Return where an answer begins by declining to answer; None where the reference does too."""
    match = _REFUSAL.search(answer[:_OPENING_CHARACTERS])
    if match is None or _REFUSAL.search(reference[:_OPENING_CHARACTERS]):
        return None
    return Span(match[0], *match.span())


def find_template(answer: str, question: str, reference: str) -> Span | None:
    """Return a control token, a template's heading or another speaker's turn in an answer.

    A control token that question or reference have is content; a heading or a turn is only content
    where the reference has it: questions may come with their template.
    """
    for pattern, allowed in ((_TEMPLATE, question + reference), (_TURN, reference)):
        for match in pattern.finditer(answer):
            text = match[0].strip()
            if text not in allowed:
                return Span(text, *match.span())
    return None


def _runs(words: list[str], length: int) -> set[tuple[str, ...]]:
    return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}


def _longest_run(marks: list[bool]) -> tuple[int, int]:
    """Return first and last index of the longest run of True; at least one is."""
    best = (0, -1)
    start = 0
    for index, mark in enumerate([*marks, False]):
        if not mark:
            if index - start > best[1] - best[0] + 1:
                best = (start, index - 1)
            start = index + 1
    return best

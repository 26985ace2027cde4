"""Notices that are on every web page, and assistants that speak of themselves."""

from __future__ import annotations

import re

_LINK = (
    r"(?:privacy(?: policy| notice)?|terms(?: (?:of (?:use|service)|and conditions|& conditions))?|"
    r"cookies?(?: policy| settings| preferences)?|contact(?: us)?|about(?: us)?|home|help|faq|"
    r"sitemap|imprint|impressum|careers|log ?in|sign (?:in|up)|register|search|menu)"
)
# Whole lines only: an answer that explains a privacy policy in a sentence of its own stays. Items
# of a list as well: `- Read more` is a resolution.
_NOTICE = re.compile(
    r"^[ \t>|]*(?:"
    r"(?:this|our) (?:web ?)?site (?:also )?uses cookies\b.{0,300}|"
    r"we (?:and our partners )?use cookies\b.{0,300}|"
    r"by (?:continuing|using|clicking|browsing)\b.{0,120}\b(?:agree|accept|consent)\b.{0,160}|"
    r"(?:accept|reject|manage)(?: all)? cookies[.!]?|"
    r"(?:please )?(?:enable|turn on|activate) javascript\b.{0,120}|"
    r"(?:you need|this (?:page|site|app) (?:needs|requires)) .{0,20}javascript\b.{0,120}|"
    r"javascript (?:is|must be|seems to be|appears to be) (?:disabled|enabled|required)\b.{0,120}|"
    r"(?:©|\(c\)|copyright\b).{0,12}(?:19|20)\d\d\b.{0,120}|"
    r".{0,120}\ball rights reserved[.]?|"
    r"lorem ipsum\b.*|"
    r"skip to (?:main )?content|"
    # Not the word alone, which may be a label.
    r"(?:share|tweet|pin|like|follow)(?: (?:us|this|it|page|article|post)\b)?"
    r" (?:on|to|via|with) (?:facebook|twitter|x|linkedin|pinterest|instagram|whatsapp|e-?mail)"
    r"[.!]?|(?:share|tweet|pin|like|follow) (?:us|this)(?: (?:page|article|post))?[.!]?|"
    r"(?:click here|read more|learn more|show more|load more|back to top)[.!…]*(?: ?[»›→>]+)?|"
    r"(?:subscribe to|sign up (?:for|to)) (?:our|the) newsletter\b.{0,120}|"
    rf"{_LINK}(?:[ \t]*[|·•/–-][ \t]*{_LINK})+"
    r")[ \t]*$",
    re.IGNORECASE | re.MULTILINE,
)
# What may follow: an AI researcher, team or startup is none.
_ASSISTANT = re.compile(
    r"\b(?:as|i(?:'|’)?m(?: just)?|i am(?: just)?) an? "
    r"(?:ai|artificial intelligence|(?:large |ai )*language model)"
    r"(?: language model| model| assistant| chatbot| system)?"
    r"(?=[,.;:!?)\"”*]|\s*$|\s+(?:and|so|but|i|i['’]m|that|which|who|without|with|trained|created|"
    r"developed|designed|made|built|programmed|by|not|here|from|my|it)\b)|"
    r"\bmy knowledge cut-?off\b|"
    r"\bmy training data (?:only )?(?:goes|go|extends?|ends?|stops?|cuts|runs) |"
    r"\bi (?:do not|don['’]t|cannot|can['’]t|am (?:not able|unable) to) "
    r"(?:have (?:the ability|access) to )?(?:browse the (?:internet|web)|"
    r"access the internet (?:in real[- ]time|directly|or )|real[- ]time)",
    re.IGNORECASE,
)


def find_notice(text: str) -> str:
    """Return the first line that is a web notice; empty if there is none.

    Source: after the line filters of C4 (Raffel et al. 2020, arXiv:1910.10683, section 2.2), which
    drop every line that so much as names a cookie policy.
    """
    match = _NOTICE.search(text)
    return match.group().strip() if match else ""


def strip_notices(text: str) -> str:
    """Return the text without web notices, and without the gaps they leave."""
    kept, count = _NOTICE.subn("", text)
    return re.sub(r"\n{3,}", "\n\n", kept).strip() if count else text


def find_self_reference(answer: str) -> str:
    """Return the words in which an answer speaks of being an AI; empty if it does not."""
    match = _ASSISTANT.search(answer)
    return match.group() if match else ""

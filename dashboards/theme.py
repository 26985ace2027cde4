"""How things look: one style sheet for light and dark, and texts as safe HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence

FOLDED_CHARACTERS = 1_500

# Colours are laid over the page's own with transparency, so one sheet fits both themes.
CSS = """
<style>
[data-testid="stSidebarNav"]::before {
  content: "tuneloop"; display: block; padding: 0 0 .6rem;
  font-weight: 650; font-size: 1.2rem; letter-spacing: -.01em;
}
[data-testid="stMainBlockContainer"] { max-width: 76rem; padding-top: 3.5rem; }
@media (max-width: 640px) {
  [data-testid="stMainBlockContainer"] { padding-left: 1rem; padding-right: 1rem; }
}
[data-testid="stMarkdown"] h1 { font-size: 1.3rem; }
[data-testid="stMarkdown"] h2 { font-size: 1.1rem; }
/* Streamlit's own grey is 4.1 : 1 on the light sidebar; readable text has 4.5. */
[data-testid="stCaptionContainer"] { opacity: 1; color: inherit; }
[data-testid="stCaptionContainer"] p { opacity: .75; }
[data-testid="stMarkdown"] table { display: block; overflow-x: auto; }
@media (max-width: 640px) {
  /* Else a column that is cut off wraps at each word and its row fills the screen. */
  [data-testid="stMarkdown"] td { min-width: 4.5rem; }
  [data-testid="stMarkdown"] td:last-child { min-width: 10rem; }
}
.st-key-tags [data-testid="stTable"] *, .st-key-trials [data-testid="stTable"] * {
  white-space: nowrap !important; }
.st-key-tags td:last-child, .st-key-tags td:last-child * {
  white-space: normal !important; min-width: 11rem; }
@media (max-width: 640px) { [data-testid="stTable"] td { min-width: 5.5rem; } }
/* What scrolls sideways fades out at its right edge until it is scrolled to the end. Without
   anything to scroll the animation has no timeline, and nothing fades. An escape stands for the
   bracket, since a sheet in which a tag seems to begin is dropped as a whole. */
@property --tl-fade { syntax: "\\3c length>"; inherits: false; initial-value: 0px; }
@keyframes tl-fade { from { --tl-fade: 2.5rem; } to { --tl-fade: 0px; } }
@supports (animation-timeline: scroll()) {
  :has(> [data-testid="stTableStyledTable"]), [data-testid="stMarkdown"] table {
    mask-image: linear-gradient(to left, transparent, #000 var(--tl-fade));
    animation: tl-fade linear both; animation-timeline: scroll(self inline);
  }
}
/* The theme's blue on its own tint is 3.5 : 1 in the dark. */
[data-testid="stButtonGroup"] [data-selected],
[data-testid="stButtonGroup"] [data-selected] * { color: inherit !important; }
/* So is the label of what is open. */
[data-testid="stPopoverButton"][aria-expanded="true"] { color: inherit; }
/* Where the keyboard is: Streamlit marks these by a change of colour that is hard to see. */
[data-testid="stSidebarNavLink"]:focus-visible, [data-testid^="stPageLink"]:focus-visible,
[data-testid="stBaseButton-elementToolbar"]:focus-visible,
[data-testid="stDataFrame"]:has(:focus-visible) {
  outline: 2px solid #5b78e6; outline-offset: 1px; }
/* The frame fills the window, so that there is one thing to scroll. */
[data-testid="stIFrame"] { height: calc(100dvh - 21rem); min-height: 24rem; }
[data-testid="stMainBlockContainer"]:has([data-testid="stIFrame"]) { padding-bottom: .5rem; }
/* On a phone the buttons stay in sight under long answers. */
@media (max-width: 640px) {
  .st-key-ballot { position: fixed; bottom: 0; left: 0; right: 0; z-index: 5; gap: .4rem;
    width: auto; padding: .6rem 1rem; background: light-dark(#fff, #14171f);
    border-top: 1px solid rgba(128, 136, 152, .3); }
  [data-testid="stMainBlockContainer"]:has(.st-key-ballot) { padding-bottom: 13rem; }
}
.tl-sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr));
  gap: .75rem; }
.tl-box { border: 1px solid rgba(128, 136, 152, .3); border-radius: .5rem; padding: .6rem .8rem;
  min-width: 0; }
.tl-head { display: flex; flex-wrap: wrap; gap: .4rem; align-items: center; font-size: .82rem;
  margin-bottom: .35rem; }
.tl-head b { font-weight: 600; }
.tl-text { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .9rem; line-height: 1.5; }
.tl-mono { font-family: ui-monospace, "Source Code Pro", monospace; font-size: .82rem; }
.tl-label { font-size: .78rem; opacity: .75; margin: .5rem 0 .15rem; }
.tl-label:first-child { margin-top: 0; }
.tl-quiet { opacity: .75; }
.tl-chip { border-radius: 1rem; padding: .05rem .5rem; font-size: .74rem; white-space: nowrap;
  background: rgba(128, 136, 152, .18); }
.tl-good { background: rgba(24, 150, 90, .2); }
.tl-bad { background: rgba(214, 60, 60, .2); }
.tl-warn { background: rgba(214, 150, 30, .24); }
.tl-same { background: rgba(128, 136, 152, .22); }
.tl-extra { background: rgba(226, 128, 30, .28); border-radius: .2rem; }
.tl-missing { text-decoration: line-through; opacity: .62; background: rgba(90, 120, 220, .2);
  border-radius: .2rem; }
.tl-token { border-right: 1px solid rgba(128, 136, 152, .35); }
.tl-learned { background: rgba(24, 150, 90, .25); }
.tl-bar { display: flex; height: .9rem; border-radius: .45rem; overflow: hidden;
  background: rgba(128, 136, 152, .15); }
.tl-bar span { min-width: 2px; }
.tl-bar .tl-good { background: #2a9d6a; } .tl-bar .tl-bad { background: #d45050; }
.tl-bar .tl-warn { background: #d9a441; } .tl-bar .tl-none { background: rgba(128, 136, 152, .7); }
.tl-bar .tl-same { background: rgba(128, 136, 152, .3); }
.tl-legend { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; font-size: .84rem;
  margin-top: .45rem; }
.tl-dot { display: inline-block; width: .65rem; height: .65rem; border-radius: .2rem;
  margin-right: .35rem; }
.tl-dot.tl-good { background: #2a9d6a; } .tl-dot.tl-bad { background: #d45050; }
.tl-dot.tl-warn { background: #d9a441; } .tl-dot.tl-none { background: rgba(128, 136, 152, .7); }
.tl-dot.tl-same { background: rgba(128, 136, 152, .3); }
</style>
"""

_CHANGE_TONES = {
    "fixed": "good",
    "introduced": "bad",
    "both_wrong": "warn",
    "both_right": "same",
    "same": "same",
    "unscored": "none",
}


def text(content: str, mono: bool = False) -> str:
    """Return a text as a block that keeps its line ends."""
    if not content.strip():
        return '<div class="tl-text tl-quiet">(empty)</div>'
    return f'<div class="tl-text{" tl-mono" if mono else ""}">{html.escape(content)}</div>'


def folded(content: str) -> str:
    """Return a text as it is, or the beginning of a long one with the rest to unfold."""
    return pieces([("same", content)])


def pieces(parts: Sequence[tuple[str, str]]) -> str:
    """Return a text with its differences marked, the rest of a long one to unfold."""
    if not "".join(part for _, part in parts).strip():
        return text("")
    shown, rest, room = "", "", FOLDED_CHARACTERS
    for kind, part in parts:
        shown += _marked(kind, part[:room])
        rest += _marked(kind, part[room:])
        room = max(0, room - len(part))
    body = f'<div class="tl-text tl-mono">{shown}</div>'
    if not rest:
        return body
    more = sum(len(part) for _, part in parts) - FOLDED_CHARACTERS
    return (
        f"{body}<details><summary>{more:,} more characters</summary>"
        f'<div class="tl-text tl-mono">{rest}</div></details>'
    )


def tokens(parts: Sequence[tuple[str, bool]]) -> str:
    """Return tokens with their borders, those that are learned in colour."""
    spans = [
        f'<span class="tl-token{" tl-learned" if learned else ""}">{_visible(part)}</span>'
        for part, learned in parts
    ]
    return f'<div class="tl-text tl-mono">{"".join(spans)}</div>'


def chip(words: str, tone: str = "") -> str:
    """Return a short label; tones are good, bad and warn."""
    return f'<span class="tl-chip{f" tl-{tone}" if tone else ""}">{html.escape(words)}</span>'


def box(title: str, chips: Sequence[str], body: str) -> str:
    """Return one of several boxes that stand side by side; `chips` and `body` are HTML."""
    head = f'<div class="tl-head"><b>{html.escape(title)}</b>{"".join(chips)}</div>'
    return f'<div class="tl-box">{head}{body}</div>'


def sides(boxes: Sequence[str]) -> str:
    """Return boxes side by side, below one another where the page is narrow."""
    return f'<div class="tl-sides">{"".join(boxes)}</div>'


def labelled(label: str, body: str) -> str:
    """Return HTML with a small label above."""
    return f'<div class="tl-label">{html.escape(label)}</div>{body}'


def change_bar(counts: Sequence[tuple[str, str, int]]) -> str:
    """Return a stacked bar with its legend, from (change, label, count)."""
    parts, legend = [], []
    for change, label, count in counts:
        tone = _CHANGE_TONES[change]
        parts.append(f'<span class="tl-{tone}" style="flex:{count}"></span>')
        legend.append(
            f'<span><span class="tl-dot tl-{tone}"></span>{html.escape(label)} '
            f"<b>{count:,}</b></span>"
        )
    return (
        f'<div class="tl-bar">{"".join(parts)}</div><div class="tl-legend">{"".join(legend)}</div>'
    )


def change_tone(change: str) -> str:
    """Return the tone of a change's label."""
    tone = _CHANGE_TONES[change]
    return "" if tone in ("same", "none") else tone


def _marked(kind: str, part: str) -> str:
    if not part or kind == "same":
        return html.escape(part)
    return f'<span class="tl-{kind}">{_visible(part)}</span>'


def _visible(part: str) -> str:
    # White space alone would be an unexplained coloured gap.
    return html.escape(part if part.strip() else part.replace(" ", "␣").replace("\n", "⏎\n"))

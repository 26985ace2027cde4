"""One definition of repetition, for rows that are filtered and answers that are tagged."""

from __future__ import annotations

import json

import pytest

from tuneloop.repetition import is_repetitive, repeated_ratio

LOOPS = {
    "a sentence": "I do not know. " * 9,
    "a word": "yes " * 5,
    "after a good start": "The tide is highest at noon. " + "So it is the moon that pulls. " * 4,
    "list items": "\n".join(f"{i}. Use the API to generate text." for i in range(1, 9)),
    "inside an item": "1. Read the file.\n2. " + "Close the file at once. " * 6,
    "JSON that never ends": '{"types": [' + '"int", ' * 20,
    "a string in JSON": json.dumps({"summary": "Sun raster file: " * 9}),
    "Chinese without spaces": "客服時間為上午九點至下午六點。" * 5,
    "Thai without spaces": "กรุณารีสตาร์ทอุปกรณ์แล้วเข้าสู่ระบบอีกครั้ง" * 5,
    "code": "def f(x):\n    return g(x, 1)\n\n" * 3,
}
FINE = {
    "nothing": "",
    "a phrase twice": "Read the file at path and return the text of the file at path, decoded.",
    "a list": "\n".join(f"{i}. Click the {w} button to open it." for i, w in enumerate("ABCDE", 1)),
    "a table": "| City | People |\n|---|---|\n"
    + "\n".join(f"| {w} | 2 million people or more |" for w in ("Rome", "Madrid", "Vienna")),
    "JSON": json.dumps([{"name": f"p{i}", "type": "string", "optional": True} for i in range(9)]),
    "JSON in a fence": f"```json\n{json.dumps([{'kind': 'int', 'of': 'x'}] * 6, indent=2)}\n```",
    "Chinese that uses a term again": "使用者可以登入系統。登入系統之後，使用者可以看到訂單。",
    "JSON of numbers": json.dumps([1] * 50),
    "a refrain": "Row, row, row your boat,\nGently down the stream.\nMerrily, merrily, merrily, "
    "merrily,\nLife is but a dream.",
}


@pytest.mark.parametrize("text", LOOPS.values(), ids=LOOPS.keys())
def test_loops_are_repetition(text: str) -> None:
    assert is_repetitive(text)


@pytest.mark.parametrize("text", FINE.values(), ids=FINE.keys())
def test_lists_tables_and_json_are_not(text: str) -> None:
    assert not is_repetitive(text)


def test_the_ratio_counts_characters_of_later_uses() -> None:
    # The second "one two six ten" is 12 of 24 + 6 characters.
    assert repeated_ratio("one two six ten and one two six ten now") == pytest.approx(12 / 30)
    assert repeated_ratio("one two six and one two six") == 0

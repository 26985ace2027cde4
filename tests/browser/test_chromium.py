"""The real Streamlit server in headless Chromium."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
LONG_MS = 30_000

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


def press_until(page: Any, key: str, answer: Any, times: int = 1) -> None:
    """Press a key that Streamlit's buttons listen to until the page answers, three tries at most.

    On a slow machine a key may reach a page that is still being drawn, or a vote may come before
    the answers have been shown for a second.
    """
    for timeout in (10_000, 10_000, LONG_MS):
        page.wait_for_timeout(1500)
        for _ in range(times):
            page.keyboard.press(key)
            page.wait_for_timeout(100)
        try:
            answer.wait_for(timeout=timeout)
            return
        except sync_api.TimeoutError:
            if timeout == LONG_MS:
                raise


@dataclass
class Visit:
    """A page with what it asked for and what went wrong in it."""

    page: Any
    asked: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Visit]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(LONG_MS)
    visit = Visit(page)
    page.on("request", lambda request: visit.asked.append(request.url))

    def note(message: Any) -> None:
        # Below a page's own address Streamlit looks for its own settings, then one level up.
        if message.type == "error" and "/_stcore/" not in message.location.get("url", ""):
            visit.errors.append(f"{message.text} {message.location}")

    page.on("console", note)
    page.on("pageerror", lambda error: visit.errors.append(str(error)))
    yield visit
    context.close()


def choice(page: Any, label: str) -> Any:
    """Return one of several choices that stand in a row."""
    return page.locator("[data-testid=stButtonGroup]").get_by_text(label)


def is_streamlits_question(response: Any) -> bool:
    return "/media/" in response.url and response.request.resource_type == "fetch"


def assert_clean(visit: Visit, served: str) -> None:
    local = (served, served.replace("http", "ws"), "data:", "blob:", "about:")
    assert [url for url in visit.asked if not url.startswith(local)] == []
    assert visit.errors == []


def test_pages_open_from_the_sidebar_and_ask_nobody_else(visit, served):
    page = visit.page
    page.goto(served)
    page.get_by_text("Finetuning helped").first.wait_for()
    page.get_by_role("link", name="Models").click()
    page.get_by_role("heading", name="Loss", exact=True).wait_for()
    page.locator("canvas, svg.marks").first.wait_for()
    page.get_by_role("link", name="Sweeps").click()
    page.get_by_text("for each doubling").first.wait_for()
    page.get_by_role("link", name="Datasets").click()
    page.get_by_role("heading", name="The card of the rows").wait_for()
    page.get_by_role("link", name="Reports").click()
    report = page.frame_locator("iframe").first
    report.get_by_role("heading", name="Paired differences").wait_for()
    assert_clean(visit, served)


def test_from_a_wrong_answer_to_the_next_version(visit, served, filled, next_version):
    page = visit.page
    page.goto(f"{served}/errors?before=base")
    page.get_by_text("30 of 30 examples").wait_for()
    choice(page, "Introduced 1").click()
    page.get_by_text("1 of 30 examples").wait_for()
    page.get_by_text("r29", exact=True).wait_for()
    choice(page, "Introduced 1").click()
    page.get_by_label("Search").fill("number 23 definately")
    page.get_by_label("Search").press("Enter")
    page.get_by_text("1 of 30 examples").wait_for()
    page.get_by_text("r23", exact=True).wait_for()
    assert "q=number" in page.url

    page.get_by_role("link", name="Blind votes").click()
    page.get_by_label("Your name").fill("grace")
    page.get_by_label("Your name").press("Enter")
    page.get_by_text("0 of 15 judged by grace").wait_for()
    # The name is text now: a digit votes, and the same key held on votes on nothing unseen.
    page.get_by_label("Your name").wait_for(state="detached")
    page.get_by_role("button", name="Left is better").wait_for()
    press_until(page, "2", page.get_by_text("1 of 15 judged by grace"), times=5)
    page.wait_for_timeout(1500)
    # The digits are the buttons' keys; while somebody writes they are digits.
    # The field of the example before stays until the page is drawn.
    page.wait_for_function("document.querySelectorAll('[aria-label=Comment]').length === 1")
    page.get_by_label("Comment").click()
    page.keyboard.type("1 of 2 is 3 or 4")
    page.keyboard.press("Tab")
    page.get_by_text("1 of 15 judged by grace").wait_for()
    page.get_by_role("button", name="Left is better").click()
    page.get_by_text("2 of 15 judged by grace").wait_for()
    assert "grace" not in page.url
    page.reload()
    page.get_by_label("Your name").fill("grace")
    page.get_by_label("Your name").press("Enter")
    page.get_by_text("2 of 15 judged by grace").wait_for()
    with sqlite3.connect(filled / "review" / "verdicts.sqlite") as connection:
        rows = connection.execute("SELECT reviewer, choice, comment FROM verdicts").fetchall()
    assert rows == [("grace", "tie", ""), ("grace", "left", "1 of 2 is 3 or 4")]
    choice(page, "Results").click()
    page.get_by_text("2 votes by grace.").wait_for()

    page.get_by_role("link", name="Answers").click()
    page.get_by_text("30 of 30 answers").wait_for()
    page.get_by_label("Search").fill("r29")
    page.get_by_label("Search").press("Enter")
    page.get_by_text("1 of 30 answers").wait_for()
    assert "find=r29" in page.url
    # The count stands above the answers: those of before go a moment later.
    page.get_by_text("r28", exact=True).wait_for(state="detached")
    # Out of the field, a digit marks the row of this place.
    page.get_by_role("heading", name="Answers", exact=True).last.click()
    press_until(page, "1", page.get_by_label("Right answer"))
    page.get_by_label("Right answer").fill('{"colour": "blue", "number": 30}')
    page.get_by_label("Right answer").press("Control+Enter")
    page.get_by_role("button", name="Store the mark").click()
    page.get_by_text("grace: the answer is wrong").wait_for()
    page.get_by_role("button", name="Export").click()
    # Beside the download Streamlit asks whether the file is there, which it is while the page is.
    with page.expect_response(is_streamlits_question), page.expect_download() as download:
        page.get_by_role("button", name="CSV").click()
    lines = Path(download.value.path()).read_text().splitlines()
    assert lines[0].startswith("example_id,arm,prompt,reference")
    assert len(lines) == 2
    page.keyboard.press("Escape")
    page.get_by_role("link", name="Follow", exact=True).click()
    page.get_by_role("heading", name="Marks").wait_for()
    page.get_by_role("link", name="Datasets").click()
    choice(page, "Test rows").click()
    page.get_by_text("6 of 6 rows").wait_for()
    page.get_by_text("grace: the answer is wrong").wait_for()
    choice(page, "Train rows").click()
    page.get_by_text("26 of 26 rows").wait_for()
    page.get_by_role("button", name="Mark").first.click()
    page.get_by_text("drop the row").click()
    page.get_by_role("button", name="Store the mark").click()
    page.get_by_text("grace: drop the row").wait_for()
    page.get_by_role("link", name="Marks").click()
    page.get_by_text("2 waiting").wait_for()
    next_version(filled)
    page.get_by_role("button", name="Refresh").click()
    page.get_by_text("2 applied").wait_for()
    page.goto(f"{served}/dataset?datasets=datasets/demo@v2&view=Changes")
    page.get_by_text("corrected by grace").wait_for()
    page.get_by_text("dropped by grace").wait_for()
    page.get_by_role("link", name="Follow", exact=True).last.click()
    page.get_by_text("corrected by grace; the files say").wait_for()
    assert_clean(visit, served)


def tab_to(page: Any, wanted: Any) -> None:
    """Press Tab until an element has the focus, as somebody without a mouse does."""
    wanted.wait_for()
    for _ in range(150):
        if wanted.evaluate("e => e === document.activeElement"):
            return
        page.keyboard.press("Tab")
    pytest.fail(f"Tab does not reach {wanted}")


def test_answers_and_votes_need_no_mouse(visit, served, filled):
    page = visit.page
    page.goto(f"{served}/answers")
    page.get_by_text("30 of 30 answers").wait_for()
    tab_to(page, page.get_by_role("combobox", name="Model"))
    page.keyboard.type("few-shot")
    page.keyboard.press("Enter")
    page.get_by_text("base+few-shot: 50.0%").wait_for()
    tab_to(page, page.get_by_label("Search"))
    page.keyboard.type("r16")
    page.keyboard.press("Enter")
    page.get_by_text("1 of 30 answers").wait_for()
    page.get_by_text("r15", exact=True).wait_for(state="detached")
    tab_to(page, page.get_by_role("button", name="Mark Shortcut 1"))
    page.keyboard.press("Enter")
    tab_to(page, page.get_by_label("Right answer"))
    page.keyboard.press("Control+A")
    page.keyboard.type('{"colour": "blue", "number": 61}')
    tab_to(page, page.get_by_label("Your name"))
    page.keyboard.type("kim")
    tab_to(page, page.get_by_role("button", name="Store the mark"))
    page.keyboard.press("Enter")
    page.get_by_text("kim: the answer is wrong").wait_for()

    page.goto(f"{served}/votes")
    tab_to(page, page.get_by_label("Your name"))
    page.keyboard.type("kim")
    page.keyboard.press("Enter")
    page.get_by_text("0 of 15 judged by kim").wait_for()
    press_until(page, "1", page.get_by_text("1 of 15 judged by kim"))
    tab_to(page, page.get_by_role("button", name="Equally good"))
    press_until(page, "Enter", page.get_by_text("2 of 15 judged by kim"))
    # The button is still the one that has the focus.
    press_until(page, "Enter", page.get_by_text("3 of 15 judged by kim"))
    tab_to(page, page.get_by_role("button", name="Change my last vote"))
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Change my last vote").wait_for(state="detached")
    press_until(page, "4", page.get_by_role("button", name="Change my last vote"))
    page.get_by_text("3 of 15 judged by kim").wait_for()
    with sqlite3.connect(filled / "review" / "verdicts.sqlite") as connection:
        asked = "SELECT choice, example_id FROM verdicts WHERE reviewer = 'kim' ORDER BY id"
        rows = connection.execute(asked).fetchall()
    assert [choice for choice, _ in rows] == ["left", "tie", "tie", "right"]
    assert rows[2][1] == rows[3][1]


def test_an_address_opens_its_page_at_once(visit, served):
    """Also on a server that nobody has visited yet, where only the main script knows the pages."""
    page = visit.page
    page.goto(f"{served}/model?models=models/demo@v1")
    page.get_by_role("heading", name="Models").wait_for()
    page.get_by_role("heading", name="Loss", exact=True).wait_for()
    page.get_by_role("link", name="Error analysis").wait_for()


def test_playground_streams_from_two_models(visit, served, parrots):
    page = visit.page
    page.goto(f"{served}/playground")
    page.get_by_role("textbox", name="Server").fill(parrots)
    page.get_by_role("textbox", name="Server").press("Enter")
    page.get_by_text("loud").first.wait_for()
    page.get_by_placeholder("Ask").fill("Who is There?")
    page.get_by_placeholder("Ask").press("Enter")
    page.get_by_text("WHO IS THERE?").first.wait_for()
    page.get_by_text("who is there?", exact=True).first.wait_for()
    assert_clean(visit, served)


@pytest.fixture(scope="module")
def phone(browser: Any) -> Iterator[Any]:
    """A page as narrow as a phone's, which loads Streamlit's scripts once."""
    context = browser.new_context(viewport={"width": 400, "height": 800})
    page = context.new_page()
    page.set_default_timeout(LONG_MS)
    yield page
    context.close()


@pytest.mark.parametrize(
    "path",
    ["", "errors", "votes", "sweep", "playground", "answers", "dataset?view=Train+rows", "marks"],
)
def test_nothing_is_wider_than_a_phone(phone, served, path: str):
    phone.goto(f"{served}/{path}")
    phone.locator("h1").first.wait_for()
    phone.wait_for_timeout(1000)
    width = phone.evaluate("document.querySelector('[data-testid=stMain]').scrollWidth")
    assert width <= 400

"""Take the README's picture of the dashboard again: `python docs/images/take.py WORKSPACE`.

Needs playwright, a Chromium on the PATH, and the published demo in the workspace.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "error-analysis.png"
PAGE = "errors?evaluations=evaluations/demo@v1&before=base%2Bfew-shot"
HEIGHT_PX = 1850


def main() -> None:
    """Start the dashboard over the given workspace and write the picture beside this file."""
    from playwright.sync_api import sync_playwright

    workspace = sys.argv[1]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "tuneloop.cli", "dashboard"]
    server = subprocess.Popen([*command, "--workspace", workspace, "--port", port])
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(url)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium") or shutil.which("google-chrome"),
                args=["--no-sandbox", "--disable-gpu"],
            )
            shoot(browser, f"{url}/{PAGE}")
    finally:
        server.terminate()
        server.wait()


def wait_for(url: str) -> None:
    """Return when the server answers; give up after a minute."""
    for _ in range(300):
        try:
            urllib.request.urlopen(f"{url}/_stcore/health", timeout=5).read()
            return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the dashboard does not start")


def shoot(browser: Any, url: str) -> None:
    """Write the picture of a page, without the sidebar."""
    page = browser.new_page(viewport={"width": 1100, "height": HEIGHT_PX})
    page.goto(url)
    page.get_by_text("What was sent").first.wait_for(timeout=60_000)
    page.add_style_tag(
        content="[data-testid=stSidebar], [data-testid=stHeader] { display: none; }"
        "[data-testid=stMainBlockContainer] { padding-top: 1.5rem !important; }"
    )
    # Parts are fetched when they are first shown; a slow machine shows grey bars meanwhile.
    page.wait_for_function("!document.querySelector('[data-testid=stSkeleton]')", timeout=60_000)
    page.wait_for_timeout(2000)
    page.screenshot(path=FILE)
    page.close()
    print(f"{FILE} {FILE.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()

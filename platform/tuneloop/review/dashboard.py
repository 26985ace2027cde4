"""Starting the dashboard's pages, which live outside the package in `dashboards/`."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

from tuneloop.errors import ResourceError

HOST = "127.0.0.1"
PORT = 8501


def run_dashboard(workspace: str, port: int = PORT, is_read_only: bool = False) -> int:
    """Serve the dashboard until interrupted and return its exit code.

    Args:
        workspace: Path or URI of the workspace to show.
        port: On 127.0.0.1.
        is_read_only: Take no votes, marks and test rows.

    Raises:
        ResourceError: Streamlit is not installed, or the port is in use.
    """
    if importlib.util.find_spec("streamlit") is None:
        raise ResourceError.of(
            "streamlit is not installed", remedy="pip install 'tuneloop[dashboard]'"
        )
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ResourceError.of(
                "the dashboard's port is in use",
                where=f"{HOST}:{port}",
                remedy="stop the program that uses it, or choose another port: --port 8502",
            ) from error
    command = [sys.executable, "-m", "streamlit", "run", str(_app()), "--server.port", str(port)]
    command += ["--server.address", HOST, "--server.headless", "true", "--", "--workspace"]
    process = subprocess.Popen([*command, workspace, *["--read-only"] * is_read_only])
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        return 0


def _app() -> Path:
    """Return the pages' script: of the checkout, else as installed from a wheel."""
    checkout = Path(__file__).parents[3] / "dashboards" / "app.py"
    installed = Path(sysconfig.get_path("data")) / "share" / "tuneloop" / "dashboards" / "app.py"
    for path in (checkout, installed):
        if path.is_file():
            return path
    raise ResourceError.of(
        "the dashboard's pages are not installed",
        where=str(installed),
        remedy="install tuneloop from a checkout or a wheel of this version",
    )

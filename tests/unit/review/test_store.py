"""What people say is stored once, for good, whoever else stores at the same time."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from tuneloop.errors import ArtifactError
from tuneloop.marks import Mark
from tuneloop.review.store import URL_VARIABLE, ReviewStore
from tuneloop.review.verdicts import Verdict

EVALUATION = "evaluations/demo@v1"
# As the versions before there were migrations made it.
LEGACY = """
CREATE TABLE verdicts (
    id INTEGER PRIMARY KEY, evaluation TEXT NOT NULL, example_id TEXT NOT NULL,
    arm_left TEXT NOT NULL, arm_right TEXT NOT NULL,
    choice TEXT NOT NULL CHECK (choice IN ('left', 'right', 'tie', 'both_bad')),
    reviewer TEXT NOT NULL, comment TEXT NOT NULL DEFAULT '', created_at TEXT NOT NULL
);
CREATE INDEX verdicts_by_evaluation ON verdicts (evaluation, reviewer, example_id);
CREATE TRIGGER verdicts_are_not_edited BEFORE UPDATE ON verdicts
    BEGIN SELECT RAISE(ABORT, 'verdicts are append-only'); END;
INSERT INTO verdicts VALUES
    (7, 'evaluations/demo@v1', 'e1', 'a', 'b', 'left', 'ann', 'why not', '2026-11-01T10:00:00');
"""


def verdict(example: str, choice: str = "left", reviewer: str = "ann") -> Verdict:
    return Verdict(EVALUATION, example, "a", "b", choice, reviewer)  # type: ignore[arg-type]


def mark(row: str = "r1", reviewer: str = "ann") -> Mark:
    return Mark("bad_reference", row, "datasets/demo@v1", reviewer, answer="42", note="sum")


def engine_of(url: str) -> sa.Engine:
    arguments = {"client_encoding": "utf8"} if url.startswith("postgresql:") else {}
    url = url.replace("postgresql:", "postgresql+psycopg:")
    return sa.create_engine(url, connect_args=arguments)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """Yield the URL of a server of our own, on a socket in its folder alone."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    if not found:
        pytest.skip("PostgreSQL is not installed")
    pytest.importorskip("psycopg")
    # Not below pytest's own folder, which nobody else may enter: the server refuses to run as root.
    folder = Path(tempfile.mkdtemp(prefix="tuneloop-"))
    user = "postgres" if os.geteuid() == 0 else getpass.getuser()
    shutil.chown(folder, user)
    options = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off"

    def run(program: str, *arguments: str) -> None:
        command = [str(found[-1].parent / program), "-D", str(folder / "data"), *arguments]
        subprocess.run(
            command, user=user, cwd=folder, check=True, capture_output=True, timeout=60,
            env={"LC_ALL": "C"},
        )  # fmt: skip

    run("initdb", "-N", "-U", "tester", "-A", "trust")
    log = str(folder / "log")
    try:
        run("pg_ctl", "-w", "-l", log, "-o", options, "start")
        yield f"postgresql://tester@/postgres?host={folder}"
    finally:
        run("pg_ctl", "-m", "immediate", "stop")
        shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a workspace whose store is the one or the other, and empty."""
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    if request.param == "postgresql":
        url = request.getfixturevalue("postgresql")
        name = f"t{time.time_ns()}"
        server = engine_of(url)
        with server.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            connection.execute(sa.text(f"CREATE DATABASE {name}"))
        monkeypatch.setenv(URL_VARIABLE, url.replace("/postgres?", f"/{name}?"))
    return tmp_path


def test_what_is_said_survives_and_a_changed_mind_is_the_newest_row(place: Path) -> None:
    store = ReviewStore(place)
    assert store.verdicts(EVALUATION) == store.marks() == []
    for said in (
        verdict("1"), verdict("2", "tie"), verdict("1", "right"), verdict("1", reviewer="bob"),
    ):  # fmt: skip
        store.add(said)
    store = ReviewStore(place)
    found = store.verdicts(EVALUATION, "ann")
    assert [(v.example_id, v.choice, v.winner) for v in found] == [
        ("2", "tie", None),
        ("1", "right", "b"),
    ]
    assert len(store.verdicts(EVALUATION)) == 3
    assert len(store.all_verdicts("1")) == 3
    assert store.verdicts("evaluations/demo@v2") == []
    first = mark()
    store.add(first)
    store.add(first)  # a second try, after a failure that left open whether it was stored
    store.add(Mark("note", "r2", "datasets/other@v3", "bob", note="Ünicode 💡\n'; DROP TABLE"))
    assert [m.row_id for m in store.marks()] == ["r1", "r2"]
    (kept,) = store.marks("demo")
    assert (kept.uid, kept.answer, kept.created_at[:2]) == (first.uid, "42", "20")
    assert store.marks()[1].note == "Ünicode 💡\n'; DROP TABLE"
    assert store.find(first.uid) == kept
    assert store.find("none") is None


def test_votes_on_several_versions_are_read_together_and_the_newest_of_each_version(
    tmp_path: Path,
) -> None:
    store = ReviewStore(tmp_path)
    later = "evaluations/demo@v2"
    for evaluation, example, choice in (
        (EVALUATION, "e1", "tie"),
        (EVALUATION, "e1", "left"),
        (EVALUATION, "e2", "left"),
        (later, "e1", "right"),
        ("evaluations/other@v1", "e1", "tie"),
    ):
        store.add(Verdict(evaluation, example, "a", "b", choice, "ann"))
    read = store.verdicts([EVALUATION, later])
    # Which of them count depends on the answers: a vote on others takes none back.
    assert [(v.evaluation, v.example_id, v.choice) for v in read] == [
        (EVALUATION, "e1", "left"),
        (EVALUATION, "e2", "left"),
        (later, "e1", "right"),
    ]
    assert store.verdicts([]) == []


def test_a_name_in_other_case_or_spaces_is_the_same_reviewer(place: Path) -> None:
    store = ReviewStore(place)
    assert store.verdicts(EVALUATION, "zoë") == []
    store.add(verdict("e1", reviewer="Zoë Lee"))
    store.add(verdict("e1", "right", "zoe\u0308  lee "))
    store.add(verdict("e1", "tie", "Zoe Lee"))
    store.add(mark(reviewer="ZOË LEE"))
    (hers,) = store.verdicts(EVALUATION, "zoë lee")
    assert (hers.reviewer, hers.choice) == ("Zoë Lee", "right")
    assert {v.reviewer for v in store.verdicts(EVALUATION)} == {"Zoë Lee", "Zoe Lee"}
    assert [m.reviewer for m in store.marks()] == ["Zoë Lee"]


@pytest.mark.parametrize("table", ["verdicts", "marks"])
def test_nothing_said_is_ever_edited(place: Path, table: str) -> None:
    store = ReviewStore(place)
    store.add(verdict("1"))
    store.add(mark())
    url = os.environ.get(URL_VARIABLE, f"sqlite:///{store.path}")
    engine = engine_of(url)
    for statement in (f"UPDATE {table} SET reviewer = 'eve'", f"DELETE FROM {table}"):
        with pytest.raises(sa.exc.DBAPIError, match="append-only"), engine.begin() as connection:
            connection.execute(sa.text(statement))
    assert [v.reviewer for v in store.verdicts(EVALUATION)] == ["ann"]
    assert [m.reviewer for m in store.marks()] == ["ann"]


def test_a_database_from_before_there_were_marks_is_brought_up_to_date(tmp_path: Path) -> None:
    (tmp_path / "review").mkdir()
    with sqlite3.connect(tmp_path / "review" / "verdicts.sqlite") as connection:
        connection.executescript(LEGACY)
    store = ReviewStore(tmp_path)
    (old,) = store.verdicts(EVALUATION)
    assert (old.example_id, old.comment, old.created_at[:4]) == ("e1", "why not", "2026")
    store.add(mark())
    store.add(verdict("e1", "right", "bob"))
    assert len(store.verdicts(EVALUATION)) == 2
    assert len(ReviewStore(tmp_path).marks()) == 1
    with sqlite3.connect(tmp_path / "review" / "verdicts.sqlite") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(ArtifactError, match="newer version of tuneloop"):
        ReviewStore(tmp_path).add(mark())


# Each reviewer is a thread, as in a dashboard; what is told as stored is noted in a file.
REVIEWERS = """
import sys, threading
from tuneloop.marks import Mark
from tuneloop.review.store import ReviewStore
from tuneloop.review.verdicts import Verdict
workspace, told, names = sys.argv[1], sys.argv[2], sys.argv[3].split(",")
lock = threading.Lock()
def review(name):
    for i in range(1000):
        store = ReviewStore(workspace)
        said = [Verdict("evaluations/demo@v1", f"e{i}", "a", "b", "left", name),
                Mark("bad_row", f"r{i}", "datasets/demo@v1", name)][i % 2]
        store.add(said)
        with lock, open(told, "a") as file:
            file.write(f"{name} {said.uid}\\n")
        if i + 1 >= int(sys.argv[4]):
            return
threads = [threading.Thread(target=review, args=[name]) for name in names]
[t.start() for t in threads]; [t.join() for t in threads]
"""


def test_reviewers_at_once_and_one_who_is_killed_lose_and_double_nothing(place: Path) -> None:
    is_server = URL_VARIABLE in os.environ
    # Two processes of ten reviewers on a server; of three and two on a file.
    parts = [[f"p{i}" for i in range(10)], [f"q{i}" for i in range(10)]]
    if not is_server:
        parts = [parts[0][:3], parts[1][:2]]
    files = [place / f"told{i}" for i in range(2)]
    processes = []
    for names, file, count in zip(parts, files, ("12", "1000"), strict=True):
        arguments = [str(place), str(file), ",".join(names), count]
        command = [sys.executable, "-c", REVIEWERS, *arguments]
        processes.append(subprocess.Popen(command, stderr=subprocess.PIPE))
    started = time.monotonic()
    while not (files[1].exists() and len(files[1].read_text().splitlines()) > 30):
        assert time.monotonic() - started < 60
        assert processes[1].poll() is None
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGKILL)
    processes[1].communicate()
    _, errors = processes[0].communicate(timeout=120)
    assert processes[0].returncode == 0, errors.decode()
    store = ReviewStore(place)
    people = [name for names in parts for name in names]
    said = [v for name in people for v in store.verdicts(EVALUATION, name)]
    stored = Counter((s.reviewer, s.uid) for s in [*said, *store.marks()])
    told = {tuple(line.split()) for file in files for line in file.read_text().splitlines()}
    assert set(stored.values()) == {1}
    assert told <= set(stored)
    # Beyond what was told there is at most what a killed reviewer was about to be told.
    assert all(name in parts[1] for name, _ in set(stored) - told)
    assert len(set(stored) - told) <= len(parts[1])
    assert Counter(name for name, _ in stored if name in parts[0]) == dict.fromkeys(parts[0], 12)


def test_unusable_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    with pytest.raises(ArtifactError, match="remote workspace"):
        ReviewStore("s3://bucket/prefix")
    (tmp_path / "review").mkdir()
    (tmp_path / "review" / "verdicts.sqlite").write_text("not a database, but long enough" * 100)
    with pytest.raises(ArtifactError, match="cannot be opened"):
        ReviewStore(tmp_path)
    monkeypatch.setenv(URL_VARIABLE, "not a url")
    with pytest.raises(ArtifactError, match="not the URL of a database"):
        ReviewStore(tmp_path)
    monkeypatch.setenv(URL_VARIABLE, "postgresql://ann:secret@127.0.0.1:1/votes")
    with pytest.raises(ArtifactError, match="check that the server runs") as raised:
        ReviewStore(tmp_path)
    assert "secret" not in str(raised.value)

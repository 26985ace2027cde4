"""Verdicts, marks and advice in a database, append-only: a changed mind is a newer row.

It is SQLite in the workspace, or the database that TUNELOOP_REVIEW_URL names: PostgreSQL for a
team. A database of an earlier version is brought up to date when it is opened.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Collection
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.pool import NullPool

from tuneloop.errors import ArtifactError, Problem
from tuneloop.marks import Mark, plain_name
from tuneloop.review.given import GivenAdvice
from tuneloop.review.verdicts import Verdict

T = TypeVar("T")
URL_VARIABLE = "TUNELOOP_REVIEW_URL"
_LOCK_TIMEOUT_S = 15.0
_CONNECT_TIMEOUT_S = 5
# Any number of our own: whoever brings the schema up to date holds this lock of PostgreSQL.
_SCHEMA_LOCK = 5_408_321_177


def _columns(record: type[Verdict] | type[Mark] | type[GivenAdvice]) -> list[sa.Column]:
    return [sa.Column(item.name, sa.Text) for item in fields(record)]


_METADATA = sa.MetaData()
_VERDICTS = sa.Table("verdicts", _METADATA, sa.Column("id", sa.BigInteger), *_columns(Verdict))
_MARKS = sa.Table("marks", _METADATA, sa.Column("id", sa.BigInteger), *_columns(Mark))
_ADVICE = sa.Table("advice", _METADATA, sa.Column("id", sa.BigInteger), *_columns(GivenAdvice))
_TABLES: dict[type, sa.Table] = {Verdict: _VERDICTS, Mark: _MARKS, GivenAdvice: _ADVICE}


class ReviewStore:
    """What people have said about the answers and rows of one workspace.

    Args:
        workspace: A local directory, where `review/verdicts.sqlite` is. Object stores do not have
            the file locks that SQLite needs: there TUNELOOP_REVIEW_URL has to name a database.

    Raises:
        ArtifactError: The workspace is not local and no database is named, or it cannot be opened.
    """

    def __init__(self, workspace: str | Path) -> None:
        url = os.environ.get(URL_VARIABLE, "")
        if not url and not has_store(workspace):
            raise ArtifactError.of(
                "what people say cannot be stored in a remote workspace",
                where="workspace",
                got=str(workspace),
                allowed=f"a local directory, or a database that {URL_VARIABLE} names",
                remedy=f"set {URL_VARIABLE}, for example to postgresql://user@host/database",
            )
        self.path: Path | None = None
        if url:
            self._url = _parsed(url)
        else:
            folder = Path(str(workspace).removeprefix("file://")).expanduser() / "review"
            self.path = folder / "verdicts.sqlite"
            self._url = sa.URL.create("sqlite", database=str(self.path))
        self.place = self._url.render_as_string(hide_password=True) if url else str(self.path)
        self._is_current = False
        if self._is_there():
            self._run(lambda connection: None)

    def add(self, said: Verdict | Mark | GivenAdvice) -> None:
        """Append a verdict, a mark or advice; it is on disk when this returns.

        Adding the same one again, after a failure that leaves open whether it was stored, keeps it
        once. A reviewer who writes her name otherwise than before, in case or spaces, stays one.

        Raises:
            ArtifactError: The database cannot be written.
        """
        table = _TABLES[type(said)]
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        values = asdict(replace(said, created_at=now))

        def insert(connection: sa.Connection) -> None:
            known = sa.select(table.c.id).where(table.c.uid == said.uid)
            if connection.execute(known).first() is None:
                if "reviewer" in values:
                    values["reviewer"] = _as_stored(connection, values["reviewer"])
                connection.execute(table.insert().values(values))

        self._run(insert, writes=True)

    def verdicts(
        self, evaluation: str | Collection[str], reviewer: str | None = None
    ) -> list[Verdict]:
        """Return the newest verdicts of each reviewer on each pair of each version, oldest first.

        Args:
            evaluation: Reference with version, or several.
            reviewer: Only hers, however she writes her name.
        """
        references = [evaluation] if isinstance(evaluation, str) else list(evaluation)
        where: sa.ColumnElement[bool] = _VERDICTS.c.evaluation.in_(references)
        if reviewer is not None and self._is_there():
            typed = reviewer
            stored = self._run(lambda connection: _as_stored(connection, typed))
            where &= _VERDICTS.c.reviewer == stored
        newest: dict[tuple[str, str, str, frozenset[str]], Verdict] = {}
        for verdict in self._select(Verdict, _VERDICTS, where):
            pair = frozenset((verdict.arm_left, verdict.arm_right))
            key = (verdict.evaluation, verdict.reviewer, verdict.example_id, pair)
            newest.pop(key, None)
            newest[key] = verdict
        return list(newest.values())

    def all_verdicts(self, example_id: str) -> list[Verdict]:
        """Return every verdict on an example or copies of it, in all evaluations, oldest first."""
        name = _VERDICTS.c.example_id
        is_meant = (name == example_id) | name.startswith(f"{example_id}-", autoescape=True)
        return self._select(Verdict, _VERDICTS, is_meant)

    def marks(self, dataset_name: str | None = None) -> list[Mark]:
        """Return every mark, or those on the rows of a dataset in any version, oldest first."""
        found = self._select(Mark, _MARKS, sa.true())
        return [m for m in found if dataset_name is None or m.dataset_name == dataset_name]

    def advice(self) -> list[GivenAdvice]:
        """Return the advice that was given, oldest first."""
        return self._select(GivenAdvice, _ADVICE, sa.true())

    def find(self, uid: str) -> Verdict | Mark | None:
        """Return the verdict or mark with a uid, or None."""
        for verdict in self._select(Verdict, _VERDICTS, _VERDICTS.c.uid == uid):
            return verdict
        for mark in self._select(Mark, _MARKS, _MARKS.c.uid == uid):
            return mark
        return None

    def _select(self, record: type[T], table: sa.Table, where: sa.ColumnElement[bool]) -> list[T]:
        if not self._is_there():
            return []
        query = sa.select(*(c for c in table.c if c.name != "id")).where(where).order_by(table.c.id)
        rows = self._run(lambda connection: connection.execute(query).mappings().all())
        # Verdicts from before there were uids have none.
        return [record(**{k: v for k, v in row.items() if v is not None}) for row in rows]

    def _is_there(self) -> bool:
        """Return whether there may be something: reading creates no file, the first vote does."""
        return self.path is None or self.path.exists()

    def _run(self, work: Callable[[sa.Connection], T], writes: bool = False) -> T:
        """Return what `work` does in one transaction, on a schema that is up to date."""
        try:
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            engine = _engine(self._url)
            if not self._is_current:
                with engine.connect() as connection:
                    self._is_current = _revision(connection) == _newest()
            is_writing = writes or not self._is_current
            with engine.connect().execution_options(writes=is_writing) as connection:
                with connection.begin():
                    if not self._is_current:
                        self._migrate(connection)
                    result = work(connection)
                self._is_current = True
                return result
        except (DBAPIError, OSError, NoSuchModuleError, ModuleNotFoundError) as error:
            raise ArtifactError(self._problem(error)) from error

    def _migrate(self, connection: sa.Connection) -> None:
        """Bring the schema up to date; of several processes the first one does it."""
        if connection.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_SCHEMA_LOCK)))
        revision = _revision(connection)
        if revision is not None and revision not in _known_revisions():
            raise ArtifactError.of(
                "the verdicts were stored by a newer version of tuneloop",
                where=self.place,
                got=f"schema {revision}",
                allowed=f"up to {_newest()}",
                remedy="update tuneloop",
            )
        if revision != _newest():
            config = _config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def _problem(self, error: Exception) -> Problem:
        cause = error.orig if isinstance(error, DBAPIError) else error
        code = getattr(cause, "sqlite_errorcode", None)
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            remedy = "wait until the other program has finished, then try again"
        elif code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            remedy = "keep a copy; `sqlite3 verdicts.sqlite .recover` may bring the votes back"
        elif isinstance(error, NoSuchModuleError | ModuleNotFoundError):
            remedy = "pip install 'tuneloop[postgres]', and give a URL such as postgresql://…"
        elif self.path is None:
            remedy = f"check that the server runs and that {URL_VARIABLE} names its database"
        else:
            remedy = "free disk space or fix the permissions"
        return Problem(
            "the verdicts cannot be opened", where=self.place, got=str(cause), remedy=remedy
        )


def _as_stored(connection: sa.Connection, reviewer: str) -> str:
    """Return a reviewer's name as it was first stored, in whatever case and spaces it is given."""
    stored: list[str] = []
    for table in (_VERDICTS, _MARKS):
        names = sa.select(table.c.reviewer).group_by(table.c.reviewer)
        stored += connection.scalars(names.order_by(sa.func.min(table.c.id)))
    if reviewer in stored:
        return reviewer
    typed = plain_name(reviewer)
    return next((name for name in stored if plain_name(name) == typed), reviewer)


def has_store(workspace: str | Path) -> bool:
    """Return whether a workspace can have verdicts and marks."""
    is_local = "://" not in str(workspace).removeprefix("file://")
    return is_local or bool(os.environ.get(URL_VARIABLE))


def _parsed(url: str) -> sa.URL:
    """Return a database's URL, with the driver that is installed with `tuneloop[postgres]`."""
    try:
        parsed = sa.make_url(url)
    except ArgumentError as error:
        raise ArtifactError.of(
            "not the URL of a database",
            where=URL_VARIABLE,
            allowed="for example postgresql://user:password@host:5432/database",
        ) from error
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    return parsed


@cache
def _engine(url: sa.URL) -> sa.Engine:
    """Return the connections to a database; SQLite's file is opened anew each time."""
    if url.get_backend_name() != "sqlite":
        arguments: dict[str, Any] = {"connect_timeout": _CONNECT_TIMEOUT_S}
        if url.get_backend_name() == "postgresql":
            # A database that was made without a language would give bytes for texts.
            arguments["client_encoding"] = "utf8"
        return sa.create_engine(url, pool_pre_ping=True, connect_args=arguments)
    engine = sa.create_engine(url, poolclass=NullPool, connect_args={"timeout": _LOCK_TIMEOUT_S})

    @sa.event.listens_for(engine, "connect")
    def _leave_transactions_to_us(connection: sqlite3.Connection, record: object) -> None:
        connection.isolation_level = None

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        # Two that read first and then want to write would lock one another out.
        writes = connection.get_execution_options().get("writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


@cache
def _known_revisions() -> tuple[str, ...]:
    """Return the revisions of the schema, newest first."""
    scripts = ScriptDirectory.from_config(_config())
    return tuple(script.revision for script in scripts.walk_revisions())


def _newest() -> str:
    return _known_revisions()[0]


def _revision(connection: sa.Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()

"""Rows of an artifact's Parquet files, filtered and page by page, however many there are.

DuckDB reads the row groups and columns that a question needs; nothing is loaded as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb

from tuneloop.artifacts import Artifact
from tuneloop.errors import ArtifactError
from tuneloop.text import ALIKE_IN_SEARCHES

# Of a column with more different values a list to choose from is no help.
_MOST_VALUES, _MOST_OF_A_CONFLICT = 50, 6
_MEMORY_LIMIT = "512MB"
_TOKENS = ("input_ids", "loss_mask")


@dataclass(frozen=True)
class RowFilter:
    """Which rows to show; an empty one lets all through.

    Args:
        words: All must occur in what a row says, in its id or in its source, in any case.
        equal: Values of columns, as text.
        below: Numbers that columns have to stay below; a value that is missing does not.
        missing: A column that has to be null.
        listed: By column of lists, what the list has to hold.
        example_ids: Only these examples; None for all.
        order_by: The column to sort by, nulls last; the order of the files if empty.
        descending: Largest first.
    """

    words: str = ""
    equal: Mapping[str, str] = field(default_factory=dict)
    below: Mapping[str, float] = field(default_factory=dict)
    missing: str = ""
    listed: Mapping[str, str] = field(default_factory=dict)
    example_ids: Sequence[str] | None = None
    order_by: str = ""
    descending: bool = False


@dataclass(frozen=True)
class RowPage:
    """Some rows, without their token ids.

    Args:
        num_matching: Rows that the filter lets through.
        num_rows: All rows.
    """

    rows: list[dict[str, Any]]
    num_matching: int
    num_rows: int


class Query:
    """Questions to the Parquet files of a folder, in SQL.

    Args:
        files: All of one schema; a column that some lack is null there.

    Raises:
        ArtifactError: A file cannot be read.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = [str(file) for file in files]
        self.connection = duckdb.connect()
        self.connection.execute(f"SET memory_limit='{_MEMORY_LIMIT}'")
        listed = ", ".join("'" + file.replace("'", "''") + "'" for file in self.files)
        try:
            self.connection.execute(
                f"CREATE VIEW rows AS FROM read_parquet([{listed}], union_by_name=true)"
            )
        except duckdb.Error as error:
            raise self._unreadable(error) from error
        described = self.ask("DESCRIBE SELECT * FROM rows")
        self.types = {row["column_name"]: row["column_type"] for row in described}

    def ask(self, sql: str, *values: object) -> list[dict[str, Any]]:
        """Return what a query on the table `rows` finds; `?` stand for the values."""
        try:
            # Several people may ask at once; a cursor of its own keeps their answers apart.
            with self.connection.cursor() as cursor:
                found = cursor.execute(sql, list(values))
                names = [column[0] for column in found.description or ()]
                return [dict(zip(names, row, strict=True)) for row in found.fetchall()]
        except duckdb.Error as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: duckdb.Error) -> ArtifactError:
        return ArtifactError.of(
            "the rows cannot be read",
            where=str(Path(self.files[0]).parent),
            got=str(error).partition("\n")[0],
            remedy="remove the artifact and run its step again",
        )

    def columns(self, without: Sequence[str] = ()) -> str:
        """Return the names of the columns, but for some, as SQL."""
        return ", ".join(quoted(name) for name in self.types if name not in without)

    def text(self) -> str:
        """Return the expression, as SQL, for all that a row says, in lower case."""
        found = []
        if "messages" in self.types:
            content = "list_transform(messages, lambda m: m.content)"
            found.append(f"array_to_string({content}, chr(10))")
        names = ("text", "row_id", "source", "reason", "example_id", "reference", "completion")
        found += [name for name in names if name in self.types]
        if {"arm", "prompt"} <= self.types.keys():
            # What was sent is JSON, with roles and examples: the question is its last turn.
            turn = "json_extract_string(TRY_CAST(prompt AS JSON), '$[#-1].content')"
            found.append(f"coalesce({turn}, prompt)")
        return f"lower(concat_ws(chr(10), {', '.join(found)}))"


def open_rows(artifact: Artifact, folder: str) -> Query | None:
    """Return the questions to ask of a split or of the removed rows; None where there are none."""
    files = sorted((artifact.path / folder).glob("*.parquet"))
    return Query(files) if files else None


def read_page(query: Query, chosen: RowFilter, page: int, page_size: int) -> RowPage:
    """Return one page of the rows that a filter lets through, in their order.

    Args:
        page: From 1; one beyond the last is empty.
    """
    conditions, values = _conditions(query, chosen)
    where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
    (total,) = query.ask("SELECT count(*) AS n FROM rows")
    matching = total
    if where:
        (matching,) = query.ask(f"SELECT count(*) AS n FROM rows {where}", *values)
    if not matching["n"]:
        return RowPage([], 0, total["n"])
    rows = query.ask(
        f"SELECT {query.columns(_TOKENS)} FROM rows {where} {_order(query, chosen)} "
        f"LIMIT {int(page_size)} OFFSET {(max(1, int(page)) - 1) * int(page_size)}",
        *values,
    )
    return RowPage(rows, matching["n"], total["n"])


def ids_where(query: Query, column: str, value: str) -> list[str]:
    """Return the ids of the rows that have a value in a column, as `value_counts` tells it."""
    conditions, values = _conditions(query, RowFilter(equal={column: value}))
    found = query.ask(f"SELECT row_id FROM rows WHERE {' AND '.join(conditions)}", *values)
    return [row["row_id"] for row in found]


def read_row(query: Query, row_id: str) -> dict[str, Any] | None:
    """Return a row whole, with its tokens, or None."""
    found = query.ask("SELECT * FROM rows WHERE row_id = ? LIMIT 1", row_id)
    return found[0] if found else None


def read_rows(query: Query, row_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return rows by their ids, without their tokens; what is not there is left out."""
    found = query.ask(
        f"SELECT {query.columns(_TOKENS)} FROM rows WHERE row_id IN (SELECT unnest(?))",
        list(row_ids),
    )
    return {row["row_id"]: row for row in found}


def conflicts(
    query: Query, page: int, page_size: int, by_task: bool = False
) -> tuple[list[list[dict[str, Any]]], int]:
    """Return groups of conversations that ask the same and answer differently, and how many are.

    Prompts are compared without regard to case and white space at their ends.

    Args:
        page: From 1.
        by_task: The rows are of a mixture: two of its tasks may answer one prompt differently.
    """
    if "messages" not in query.types:
        return [], 0
    said = "array_to_string(list_transform(messages[:-2], lambda m: m.content), chr(10))"
    asked = f"hash(lower(trim({said})){', task' * by_task})"
    answered = "hash(trim(messages[-1].content))"
    start = (max(1, int(page)) - 1) * int(page_size)
    # Groups are named by position: people call their own columns `prompt` and `value` too.
    # Each reading of a million rows takes seconds: one for the groups, one for all their rows.
    groups = query.ask(
        f"SELECT {asked} AS prompt, count(*) AS n, count(*) OVER () AS total FROM rows "
        f"GROUP BY 1 HAVING min({answered}) <> max({answered}) "
        f"ORDER BY 2 DESC, 1 LIMIT {int(page_size)} OFFSET {start}"
    )
    if not groups:
        return [], conflicts(query, 1, page_size, by_task)[1] if page > 1 else 0
    # A row of each answer first.
    each = f"row_number() OVER (PARTITION BY {asked}, {answered} ORDER BY row_id)"
    rows = query.ask(
        f"SELECT * FROM (SELECT {query.columns(_TOKENS)}, {asked} AS _asked, {each} AS _each "
        "FROM rows WHERE _asked IN (SELECT unnest(?))) "
        "QUALIFY row_number() OVER (PARTITION BY _asked ORDER BY _each, row_id) "
        f"<= {_MOST_OF_A_CONFLICT} ORDER BY _each, row_id",
        [group["prompt"] for group in groups],
    )
    found: dict[int, list[dict[str, Any]]] = {group["prompt"]: [] for group in groups}
    for row in rows:
        del row["_each"]
        found[row.pop("_asked")].append(row)
    return list(found.values()), groups[0]["total"]


def value_counts(query: Query) -> dict[str, dict[str, int]]:
    """Return the columns worth filtering by: the counts of their values, the most frequent first.

    These are texts, numbers and truths with two to fifty different values.
    """
    simple = ("VARCHAR", "BOOLEAN", "BIGINT", "INTEGER", "TINYINT", "SMALLINT")
    left_out = {"row_id", "text", "reason", "num_tokens", "kept_row_id"}
    names = [n for n, kind in query.types.items() if kind in simple and n not in left_out]
    found: dict[str, dict[str, int]] = {}
    for name in names:
        column = _as_text(name)
        counts = query.ask(
            f"SELECT {column} AS value, count(*) AS n FROM rows WHERE {quoted(name)} IS NOT NULL "
            f"GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT {_MOST_VALUES + 1}"
        )
        if 1 < len(counts) <= _MOST_VALUES:
            found[name] = {row["value"]: row["n"] for row in counts}
    return found


def quoted(name: str) -> str:
    """Return the name of a column as SQL."""
    return '"' + name.replace('"', '""') + '"'


def _as_text(name: str) -> str:
    # Of a place in a file, the file.
    return (
        "regexp_replace(source, ':[0-9]+$', '')" if name == "source" else f"{quoted(name)}::VARCHAR"
    )


def _order(query: Query, chosen: RowFilter) -> str:
    if chosen.order_by not in query.types:
        return ""
    direction = "DESC" if chosen.descending else "ASC"
    # Ids are hashes: of equal rows a random order that is the same every time.
    return f"ORDER BY {quoted(chosen.order_by)} {direction} NULLS LAST, example_id"


def _conditions(query: Query, chosen: RowFilter) -> tuple[list[str], list[object]]:
    conditions, values = [], list[object]()
    for name, value in chosen.equal.items():
        if name in query.types:
            conditions.append(f"{_as_text(name)} = ?")
            values.append(value)
    for name, limit in chosen.below.items():
        if name in query.types:
            conditions.append(f"{quoted(name)} < ?")
            values.append(limit)
    if chosen.missing in query.types:
        conditions.append(f"{quoted(chosen.missing)} IS NULL")
    for name, item in chosen.listed.items():
        conditions.append(f"list_contains({quoted(name)}, ?)")
        values.append(item)
    if chosen.example_ids is not None:
        conditions.append("example_id IN (SELECT unnest(?))")
        values.append(list(chosen.example_ids))
    for word in chosen.words.split():
        said, asked = query.text(), "lower(?)"
        for letter, plain in ALIKE_IN_SEARCHES:
            if plain in word.casefold():
                said, asked = (f"replace({text}, '{letter}', '{plain}')" for text in (said, asked))
        conditions.append(f"contains({said}, {asked})")
        values.append(word)
    return conditions, values

"""Sources that are more than files: folders with splits, the Hub's layout, object stores."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

from tuneloop.config import TuneloopConfig
from tuneloop.data.sources.files import find_files
from tuneloop.data.sources.readers import read_source
from tuneloop.errors import DataError


def config_for(path: Path | str, **source: Any) -> TuneloopConfig:
    layout = {"path": str(path), "format": "question_answer", **source}
    return TuneloopConfig.model_validate(
        {
            "name": "t",
            "task": {"type": "generation"},
            "model": {"base": "x"},
            "data": {"sources": [layout]},
        }
    )


def read(config: TuneloopConfig) -> list[dict[str, Any]]:
    files = find_files(config.data.sources)
    rows = [row for i, file in enumerate(files) for row in read_source(file, i, config)]
    assert not any(row["rejection"] for row in rows)
    return rows


def answers(config: TuneloopConfig) -> list[str]:
    return [row["messages"][-1]["content"] for row in read(config)]


def refusal(config: TuneloopConfig) -> Any:
    with pytest.raises(DataError) as caught:
        find_files(config.data.sources)
    (problem,) = caught.value.problems
    return problem


def jsonl(*answers: str) -> str:
    return "".join(json.dumps({"question": f"q {a}", "answer": a}) + "\n" for a in answers)


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[int]:
    """Serve on 127.0.0.1 meanwhile; the value is the port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join()


def test_splits_in_file_names_are_not_mixed_unasked(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "repo",
        **{
            "data__train-00000-of-00002_dot_jsonl": jsonl("a"),
            "data__train-00001-of-00002_dot_jsonl": jsonl("b"),
            "data__test_dot_jsonl": jsonl("c"),
            "validation__part_dot_jsonl": jsonl("d"),
            "README_dot_md": "---\nlicense: mit\n---\nRows.\n",
        },
    )
    problem = refusal(config_for(folder))
    assert problem.what == "the data set has several splits"
    assert problem.allowed == "test, train, validation"
    assert "data.sources.0.split" in problem.remedy
    assert answers(config_for(folder, split="train")) == ["a", "b"]
    assert answers(config_for(folder, split="validation")) == ["d"]
    assert sorted(answers(config_for(folder, split="all"))) == ["a", "b", "c", "d"]
    problem = refusal(config_for(folder, split="dev"))
    assert (problem.where, problem.allowed) == (
        "data.sources.0.split",
        "test, train, validation, all",
    )
    # One split, or none, is what the directory holds.
    assert answers(config_for(folder / "data" / "test.jsonl")) == ["c"]
    assert answers(config_for(folder / "validation")) == ["d"]
    # Chapters are no splits.
    write(folder / "docs", training_dot_md="a", evaluation_dot_md="b", other_dot_txt="c")
    assert len(find_files(config_for(folder / "docs", format="text").data.sources)) == 3
    assert refusal(config_for(folder / "data" / "test.jsonl", split="test")).what == (
        "files have no splits"
    )
    assert "subsets" in refusal(config_for(folder / "data" / "*.jsonl", subset="x")).what


def test_a_described_folder_is_read_as_its_description_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    monkeypatch.setenv("TUNELOOP_CACHE", str(tmp_path / "cache"))
    described = """---
configs:
- config_name: small
  default: true
  data_files:
  - {split: train, path: part-one/*.parquet}
  - {split: test, path: part-two/x.parquet}
- config_name: other
  data_files: part-two/y.parquet
---
"""
    folder = write(tmp_path / "repo", README_dot_md=described)
    features = Features({"question": Value("string"), "answer": ClassLabel(names=["good", "bad"])})
    for part in ("one/0", "one/1", "two/x", "two/y"):
        labels = {"one/0": [0, 1, 1], "one/1": [0], "two/x": [1], "two/y": [1, -1]}[part]
        rows = {"question": [f"{part} {i}" for i in range(len(labels))], "answer": labels}
        (folder / f"part-{part}").parent.mkdir(exist_ok=True)
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"part-{part}.parquet")
    assert refusal(config_for(folder)).allowed == "train, test"
    rows = read(config_for(folder, split="train"))
    # A class label is its name, not its number.
    assert [row["messages"][-1]["content"] for row in rows] == ["good", "bad", "bad", "good"]
    assert rows[3]["source"] == f"{folder}/part-one/1.parquet:1"
    (found,) = find_files(config_for(folder, subset="other").data.sources)
    labelled, missing = read_source(found, 0, config_for(folder, subset="other"))
    assert labelled["messages"][-1]["content"] == "bad"
    assert "is empty" in missing["rejection"].what
    assert answers(config_for(folder, split="test")) == ["bad"]
    assert "no such split" in refusal(config_for(folder, split="dev")).what
    problem = refusal(config_for(folder, subset="large"))
    assert problem.where == "data.sources.0.subset"
    assert "small" in problem.got
    # The files themselves hold numbers; their schema has the names.
    assert answers(config_for(folder / "part-one" / "0.parquet")) == ["good", "bad", "bad"]

    # A folder is read as it is, whatever was read from it before.
    (folder / "part-two" / "x.parquet").write_bytes((folder / "part-one/0.parquet").read_bytes())
    assert answers(config_for(folder, split="test")) == ["good", "bad", "bad"]
    (folder / "README.md").write_text(described.replace("default: true", "columns: [question]"))
    assert refusal(config_for(folder, subset="small", split="test")).got == "columns"
    (folder / "README.md").write_text(described.replace("x.parquet", "absent.parquet"))
    assert refusal(config_for(folder, split="test")).what == "`datasets` cannot load the data set"


def test_saved_splits_are_named_with_the_same_key(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list([{"question": f"q{i}", "answer": f"a{i}"} for i in range(3)])
    DatasetDict({"train": rows, "extra": rows.select([2])}).save_to_disk(tmp_path / "many")
    assert answers(config_for(tmp_path / "many", split="extra")) == ["a2"]
    assert len(answers(config_for(tmp_path / "many", split="all"))) == 4
    assert refusal(config_for(tmp_path / "many", split="test")).allowed == "extra, train, all"
    assert "no split" in refusal(config_for(tmp_path / "many" / "train", split="train")).allowed


def test_a_hub_id_without_the_hub_is_one_clear_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNELOOP_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for path in ("someone/some-data", "hf://datasets/someone/some-data"):
        problem = refusal(config_for(path))
        assert problem.what == "the Hub does not answer and the data set is not in the local cache"
        assert problem.where == "data.sources.0.path"
        assert problem.got == path
        assert str(tmp_path) in problem.remedy
    # What is meant for a file, or lies in a directory that is there, is no Hub id.
    (tmp_path / "rows").mkdir()
    for path in ("nowhere/faq.jsonl", "rows/faq", "nowhere/faq.jsonl.gz"):
        assert refusal(config_for(path)).what == "no such file"


COMMIT = "c0ffee" * 6 + "abcd"
FETCH = """
import json, sys
from tuneloop.config import TuneloopConfig
from tuneloop.data.sources.files import find_files
from tuneloop.data.sources.readers import read_source
config = TuneloopConfig.model_validate_json(sys.argv[1])
files = find_files(config.data.sources)
print(json.dumps([(r["source"], r["messages"][-1]["content"])
                  for i, f in enumerate(files) for r in read_source(f, i, config)]))
"""


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub's protocol that loading takes, with one data set."""

    files = {  # noqa: RUF012
        "README.md": b"---\nlicense: mit\n---\n",
        "data/train.jsonl": jsonl("a", "b").encode(),
        "data/test.jsonl": jsonl("c").encode(),
    }

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        _, at, name = path.partition(f"/some-data/resolve/{COMMIT}/")
        name = name if at else path.partition("/some-data/resolve/main/")[2]
        folder = path.partition(f"/some-data/tree/{COMMIT}")[2].strip("/")
        if name in self.files:
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{name}"'}
            self.answer(200, self.files[name], headers)
        elif path.endswith(f"/some-data/revision/{COMMIT}"):
            self.answer(200, json.dumps({"id": "someone/some-data", "sha": COMMIT, "tags": []}))
        elif f"/some-data/tree/{COMMIT}" in path:
            files = [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                for name, data in self.files.items()
                if name.rpartition("/")[0] == folder
            ]
            folders = [] if folder else [{"type": "directory", "path": "data", "oid": "0" * 40}]
            self.answer(200, json.dumps(folders + files))
        else:
            self.answer(404, "", {"X-Error-Code": "EntryNotFound" if name else "RepoNotFound"})

    def answer(self, status: int, data: str | bytes, headers: dict[str, str] | None = None) -> None:
        content = data.encode() if isinstance(data, str) else data
        self.send_response(status)
        for name, value in (headers or {"Content-Type": "application/json"}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def test_a_hub_id_is_fetched_and_then_read_without_the_hub(tmp_path: Path) -> None:
    def fetched(path: str, endpoint: str) -> tuple[str, str]:
        # The library reads its settings when it is imported.
        own = {"TUNELOOP_CACHE": "cache", "HF_HOME": "home", "HF_ENDPOINT": endpoint}
        own |= {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-c", FETCH, config_for(path, split="train").model_dump_json()],
            cwd=tmp_path,
            env=os.environ | own,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout, done.stderr

    with serving(Hub) as port:
        said, problem = fetched("someone/some-data", f"http://127.0.0.1:{port}")
        assert problem == ""
        expected = [["someone/some-data/train:1", "a"], ["someone/some-data/train:2", "b"]]
        assert json.loads(said) == expected
        _, problem = fetched("someone/absent", f"http://127.0.0.1:{port}")
        assert "no such data set on the Hub, nor such a file or directory" in problem
    said, notice = fetched("someone/some-data", f"http://127.0.0.1:{port}")
    assert json.loads(said) == expected
    assert "cached version" in notice


class ObjectStore(BaseHTTPRequestHandler):
    """The part of the S3 protocol that reading takes, over objects in memory."""

    objects: dict[str, bytes]

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        name = unquote(urlsplit(self.path).path).strip("/")
        data = self.objects.get(name)
        is_bucket = any(key.startswith(f"{name}/") for key in self.objects) and "/" not in name
        self.send_response(200 if is_bucket or data is not None else 404)
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        name = unquote(url.path).lstrip("/")
        if "list-type" in query:
            self.answer(self.listing(name.rstrip("/"), query).encode(), 200)
        elif name not in self.objects:
            self.answer(b"<Error><Code>NoSuchKey</Code></Error>", 404)
        elif span := self.headers.get("Range"):
            first, last = span.removeprefix("bytes=").split("-")
            data = self.objects[name]
            part = data[int(first) : int(last) + 1]
            self.answer(part, 206, f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        else:
            self.answer(self.objects[name], 200)

    def listing(self, bucket: str, query: dict[str, str]) -> str:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        keys = [name.removeprefix(f"{bucket}/") for name in self.objects]
        keys = sorted(key for key in keys if key.startswith(prefix))
        folders = {prefix + key[len(prefix) :].split("/")[0] + "/" for key in keys if delimiter}
        found = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(self.objects[f'{bucket}/{key}'])}</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key in keys
            if not delimiter or "/" not in key[len(prefix) :]
        ) + "".join(
            f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>"
            for folder in sorted(folders)
            if any(key.startswith(folder) for key in keys)
        )
        return (
            f"<ListBucketResult><Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix>"
            f"<KeyCount>{len(keys)}</KeyCount><MaxKeys>1000</MaxKeys>"
            f"<IsTruncated>false</IsTruncated>{found}</ListBucketResult>"
        )

    def answer(self, data: bytes, status: int, content_range: str = "") -> None:
        self.send_response(status)
        if content_range:
            self.send_header("Content-Range", content_range)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[dict[str, bytes], str]]:
    """Objects by bucket and key, and what a URI needs to reach them."""
    objects: dict[str, bytes] = {}
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with serving(type("Store", (ObjectStore,), {"objects": objects})) as port:
        yield objects, f"?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"


def test_objects_are_read_by_key_directory_and_glob(store: tuple[dict[str, bytes], str]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    objects, query = store
    rows = [{"question": f"q {answer}", "answer": answer} for answer in "cd"]
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(rows), sink)
    objects |= {
        "bucket/rows/a.jsonl": jsonl("a").encode(),
        "bucket/rows/deep/b.jsonl.gz": gzip.compress(jsonl("b").encode()),
        "bucket/rows/z.parquet": sink.getvalue().to_pybytes(),
        "bucket/rows/README.md": b"# Rows",
        "bucket/others/e.jsonl": jsonl("e").encode(),
    }
    (row,) = read(config_for(f"s3://bucket/rows/a.jsonl{query}"))
    assert row["source"] == "s3://bucket/rows/a.jsonl:1"
    with_key = config_for(f"s3://test:test@bucket/others/e.jsonl{query}")
    assert [row["source"] for row in read(with_key)] == ["s3://bucket/others/e.jsonl:1"]
    assert answers(config_for(f"s3://bucket/rows{query}")) == ["a", "b", "c", "d"]
    assert answers(config_for(f"s3://bucket/*/*.jsonl{query}")) == ["e", "a"]
    assert answers(config_for(f"s3://bucket/rows/*.parquet{query}")) == ["c", "d"]
    (file,) = find_files(config_for(f"s3://bucket/others/e.jsonl{query}").data.sources)
    before = file.sha256()
    objects["bucket/others/e.jsonl"] = jsonl("f").encode()
    assert file.sha256() != before
    assert refusal(config_for(f"s3://bucket/absent.jsonl{query}")).what == "no such file"
    assert refusal(config_for(f"s3://bucket/rows/*.csv{query}")).what == "a glob matches no file"

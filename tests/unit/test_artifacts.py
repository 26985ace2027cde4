"""Artifacts: published whole or not at all, never changed, found again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pyarrow import fs

from tuneloop.artifacts import Artifact, Workspace, fingerprint, sha256_file
from tuneloop.errors import ArtifactError, ResourceError


def publish(workspace: Workspace, identity: str, content: str = "rows") -> Artifact:
    with workspace.draft("datasets", "faq", identity) as draft:
        (draft.path / "train").mkdir()
        (draft.path / "train" / "a.txt").write_text(content)
        return draft.publish(
            config={"seed": 1}, resources={"workers": 2}, inputs=["file.jsonl"], metrics={"rows": 3}
        )


def test_the_manifest_says_everything(tmp_path: Path) -> None:
    artifact = publish(Workspace(tmp_path), "f" * 64)
    manifest = json.loads((tmp_path / "datasets/faq/v1/artifact.json").read_text())
    assert set(manifest) == set(
        "schema_version kind name version fingerprint config resources inputs packages git "
        "metrics created_at duration_s files".split()
    )
    assert artifact.ref == "datasets/faq@v1"
    (entry,) = [file for file in manifest["files"] if file["path"] == "train/a.txt"]
    assert entry["bytes"] == 4
    assert entry["sha256"] == sha256_file(artifact.path / "train" / "a.txt")
    assert not any((tmp_path / ".work").iterdir())


def test_same_fingerprint_is_found_and_another_is_the_next_version(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    first = publish(workspace, "1" * 64)
    second = publish(workspace, "2" * 64)
    assert second.version == 2
    found = workspace.find("datasets", "faq", "1" * 64)
    assert found is not None
    assert found.version == first.version
    assert workspace.find("datasets", "faq", "3" * 64) is None
    assert workspace.open("datasets/faq").version == 2
    assert workspace.open("datasets/faq@v1").version == 1
    assert [artifact.ref for artifact in workspace.published()] == [first.ref, second.ref]


def test_a_failure_publishes_nothing_and_keeps_the_scratch(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    with pytest.raises(ValueError), workspace.draft("models", "faq", "a" * 64) as draft:
        (draft.scratch / "checkpoint").write_text("step 10")
        (draft.path / "half").write_text("half")
        raise ValueError("boom")
    assert workspace.published() == []
    with workspace.draft("models", "faq", "a" * 64) as draft:
        assert (draft.scratch / "checkpoint").read_text() == "step 10"
        assert not (draft.path / "half").exists()


def test_a_failure_with_nothing_to_go_on_from_leaves_nothing(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    with pytest.raises(ValueError), workspace.draft("datasets", "faq", "a" * 64) as draft:
        (draft.path / "half").write_text("half")
        raise ValueError
    assert list((tmp_path / ".work").iterdir()) == []


def test_kill_while_building_publishes_nothing_and_frees_the_lock(tmp_path: Path) -> None:
    code = textwrap.dedent(f"""
        import os, signal
        from tuneloop.artifacts import Workspace
        with Workspace({str(tmp_path)!r}).draft("datasets", "faq", "b" * 64) as draft:
            (draft.path / "rows").write_text("1")
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    workspace = Workspace(tmp_path)
    assert workspace.published() == []
    publish(workspace, "b" * 64)
    assert [artifact.ref for artifact in workspace.published()] == ["datasets/faq@v1"]


def test_two_builders_of_the_same_artifact_are_told(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    with (
        workspace.draft("datasets", "faq", "c" * 64),
        pytest.raises(ResourceError, match="another process"),
        workspace.draft("datasets", "faq", "c" * 64),
    ):
        pass


def test_a_damaged_artifact_is_refused(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    artifact = publish(workspace, "d" * 64)
    (artifact.path / "train" / "a.txt").write_text("")
    with pytest.raises(ArtifactError, match="damaged"):
        workspace.open("datasets/faq")


@pytest.mark.parametrize("text", ["", "\0" * 300, '{"kind": "datasets", ', "[1]", "{}"])
def test_a_manifest_that_cannot_be_read_stops_nothing_else(text: str, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    first, second = publish(workspace, "d" * 64), publish(workspace, "e" * 64)
    (second.path / "artifact.json").write_text(text)
    artifacts, damaged = workspace.listing()
    assert [artifact.ref for artifact in artifacts] == [first.ref]
    assert [problem.what for problem in damaged] == [f"{second.ref} is damaged"]
    with pytest.raises(ArtifactError, match=f"{second.ref} is damaged"):
        workspace.open("datasets/faq")
    assert workspace.open("datasets/faq@v1").ref == first.ref
    # The step that made it makes the next version.
    assert workspace.find("datasets", "faq", "e" * 64) is None
    assert workspace.find("datasets", "faq", "d" * 64) == first
    assert publish(workspace, "e" * 64).version == 3


@pytest.mark.parametrize("reference", ["faq", "datasets/faq@2", "things/faq", "datasets/nope"])
def test_references_that_name_nothing(tmp_path: Path, reference: str) -> None:
    workspace = Workspace(tmp_path)
    publish(workspace, "e" * 64)
    with pytest.raises(ArtifactError):
        workspace.open(reference)


def test_a_workspace_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot open the workspace"):
        Workspace(tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_workspace_is_the_users_problem(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ResourceError):
        publish(Workspace(tmp_path / "w"), "f" * 64)


def test_a_full_disk_is_the_users_problem(tmp_path: Path) -> None:
    with (
        pytest.raises(ResourceError, match="No space left"),
        Workspace(tmp_path).draft("datasets", "faq", "a" * 64),
        Path("/dev/full").open("w") as full,
    ):
        full.write("x" * 100_000)
        full.flush()


def test_the_fingerprint_depends_on_values_not_on_order() -> None:
    assert fingerprint("a", 1, x=1, y=[2]) == fingerprint("a", 1, y=[2], x=1)
    assert fingerprint("a", 1, x=1) != fingerprint("a", 2, x=1)
    assert fingerprint("a", 1, x=1) != fingerprint("b", 1, x=1)


@pytest.fixture
def store(tmp_path: Path) -> Workspace:
    """A workspace that treats a local folder as a remote store."""
    workspace = Workspace(tmp_path / "cache")
    workspace.remote, workspace._arrow, workspace.location = True, fs, "store://bucket"
    workspace._fs = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    workspace._base = "b"
    workspace._fs.create_dir("b")
    return workspace


def test_a_workspace_behind_a_uri(store: Workspace, tmp_path: Path) -> None:
    artifact = publish(store, "a" * 64)
    assert (tmp_path / "b/datasets/faq/v1/artifact.json").exists()
    assert artifact.location == "store://bucket/datasets/faq/v1"
    shutil.rmtree(tmp_path / "cache")
    again = store.open("datasets/faq@v1")
    assert (again.path / "train" / "a.txt").read_text() == "rows"


def test_an_upload_that_was_cut_short_hides_nothing(store: Workspace, tmp_path: Path) -> None:
    published = publish(store, "a" * 64)
    (tmp_path / "b/datasets/faq/v2").mkdir()
    (tmp_path / "b/datasets/faq/v2/a.txt").write_text("ro")
    assert store.open("datasets/faq").ref == published.ref
    assert publish(store, "b" * 64).version == 3


def test_a_copy_of_what_was_removed_from_the_store_is_not_used(
    store: Workspace, tmp_path: Path
) -> None:
    publish(store, "a" * 64)
    folder = tmp_path / "b/datasets/faq/v1"
    shutil.rmtree(folder)
    # Removed there, and made anew: here, then by another machine.
    artifact = publish(store, "b" * 64)
    assert (artifact.version, artifact.fingerprint) == (1, "b" * 64)
    (folder / "train" / "a.txt").write_text("ROWS")
    manifest = (folder / "artifact.json").read_text()
    (folder / "artifact.json").write_text(manifest.replace("b" * 64, "c" * 64))
    assert (store.open("datasets/faq").path / "train" / "a.txt").read_text() == "ROWS"


def test_two_uploads_at_once_are_two_versions(
    store: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = store._versions

    def slow(kind: str, name: str) -> list[int]:
        found = versions(kind, name)
        time.sleep(0.1)
        return found

    monkeypatch.setattr(store, "_versions", slow)
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda letter: publish(store, letter * 64).version, "ab"))
    assert sorted(made) == [1, 2]
    assert {a.fingerprint[0] for a in store.published()} == {"a", "b"}


def test_files_of_published_artifacts_are_fetched_where_they_are_needed(
    store: Workspace, tmp_path: Path
) -> None:
    publish(store, "a" * 64)
    shutil.rmtree(tmp_path / "cache")
    (listed,) = store.published("datasets", "faq")
    assert not listed.path.exists()
    (fetched,) = store.with_files([listed])
    assert (fetched.path / "train" / "a.txt").read_text() == "rows"

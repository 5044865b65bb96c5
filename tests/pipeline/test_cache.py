"""The cache of a run: what counts as done, what is removed, and who may work in a run folder."""

from __future__ import annotations

import json
import logging
import multiprocessing
from pathlib import Path

import pytest

from lpcam.pipeline.cache import RECORD, Result, in_use, locked
from lpcam.runtime.errors import ArtefactError
from lpcam.runtime.files import digest_json
from lpcam.runtime.versions import versions

PARTS = {"tau": 0.1, "backbone": {"name": "a", "arguments": {}}, "images": "d1"}


def cache(folder: Path, *names: str, **changes: object) -> Result:
    """A result of some files."""
    return Result(folder.name, folder, {**PARTS, **changes}, [folder / name for name in names])


def finished(folder: Path, *names: str) -> list[Path]:
    """A finished result with some files."""
    made = cache(folder)
    made.begin()
    paths = [folder / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    made.finish({"digest": "abc"})
    return paths


def test_begin_finish_done(tmp_path: Path) -> None:
    folder = tmp_path / "cam"
    one = cache(folder)
    assert not one.done()
    one.begin()
    assert not cache(folder).done()
    (folder / "a.npz").write_text("x")
    one.finish({"digest": "abc", "history": [1]})
    again = cache(folder, "a.npz")
    assert again.done()
    assert again.output == {"digest": "abc", "history": [1]}
    assert not cache(folder, "a.npz", "b.npz").done()
    record = json.loads((folder / RECORD).read_text())
    assert record["parts"] == PARTS
    assert record["done"] is True
    assert record["versions"] == versions()


def test_the_key_depends_on_the_values_alone() -> None:
    key = cache(Path()).key
    assert Result("", Path(), dict(reversed(PARTS.items()))).key == key
    others = [
        cache(Path(), tau=0.2),
        cache(Path(), images="d2"),
        cache(Path(), backbone={"name": "a", "arguments": {"x": 1}}),
        cache(Path(), more=None),
    ]
    assert len({key, *(other.key for other in others)}) == 5


def test_the_same_key_resumes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "cam"
    cache(folder).begin()
    (folder / "a.npz").write_text("x")
    with caplog.at_level(logging.INFO):
        cache(folder).begin()
    assert (folder / "a.npz").read_text() == "x"
    assert "cam: resuming" in caplog.text


def test_another_key_removes_the_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "cam"
    finished(folder, "a.npz", "barn/b.npz")
    beside = tmp_path / "other.txt"
    beside.write_text("x")
    changed = cache(folder, tau=0.2, images=digest_json(1), backbone={"name": "b", "arguments": {}})
    assert not changed.done()
    with caplog.at_level(logging.INFO):
        changed.begin()
    assert [path.name for path in folder.rglob("*")] == [RECORD]
    assert beside.exists()
    # a digest means nothing to a reader, so only the name of its part is shown
    assert "cam: recomputing: backbone.name 'a' -> 'b'; images; tau 0.1 -> 0.2" in caplog.text
    assert not cache(folder).done()  # the old settings are no longer done either


def test_an_interrupted_removal_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cam"
    paths = finished(folder, "a.npz", "b.npz")
    unlink = Path.unlink

    def stops_at_b(self: Path, missing_ok: bool = False) -> None:
        if self.name == "b.npz":
            raise KeyboardInterrupt
        unlink(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", stops_at_b)
        with pytest.raises(KeyboardInterrupt):
            cache(folder, tau=0.2).begin()
    assert paths[1].exists()
    assert not cache(folder, "a.npz", "b.npz", tau=0.2).done()
    cache(folder, tau=0.2).begin()
    assert not paths[1].exists()  # a file of other settings does not survive


def test_files_without_a_record_are_never_removed(tmp_path: Path) -> None:
    folder = tmp_path / "seeds"
    folder.mkdir()
    cache(folder).begin()  # an empty folder is fine
    (folder / RECORD).unlink()
    (folder / "mine.png").write_text("x")
    with pytest.raises(ArtefactError, match=r"seeds.*stage\.json"):
        cache(folder).begin()
    assert (folder / "mine.png").read_text() == "x"


@pytest.mark.parametrize("text", ["{}", "[]", '{"key": "a"}', "{"])
def test_a_record_of_another_kind_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(ArtefactError, match=r"stage\.json"):
        cache(tmp_path).done()


def test_a_second_run_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    assert not in_use(folder)
    with locked(folder):
        assert in_use(folder)
        with pytest.raises(ArtefactError, match=r"another run uses .*a;"), locked(folder):
            pass
        with locked(tmp_path / "b"):
            pass
    assert not in_use(folder)
    with locked(folder):
        pass


def test_a_lock_ends_with_the_process_that_holds_it(tmp_path: Path) -> None:
    here, there = multiprocessing.Pipe()

    def hold() -> None:
        with locked(tmp_path):
            there.send("held")
            there.recv()

    holder = multiprocessing.get_context("fork").Process(target=hold)
    holder.start()
    try:
        assert here.recv() == "held"
        with pytest.raises(ArtefactError, match="another run"), locked(tmp_path):
            pass
    finally:
        holder.kill()
        holder.join()
    with locked(tmp_path):
        pass


def test_a_run_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    match = r"file/run: .*--run\.folder"
    with pytest.raises(ArtefactError, match=match), locked(tmp_path / "file" / "run"):
        pass

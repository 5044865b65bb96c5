"""Stage records: what counts as done, what is removed, and who may work in a run folder."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from lpcam.pipeline.stage import RECORD, Stage, locked
from lpcam.runtime.errors import ArtefactError
from lpcam.runtime.files import digest_json
from lpcam.runtime.versions import versions

PARTS = {"tau": 0.1, "backbone": {"name": "a", "arguments": {}}, "images": "d1"}


def stage(folder: Path, **changes: object) -> Stage:
    return Stage(folder, {**PARTS, **changes})


def finished(folder: Path, *names: str) -> list[Path]:
    """A finished stage with some files."""
    made = stage(folder)
    made.begin()
    paths = [folder / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    made.finish(digest="abc")
    return paths


def test_begin_finish_done(tmp_path: Path) -> None:
    folder = tmp_path / "cam"
    one = stage(folder)
    assert not one.done([])
    one.begin()
    assert not stage(folder).done([])
    (folder / "a.npz").write_text("x")
    one.finish(digest="abc", history=[1])
    again = stage(folder)
    assert again.output == {}
    assert again.done([folder / "a.npz"])
    assert again.output == {"digest": "abc", "history": [1]}
    assert not stage(folder).done([folder / "a.npz", folder / "b.npz"])
    record = json.loads((folder / RECORD).read_text())
    assert record["parts"] == PARTS
    assert record["done"] is True
    assert record["versions"] == versions()


def test_the_key_is_of_the_values_and_not_of_their_order() -> None:
    key = stage(Path()).key
    assert Stage(Path(), dict(reversed(PARTS.items()))).key == key
    others = [
        stage(Path(), tau=0.2),
        stage(Path(), images="d2"),
        stage(Path(), backbone={"name": "a", "arguments": {"x": 1}}),
        stage(Path(), more=None),
    ]
    assert len({key, *(other.key for other in others)}) == 5


def test_the_same_settings_go_on_with_the_files_there_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "cam"
    stage(folder).begin()
    (folder / "a.npz").write_text("x")
    with caplog.at_level(logging.INFO):
        stage(folder).begin()
    assert (folder / "a.npz").read_text() == "x"
    assert "cam: goes on where it stopped" in caplog.text


def test_other_settings_remove_the_files_and_say_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "cam"
    finished(folder, "a.npz", "barn/b.npz")
    beside = tmp_path / "other.txt"
    beside.write_text("x")
    changed = stage(folder, tau=0.2, backbone={"name": "b", "arguments": {}})
    assert not changed.done([])
    with caplog.at_level(logging.INFO):
        changed.begin()
    assert [path.name for path in folder.rglob("*")] == [RECORD]
    assert beside.exists()
    assert "cam: made anew, for backbone.name 'a' -> 'b'; tau 0.1 -> 0.2" in caplog.text
    assert not stage(folder).done([])  # the old settings are no longer done either


def test_digests_are_not_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for value in ("a", "b"):
        stage = Stage(tmp_path / "cam", {"images": digest_json(value), "tau": value})
        stage.begin()
        stage.finish()
    assert "cam: made anew, for images; tau 'a' -> 'b'" in caplog.text


def test_a_stop_while_files_are_removed_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
            stage(folder, tau=0.2).begin()
    assert paths[1].exists()
    assert not stage(folder, tau=0.2).done(paths)
    stage(folder, tau=0.2).begin()
    assert not paths[1].exists()  # a file of other settings does not survive


def test_files_that_may_be_the_users_are_never_removed(tmp_path: Path) -> None:
    folder = tmp_path / "seeds"
    folder.mkdir()
    stage(folder).begin()  # an empty folder is fine
    (folder / RECORD).unlink()
    (folder / "mine.png").write_text("x")
    with pytest.raises(ArtefactError, match=r"seeds holds files but no .*stage\.json, so they may"):
        stage(folder).begin()
    assert (folder / "mine.png").read_text() == "x"


@pytest.mark.parametrize("text", ["{}", "[]", '{"key": "a"}', "{"])
def test_a_record_of_another_kind(tmp_path: Path, text: str) -> None:
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(ArtefactError, match=r"stage\.json is .*delete"):
        stage(tmp_path).done([])


def test_a_second_run_is_refused_and_the_lock_goes_with_its_holder(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    with locked(folder):
        match = r"another run is working in .*a; wait for it"
        with pytest.raises(ArtefactError, match=match), locked(folder):
            pass
        with locked(tmp_path / "b"):
            pass
    with locked(folder):
        pass


def test_another_process_holds_the_lock_until_it_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from lpcam.pipeline.cache import locked\n"
        f"with locked(Path({str(tmp_path)!r})):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": str(Path(__file__).parents[1] / "src")},
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ArtefactError, match="another run is working"), locked(tmp_path):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with locked(tmp_path):
        pass


def test_a_run_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    match = r"cannot use the run folder .*file/run: .*--run\.folder"
    with pytest.raises(ArtefactError, match=match), locked(tmp_path / "file" / "run"):
        pass

"""Run folders: written whole or not at all, read validated, locked."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from kitbench.errors import InputError
from kitbench.store.files import writable, writable_file, write_atomic
from kitbench.store.folder import RunFolder, RunLocked, find
from kitbench.store.records import Evaluation, Owner
from kitbench.verdict.rows import rows
from tests.stored import rewrite, store


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        find([tmp_path / "missing"])
    with pytest.raises(InputError, match="No run in"):
        find([tmp_path])
    store(tmp_path / "runs", "kit", 30.0)
    with pytest.raises(InputError, match=r"give .*/runs, which has some\."):
        find([tmp_path])
    assert len(find([tmp_path / "runs"])) == 1


def test_a_file_name_as_long_as_file_systems_allow_is_written_and_a_longer_one_refused(tmp_path: Path) -> None:
    longest = tmp_path / ("x" * 255)
    writable_file(longest)
    write_atomic(longest, b"whole")
    assert longest.read_bytes() == b"whole"
    with pytest.raises(InputError, match="is too long; give a shorter one"):
        writable_file(tmp_path / ("x" * 256))
    with pytest.raises(InputError, match="cannot be written .File name too long.; give a file in another folder"):
        writable_file(tmp_path / ("x" * 256) / "file.csv")
    with pytest.raises(InputError, match="cannot be written .File name too long.; choose another with --out"):
        writable(tmp_path / ("x" * 256))


def test_a_device_or_a_pipe_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null"), Path("/dev/stdout")):
        with pytest.raises(InputError, match="is a device or a pipe, which the new file would replace"):
            writable_file(path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"schema_version": 99}', '{"schema_version": 1}', "[" * 100_000]
)
def test_a_record_that_is_none_is_refused_in_one_sentence(tmp_path: Path, text: str) -> None:
    folder = store(tmp_path, "kit", 30.0)
    (folder.path / "run.json").write_text(text)
    with pytest.raises(InputError) as refused:
        rows([folder])
    assert "run.json" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "file.json"
    write_atomic(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == ["file.json"]


def test_only_one_process_works_on_a_run_and_the_others_are_told_which(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert not folder.held()
    with folder.lock() as killed:
        assert killed is None
        assert folder.held()
        with pytest.raises(RunLocked, match=rf"worked on by process {os.getpid()} on .*; wait for it"), folder.lock():
            pass
    assert not folder.held()
    with folder.lock() as killed:
        assert killed is None


def test_whether_another_users_run_is_held_is_told_without_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, real = RunFolder(tmp_path / "run"), os.open

    def read_only(path: str, flags: int, *more: int, **others: int) -> int:
        if str(path).endswith(".lock") and flags & (os.O_RDWR | os.O_WRONLY):
            raise PermissionError(13, "Permission denied")
        return real(path, flags, *more, **others)

    with folder.lock():
        monkeypatch.setattr(os, "open", read_only)
        assert folder.held()
    assert not folder.held()


def test_what_a_killed_process_left_is_recognised_and_removed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    (folder.path / "eval").mkdir(parents=True)
    for half in (folder.path / ".run.json.123.tmp", folder.path / "eval" / ".a.json.123.tmp"):
        half.write_text('{"ha')
    folder.write(".owner", Owner(pid=123, host="there", started="2026-01-01T00:00:00+00:00"))
    with folder.lock() as killed:
        assert str(killed) == "process 123 on there (since 2026-01-01T00:00:00+00:00)"
        assert not list(folder.path.rglob("*.tmp"))
    assert not (folder.path / ".owner").exists()


def test_a_record_of_another_schema_is_refused_with_what_to_do(tmp_path: Path) -> None:
    folder = store(tmp_path, "kit", 30.25)
    path = folder.path / "training.json"
    text = path.read_text()
    for version, advice in (("2", "update kitbench"), ("0", "restore it"), ("null", "restore it")):
        path.write_text(text.replace('"schema_version": 1', f'"schema_version": {version}'))
        with pytest.raises(InputError, match=advice):
            _ = folder.training


def test_scores_of_a_training_that_is_not_known_to_have_ended_are_refused(tmp_path: Path) -> None:
    """By all that read scores; those of a training-free method, which has no training.json, are read."""
    assert store(tmp_path, "input", 20.0, seed=None).evaluations()
    folder = store(tmp_path, "kit", 30.25)
    (folder.path / "training.json").unlink()
    with pytest.raises(
        InputError, match=r"has scores, but no training\.json, written before them; restore it or delete"
    ):
        folder.evaluations()


@pytest.mark.parametrize("stamp", ["../../../x", "a/b.v1", "a.v1+12345", "/etc.v1", ""])
def test_a_strangers_record_leads_to_no_file_outside_its_folder(stamp: str, tmp_path: Path) -> None:
    folder = store(tmp_path, "kit", 30.25)
    [path] = (folder.path / "eval").iterdir()
    record = json.loads(path.read_text())
    del record["sha256"]
    path.write_text(json.dumps(record | {"stamp": stamp}))
    with pytest.raises(InputError, match="stamp"):
        folder.evaluations()
    [evaluation] = [Evaluation.model_validate(record | {"data_set": "../../secret/.."})]
    crop = folder.crop_path(evaluation.data_set, evaluation.sigma, evaluation.stamp, 0)
    assert crop.resolve().parent == folder.path.resolve() / "crops"


def test_an_evaluation_without_images_is_no_record(tmp_path: Path) -> None:
    folder = store(tmp_path, "kit", 30.25)
    [path] = (folder.path / "eval").iterdir()
    rewrite(path, lambda raw: raw.update(scores=[]))
    with pytest.raises(InputError, match="scores: expected at least one value"):
        rows([folder])


def test_a_number_changed_by_hand_is_noticed(tmp_path: Path) -> None:
    folder = store(tmp_path, "kit", 30.25)
    [path] = (folder.path / "eval").iterdir()
    path.write_text(path.read_text().replace("31.25", "32.25"))
    with pytest.raises(InputError, match="is damaged or was edited"):
        folder.evaluations()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"parameters": -5}, "cost.parameters: Input should be greater than or equal to 0"),
        ({"attention_parameters": 1235}, "1235 parameters in the attention are more than the 1234 in all"),
        ({"macs": -1}, "cost.macs: Input should be greater than or equal to 0"),
        ({"train_peak_bytes": 10**30}, "cost.train_peak_bytes: Input should be less than or equal to"),
        ({"step_seconds": -1}, "cost.step_seconds: Input should be greater than or equal to 0"),
        ({"resolution": 0}, "cost.resolution: Input should be greater than or equal to 1"),
    ],
)
def test_a_cost_that_nothing_has_is_no_record(tmp_path: Path, change: dict[str, object], fault: str) -> None:
    folder = store(tmp_path, "kit", 30.0)
    rewrite(folder.path / "training.json", lambda raw: raw["cost"].update(change))
    with pytest.raises(InputError, match=fault):
        assert folder.training


def test_a_pipe_in_the_place_of_a_record_is_not_waited_for(tmp_path: Path) -> None:
    folder = store(tmp_path, "kit", 30.25)
    (folder.path / "run.json").unlink()
    os.mkfifo(folder.path / "run.json")
    with pytest.raises(InputError, match="is not a file"):
        _ = folder.run


def test_a_folder_that_cannot_be_written_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    writable(tmp_path / "a" / "b")
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        writable(tmp_path / "file" / "results")


def test_records_survive_the_disk(tmp_path: Path) -> None:
    folder = store(tmp_path, "kit", 30.25)
    [evaluation] = folder.evaluations()
    assert [score.psnr for score in evaluation.scores] == [29.25, 31.25]
    assert np.mean([score.ssim for score in evaluation.scores]) == 0.5
    assert folder.training is not None
    assert folder.run.identity["seed"] == 0

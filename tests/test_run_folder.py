"""The run folder: what it refuses, what is deleted in it, and its files."""

import json
import resource

import pytest

from experiments.train.run import RunFolder
from experiments.train.terminal import UserError


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_foreign_folder_is_refused_and_nothing_is_written_there(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    run = RunFolder(tmp_path)
    with pytest.raises(UserError, match="not a run folder"), run.locked():
        pass
    for overwrite in (False, True):
        with pytest.raises(UserError, match="not a run folder"):
            run.open({"a": 1}, overwrite=overwrite)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def begun(path):
    run = RunFolder(path)
    run.open({"a": 1}, overwrite=False)
    return run


def test_overwrite_deletes_what_the_run_wrote_and_nothing_else(tmp_path):
    run = begun(tmp_path)
    for name in ("notes.txt", "mine.png", "mine.npz", "other.jsonl"):
        (tmp_path / name).write_text("mine")
    run.file("metrics.json").write_text("{}")
    run.file("checkpoints/stage").mkdir(parents=True)
    (tmp_path / "checkpoints" / "stage" / "5").mkdir()
    (tmp_path / "checkpoints" / "notes").write_text("mine")
    with pytest.raises(UserError, match="--a: the folder has 1, now 2"):
        RunFolder(tmp_path).open({"a": 2}, overwrite=False)
    RunFolder(tmp_path).open({"a": 2}, overwrite=True)
    names = {str(entry.relative_to(tmp_path)) for entry in tmp_path.rglob("*")}
    assert names == {
        "config.json", "manifest.json", "notes.txt", "mine.png", "mine.npz", "other.jsonl",
        "checkpoints", "checkpoints/notes",
    }  # fmt: skip
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 2}


@pytest.mark.parametrize("name", ["latents", "checkpoints"])
def test_overwrite_never_deletes_behind_a_link(tmp_path, name):
    run, disk = begun(tmp_path / "run"), tmp_path / "disk"
    run.file("checkpoints/stage"), run.file("latents"), run.file("samples.npz").write_text("x")
    (disk / "stage" / "5").mkdir(parents=True)
    (run.path / name).symlink_to(disk)
    with pytest.raises(UserError, match="is a link, and what is behind links is not deleted"):
        RunFolder(run.path).open({"a": 2}, overwrite=True)
    assert (disk / "stage" / "5").exists() and (run.path / "samples.npz").exists()
    assert json.loads((run.path / "config.json").read_text()) == {"a": 1}


def test_a_run_without_a_manifest_is_not_deleted(tmp_path):
    (tmp_path / "config.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        RunFolder(tmp_path).open({"a": 2}, overwrite=True)


@pytest.mark.parametrize(
    "manifest",
    ['{"wrote": ["../x"]}', '{"wrote": ["/etc"]}', '{"wrote": 5}', '{"wrote": [1]}', "5"],
)
def test_a_manifest_that_names_other_places_is_refused(tmp_path, manifest):
    begun(tmp_path)
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        RunFolder(tmp_path).open({"a": 2}, overwrite=True)


@pytest.mark.parametrize("content", [b"", b"{", b"5", b"[1]", b"\xff{}", b"null", b"[" * 10**5])
@pytest.mark.parametrize("name", ["config.json", "metrics.json"])
def test_a_damaged_json_file_is_named(tmp_path, name, content):
    run = begun(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} is damaged"):
        run.config() if name == "config.json" else run.metrics()


def test_a_log_with_damaged_lines_goes_on(tmp_path):
    run = begun(tmp_path)
    run.log(stage="a", step=1)
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(b'5\n{}\n\xff\xfe\n{"stage": "a", "step": null}\n[]\n{"stage": "a", "st')
    run.rewind_log("a", 5)
    assert log(tmp_path) == [{"stage": "a", "step": 1}, {"stage": "a", "step": None}]


def test_a_log_that_cannot_be_written_is_said_once_and_goes_on_later(tmp_path, capsys):
    run = RunFolder(tmp_path)
    run.log(stage="a", step=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, hard))  # in the middle of the next line
    try:
        run.log(stage="a", step=2)
        run.log(stage="a", step=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    run.log(stage="a", step=4)
    assert [entry["step"] for entry in run.log_entries()] == [1, 4]
    said = capsys.readouterr().out
    assert said.count(f"{tmp_path}/log.jsonl: File too large. Going on without") == 1


def test_a_run_killed_before_it_had_a_configuration_is_begun_anew(tmp_path):
    (tmp_path / ".config.json-0123abcd.json").write_text("{")
    (tmp_path / ".lock").write_text("")
    RunFolder(tmp_path).open({"a": 1}, overwrite=False)
    assert (tmp_path / "config.json").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / ".samples.npz-0123abcd.npz").write_text("")
    with pytest.raises(UserError, match="not a run folder"):
        RunFolder(other).open({"a": 1}, overwrite=False)


def test_a_run_folder_belongs_to_one_command(tmp_path):
    with (
        RunFolder(tmp_path).locked(),
        pytest.raises(UserError, match="in use by another"),
        RunFolder(tmp_path).locked(),
    ):
        pass


@pytest.mark.parametrize("path", ["file", "file/below", "x" * 300, "/proc/eqxldm"])
def test_a_place_where_no_folder_can_be_is_one_message(tmp_path, path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--run-dir"), RunFolder(tmp_path / path).locked():
        pass

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from kdexport.errors import RunError
from kdexport.files import fault_of, write_bytes
from kdexport.stages import Run, read_record


def build(calls, content="x"):
    def write(folder: Path) -> None:
        calls.append(folder.name)
        (folder / "file").write_text(content)

    return write


def test_a_stage_is_built_once_and_again_only_when_something_changed(tmp_path):
    source, calls = tmp_path / "source.csv", []
    source.write_text("a")

    def go(version=1, settings=None):
        with Run(tmp_path / "run") as run:
            run.stage("one", version=version, settings=settings, reads=[source], build=build(calls))
        return len(calls)

    assert [go(), go()] == [1, 1]
    assert go(version=2) == 2
    assert go(version=2, settings={"epochs": 3}) == 3
    source.write_text("b")
    assert go(version=2, settings={"epochs": 3}) == 4
    source.touch()  # time alone changes nothing
    assert go(version=2, settings={"epochs": 3}) == 4


def test_a_later_stage_is_kept_when_an_earlier_one_gives_the_same_again(tmp_path):
    calls = []
    for version in (1, 2):
        with Run(tmp_path) as run:
            first = run.stage("first", version=version, settings=None, reads=[], build=build(calls))
            run.stage("second", version=1, settings=None, reads=[first], build=build(calls))
    assert calls == [".kdexport-first", ".kdexport-second", ".kdexport-first"]


def test_two_things_of_one_name_and_an_edited_stage_of_another_run_are_told_apart(tmp_path):
    with Run(tmp_path / "other") as run:
        other = run.stage("one", version=1, settings=None, reads=[], build=build([]))
    calls = []

    def go():
        with Run(tmp_path / "run") as run:
            mine = run.stage("one", version=1, settings=None, reads=[], build=build([], "mine"))
            run.stage("two", version=1, settings=None, reads=[other, mine], build=build(calls))
        return len(calls)

    assert [go(), go()] == [1, 1]
    (other / "file").write_text("edited")
    assert go() == 2


def test_a_failed_stage_leaves_the_finished_one_in_place(tmp_path):
    with Run(tmp_path) as run:
        run.stage("one", version=1, settings=None, reads=[], build=build([]))

    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise ValueError

    with Run(tmp_path) as run, pytest.raises(ValueError):  # noqa: PT011
        run.stage("one", version=2, settings=None, reads=[], build=fail)
    assert (tmp_path / "one" / "file").read_text() == "x"


def test_interrupted_work_is_found_again_by_the_same_key_only(tmp_path):
    found = []

    def interrupted(folder: Path) -> None:
        (folder / "checkpoint").write_text("7")
        raise KeyboardInterrupt

    def look(folder: Path) -> None:
        found.append((folder / "checkpoint").exists())

    for settings in ("same", "other"):
        with Run(tmp_path / settings) as run, pytest.raises(KeyboardInterrupt):
            run.stage("one", version=1, settings="same", reads=[], build=interrupted)
        with Run(tmp_path / settings) as run:
            run.stage("one", version=1, settings=settings, reads=[], build=look)
    assert found == [True, False]


def test_a_stage_killed_before_its_rename_is_taken_as_it_is(tmp_path):
    with Run(tmp_path) as run:
        one = run.stage("one", version=1, settings=None, reads=[], build=build([]))
    one.rename(tmp_path / ".kdexport-one")
    calls = []
    with Run(tmp_path) as run:
        run.stage("one", version=1, settings=None, reads=[], build=build(calls))
    assert calls == []
    assert read_record(one).outputs.keys() == {"file"}


def test_a_damaged_stage_is_put_aside_and_made_again(tmp_path, capsys):
    calls = []

    def go() -> Path:
        with Run(tmp_path) as run:
            one = run.stage("one", version=1, settings=None, reads=[], build=build(calls, "weights"))
            run.stage("two", version=1, settings=None, reads=[one], build=build(calls))
        return one / "file"

    def flip(path: Path) -> None:
        path.write_text("weighty")

    go()
    for number, damage in enumerate((flip, Path.unlink, lambda path: os.truncate(path, 3)), 1):
        damage(tmp_path / "one" / "file")
        assert go().read_text() == "weights"
        assert "is put aside and made again" in capsys.readouterr().err
        assert (tmp_path / f"one.old-{number}" / "stage.json").is_file()
    assert calls == [".kdexport-one", ".kdexport-two", *[".kdexport-one"] * 3]  # what reads the same is not made again
    for name in ("one", "two"):
        flip(tmp_path / name / "file")
    go()
    assert calls[5:] == [".kdexport-one", ".kdexport-two"]


def test_what_was_put_aside_is_in_no_later_runs_way(tmp_path):
    for call, version in enumerate((1, 1, 2)):
        with Run(tmp_path) as run:
            one = run.stage("student-seed1", version=version, settings=None, reads=[], build=build([]))
            run.stage("verify", version=version, settings=None, reads=[], build=build([]))
        if call == 0:
            (one / "file").write_text("damaged")
    assert (tmp_path / "student-seed1.old-1" / "file").read_text() == "damaged"


def test_a_copied_run_whose_files_have_other_times_is_as_finished_as_before(tmp_path, capsys):
    calls = []
    for folder in ("here", "there"):
        with Run(tmp_path / folder) as run:
            run.stage("one", version=1, settings=None, reads=[], build=build(calls))
        if folder == "here":
            shutil.copytree(tmp_path / "here", tmp_path / "there", copy_function=shutil.copyfile)
    assert len(calls) == 1
    assert "put aside" not in capsys.readouterr().err


def test_what_a_power_cut_left_of_a_stage_before_its_rename_is_not_taken(tmp_path):
    with Run(tmp_path) as run:
        one = run.stage("one", version=1, settings=None, reads=[], build=build([]))
    one.rename(tmp_path / ".kdexport-one")
    os.truncate(tmp_path / ".kdexport-one" / "file", 0)
    with Run(tmp_path) as run:
        run.stage("one", version=1, settings=None, reads=[], build=build([]))
    assert (one / "file").read_text() == "x"


def test_every_file_of_a_stage_is_on_the_disk_before_it_has_its_name_and_the_name_after(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(os, "fsync", lambda fd: order.append(str(Path(f"/proc/self/fd/{fd}").readlink())))

    def nested(folder: Path) -> None:
        (folder / "onnx").mkdir()
        (folder / "onnx" / "model").write_text("x")

    with Run(tmp_path) as run:
        rename = Path.rename
        monkeypatch.setattr(Path, "rename", lambda self, to: (order.append(f"→ {Path(to).name}"), rename(self, to))[1])
        run.stage("one", version=1, settings=None, reads=[], build=nested)
    named = order.index("→ one")
    work = tmp_path / ".kdexport-one"
    assert {str(work / "onnx" / "model"), str(work / "onnx"), str(work), str(work / "stage.json")} <= {
        path.partition(".stage.json")[0] + "stage.json" if ".stage.json" in path else path for path in order[:named]
    }
    assert order[named + 1] == str(tmp_path)


def test_two_processes_cannot_share_a_run(tmp_path):
    with Run(tmp_path), pytest.raises(RunError, match="in use"):
        Run(tmp_path)


def test_a_strange_folder_is_not_taken_for_a_run(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="is not empty, and kdexport run did not write it"):
        Run(tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk wants root")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(
    ("code", "line"),
    [
        (errno.ENOSPC, "the disk is full: FOLDER. Make room"),
        (errno.EDQUOT, "the disk is full: FOLDER. Make room"),
        (errno.EROFS, "FOLDER is on a read-only file system. Mount it for writing"),
        (errno.EMFILE, "too many files are open. Raise the limit (ulimit -n 1024)"),
    ],
)
def test_a_fault_of_the_machine_is_one_line_however_a_library_words_it(tmp_path, code, line):
    own = OSError(code, os.strerror(code))
    words = RuntimeError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")
    behind = ValueError("can't save")
    behind.__cause__ = own
    for error in (own, words, behind):
        assert str(fault_of(error, tmp_path)).startswith(line.replace("FOLDER", str(tmp_path)))
    assert fault_of(FileNotFoundError(errno.ENOENT, "No such file"), Path("/proc/self")) is None
    assert fault_of(KeyError("logits"), tmp_path) is None


def test_a_file_that_finds_no_room_is_named_and_nothing_is_left_of_it(small_disk):
    for new in (False, True):
        with pytest.raises(OSError, match=r"No space left on device: .*spec\.yaml"):
            write_bytes(small_disk / "spec.yaml", b"0" * 1_000_000, new=new)
    assert list(small_disk.iterdir()) == []


def test_a_full_disk_is_one_line_and_keeps_what_was_finished(small_disk):
    with Run(small_disk / "run") as run:
        run.stage("one", version=1, settings=None, reads=[], build=build([]))

        def fill(folder: Path) -> None:
            write_bytes(folder / "big", b"0" * 1_000_000)

        with pytest.raises(RunError, match="the disk is full"):
            run.stage("two", version=1, settings=None, reads=[], build=fill)
    assert (small_disk / "run" / "one" / "file").read_text() == "x"
    assert not (small_disk / "run" / "two").exists()

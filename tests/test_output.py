"""Nothing of the user's is lost: what kdexport did not write, or what was changed since, is kept."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import as_flags

from kdexport.errors import RunError
from kdexport.files import hash_file, write_bytes
from kdexport.output import PRIVATE, Output, making, publish, read_record
from kdexport.stages import Run

MINE = b"three years of work\n"


def bytes_below(folder: Path) -> dict[str, str]:
    """Every file and link below a folder with its content; of `.kdexport` and its kind, which are ours, none."""
    found = {}
    for here, folders, names in os.walk(folder):
        for name in (*names, *(f for f in folders if Path(here, f).is_symlink())):
            path = Path(here, name)
            if PRIVATE not in here:
                content = str(path.readlink()) if path.is_symlink() else hash_file(path)
                found[str(path.relative_to(folder))] = content
    return found


def assert_kept(before: dict[str, str], folder: Path, *ours: str) -> None:
    """Every one of the files is there as it was, but for those that are ours to change."""
    after = bytes_below(folder)
    assert not {name for name, content in before.items() if after.get(name) != content} - {*ours}


def assert_refused(found: subprocess.CompletedProcess[str], path: object) -> None:
    """One line that names the file, and exit code 2."""
    assert found.returncode == 2, found.stderr
    last = found.stderr.splitlines()[-1]
    assert last.startswith("error: "), found.stderr
    assert str(path) in last, found.stderr
    assert "--move-aside" in last, found.stderr
    assert "Traceback" not in found.stderr


def plant(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(MINE)
    return path


# --- the module


def test_a_file_is_replaced_while_it_is_ours_and_kept_once_it_was_edited(tmp_path):
    with Output(tmp_path / "out", "bench") as out:
        out.write("report.md", b"one")
        out.write("report.md", b"two")
    with Output(tmp_path / "out", "bench") as out:
        out.write("report.md", b"three")
        (out.folder / "report.md").write_text("three, and my notes")
        with pytest.raises(RunError, match=r"report\.md was changed after kdexport wrote it"):
            out.write("report.md", b"four")
    assert (tmp_path / "out/report.md").read_text() == "three, and my notes"
    with Output(tmp_path / "out", "bench", move_aside=True) as out:
        out.write("report.md", b"four")
    assert (tmp_path / "out/report.md").read_text() == "four"
    assert (tmp_path / "out/report.md.old-1").read_text() == "three, and my notes"


def test_a_kill_between_record_and_file_leaves_a_file_that_is_still_ours(tmp_path, monkeypatch):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with Output(tmp_path / "out", "bench") as out:
        out.write("a", b"one")
    for content in (b"two", b"three", b"four"):
        with Output(tmp_path / "out", "bench") as out, monkeypatch.context() as patch:
            patch.setattr("kdexport.output.write_bytes", killed)
            with pytest.raises(KeyboardInterrupt):
                out.write("a", content)
    with Output(tmp_path / "out", "bench") as out:
        out.write("a", b"two")
    assert (tmp_path / "out/a").read_bytes() == b"two"


@pytest.mark.parametrize("kind", ["file", "deep", "link", "dangling", "folder link", "pipe", "edited", "hidden"])
def test_a_folder_is_replaced_only_if_it_holds_exactly_what_was_written(tmp_path, kind):
    outside = plant(tmp_path / "elsewhere" / "file")

    def build(work: Path) -> None:
        (work / "sub").mkdir()
        (work / "file").write_text("ours")
        (work / "sub" / "file").write_text("ours")

    with Run(tmp_path / "run") as run:
        one = run.stage("data", version=1, settings=None, reads=[], build=build)
    match kind:
        case "file":
            plant(one / "labels-by-hand.csv")
        case "deep":
            plant(one / "sub" / "stage.json")  # the name of a record of ours, elsewhere
        case "link":
            (one / "file").unlink()
            (one / "file").symlink_to(outside)
        case "dangling":
            (one / "link").symlink_to("nowhere")
        case "folder link":
            (one / "more").symlink_to(outside.parent)
        case "pipe":
            os.mkfifo(one / "pipe")
        case "edited":
            (one / "file").write_text("ours, mended")
        case "hidden":
            plant(one / ".git" / "HEAD")
    before = {p: p.lstat().st_ino for p in one.rglob("*")}
    with Run(tmp_path / "run") as run, pytest.raises(RunError, match="is to be replaced"):
        run.stage("data", version=2, settings=None, reads=[], build=build)
    assert {p: p.lstat().st_ino for p in one.rglob("*")} == before
    with Run(tmp_path / "run", move_aside=True) as run:
        run.stage("data", version=2, settings=None, reads=[], build=build)
    assert len(list((tmp_path / "run" / "data.old-1").rglob("*"))) == len(before)
    assert outside.read_bytes() == MINE


def test_what_a_later_stage_would_refuse_is_refused_before_the_first_one_works(tmp_path):
    def build(work: Path) -> None:
        (work / "file").write_text("ours")

    with Run(tmp_path / "run") as run:
        for name in ("data", "student", "artifact"):
            run.stage(name, version=1, settings=None, reads=[], build=build)
    plant(tmp_path / "run/artifact/NOTES.md")
    calls = []
    with Run(tmp_path / "run") as run:
        run.stage("data", version=1, settings=None, reads=[], build=calls.append)  # it stands: nothing is in the way
        with pytest.raises(RunError, match=r"artifact/NOTES\.md was not written by kdexport"):
            run.stage("student", version=2, settings=None, reads=[], build=calls.append)
    assert calls == []


def test_a_foreign_lock_is_never_truncated_and_makes_no_run(tmp_path):
    plant(tmp_path / "lk" / ".lock")
    plant(tmp_path / "lk" / "data" / "a")
    with pytest.raises(RunError, match="is not empty"):
        Run(tmp_path / "lk")
    plant(tmp_path / "priv" / ".kdexport" / "notes")
    for move in (False, True):
        with pytest.raises(RunError, match="is not empty"):
            Run(tmp_path / "priv", move_aside=move)
    assert {path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == {MINE}


def test_sources_that_lie_where_the_run_writes_are_refused(tmp_path):
    Run(tmp_path / "run").__exit__()
    for name in ("data/tickets.csv", "teacher", "student-seed1/model", "report.json", ".kdexport-data/x"):
        with pytest.raises(RunError, match="lies where the run writes"):
            Run(tmp_path / "run", [tmp_path / "run" / name])
    Run(tmp_path / "run", [tmp_path / "run" / "tickets.csv", tmp_path / "data" / "a.csv"]).__exit__()


def test_a_new_file_never_replaces_one_and_a_full_disk_leaves_none(tmp_path):
    file = plant(tmp_path / "spec.yaml")
    with pytest.raises(FileExistsError):
        write_bytes(file, b"new", new=True)
    with pytest.raises(OSError, match="nowhere"):
        write_bytes(tmp_path / "nowhere" / "spec.yaml", b"new", new=True)
    assert [path.name for path in tmp_path.iterdir()] == ["spec.yaml"]
    assert file.read_bytes() == MINE


def made_in(work: Path, content: str, *names: str) -> Path:
    for name in names:
        path = work / "made" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return work / "made"


def test_a_published_folder_is_replaced_whole_or_beside_what_others_put_there(tmp_path):
    place, mine = tmp_path / "repository" / "t", ("1", "config.pbtxt")
    for content in ("one", "two"):
        with making(place) as work:
            publish(made_in(work, content, "1/model.onnx", "config.pbtxt"), place, work, mine)
    plant(place / "2" / "model.onnx")
    with making(place) as work:
        publish(made_in(work, "three", "1/model.onnx", "config.pbtxt"), place, work, mine)
    assert (place / "1/model.onnx").read_text() == "three"
    assert (place / "2/model.onnx").read_bytes() == MINE
    assert set(read_record(place).files) == {"1/model.onnx", "config.pbtxt"}
    (place / "config.pbtxt").write_text("three # count: 4")
    with making(place) as work, pytest.raises(RunError, match=r"config\.pbtxt was changed"):
        publish(made_in(work, "four", "1/model.onnx", "config.pbtxt"), place, work, mine)
    assert (place / "1/model.onnx").read_text() == "three"
    assert [path.name for path in tmp_path.rglob(".*.kdexport*")] == []


_KILLED = """
import os, signal, sys, kdexport.output as o
from pathlib import Path
place, at = Path(sys.argv[1]), int(sys.argv[2])
calls = 0
def counted(function):
    def call(*arguments, **more):
        global calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **more)
    return call
Path.rename = counted(Path.rename)
with o.making(place) as work:
    (work / "made").mkdir()
    (work / "made" / "file").write_text("new")
    o.publish(work / "made", place, work)
"""


def test_a_killed_export_leaves_the_old_folder_or_the_new_and_the_next_one_clears_up(tmp_path):
    place = tmp_path / "dep"
    for at in range(1, 6):
        shutil.rmtree(tmp_path)
        with making(place) as work:
            publish(made_in(work, "old", "file"), place, work)
        code = subprocess.run([sys.executable, "-c", _KILLED, str(place), str(at)]).returncode
        assert (code == -signal.SIGKILL) == (at < 4)
        with making(place):
            pass
        assert (place / "file").read_text() == ("old" if at < 4 else "new")
        assert [path.name for path in tmp_path.iterdir()] == ["dep"]


def test_a_file_beside_our_record_is_not_ours(tmp_path):
    place = tmp_path / "dep"
    with making(place) as work:
        publish(made_in(work, "one", "file"), place, work)
    mine = plant(place / PRIVATE / "notes.txt")
    with making(place) as work, pytest.raises(RunError, match=r"notes\.txt was not written by kdexport"):
        publish(made_in(work, "two", "file"), place, work)
    assert mine.read_bytes() == MINE


def test_the_current_folder_is_not_moved_from_under_its_user(tmp_path, monkeypatch):
    mine = plant(tmp_path / "home" / "notes.txt")
    monkeypatch.chdir(tmp_path / "home")
    with making(tmp_path / "home") as work, pytest.raises(RunError, match="is the current folder"):
        publish(made_in(work, "one", "file"), tmp_path / "home", work, may_move=True)
    assert mine.read_bytes() == MINE


def test_a_stage_of_before_there_were_records_is_known_by_its_own(tmp_path):
    def build(work: Path) -> None:
        (work / "file").write_text("ours")

    with Run(tmp_path / "run") as run:
        one = run.stage("data", version=1, settings=None, reads=[], build=build)
    shutil.rmtree(tmp_path / "run" / PRIVATE)
    with Run(tmp_path / "run", move_aside=True) as run:
        run.stage("data", version=2, settings=None, reads=[], build=build)
    assert not list(tmp_path.rglob("*.old-1"))
    shutil.rmtree(tmp_path / "run" / PRIVATE)
    (one / "file").write_text("edited")
    with Run(tmp_path / "run", move_aside=True) as run:
        run.stage("data", version=3, settings=None, reads=[], build=build)
    assert (tmp_path / "run/data.old-1/file").read_text() == "edited"


# --- the commands, in a process of their own, with files of others in every place that they write to


@pytest.fixture
def hands(copied, tmp_path):
    """A finished run, surrounded: a file in every folder, and every file that the user may edit, edited."""
    for folder in [copied, *(path for path in copied.rglob("*") if path.is_dir())]:
        if ".kdexport" not in folder.parts:
            plant(folder / "MINE.txt")
    return copied


def test_run_keeps_what_others_put_into_its_stages(kdexport, hands, settings):
    before = bytes_below(hands)
    flags = [*as_flags(settings | {"seed": 1}), "--out", hands]
    assert_refused(kdexport("run", *flags), "MINE.txt")
    assert_kept(before, hands)


def test_run_goes_on_beside_files_that_are_not_in_its_way(kdexport, hands, settings):
    mine = {path: path.read_bytes() for path in hands.rglob("MINE.txt")}
    found = kdexport("run", *as_flags(settings), "--out", hands)
    assert found.returncode == 0, found.stderr
    assert all(path.read_bytes() == content for path, content in mine.items())


@pytest.mark.parametrize("name", ["spec.yaml", "report.json", "report.md", "report.html"])
def test_run_keeps_an_edited_file(kdexport, copied, settings, name):
    with (copied / name).open("a") as file:
        file.write("\n# my notes\n")
    before = bytes_below(copied)
    assert_refused(kdexport("run", *as_flags(settings), "--out", copied), name)
    assert_kept(before, copied)


def test_run_takes_no_folder_of_others_and_a_failed_run_owns_only_what_it_wrote(kdexport, tmp_path, base_model):
    home = tmp_path / "home"
    plant(home / ".lock")
    plant(home / "data" / "a.csv")
    rows = "text,label\n" + "".join(f"text number {i},{'ab'[i % 2]}\n" for i in range(40))
    (tmp_path / "good.csv").write_text(rows)
    (tmp_path / "bad.csv").write_text("text,label\nfine,a\n,b\n")
    before = bytes_below(home)
    assert_refused(kdexport("run", "--teacher", base_model, "--data", tmp_path / "good.csv", "--out", home), home)
    assert_kept(before, home)
    empty = tmp_path / "empty"
    assert kdexport("run", "--teacher", base_model, "--data", tmp_path / "bad.csv", "--out", empty).returncode == 2
    plant(empty / "data" / "labels-by-hand.csv")
    (empty / "data" / "tickets.csv").write_text(rows)
    before = bytes_below(empty)
    found = kdexport("run", "--teacher", base_model, "--data", empty / "data/tickets.csv", "--out", empty)
    assert found.returncode == 2
    assert "tickets.csv lies where the run writes" in found.stderr
    found = kdexport("run", "--teacher", base_model, "--data", tmp_path / "good.csv", "--out", empty)
    assert_refused(found, "data")
    assert_kept(before, empty, "spec.yaml")


def test_bench_takes_no_folder_of_others_and_no_run(kdexport, copied, tmp_path):
    mine = tmp_path / "mine"
    for name in ("rows.json", "report.html", "bench.json"):
        plant(mine / name)
    before = bytes_below(mine) | {}
    quick = ["--rounds", 1, "--round-seconds", 0.05, "--batch-sizes", 0, "--precision", 0]
    assert_refused(kdexport("bench", f"{copied}:int8", "--out", mine, *quick), mine)
    assert_kept(before, mine)
    before = bytes_below(copied)
    found = kdexport("bench", f"{copied}:int8", "--out", copied, *quick)
    assert found.returncode == 2
    assert "holds what kdexport run wrote" in found.stderr
    assert_kept(before, copied)
    out, other = tmp_path / "bench", plant(tmp_path / "benchmark.json")
    assert_refused(kdexport("bench", f"{copied}:int8", "--out", out, "--pytest-benchmark", other, *quick), other)
    assert other.read_bytes() == MINE
    for _ in range(2):
        assert kdexport("bench", f"{copied}:int8", "--out", out, *quick).returncode == 0
        plant(out / "rows.json")
        plant(out / "notes.md")
    assert (out / "rows.json").read_bytes() == (out / "notes.md").read_bytes() == MINE


def test_report_and_compare_keep_an_edited_page(kdexport, copied, tmp_path):
    (copied / "report.md").write_bytes(MINE)
    before = bytes_below(copied)
    assert_refused(kdexport("report", copied), "report.md")
    assert_kept(before, copied)
    plant(tmp_path / "c" / "compare.md")
    assert_refused(kdexport("compare", copied, copied, "--no-measure", "--out", tmp_path / "c"), "compare.md")
    assert (tmp_path / "c" / "compare.md").read_bytes() == MINE
    moved = kdexport("compare", copied, copied, "--no-measure", "--out", tmp_path / "c", "--move-aside")
    assert moved.returncode == 0, moved.stderr
    assert (tmp_path / "c" / "compare.md.old-1").read_bytes() == MINE
    assert (tmp_path / "c" / "compare.html").stat().st_size > 1000  # of a run against itself: nothing changed


@pytest.mark.parametrize("layout", ["kserve", "triton"])
def test_export_keeps_what_others_put_into_its_folder(kdexport, copied, tmp_path, layout):
    out = tmp_path / "dep"

    def export(*more: object) -> subprocess.CompletedProcess[str]:
        return kdexport("export", f"{copied}:int8", out, "--layout", layout, "--name", "t", *more)

    for _ in range(2):  # what nobody changed is replaced
        assert export().returncode == 0
    mine = ["overlays/prod.yaml", ".git/HEAD", "NOTES.md"] if layout == "kserve" else ["t/2/model.onnx", "other/1/m"]
    for name in mine:
        plant(out / name)
    before = bytes_below(out)
    if layout == "kserve":
        assert_refused(export(), out)
    else:
        assert export().returncode == 0
    assert all((out / name).read_bytes() == MINE for name in mine)
    edited = out / ("kubernetes.yaml" if layout == "kserve" else "t/config.pbtxt")
    edited.write_text(edited.read_text().replace("1", "7"))
    before = bytes_below(out)
    assert_refused(export(), out)
    assert_kept(before, out)
    assert export("--move-aside").returncode == 0
    assert list(tmp_path.rglob("*.old-1"))


@pytest.mark.slow
def test_export_keeps_an_edited_card_and_manifest(kdexport, classifier, tmp_path):
    model, out = classifier("single-label"), tmp_path / "dep"
    assert kdexport("export", model, out, "--variants", "fp32").returncode == 0
    for name in ("README.md", "kdexport.json", "NOTES.md"):
        whole = (out / name).read_bytes() if (out / name).exists() else b""
        (out / name).write_bytes(whole + b"\n")
        assert_refused(kdexport("export", model, out), name)
        assert (out / name).read_bytes() == whole + b"\n"
        (out / name).write_bytes(whole) if whole else (out / name).unlink()


def test_init_keeps_a_spec_and_writes_none_where_there_is_no_room(kdexport, tmp_path):
    spec = plant(tmp_path / "spec.yaml")
    found = kdexport("init", "--teacher", "a/b", "--data", "x.csv", "--out", spec)
    assert found.returncode == 2
    assert "exists already" in found.stderr
    assert spec.read_bytes() == MINE
    found = kdexport("init", "--teacher", "a/b", "--data", "x.csv", "--out", tmp_path / "no" / "spec.yaml")
    assert found.returncode == 2
    assert f"{tmp_path}/no/spec.yaml: No such file or directory" in found.stderr

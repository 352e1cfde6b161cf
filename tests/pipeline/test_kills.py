"""A run that is ended at random moments, by what a machine may do to it, ends with the bytes of one that ran through.

`make kills` does it 50 times, with two kinds of run; see kills.py.
"""

import os
import shutil

import pytest
from kills import FAULTS, SIGNALS, Attempt, differences, disk, disturb, specs, write_rows


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills") / "disk"
    with disk(folder) as mounted:
        yield folder, mounted


@pytest.fixture(scope="module")
def undisturbed(articles, small_disk, tmp_path_factory):
    files = tmp_path_factory.mktemp("rows")
    write_rows(files, articles)
    quick = {"student.model": "cnn"}  # a file a precision, so half as many to measure
    made = Attempt(specs(files)["classes"] | quick, small_disk[0], "undisturbed")
    made.finish()
    return made


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_is_ended_six_times_ends_with_the_same_bytes(undisturbed, small_disk):
    folder, mounted = small_disk
    faults = FAULTS if mounted else (*SIGNALS, "open files")
    attempt = Attempt(undisturbed.settings, folder, "disturbed")
    rows = list(disturb("classes", undisturbed, attempt, 6, 3, faults))
    assert len(rows) >= 4, rows  # a stage of milliseconds may be over before
    for row in rows:
        assert row["proper"], row["said"]
        assert row["same_bytes"], row["differing"]
    if not mounted:
        pytest.skip("full and read-only disks want root, which mounts a small one; the rest held")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_damaged_stages_and_shards_are_put_aside_and_made_again(undisturbed, small_disk):
    attempt = Attempt(undisturbed.settings, small_disk[0], "damaged")
    for of in ("out", "cache"):
        shutil.copytree(getattr(undisturbed, of), getattr(attempt, of))
    weights = attempt.out / "student" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    os.truncate(attempt.out / "targets" / "train.npy", 100)
    shard = next(attempt.cache.rglob("*.npy"))
    os.truncate(shard, 1000)
    (shard.parent / "of-another-version.npy").write_bytes(b"kdexport 9")
    (shard.parent / "of-an-older-version.npz").write_bytes(b"kdexport 0.2")
    attempt.finish()
    said = attempt.said()
    assert "train.npy is not as it was made, so this stage is put aside and made again" in said
    assert "model.safetensors is not as it was made, so this stage is put aside and made again" in said
    assert (attempt.out / "student.old-1" / "model.safetensors").read_bytes() == content
    assert (shard.parent / f"{shard.name}.damaged").stat().st_size == 1000
    made = {name: sha for name, sha in attempt.bytes_of().items() if ".old-1/" not in name}
    assert differences(undisturbed.bytes_of(), made) == []

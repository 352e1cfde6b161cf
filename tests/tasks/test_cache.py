"""What a training decodes once: the same arrays from memory and from the file, in bounded memory, by threads."""

import resource
import shutil
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from kdexport import spec
from kdexport.errors import DataError, SpecError
from kdexport.tasks import task_class
from kdexport.tasks.config import AudioConfig, ImageConfig, TaskConfig
from kdexport.tasks.inputs import cache
from kdexport.tasks.inputs.media import cached, taken
from tests.tones import say

COLOURS = ImageConfig(
    channels=3, resize=[24, 20], crop=[16, 18], scale=1 / 255, mean=[0.1, 0.5, 0.4], std=[0.3, 0.2, 1]
)
GREY = ImageConfig(channels=1, resize=None, crop=[28, 28], scale=1 / 255, mean=[0.3], std=[0.7])


@pytest.fixture(params=["colours", "grey", "bands", "speech"])
def task_and_rows(request, tmp_path):
    random, rows = np.random.default_rng(0), []
    for i in range(12):
        file = tmp_path / f"{i}"
        if request.param in ("colours", "grey"):
            Image.fromarray(random.integers(0, 256, (33 + i, 41, 3), np.uint8)).save(file, "JPEG")
        else:
            file.write_bytes(say("abcd"[: 1 + i % 4], seed=i))
        rows.append({"image" if request.param in ("colours", "grey") else "audio": str(file), "id": str(i)})
    kind, inputs, how = {
        "colours": ("image-classification", "pixel_values", {"image": COLOURS}),
        "grey": ("image-classification", "pixel_values", {"image": GREY}),
        "bands": ("audio-classification", "input_values", {"audio": AudioConfig(rate=8000, length=40, mels=12)}),
        "speech": (
            "automatic-speech-recognition",
            "input_values",
            {"audio": AudioConfig(rate=8000, length=99, mels=8)},
        ),
    }[request.param]
    return task_class(kind)(TaskConfig(task=kind, labels=["", "a"], inputs=[inputs], **how)), rows


@pytest.fixture
def memory(request):
    cache.limit_memory(request.param)
    yield request.param
    cache.limit_memory(None)


def remove(rows):
    for row in rows:
        Path(row.get("image") or row["audio"]).unlink()


@pytest.mark.parametrize("memory", [0, 1, None], indirect=True)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_second_pass_reads_the_same_arrays_and_no_file(task_and_rows, memory, threads, tmp_path):
    task, rows = task_and_rows
    name = task.config.inputs[0]
    plain = [arrays[name] for arrays in task.tokenize(rows)]
    encoded = task.tokenize(rows)
    encoded.threads = threads
    with cached(tmp_path, encoded):
        first = taken(encoded, [*range(12)])
        remove(rows)
        second = taken(encoded, [*reversed(range(12))])[::-1]
        for one, again, expected in zip(first, second, plain, strict=True):
            assert one[name].dtype == again[name].dtype == np.float32
            assert one[name].tobytes() == again[name].tobytes() == expected.tobytes()
    assert not [*tmp_path.iterdir()]
    with pytest.raises(DataError):
        encoded[0]


def arrays(number, size=1_000_000):
    return {"pixels": np.full((2, size // 2), number, np.uint8), "ids": np.arange(number)}


def test_what_is_beyond_the_memory_is_in_a_file_without_a_name(tmp_path):
    tracemalloc.start()
    with cache.Cache(tmp_path, memory=2_500_000) as found:
        first = found.claim(40)
        for number in range(40):
            found.put(first + number, arrays(number))
        for number in range(40):
            again = found.get(first + number)
            assert {name: (a.dtype, a.tolist()) for name, a in again.items() if name == "ids"} == {
                "ids": (np.arange(number).dtype, [*range(number)])
            }
            assert again["pixels"].shape == (2, 500_000)
            assert (again["pixels"] == number).all()
        assert not [*tmp_path.iterdir()]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000


def test_a_full_disk_is_no_error(tmp_path, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, hard))
    try:
        with cache.Cache(tmp_path, memory=0) as found:
            found.claim(4)
            for number in range(4):
                found.put(number, arrays(number))
            held = [number in found for number in range(4)]
            assert (found.get(0)["pixels"] == 0).all()
            assert found.get(1) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert held == [True, False, False, False]
    assert capsys.readouterr().err.count("File too large") == 1


def test_processes_of_a_run_share_half_of_the_free_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=12_000_000))
    with cache.Cache(tmp_path, memory=0) as found:
        found.claim(4)
        for number in range(4):
            found.put(number, arrays(number))
        assert [number in found for number in range(4)] == [True, False, False, False]


def test_two_sets_of_rows_share_a_cache(tmp_path):
    with cache.Cache(tmp_path, memory=0) as found:
        train, validation = found.claim(3), found.claim(2)
        found.put(train + 2, arrays(2, size=10))
        found.put(validation, arrays(7, size=10))
        assert [number in found for number in range(5)] == [False, False, True, True, False]
        assert found.get(train + 2)["pixels"][0, 0] == 2
        assert found.get(validation)["pixels"][0, 0] == 7


def test_processes_of_one_machine_share_the_memory(monkeypatch):
    alone = cache.memory_for_cache()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert cache.memory_for_cache() == alone // 4
    assert alone > 10_000_000


@pytest.mark.parametrize("memory", [12], indirect=True)
def test_the_spec_sets_the_memory_of_images_and_sound_alone(memory):
    assert cache.memory_for_cache() == 12_000_000
    flags = {"data.train": "d.csv", "data.cache_mb": 12, "teacher.model": "t"}
    assert spec.load(None, flags | {"task": "image-classification"}).data.cache_mb == 12
    with pytest.raises(SpecError, match=r"data\.cache_mb has no effect on text-classification"):
        spec.load(None, flags | {"task": "text-classification"})

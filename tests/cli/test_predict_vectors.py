"""`kdexport predict` of sentence embeddings: JSON lines, or a file of vectors."""

from __future__ import annotations

import json

import numpy as np
import pytest
from embedders import write_embedder
from fuzz import small

import kdexport as package
from kdexport.pipeline.export_model import export

TEXTS = [f"text {i}. " * (i % 7 + 1) for i in range(70)]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors")
    export(write_embedder(folder / "model"), folder / "artifact", variants="fp32")
    return folder / "artifact"


def test_json_lines_have_the_vector(kdexport, artifact):
    found = kdexport("predict", artifact, *TEXTS[:3], "--prompt", "query", "--dimensions", 4)
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert [line["text"] for line in lines] == TEXTS[:3]
    expected = package.load(artifact).embed(TEXTS[:3], prompt="query", dimensions=4)
    np.testing.assert_allclose([line["embedding"] for line in lines], expected, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float", "int8", "binary"])
def test_a_file_gets_the_vectors_of_all_texts_in_order(kdexport, artifact, tmp_path, dtype):
    found = kdexport(
        "predict", artifact, "--out", tmp_path / "v.npy", "--dtype", dtype, "--batch-size", 1, input="\n".join(TEXTS)
    )
    assert (found.returncode, found.stdout) == (0, ""), found.stderr
    vectors, expected = np.load(tmp_path / "v.npy", mmap_mode="r"), package.load(artifact).embed(TEXTS, 1, dtype=dtype)
    assert (vectors.dtype, vectors.shape) == (expected.dtype, expected.shape)
    np.testing.assert_allclose(vectors.astype(float), expected.astype(float), atol=1e-6 if dtype == "float" else 0)
    assert [path.name for path in tmp_path.iterdir()] == ["v.npy"]


def test_a_file_appears_only_when_it_is_whole_and_replaces_none(kdexport, artifact, tmp_path):
    (tmp_path / "bad.csv").write_text('text\nfine\n"' + "x" * 200_000 + '"\n')
    found = kdexport("predict", artifact, "--file", tmp_path / "bad.csv", "--out", tmp_path / "v.npy")
    assert found.returncode == 2
    assert [path.name for path in tmp_path.iterdir()] == ["bad.csv"]
    (tmp_path / "v.npy").write_bytes(b"mine")
    found = kdexport("predict", artifact, "a", "--out", tmp_path / "v.npy")
    assert found.stderr.splitlines()[-1] == f"error: --out {tmp_path / 'v.npy'} exists already. Name another file"
    assert (tmp_path / "v.npy").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--out", "v.txt"], "--out v.txt does not end in .npy"),
        (["--dtype", "int8"], "--dtype int8 is for a file of vectors. Name it: --out FILE.npy"),
        (["--out", "v.npy", "--dtype", "int4"], "the dtype 'int4' is unknown. Take one of float, int8, binary"),
        (["--prompt", "title"], "the model has no prompt 'title'. Its prompts are query, passage"),
        (["--dimensions", "64"], "the model's vectors have 32 dimensions, not 64. Ask for fewer"),
        (["--perplexity"], "is for sentence-embedding, and writes nothing"),
    ],
)
def test_wrong_use_is_one_line(kdexport, artifact, flags, says):
    found = kdexport("predict", artifact, "a", *flags)
    assert found.returncode == 2
    assert says in found.stderr.splitlines()[-1]


def test_other_tasks_have_no_vectors(kdexport, tmp_path):
    news = small.pack(small.configs()["text"], tmp_path / "news")
    for flags in (["--out", tmp_path / "v.npy"], ["--prompt", "query"], ["--dimensions", 2]):
        found = kdexport("predict", news, "a", *flags)
        assert found.returncode == 2
        assert "is for text-classification, and makes no vectors. Leave out the options" in found.stderr

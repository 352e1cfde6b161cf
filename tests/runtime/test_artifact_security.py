"""An artifact from anybody: what it names, links to or leaves to other files is not followed out of its folder."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
from pathlib import Path

import onnx
import onnx.helper
import onnxruntime
import pytest

import kdexport
from kdexport.errors import ArtifactError
from kdexport.runtime import artifact
from kdexport.runtime.predictor import Predictor
from kdexport.tasks import load_task


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished / "artifact", tmp_path / "artifact"))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def rewrite(folder: Path, **changes: object) -> None:
    """Change the manifest's recommended variant, with checksums that are right."""
    path = folder / artifact.MANIFEST
    manifest = json.loads(path.read_bytes())
    chosen = manifest["variants"][manifest["recommended"]]
    chosen |= changes
    if (folder / chosen["file"]).is_file():
        chosen["sha256"] = sha256(folder / chosen["file"])
    for name in manifest["files"]:
        if (folder / name).is_file():
            manifest["files"][name] = sha256(folder / name)
    path.write_text(json.dumps(artifact.sealed(manifest)))


def test_the_files_of_an_artifact_are_taken_as_they_are(folder):
    assert artifact.model_file(folder).is_file()


@pytest.mark.parametrize(
    "name",
    ["../outside.onnx", "../../../../../../etc/passwd", "/etc/passwd", "onnx/../../outside.onnx", "a\0b", "loop", ".."],
)
def test_a_manifest_that_points_out_of_its_folder_is_refused(folder, name):
    shutil.copyfile(artifact.model_file(folder), folder.parent / "outside.onnx")
    (folder / "loop").symlink_to("loop")
    rewrite(folder, file=name)
    with pytest.raises(ArtifactError, match="outside of it") as raised:
        artifact.model_file(folder)
    assert "root:" not in str(raised.value)


def test_a_name_is_judged_even_where_it_leads_back(folder):
    rewrite(folder, file=str(artifact.model_file(folder).resolve()))
    with pytest.raises(ArtifactError, match="outside of it"):
        artifact.model_file(folder)


@pytest.mark.parametrize("name", ["onnx", "tokenizer.json", "README.md", "golden.json", "special_tokens_map.json"])
def test_a_link_out_of_the_folder_is_refused(folder, name):
    elsewhere = folder.parent / "elsewhere"
    if (folder / name).exists():
        (folder / name).rename(elsewhere)
    else:
        elsewhere.write_text("{}")
    (folder / name).symlink_to(elsewhere)
    with pytest.raises(ArtifactError, match="outside of it"):
        artifact.model_file(folder)
    with pytest.raises(ArtifactError, match="outside of it"):
        kdexport.load(folder)


def test_links_within_the_folder_and_to_it_are_followed(folder):
    model = artifact.model_file(folder)
    model.rename(folder / "kept.onnx")
    model.symlink_to("../kept.onnx")
    link = folder.parent / "link"
    link.symlink_to(folder)
    assert artifact.model_file(link).read_bytes() == (folder / "kept.onnx").read_bytes()


@pytest.fixture
def snapshot(folder) -> Path:
    """The artifact in a cache of the hub, where every file is a link into `blobs`."""
    repository = folder.parent / "hub" / "models--org--news"
    (repository / "blobs").mkdir(parents=True)
    found = repository / "snapshots" / "0123"
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        link = found / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = repository / "blobs" / sha256(path)
        shutil.copyfile(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return found


def test_a_snapshot_in_the_hubs_cache_is_loaded(folder, snapshot):
    assert kdexport.load(snapshot).predict("hello") == kdexport.load(folder).predict("hello")
    assert kdexport.load(snapshot, "int8").predict("hello")


@pytest.mark.parametrize("place", ["../../refs/main", "../../blobs/inner/file", "../../../elsewhere", "/etc/hostname"])
def test_links_of_a_snapshot_lead_nowhere_but_into_blobs(snapshot, place):
    (snapshot / "README.md").unlink()
    target = snapshot / place
    if not place.startswith("/"):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("secret")
    (snapshot / "README.md").symlink_to(place)
    with pytest.raises(ArtifactError, match="outside of it"):
        kdexport.load(snapshot)


def test_blobs_that_are_a_link_or_of_no_cache_are_refused(snapshot):
    repository = snapshot.parent.parent
    elsewhere = repository.rename(repository.with_name("news"))
    with pytest.raises(ArtifactError, match="outside of it"):
        kdexport.load(elsewhere / "snapshots" / snapshot.name)
    elsewhere.rename(repository)
    (repository / "blobs").rename(repository.with_name("secrets"))
    (repository / "blobs").symlink_to("../secrets")
    with pytest.raises(ArtifactError, match="outside of it"):
        kdexport.load(snapshot)


def test_a_manifest_names_no_blob(snapshot):
    blob = (snapshot / "onnx" / "model.onnx").resolve()
    manifest = (snapshot / artifact.MANIFEST).resolve()
    (snapshot / artifact.MANIFEST).unlink()
    shutil.copyfile(manifest, snapshot / artifact.MANIFEST)
    rewrite(snapshot, file=f"../../blobs/{blob.name}")
    with pytest.raises(ArtifactError, match="outside of it"):
        artifact.model_file(snapshot)


@pytest.mark.parametrize("name", ["the model", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("change", ["changed", "missing", "a folder", "a pipe"])
def test_what_is_changed_or_missing_is_refused(folder, name, change):
    path = artifact.model_file(folder) if name == "the model" else folder / name
    data = bytearray(path.read_bytes())
    path.unlink()
    match change:
        case "changed":
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        case "a folder":
            path.mkdir()
        case "a pipe":
            os.mkfifo(path)
    with pytest.raises(ArtifactError, match=r"not the file that was packed|missing or unreadable|no file"):
        kdexport.load(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"\xff\xfe", b'{"schema":' * 100_000, b'{"schema": 1}', b'{"schema": 1, "task": {"labels": "\xff"}}'],
    ids=["empty", "list", "no UTF-8", "deep", "nothing in it", "no UTF-8 inside"],
)
def test_a_manifest_of_anything_is_refused(folder, content):
    (folder / artifact.MANIFEST).write_bytes(content)
    with pytest.raises(ArtifactError):
        kdexport.load(folder)


@pytest.mark.parametrize("content", [b"", b"garbage", b"{}", b"[" * 100_000, b"\xff" * 100, b'{"model": {}}'])
def test_a_tokenizer_of_anything_is_refused(folder, content):
    (folder / "tokenizer.json").write_bytes(content)
    rewrite(folder)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json can't be read"):
        kdexport.load(folder)


# --- weights in other files


def keep_outside(model: Path, location: str, data: bytes | None = None) -> None:
    """Move the weights of an ONNX file into another one, or have it say that they are there."""
    proto = onnx.load(model)
    tensor = next(t for t in proto.graph.initializer if len(t.raw_data) > 1000)
    if data is None:
        (model.parent / location).write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    model.write_bytes(proto.SerializeToString())


@pytest.mark.parametrize("location", ["weights.bin", "../tokenizer.json", "../../outside.bin", "/etc/passwd"])
def test_weights_in_other_files_are_refused(folder, location):
    model = artifact.model_file(folder)
    keep_outside(model, location, None if location == "weights.bin" else b"")
    rewrite(folder)
    with pytest.raises(ArtifactError, match="weights in other files"):
        kdexport.load(folder)


# The tags of TensorProto's external_data and data_location, and of a location's key: the shortest form, a longer one,
# and one with bits in the fifth byte that protobuf's C++ parser drops.
@pytest.mark.parametrize("short", [b"\x6a", b"\x70", b"\x0a"])
@pytest.mark.parametrize("ending", ["", "\x80\x00", "\x80\x80\x80\x10", "\x80\x80\x80\x70"])
def test_weights_in_other_files_are_found_however_protobuf_writes_them(folder, short, ending):
    def field(tag: bytes, content: bytes) -> bytes:
        if tag == short and ending:
            tag = bytes([tag[0] | 0x80]) + ending.encode("latin-1")
        return tag + content

    def sized(content: bytes) -> bytes:
        assert len(content) < 128
        return bytes([len(content)]) + content

    weights = onnx.TensorProto(name="w", dims=[8], data_type=onnx.TensorProto.UINT8).SerializeToString()
    entry = field(b"\x0a", sized(b"location")) + b"\x12" + sized(b"weights.bin")
    weights += field(b"\x6a", sized(entry)) + field(b"\x70", b"\x01")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["w"], ["logits"])],
        "g",
        [],
        [onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.UINT8, [8])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    path = artifact.model_file(folder)
    path.write_bytes(model.SerializeToString() + b"\x3a" + sized(b"\x2a" + sized(weights)))
    (path.parent / "weights.bin").write_bytes(bytes(range(8)))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert session.run(None, {})[0].tolist() == list(range(8))  # ONNX Runtime would read it
    rewrite(folder)
    with pytest.raises(ArtifactError, match="weights in other files"):
        kdexport.load(folder)


@pytest.mark.parametrize("name", ["onnx/model.ort", "onnx/model", "onnx/model.ONNX"])
def test_a_model_is_called_onnx_or_other_formats_would_be_read(folder, name):
    """ONNX Runtime takes a file that ends in .ort for another format, in which weights in other files are elsewhere."""
    shutil.copyfile(artifact.model_file(folder), folder / name)
    rewrite(folder, file=name)
    with pytest.raises(ArtifactError, match=r"is not called \.onnx"):
        kdexport.load(folder)


def test_a_word_that_looks_like_it_is_no_weight(folder):
    model = artifact.model_file(folder)
    proto = onnx.load(model)
    proto.doc_string = "location, location, location"
    proto.graph.node[0].name = "relocation"
    model.write_bytes(proto.SerializeToString())
    rewrite(folder)
    assert len(kdexport.load(folder).predict("hello")) == 1


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x08\x07\x12\x00"])
def test_a_model_of_anything_is_refused(folder, content):
    artifact.model_file(folder).write_bytes(content)
    rewrite(folder)
    with pytest.raises(ArtifactError, match=r"can't be loaded"):
        kdexport.load(folder)


def test_onnx_runtime_reads_a_path_and_so_nothing_outside_of_it(folder, tmp_path, monkeypatch):
    """ONNX Runtime takes a path's folder as the bound of a model's other files; given bytes, the working directory."""
    (tmp_path / "secret.bin").write_bytes(bytes(8))
    monkeypatch.chdir(tmp_path)
    weights = onnx.TensorProto(name="w", dims=[8], data_type=onnx.TensorProto.UINT8)
    weights.data_location = onnx.TensorProto.EXTERNAL
    weights.external_data.add(key="location", value="secret.bin")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["w"], ["logits"])],
        "leak",
        [],
        [onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.UINT8, [8])],
        [weights],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    path = artifact.model_file(folder)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match="can't be loaded"):
        Predictor(load_task(folder), path, threads=1)


def test_no_session_is_made_of_anything_but_a_path():
    package = Path(kdexport.__file__).parent
    found = []
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("InferenceSession"):
                found.append((path.name, ast.unparse(node.args[0])))
    assert found
    for name, argument in found:
        assert argument.startswith("str("), f"{name} opens a session on {argument}"

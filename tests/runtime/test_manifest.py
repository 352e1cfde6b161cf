"""The manifest of a small artifact: what it says, and that each change of it or of a file is named."""

import json
import shutil
from pathlib import Path

import pytest
from fuzz import small

from kdexport.errors import ArtifactError
from kdexport.files import hash_file
from kdexport.runtime import artifact


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return small.pack(small.configs()["text"], tmp_path_factory.mktemp("packed"))


@pytest.fixture
def folder(packed, tmp_path):
    return Path(shutil.copytree(packed, tmp_path / "artifact"))


def rewrite(folder, change, seal=True):
    manifest = json.loads((folder / artifact.MANIFEST).read_text())
    change(manifest)
    content = artifact.sealed(manifest) if seal else manifest
    (folder / artifact.MANIFEST).write_text(json.dumps(content))


def refused(folder, says, variant=None):
    with pytest.raises(ArtifactError, match=says):
        artifact.model_file(folder, variant)


def test_a_manifest_holds_what_was_packed(folder):
    manifest = artifact.read_manifest(folder)
    assert (manifest.schema, manifest.recommended, manifest.made) == (1, "fp32", {"by": "a test"})
    (variant,) = manifest.variants.values()
    file = folder / variant.file
    assert (variant.file, variant.graph, variant.precision) == ("onnx/model.onnx", "plain", "fp32")
    assert (variant.sha256, variant.size_bytes) == (hash_file(file), file.stat().st_size)
    assert (variant.decoder, variant.decoder_sha256) == ("", None)
    assert manifest.files == {name: hash_file(folder / name) for name in manifest.files}
    assert {*manifest.files} == {"config.json", "tokenizer.json", artifact.GOLDEN}
    assert artifact.model_file(folder) == artifact.model_file(folder, "fp32") == file
    assert artifact.read_columns(folder) == {}
    golden = artifact.read_golden(folder)
    assert len(golden.rows) == len(golden.logits["fp32"])
    assert artifact.read_card(folder) == "# A model\n"
    assert artifact.size_of(file) == variant.size_bytes


def test_a_run_leads_to_its_artifact(folder):
    run = folder.parent
    assert artifact.resolve(run) == artifact.resolve(folder) == folder
    assert artifact.read_manifest(run) == artifact.read_manifest(folder)
    assert artifact.read_columns(run / "elsewhere") == {}
    assert artifact.resolve(run / "elsewhere") == run / "elsewhere"
    shutil.copytree(folder, folder / "artifact")  # a manifest of one's own comes first
    assert artifact.resolve(folder) == folder


def test_an_artifact_without_golden_answers_has_no_file_of_them(packed, tmp_path):
    (tmp_path / "bare" / "onnx").mkdir(parents=True)
    models = {"fp32": (packed / "onnx/model.onnx", "plain")}
    artifact.pack(packed.parent / "student", models, "fp32", {}, tmp_path / "bare")
    assert not (tmp_path / "bare" / artifact.GOLDEN).exists()
    assert artifact.model_file(tmp_path / "bare") == tmp_path / "bare/onnx/model.onnx"


def test_links_of_a_hub_cache_lead_to_its_blobs_and_nowhere_else(packed, tmp_path):
    cache = tmp_path / "models--a--b"
    snapshot = cache / "snapshots" / "1"
    shutil.copytree(packed, cache / "blobs")
    (snapshot / "onnx").mkdir(parents=True)
    (cache / "blobs" / "onnx" / "model.onnx").rename(cache / "blobs" / "model.onnx")
    (snapshot / "onnx" / "model.onnx").symlink_to("../../../blobs/model.onnx")
    for file in (cache / "blobs").glob("*.json"):
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert artifact.model_file(snapshot)
    for elsewhere in (cache / "refs", tmp_path):
        elsewhere.mkdir(exist_ok=True)
        shutil.copyfile(packed / "config.json", elsewhere / "config.json")
        (snapshot / "config.json").unlink()
        (snapshot / "config.json").symlink_to(elsewhere / "config.json")
        refused(snapshot, "lies outside of it")


def test_files_up_to_the_limit_are_read(folder, monkeypatch):
    largest = max((folder / name).stat().st_size for name in artifact.read_manifest(folder).files)
    monkeypatch.setattr(artifact, "_MOST_OTHER", largest)
    monkeypatch.setattr(artifact, "_MOST_MODEL", (folder / "onnx/model.onnx").stat().st_size)
    assert artifact.model_file(folder)
    monkeypatch.setattr(artifact, "_MOST_MODEL", artifact._MOST_MODEL - 1)
    refused(folder, r"model.onnx has .* bytes; at most")
    monkeypatch.setattr(artifact, "_MOST_OTHER", largest - 1)
    refused(folder, r"(tokenizer.json|model.onnx) has .* bytes; at most")


def test_columns_and_golden_answers_may_be_absent(folder):
    rewrite(folder, lambda manifest: manifest.update(columns={"text": "query"}))
    assert artifact.read_columns(folder) == {"text": "query"}
    (folder / artifact.GOLDEN).unlink()
    assert artifact.read_golden(folder) is None
    (folder / artifact.CARD).unlink()
    assert artifact.read_card(folder) == ""


def test_a_card_is_cut_at_a_mebibyte(folder):
    (folder / artifact.CARD).write_bytes(b"a" * (2**20 + 5))
    assert len(artifact.read_card(folder)) == 2**20
    (folder / artifact.CARD).write_bytes(b"\xff")
    assert artifact.read_card(folder) == "\ufffd"


@pytest.mark.parametrize("sealed", [True, False])
def test_a_changed_manifest_is_refused_unless_it_is_sealed_or_has_no_seal(folder, sealed):
    rewrite(folder, lambda manifest: manifest.update(kdexport="9"), seal=sealed)
    if sealed:
        assert artifact.read_manifest(folder).kdexport == "9"
    else:
        refused(folder, "was changed after it was packed")
        rewrite(folder, lambda manifest: manifest.update(sha256=""), seal=False)
        assert artifact.read_manifest(folder).kdexport == "9"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.update(schema=2), "is of schema 2, this kdexport reads 1"),
        (lambda m: m.update(recommended="int8"), "recommends a variant that it lacks: 'int8'. It has: fp32"),
        (lambda m: m["variants"]["fp32"].update(size_bytes=-1), "can't be read"),
        (lambda m: m["variants"]["fp32"].update(sha256="0" * 64), "is not the file that was packed"),
        (lambda m: m["variants"]["fp32"].update(sha256="0" * 63), "can't be read"),
        (lambda m: m["variants"]["fp32"].update(decoder="onnx/x.onnx"), "does not name the decoder of its encoder"),
        (lambda m: m["variants"]["fp32"].update(file="../model.onnx"), "lies outside of it"),
        (lambda m: m["variants"]["fp32"].update(file="onnx/model.ort"), "missing or unreadable"),
        (lambda m: m["files"].update({"config.json": "0" * 64}), "config.json is not the file that was packed"),
        (lambda m: m["files"].update({"vocab.txt": "0" * 64}), "vocab.txt is missing or unreadable"),
        (lambda m: m["files"].update({"/etc/hostname": "0" * 64}), "lies outside of it"),
        (lambda m: m["files"].pop("tokenizer.json"), "tokenizer.json is not in the manifest"),
        (lambda m: m["files"].pop(artifact.GOLDEN), "golden.json is not in the manifest"),
        (lambda m: m["task"].update(labels=["d", "c", "b", "a"]), "has other labels than its config.json"),
        (lambda m: m.pop("task"), "can't be read"),
    ],
)
def test_what_a_manifest_may_not_say(folder, change, says):
    rewrite(folder, change)
    refused(folder, says)


def test_what_is_no_manifest(folder):
    refused(folder, "has no variant 'int8'. It has: fp32", variant="int8")
    (folder / artifact.MANIFEST).write_text("[")
    refused(folder, "can't be read")
    (folder / artifact.MANIFEST).unlink()
    refused(folder, "is no artifact: it has no kdexport.json")


def test_files_of_other_kinds_are_refused(folder):
    (folder / artifact.CARD).unlink()
    (folder / artifact.CARD).mkdir()
    assert artifact.model_file(folder)
    assert artifact.read_card(folder) == ""
    (folder / artifact.GOLDEN).write_text("{}")
    with pytest.raises(ArtifactError, match="can't be read"):
        artifact.read_golden(folder)
    (folder / artifact.GOLDEN).unlink()
    (folder / artifact.GOLDEN).mkdir()
    refused(folder, "golden.json is no file")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("a", ("a", None)),
        ("a:int8", ("a", "int8")),
        ("a:", ("a", None)),
        ("C:/a/b", ("C:/a/b", None)),
        ("a:b:int8", ("a:b", "int8")),
        (":int8", (":int8", None)),
    ],
)
def test_a_variant_follows_the_last_colon(given, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert artifact.split_name(given) == (Path(found[0]), found[1])
    if "/" not in given:
        (tmp_path / given).mkdir()
        assert artifact.split_name(given) == (Path(given), None)


def test_an_encoder_has_its_decoder_beside_it(tmp_path):
    encoder = tmp_path / "encoder_model_quantized.onnx"
    decoder = tmp_path / "decoder_model_merged_quantized.onnx"
    assert artifact.decoder_of(encoder) == decoder
    assert artifact.files_of(encoder) == [encoder, decoder]
    assert artifact.decoder_of(tmp_path / "model.onnx") is None
    assert artifact.shipped_as("int8", encoder) == "onnx/encoder_model_quantized.onnx"
    assert artifact.shipped_as("int8", tmp_path / "x.onnx") == "onnx/model_quantized.onnx"
    encoder.write_bytes(b"123")
    decoder.write_bytes(b"4567")
    assert artifact.size_of(encoder) == 7


def test_any_error_of_an_artifact_is_an_artifact_error_but_an_interrupt(tmp_path):
    for error, reason in ((ValueError("x"), "x"), (MemoryError(), "MemoryError"), (RecursionError("deep"), "deep")):
        says = f"can't be loaded: {reason}"
        with pytest.raises(ArtifactError, match=says), artifact.only_artifact_errors(tmp_path):
            raise error
    with pytest.raises(KeyboardInterrupt), artifact.only_artifact_errors(tmp_path):
        raise KeyboardInterrupt
    with pytest.raises(ArtifactError, match=r"^as it is$"), artifact.only_artifact_errors(tmp_path):
        raise ArtifactError("as it is")

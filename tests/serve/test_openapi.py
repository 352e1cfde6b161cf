"""The OpenAPI document is true: the server does what it says, says all that it does, and is the protocol's."""

from __future__ import annotations

import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import msgspec
import pytest
from embedders import write_embedder
from fuzz import small
from load_client import ask
from serve_process import served

from kdexport.pipeline.export_model import export
from kdexport.schemas import openapi
from kdexport.serve.app import OPEN, App
from kdexport.serve.openapi import Served, document
from kdexport.serve.registry import Models
from kdexport.serve.settings import Settings

CONFIG = Path(__file__).with_name("schemathesis.toml")
# Every operation is in every server's document, whatever its models answer.
ALL_SELECTED = "27 selected / 27 total"
KEY = "a-key"


@pytest.fixture(scope="module")
def server(finished):
    with served(f"tickets={finished}") as found:
        yield found


def schemathesis(url: str, folder: Path, *arguments: str, config: Path = CONFIG) -> subprocess.CompletedProcess[str]:
    """Every check on every operation; the fourth phase tries sequences, and no request here makes what others use."""
    command = [Path(sys.executable).with_name("schemathesis"), "--config-file", config, "run", f"{url}/openapi.json"]
    return subprocess.run(
        [*command, "--seed", "0", "--no-color", *arguments], cwd=folder, capture_output=True, text=True
    )


@pytest.mark.slow
def test_schemathesis_finds_nothing(server, tmp_path):
    found = schemathesis(server.url, tmp_path, "--phases", "examples,coverage,fuzzing", "--max-examples", "25")
    assert found.returncode == 0, found.stdout
    assert ALL_SELECTED in found.stdout
    assert not any('"code":500' in line for line in server.log)


@pytest.mark.slow
def test_schemathesis_finds_nothing_where_a_model_tags_words(tmp_path):
    model = small.pack(small.configs()["tags"], tmp_path / "tags")
    with served(f"tags={model}") as server:
        found = schemathesis(server.url, tmp_path, "--phases", "examples,coverage,fuzzing", "--max-examples", "25")
    assert found.returncode == 0, found.stdout


@pytest.mark.slow
def test_schemathesis_finds_nothing_where_a_model_makes_vectors(tmp_path):
    """No schema says which prompts and ids a model has, that it has so many dimensions, and that ids have no prompt."""
    operations = ["inferFirst", "inferBy", "invocations", "embed", "embedAll", "compare", "embedListed"]
    loose = f"\n[[operations]]\ninclude-operation-id = {operations}\n"
    for phase in ("coverage", "fuzzing"):
        loose += f"[operations.phases.{phase}.checks.positive_data_acceptance]\nexpected-statuses = "
        loose += '["200", "404", "422"]\n'
    (tmp_path / "schemathesis.toml").write_text(CONFIG.read_text() + loose)
    export(write_embedder(tmp_path / "model"), tmp_path / "vectors", variants="fp32")
    with served(tmp_path / "vectors") as server:
        phases = ("--phases", "examples,coverage,fuzzing", "--max-examples", "25")
        found = schemathesis(server.url, tmp_path, *phases, config=tmp_path / "schemathesis.toml")
        assert not any('"code":500' in line for line in server.log)
    assert found.returncode == 0, found.stdout


@pytest.mark.slow
def test_schemathesis_finds_nothing_where_a_key_is_needed(finished, tmp_path):
    with served(finished, KDEXPORT_API_KEYS=KEY) as server:
        found = schemathesis(
            server.url, tmp_path, "--phases", "examples,coverage", "-H", f"Authorization: Bearer {KEY}"
        )
    assert found.returncode == 0, found.stdout


def test_the_document_is_what_make_schemas_writes():
    assert openapi.PATH.read_bytes() == openapi.generate(), "run: make schemas"


@pytest.mark.parametrize("writers", [(), (("m", 63),), (("m", 63), ("n", 31))])
def test_nothing_in_the_document_is_left_to_fill(writers):
    found = msgspec.json.encode(document(Served(("m", "n"), ("0" * 12,), writers), Settings()))
    assert not re.findall(rb'"\$(?!ref")[^"]*"', found)


def test_the_document_has_every_route_and_its_limits_are_the_settings():
    settings = Settings(max_rows=3, max_chars=50, api_keys=(KEY,))
    app = App(Models({}, 1, 1), settings)
    found = document(Served(("m",)), settings)
    paths, schemas = found["paths"], found["components"]["schemas"]
    assert {path: {method.upper() for method in operations} for path, operations in paths.items()} == {
        path: set(methods) for path, methods in app.routes.items()
    }
    for path, operations in paths.items():
        for method, operation in operations.items():
            keyed = path not in OPEN or (path, method) == ("/", "post")
            assert ("security" in operation) == ("401" in operation["responses"]) == keyed, path
    text, _, texts = schemas["ClassifyRequest"]["properties"]["inputs"]["anyOf"]
    assert text["maxLength"] == 50
    assert texts["maxItems"] == 3
    batch = schemas["PredictRequest"]["properties"]["inputs"]["anyOf"][2]
    assert (batch["maxItems"], batch["items"]["items"]["maxLength"]) == (3, 50)


@pytest.mark.parametrize("path", ["/", "/v2", "/v2/", "/v2/health/ready", "/health", "/openapi.json", "/info"])
def test_head_is_get_without_a_body(server, path):
    with (
        urllib.request.urlopen(server.url + path) as get,
        urllib.request.urlopen(urllib.request.Request(server.url + path, method="HEAD")) as head,
    ):
        assert head.read() == b""
        assert int(head.headers["content-length"]) == len(get.read())
        assert head.headers["content-type"] == get.headers["content-type"]


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/", {"GET", "HEAD", "POST"}),
        ("/predict", {"POST"}),
        ("/v2/health/live", {"GET", "HEAD"}),
        ("/v2/models/tickets", {"GET", "HEAD"}),
        ("/v2/models/tickets/infer", {"POST"}),
        ("/models/tickets", {"POST"}),
    ],
)
def test_another_method_is_told_what_there_is(server, path, allowed):
    for method in ("OPTIONS", "PUT", "DELETE", "PATCH", *({"GET", "POST"} - allowed)):
        request = urllib.request.Request(server.url + path, method=method)
        with pytest.raises(urllib.request.HTTPError) as error:
            urllib.request.urlopen(request)
        with error.value as answer:
            assert answer.code == 405
            assert set(answer.headers["allow"].split(", ")) == allowed
            assert b'{"error":' in answer.read()


# --- the Open Inference Protocol's own document, open_inference_rest.yaml, in the parts that a client relies on

NAME, TEXTS, NUMBERS, OBJECT = "string", ["string"], ["integer"], "object"
TENSOR = {"name": NAME, "datatype": NAME, "shape": NUMBERS}
# Operation → (schema of its answer, what it requires).
ANSWERS = {
    "/v2/": ({"name": NAME, "version": NAME, "extensions": TEXTS}, {"name", "version", "extensions"}),
    "/v2/models/{name}/versions/{version}": (
        {"name": NAME, "versions": TEXTS, "platform": NAME, "inputs": [TENSOR], "outputs": [TENSOR]},
        {"name", "platform"},
    ),
    "/v2/models/{name}/versions/{version}/infer": (
        {
            "model_name": NAME, "model_version": NAME, "id": NAME,
            "outputs": [TENSOR | {"parameters": OBJECT, "data": ["tensor data"]}],
        },
        {"model_name", "outputs"},
    ),
}  # fmt: skip
REQUEST = {
    "id": NAME, "parameters": OBJECT,
    "inputs": [TENSOR | {"parameters": OBJECT, "data": ["tensor data"]}],
    "outputs": [{"name": NAME, "parameters": OBJECT}],
}  # fmt: skip


def allows(schema: dict, theirs: object, schemas: dict) -> bool:
    """Whether a value of their schema may be one of ours."""
    if "$ref" in schema:
        if schema["$ref"].endswith("/TensorData"):
            return theirs == ["tensor data"]
        return allows(schemas[schema["$ref"].rsplit("/", 1)[1]], theirs, schemas)
    if "anyOf" in schema:
        return any(allows(one, theirs, schemas) for one in schema["anyOf"])
    if isinstance(theirs, list):
        return schema.get("type") == "array" and allows(schema["items"], theirs[0], schemas)
    if isinstance(theirs, dict):
        properties = schema.get("properties", {})
        return schema.get("type") == "object" and all(
            name in properties and allows(properties[name], one, schemas) for name, one in theirs.items()
        )
    if "enum" in schema:
        return theirs == "string" and all(isinstance(one, str) for one in schema["enum"])
    return schema.get("type") == theirs


def test_our_part_of_the_protocol_is_what_its_document_says(server):
    found = ask(f"{server.url}/openapi.json")[1]
    paths, schemas = found["paths"], found["components"]["schemas"]
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/{name}/versions/{version}/ready"):
        assert "200" in paths[path]["get"]["responses"]
    for path, (theirs, required) in ANSWERS.items():
        (operation,) = paths[path].values()
        schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
        assert allows(schema, theirs, schemas), path
        assert required <= set(schemas[schema["$ref"].rsplit("/", 1)[1]]["required"])
    infer = paths["/v2/models/{name}/versions/{version}/infer"]["post"]
    schema = infer["requestBody"]["content"]["application/json"]["schema"]
    assert allows(schema, REQUEST, schemas)
    # We require no more than they do, so that every request of theirs is one of ours.
    assert set(schemas["InferRequest"]["required"]) == {"inputs"}
    assert set(schemas["InputTensor"]["required"]) < {"name", "shape", "datatype", "data"}
    assert schemas["RequestedOutput"]["required"] == ["name"]
    # Their only error has one text.
    bad = found["components"]["responses"]["400"]["content"]["application/json"]["schema"]
    assert infer["responses"]["400"] == {"$ref": "#/components/responses/400"}
    assert allows(bad, {"error": NAME}, schemas)

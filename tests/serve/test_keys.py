"""API keys and the admin port: who may ask what, and that no key is ever told, logged or guessed by its time."""

from __future__ import annotations

import hmac
import json
import shutil
import time
from pathlib import Path

import pytest
from serve_process import served
from wire import GOOD, ask, assert_refused

from kdexport.errors import SpecError
from kdexport.runtime.artifact import sealed
from kdexport.serve.http import Keys, Refused, Request

KEYS = ("first-key-1234567890", "schlüssel-€-ключ", "third key with spaces")
OPEN = ("/", "/ping", "/health", "/v2", "/v2/", "/v2/health/live", "/v2/health/ready", "/openapi.json")
CLOSED = (
    ("/", GOOD),
    ("/predict", GOOD),
    ("/invocations", GOOD),
    ("/models/news", GOOD),
    ("/info", None),
    ("/v2/models/news", None),
    ("/v2/models/news/ready", None),
    ("/v2/models/news/infer", b"{}"),
    ("/v2/models/nowhere/infer", b"{}"),
    ("/nowhere", None),
)


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """Where the server's log goes."""
    return tmp_path_factory.mktemp("log") / "access.log"


@pytest.fixture(scope="module")
def server(finished, tmp_path_factory, logged):
    folder = tmp_path_factory.mktemp("keys")
    (folder / "keys.txt").write_text("\n".join(["", *KEYS, "  ", ""]), encoding="utf-8")
    shutil.copytree(finished / "artifact", folder / "artifact")
    with logged.open("wb") as output:
        with served(f"news={folder / 'artifact'}", "--api-keys", folder / "keys.txt", output=output) as found:
            found.log.append(str(folder / "artifact"))
            yield found


@pytest.fixture
def artifact(server) -> Path:
    """The folder that is served."""
    return Path(next(line for line in server.log if line.endswith("artifact")))


def bearer(key: str | bytes) -> bytes:
    return b"Authorization: Bearer " + (key if isinstance(key, bytes) else key.encode())


# --- on the public port


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("header", ["Authorization: Bearer ", "authorization: bearer  ", "X-API-Key: "])
def test_each_key_opens(server, key, header):
    assert ask(server.url, "/", GOOD, header.encode() + key.encode()).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        (),
        (bearer("first-key-123456789"),),
        (bearer("first-key-12345678901"),),
        (bearer("FIRST-KEY-1234567890"),),
        (bearer(""),),
        (bearer(KEYS[1].encode("latin-1", "replace")),),
        (bearer(b"\xff\xfe"),),
        (bearer(",".join(KEYS)),),
        (bearer("\n".join(KEYS).encode().hex()),),
        (bearer("k" * 20_000),),
        (b"Authorization: Basic " + KEYS[0].encode(),),
        (b"Authorization: " + KEYS[0].encode(),),
        (b"X-API-Key: wrong",),
        (b"Cookie: key=" + KEYS[0].encode(),),
        (b"Proxy-Authorization: Bearer " + KEYS[0].encode(),),
    ],
    ids=range(15),
)
def test_anything_else_does_not(server, headers):
    for path, body in CLOSED:
        found = ask(server.url, path, body, *headers)
        assert_refused(found, 401)
        assert found.headers["www-authenticate"] == "Bearer"
        assert not any(key in found.json["error"] for key in KEYS)


def test_a_wrong_key_is_told_from_a_missing_one(server):
    for header, says in (
        (bearer("wrong"), "not known here"),
        (b"X-API-Key: wrong", "not known"),
        (bearer(""), "needed"),
    ):
        assert says in ask(server.url, "/", GOOD, header).json["error"]
    assert ask(server.url, "/", GOOD).json["error"] == "an API key is needed: Authorization: Bearer KEY"


def test_a_key_in_the_address_is_none(server):
    assert_refused(ask(server.url, f"/predict?api_key={KEYS[0]}&key={KEYS[0]}", GOOD), 401)


def test_without_a_key_nothing_is_learnt_of_what_is_there(server):
    answers = {ask(server.url, path, body).body for path, body in CLOSED}
    assert len(answers) == 1


@pytest.mark.parametrize("path", OPEN)
def test_health_and_what_there_is_stay_open(server, path):
    assert ask(server.url, path).status == 200
    assert ask(server.url, path, None, bearer("wrong")).status == 200


def test_a_path_is_open_only_as_it_is_written(server):
    for path in ("//", "/ping/../predict", "/%70redict", "/predict/", "/PREDICT", "/v2/health/live/../../models/news"):
        assert_refused(ask(server.url, path, GOOD), 401, 404, 405)


def test_a_large_body_without_a_key_is_not_read(server):
    found = ask(server.url, "/", b"x" * 1_000_000)
    assert_refused(found, 401)


# --- the admin port


def test_the_admin_port_is_on_loopback_and_another_one(server):
    assert server.admin.startswith("http://127.0.0.1:")
    assert server.admin != server.url
    assert_refused(ask(server.url, "/metrics"), 401)
    assert_refused(ask(server.url, "/v2/repository/index", b"", bearer(KEYS[0])), 404)


def test_metrics_and_the_index_need_no_key_there(server):
    assert b"kdexport_ready 1.0" in ask(server.admin, "/metrics").body
    assert ask(server.admin, "/v2/repository/index", b"").json[0]["name"] == "news"


@pytest.mark.parametrize("what", ["load", "unload"])
def test_what_changes_something_needs_a_key(server, what):
    for headers in ((), (bearer("wrong"),)):
        found = ask(server.admin, f"/v2/repository/models/news/{what}", b"", *headers)
        assert_refused(found, 401)
        assert found.headers["www-authenticate"] == "Bearer"
    assert ask(server.url, "/v2/models/news/ready", None, bearer(KEYS[0])).status == 200


@pytest.mark.parametrize("path", ["/metrics", "/v2/repository/index", "/v2/repository/models/news/unload"])
@pytest.mark.parametrize("origin", [b"null", b"https://example.com", b"http://127.0.0.1", b""])
def test_a_browsers_page_may_not_ask_it(server, path, origin):
    body = None if path == "/metrics" else b""
    assert_refused(ask(server.admin, path, body, b"Origin: " + origin, bearer(KEYS[0])), 403)


@pytest.mark.parametrize(
    "path",
    ["/v2/repository/models/../load", "/v2/repository/models/%2e%2e%2fx/load", "/v2/repository/models//load", "/"],
)
def test_only_models_that_were_named_can_be_loaded(server, path):
    assert_refused(ask(server.admin, path, b'{"parameters": {"path": "/etc"}}', bearer(KEYS[0])), 404)


def test_the_admin_port_has_the_same_bounds(server):
    assert_refused(ask(server.admin, "/metrics", None, b"X: " + b"a" * 50_000), 431)
    assert_refused(ask(server.admin, "/metrics", b""), 404)


def test_a_model_is_unloaded_and_loaded_with_a_key(server):
    good = ("/", GOOD, bearer(KEYS[0]))
    assert ask(server.admin, "/v2/repository/models/news/unload", b"", bearer(KEYS[1])).status == 200
    assert ask(server.url, *good).status == 503
    assert ask(server.admin, "/v2/repository/models/news/load", b"", b"X-API-Key: " + KEYS[1].encode()).status == 200
    assert ask(server.url, *good).status == 200


@pytest.mark.parametrize(
    "change", ["a changed byte", "a link", "garbage with the right sum", "no word for unknown words"]
)
def test_an_artifact_that_went_bad_is_not_loaded_and_the_one_before_serves_on(server, artifact, change):
    tokenizer, manifest = artifact / "tokenizer.json", artifact / "kdexport.json"
    kept = {path: path.read_bytes() for path in (tokenizer, manifest)}
    try:
        match change:
            case "a changed byte":
                tokenizer.write_bytes(kept[tokenizer][:-2] + b" }")
            case "a link":
                tokenizer.unlink()
                tokenizer.symlink_to("/etc/passwd")
            case "garbage with the right sum":
                tokenizer.write_bytes(b"[")
                listed = json.loads(kept[manifest])
                del listed["files"]["tokenizer.json"]
                manifest.write_text(json.dumps(sealed(listed)))
            case "no word for unknown words":  # found out only when a text is cut into words
                listed, words = json.loads(kept[manifest]), json.loads(kept[tokenizer])
                del listed["files"]["tokenizer.json"]
                vocabulary = words["model"]["vocab"]
                words["model"]["vocab"] = {word: vocabulary[word] for word in ("[PAD]", "[CLS]", "[SEP]")}
                tokenizer.write_text(json.dumps(words))
                manifest.write_text(json.dumps(sealed(listed)))
        found = ask(server.admin, "/v2/repository/models/news/load", b"", bearer(KEYS[0]))
        assert found.status in (400, 500)
        assert "serves on" in found.json["error"] or found.status == 500
        assert "root:" not in found.json["error"]
        assert ask(server.url, "/", GOOD, bearer(KEYS[0])).status == 200
    finally:
        tokenizer.unlink()
        for path, data in kept.items():
            path.write_bytes(data)
    assert ask(server.admin, "/v2/repository/models/news/load", b"", bearer(KEYS[0])).status == 200


# --- what is told of keys: nothing


def test_no_key_and_no_text_is_in_the_log(server, logged):
    """Last of this server's tests: it has seen all of theirs."""
    ask(server.url, "/", b'{"inputs": "a very private text"}', bearer(KEYS[0]))
    ask(server.url, "/", b'{"inputs": "a very private text"', bearer(KEYS[0]))
    ask(server.url, "/x%0a%7b%22code%22:%20200%7d%0d%1b[31m", None, bearer(KEYS[0]))
    time.sleep(0.5)  # lines are written in bundles
    log, said = logged.read_bytes(), "".join(server.log)
    lines = [json.loads(line) for line in log.splitlines()]
    assert lines[-1]["path"] == '/x\n{"code": 200}\r\x1b[31m'
    assert b"\x1b" not in log
    for key in (*KEYS, "wrong"):
        assert key.encode() not in log.replace(b"api_key=" + key.encode(), b"")
        assert key not in said
    assert b"private" not in log
    assert b"api_key" not in log  # nor a query, where some would put one


def test_keys_of_the_environment_may_be_any_bytes(finished):
    env = {"KDEXPORT_API_KEYS": " one-key ,schlüssel, " + b"\xff\xfe\x80".decode("utf-8", "surrogateescape")}
    with served(finished, "--access-log", "off", **env) as server:
        assert_refused(ask(server.url, "/", GOOD), 401)
        assert_refused(ask(server.url, "/", GOOD, bearer("one-key,schlüssel")), 401)
        for key in (b"one-key", "schlüssel".encode(), b"\xff\xfe\x80"):
            assert ask(server.url, "/", GOOD, bearer(key)).status == 200


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe", None])
def test_a_file_that_holds_no_key_is_no_open_door(tmp_path, content):
    from kdexport.cli.use import _keys

    if content is not None:
        (tmp_path / "keys.txt").write_bytes(content)
    with pytest.raises(SpecError):
        _keys(tmp_path / "keys.txt")


def given(*headers: tuple[bytes, bytes]) -> Request:
    return Request({"method": "POST", "path": "/", "headers": list(headers)}, None)


def test_every_key_is_compared_whole_and_in_constant_time(monkeypatch):
    compared = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return hmac_compare(one, other)

    hmac_compare = hmac.compare_digest
    monkeypatch.setattr("kdexport.serve.http.hmac.compare_digest", compare)
    keys = Keys(KEYS)
    keys.check(given((b"authorization", b"Bearer " + KEYS[0].encode())))
    with pytest.raises(Refused):
        keys.check(given((b"x-api-key", b"x")))
    # As many comparisons for the first key as for none, of digests: their length tells nothing of a key's.
    assert len(compared) == 2 * len(KEYS)
    assert {len(part) for pair in compared for part in pair} == {32}
    assert not any(key.encode() in part for key in KEYS for pair in compared for part in pair)

"""What a web page can make its visitor's browser send to a server on loopback: refused by `Host` and `Origin`."""

from __future__ import annotations

import pytest
from serve_process import served
from wire import GOOD, Wire, ask, assert_refused, is_well

from kdexport.serve.hosts import Hosts
from kdexport.serve.http import Refused, Request

PATHS = [("/", GOOD), ("/", None), ("/ping", None), ("/predict", GOOD), ("/v2/models/news", None)]
ADMIN = [
    ("/metrics", None),
    ("/v2/health/live", None),
    ("/v2/repository/index", b""),
    ("/v2/repository/models/news/load", b""),
]
KEY = b"Authorization: Bearer a-key-of-some-length"


@pytest.fixture(scope="module")
def server(finished):
    """On loopback, without keys; a proxy passes one public name on to it."""
    with served(f"news={finished}", "--access-log", "off", "--allow-host", "models.example") as found:
        yield found
        assert is_well(found.url)


@pytest.fixture(scope="module")
def in_a_cluster(finished):
    """On all addresses, without keys."""
    flags = ("--host", "0.0.0.0", "--admin-host", "0.0.0.0", "--access-log", "off")
    with served(f"news={finished}", *flags) as found:
        yield found


def sent(url: str, path: str, body: bytes | None, *headers: bytes):
    """A request with just these headers."""
    head = [b"%s %s HTTP/1.1" % (b"GET" if body is None else b"POST", path.encode()), *headers]
    if body is not None:
        head += [b"Content-Type: text/plain", b"Content-Length: %d" % len(body)]
    with Wire(url) as wire:
        return wire.send(b"\r\n".join([*head, b"", body or b""])).answer()


@pytest.mark.parametrize(
    "host", [b"evil.example", b"127.0.0.1.evil.example", b"localhost.evil.example:80", b"", b"[::2]"]
)
def test_a_name_that_was_led_to_loopback_is_refused_on_both_ports(server, host):
    for url, paths in ((server.url, PATHS), (server.admin, ADMIN)):
        for path, body in paths:
            found = sent(url, path, body, b"Host: " + host)
            assert_refused(found, 403)
            assert "--allow-host" in found.json["error"]


@pytest.mark.parametrize(
    "host", [b"localhost", b"LocalHost:1", b"127.0.0.1:8080", b"[::1]", b"[::1]:80", b"models.example"]
)
def test_loopbacks_own_names_are_answered(server, host):
    assert sent(server.url, "/", GOOD, b"Host: " + host).status == 200
    assert sent(server.admin, "/metrics", None, b"Host: " + host).status == 200


@pytest.mark.parametrize(
    "origin", [b"http://evil.example", b"null", b"http://localhost:3000", b"http://evil.example#localhost"]
)
def test_a_foreign_page_is_refused(server, origin):
    for path, body in PATHS:
        assert_refused(sent(server.url, path, body, b"Host: localhost:80", b"Origin: " + origin), 403)


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        (b"127.0.0.1:8080", b"http://127.0.0.1:8080"),
        (b"localhost", b"http://localhost"),
        (b"127.0.0.1:8080", b"https://models.example"),
    ],
)
def test_the_servers_own_page_may_ask(server, host, origin):
    assert sent(server.url, "/", GOOD, b"Host: " + host, b"Origin: " + origin).status == 200


@pytest.mark.parametrize("hosts", [(), (b"Host: localhost", b"Host: localhost")], ids=["none", "two"])
def test_a_request_names_one_host(server, in_a_cluster, hosts):
    for url in (server.url, server.admin, in_a_cluster.url):
        assert_refused(sent(url, "/v2/health/live", None, *hosts), 400)


def test_other_encodings_of_a_transfer_are_refused_whatever_the_method(server):
    for method, path in ((b"GET", b"/ping"), (b"POST", b"/"), (b"DELETE", b"/ping"), (b"GET", b"/nowhere")):
        with Wire(server.url) as wire:
            wire.send(
                method
                + b" "
                + path
                + b" HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"
            )
            assert_refused(wire.answer(), 400)
            assert wire.answer() is None


def test_in_a_cluster_any_host_is_answered_and_without_keys_nothing_is_changed(in_a_cluster):
    host = b"Host: 10.1.2.3:8081"
    assert sent(in_a_cluster.url, "/", GOOD, b"Host: tickets.models.svc", b"Origin: http://app.example").status == 200
    for path, body in ADMIN[:-1]:
        assert sent(in_a_cluster.admin, path, body, host).status == 200
    for what in ("load", "unload"):
        found = sent(in_a_cluster.admin, f"/v2/repository/models/news/{what}", b"", host)
        assert_refused(found, 403)
        assert "API key" in found.json["error"]
    assert is_well(in_a_cluster.url)


def test_with_keys_any_host_is_answered_but_not_where_none_are_needed(finished):
    environment = {"KDEXPORT_API_KEYS": "a-key-of-some-length"}
    flags = ("--admin-host", "127.0.0.1", "--access-log", "off")
    with served(f"news={finished}", *flags, **environment) as server:
        assert sent(server.url, "/", GOOD, b"Host: models.example", b"Origin: https://app.example", KEY).status == 200
        assert_refused(sent(server.admin, "/metrics", None, b"Host: evil.example"), 403)
        assert ask(server.admin, "/metrics").status == 200


def test_any_name_can_be_allowed():
    hosts = Hosts("127.0.0.1", "localhost", ["*"], open=True)
    hosts.check(given(b"evil.example", b"http://evil.example"))
    with pytest.raises(Refused, match="Host"):
        Hosts("127.0.0.1", "localhost", ["Models.Example"], open=True).check(given(b"other.example"))
    Hosts("127.0.0.1", "localhost", ["Models.Example"], open=True).check(given(b"models.example."))


@pytest.mark.parametrize("address", ["127.0.0.1", "127.3.4.5", "::1"])
def test_a_server_is_known_by_the_name_and_the_address_that_it_listens_on(address):
    hosts = Hosts(address, "Box", [], open=True)
    for name in (b"box:80", b"[::1]" if address == "::1" else address.encode()):
        hosts.check(given(name))
    with pytest.raises(Refused):
        hosts.check(given(b"127.9.9.9"))
    assert hosts.loopback
    assert not Hosts("10.0.0.1", "box", [], open=True).loopback
    Hosts("fe80::1%eth0", "box", [], open=True).check(given(b"any"))


def given(host: bytes, origin: bytes | None = None) -> Request:
    headers = [(b"host", host), *([(b"origin", origin)] if origin else [])]
    request = Request({"method": "GET", "path": "/", "headers": headers, "http_version": "1.1"}, None)
    request.read_head()
    return request

"""Checks of `Host` and `Origin`, against requests from web pages.

Any page in a local browser can reach a server on loopback without keys: by cross-origin requests, with a foreign
`Origin`, or by DNS rebinding, with a foreign `Host`. Elsewhere any `Host` is accepted: a cluster has many names.
"""

import ipaddress
from collections.abc import Iterable
from functools import lru_cache

from kdexport.serve.http import Refused, Request


class Hosts:
    """The `Host` and `Origin` headers that a port accepts.

    A port has its bound `address`, and the `name` in the configuration; `allowed` are further names, of proxies on this
    machine, `*` for any. `open`: requests need no key.
    """

    def __init__(self, address: str, name: str, allowed: Iterable[str], open: bool) -> None:
        self.loopback = ipaddress.ip_address(address.partition("%")[0]).is_loopback
        self._allowed = {one.lower().removeprefix("[").removesuffix("]") for one in allowed}
        self._own = {"localhost", "127.0.0.1", "::1", address, name.lower()}
        self._checked = open and self.loopback and "*" not in self._allowed
        self._usual: list[bytes] | None = None  # the last accepted one
        self._fault = lru_cache(256)(self._find_fault)

    def check(self, request: Request) -> None:
        """Refuse a request from a foreign page or for a foreign host (403), or with no host or two (400)."""
        hosts = request.host
        if hosts == self._usual and request.origin is None:
            return
        if len(hosts) != 1 and (hosts or request.scope["http_version"] == "1.1"):
            raise Refused(400, "a request has one Host header")
        if self._checked and (fault := self._fault(hosts[0] if hosts else None, request.origin)):
            raise Refused(403, fault)
        self._usual = hosts if len(hosts) == 1 else None

    def _find_fault(self, host: bytes | None, origin: bytes | None) -> str:
        if host is not None and (name := _name(host)) not in self._own and name not in self._allowed:
            return "this Host is none of the server's; kdexport serve --allow-host NAME adds one"
        if origin is not None:
            own = origin.rpartition(b"://")[2]
            if own != host and _name(own) not in self._allowed:
                return "web pages of other origins may not ask this server; kdexport serve --allow-host NAME adds one"
        return ""


def _name(host: bytes) -> str:
    """Strip a `Host` of port, trailing dot and the brackets of IPv6."""
    text = host.decode("latin-1").lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0].removesuffix(".")

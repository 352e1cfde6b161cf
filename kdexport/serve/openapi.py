"""The OpenAPI document, written by `make schemas` and filled in with settings and models."""

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from kdexport import __version__
from kdexport.serve.protocols import oip
from kdexport.serve.settings import Settings

PATH = Path(__file__).with_name("openapi.json")
_KEYED = {"security", "securitySchemes", "401"}


class Served(NamedTuple):
    """Names and versions in service; language models with their most new tokens, and models of other answers."""

    names: tuple[str, ...]
    versions: tuple[str, ...] = ()
    generators: tuple[tuple[str, int], ...] = ()
    taggers: tuple[str, ...] = ()
    transcribers: tuple[str, ...] = ()
    embedders: tuple[str, ...] = ()


@lru_cache(maxsize=1)  # as slow as an inference
def document(served: Served, settings: Settings) -> Any:
    """OpenAPI 3.1 of the public port, with the settings' limits and keys."""
    found = msgspec.json.decode(PATH.read_bytes())
    writers = [name for name, _ in served.generators]
    named_kinds = {
        **dict.fromkeys(served.names, "classifies"),
        **dict.fromkeys(served.taggers, "tags"),
        **dict.fromkeys(served.transcribers, "transcribes"),
        **dict.fromkeys(writers, "writes"),
        **dict.fromkeys(served.embedders, "embeds"),
    }
    kinds = [named_kinds[name] for name in served.names] or ["classifies"]
    outputs = {"writes": oip.WRITTEN, "transcribes": oip.HEARD, "embeds": oip.VECTORS}
    first, named = kinds[0], kinds[0] if len(set(kinds)) == 1 else "both"
    values: dict[str, Any] = {
        **{"$version": __version__, "$names": served.names, "$versions": served.versions},
        **{"$max_chars": settings.max_chars, "$max_rows": settings.max_rows, "$max_others": settings.max_rows - 1},
        "$room": min((room for _, room in served.generators), default=2**31),
        "$writer": writers[0] if writers else "NAME",
        "$writers": {"enum": writers} if writers else {"type": "string"},
        "$hearers": {"enum": served.transcribers} if served.transcribers else {"type": "string"},
        "$embedder": served.embedders[0] if served.embedders else "NAME",
        "$embedders": {"enum": [*served.embedders, None]} if served.embedders else {"type": ["string", "null"]},
        "$outputs": list(dict.fromkeys(name for kind in kinds for name in outputs.get(kind, oip.OUTPUTS))),
    }
    for name, variants in found.pop("x-variants").items():
        values[f"${name}"] = variants[named if name.startswith("named") else first]

    def filled(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: filled(value) for key, value in node.items() if settings.api_keys or key not in _KEYED}
        if isinstance(node, list):
            return list(map(filled, node))
        if isinstance(node, str) and node in values:
            return filled(values[node])
        return node

    return filled(found)

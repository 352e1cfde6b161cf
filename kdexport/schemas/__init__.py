"""JSON Schemas of the files that others read or write, for editors and machines.

Generated from the code by `python -m kdexport.schemas`; a test holds them to it.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from kdexport.results import Comparison, Report
from kdexport.runtime.artifact import Manifest
from kdexport.spec import Spec

SCHEMAS: dict[str, type] = {"spec": Spec, "report": Report, "comparison": Comparison, "manifest": Manifest}


def path(name: str) -> Path:
    """Where a schema lies."""
    return Path(__file__).parent / f"{name}.schema.json"


def generate(name: str) -> bytes:
    """A schema as indented JSON."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | msgspec.json.schema(SCHEMAS[name])
    return msgspec.json.format(msgspec.json.encode(schema), indent=2) + b"\n"

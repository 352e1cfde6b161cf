"""An artifact where others serve it: Triton, Kubernetes and KServe, Ray Serve. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def render(template: str, filters: Mapping[str, Callable[..., str]], **values: Any) -> str:
    """A file of `templates/`, filled; whatever a user or an artifact gives must pass `tojson` or a filter like it."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("kdexport", "integrations/templates"), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters.update(filters)
    return environment.get_template(template).render(values)

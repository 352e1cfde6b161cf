"""Artifacts for Triton, Kubernetes, KServe and Ray Serve. No torch."""

from collections.abc import Callable, Mapping
from typing import Any


def render(template: str, filters: Mapping[str, Callable[..., str]], **values: Any) -> str:
    """Render a file of `templates/`; values of users and artifacts must pass `tojson` or a similar filter."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("kdexport", "integrations/templates"), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters.update(filters)
    return environment.get_template(template).render(values)

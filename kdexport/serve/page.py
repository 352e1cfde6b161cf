"""The page at `/`: what is served, its model card, and a place to try it."""

from __future__ import annotations

from collections.abc import Sequence

from kdexport.serve.http import Response
from kdexport.serve.models import Version


def render(versions: Sequence[Version], with_card: bool) -> Response:
    """The page as HTML; it loads nothing from elsewhere."""
    return Response(b"<!doctype html><title>kdexport</title>", headers=[(b"content-type", b"text/html; charset=utf-8")])

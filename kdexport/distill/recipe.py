"""Values that the spec leaves open, derived with a reason; no torch, so `--plan` costs nothing."""

from __future__ import annotations

from typing import NamedTuple

from kdexport import spec
from kdexport.errors import SpecError

# name → (layers, width); heads are width / 64, the feed-forward width is 4 × width (Turc et al. 2019).
PRESETS = {"tiny": (2, 128), "mini": (4, 256), "small": (4, 512)}

_EXAMPLES_SEEN, _STEPS = 300_000, 500


class Derived(NamedTuple):
    """A value and why it is that."""

    value: float
    reason: str


def layers_to_keep(model: str) -> int | None:
    """N of `layers:N`, or None for any other student.

    Raises:
        SpecError: what follows `layers:` is no positive number.
    """
    if not model.startswith("layers:"):
        return None
    count = model.removeprefix("layers:")
    if not count.isdecimal() or int(count) == 0:
        raise SpecError(f"student.model: {model!r} names no number of layers", "Write it like layers:3")
    return int(count)


def epochs(settings: spec.Distill, rows: int) -> Derived:
    """Passes over the training rows."""
    if settings.epochs is not None:
        return Derived(settings.epochs, "as given")
    if 15 * rows < _STEPS * settings.batch_size:
        value = min(100, -(-_STEPS * settings.batch_size // rows))
        return Derived(value, f"about {_STEPS} steps, at most 100 passes; there are {rows:,} rows")
    value = max(3, min(15, _EXAMPLES_SEEN // rows))
    return Derived(value, f"about {_EXAMPLES_SEEN:,} examples seen, 3 to 15 passes; there are {rows:,} rows")


def learning_rate(settings: spec.Distill, width: int, pretrained: bool) -> Derived:
    """The highest learning rate: smaller for wider students, halved for weights that are trained already."""
    if settings.learning_rate is not None:
        return Derived(settings.learning_rate, "as given")
    value = 5e-4 * 128 / width * (0.5 if pretrained else 1.0)
    start = ", halved: its weights are trained already" if pretrained else ""
    return Derived(float(f"{value:.2g}"), f"5e-4 at width 128, less for wider: it is {width} wide{start}")

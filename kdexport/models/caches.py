"""Key-value caches of language models, on both supported lines of transformers, 4.57 and 5.

Version 5.40 of transformers drops the name `past_key_values` for `cache`.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

Pairs = list[tuple[Tensor, Tensor]]  # keys and values of each layer, [B, heads, T, size]


def cache_name(forward: Callable[..., Any]) -> str:
    """Return the name of a model's argument for a cache."""
    return "cache" if "cache" in signature(forward).parameters else "past_key_values"


def read_after(model: PreTrainedModel, past: Any, **inputs: Tensor) -> tuple[Tensor, Any]:
    """Run a model after a cache, or None; return the logits [B, T, V] and the extended cache."""
    found = model(**inputs, **{cache_name(model.forward): past}, use_cache=True)
    return found.logits, found["cache"] if "cache" in found else found["past_key_values"]


def pairs_of(cache: Any) -> Pairs:
    """Return the keys and values of each layer of a cache."""
    return [(layer.keys, layer.values) for layer in cache.layers]

"""The decoder of a recogniser that writes, in ONNX Runtime: tokens after a cache → logits. No torch."""

from typing import Any

import numpy as np

from kdexport.tasks.metrics import Array
from kdexport.tasks.speech_seq2seq import Read

# Optimum's names of the inputs and outputs of a graph with a key-value cache.
PAST, PRESENT = "past_key_values.", "present."
_SWITCH, _STATES = "use_cache_branch", "encoder_hidden_states"


def reader(onnxruntime: Any, session: Any, states: Array) -> Read:
    """Return a function that reads tokens for the states of an encoder, float32 [B, T, H].

    `session` runs a merged decoder. What it makes of the states, by far the most of its cache, is made once.
    """
    value = onnxruntime.OrtValue.ortvalue_from_numpy
    shapes = {tensor.name: tensor.shape for tensor in session.get_inputs() if tensor.name.startswith(PAST)}
    names = {past: past.replace(PAST, PRESENT, 1) for past in shapes}
    heard = value(states)

    def read(ids: Array, cache: Any) -> tuple[Array, Any]:
        given = cache or {
            past: value(np.zeros((len(ids), shape[1], 0, shape[3]), np.float32)) for past, shape in shapes.items()
        }
        switch = value(np.array([cache is not None]))
        wanted = [past for past in names if cache is None or ".decoder." in past]
        feed = {"input_ids": value(np.ascontiguousarray(ids)), _STATES: heard, _SWITCH: switch} | given
        logits, *present = session.run_with_ort_values(["logits", *(names[past] for past in wanted)], feed)
        return logits.numpy(), given | dict(zip(wanted, present, strict=True))

    return read

"""A recogniser that writes → ONNX: its encoder, and its decoder with and without a cache, merged in one file.

Files, inputs and outputs have the names that Optimum and transformers.js read. An encoder `encoder_model.onnx` belongs
to the decoder `decoder_model_merged.onnx` beside it, and so on with every suffix.
"""

from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache

from kdexport.errors import ModelError, first_line
from kdexport.export.merge import merge, share_table
from kdexport.export.onnx import OPSET, masks_without_vmap, quiet
from kdexport.models import LINE_5
from kdexport.models.caches import cache_name, pairs_of
from kdexport.models.registry import open_trained
from kdexport.runtime.transcription import PAST, PRESENT

# Sizes of the traced example: all differ, and none is 1.
_ROWS, _READ, _BEFORE = 2, 3, 5


class _Encoder(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model

    def forward(self, bands: Tensor) -> Tensor:
        return self._model.encoded(bands)  # type: ignore[no-any-return]


class _Decoder(nn.Module):
    """A decoder with a cache as positional tensors, layer by layer: keys and values of its own, and of the encoder."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._decoder, self._head = model.model.decoder, model.proj_out

    def forward(self, ids: Tensor, states: Tensor, *past: Tensor) -> Any:
        pairs = list(zip(past[::2], past[1::2], strict=True))
        cache = EncoderDecoderCache(DynamicCache(pairs[::2] or None), DynamicCache(pairs[1::2] or None))
        name = {cache_name(type(self._decoder).forward): cache}
        hidden = self._decoder(ids, encoder_hidden_states=states, use_cache=True, **name).last_hidden_state
        own, cross = pairs_of(cache.self_attention_cache), pairs_of(cache.cross_attention_cache)
        flat = [pair for both in zip(own, cross, strict=True) for pair in (both if not past else both[:1])]
        return self._head(hidden), *(tensor for pair in flat for tensor in pair)


def export_speech(student: Path, encoder: Path, work: Path) -> tuple[Path, Path]:
    """Write a student's encoder; and into `work` its decoder without a cache and with one, each fp32, and return these.

    Raises:
        ModelError: the exporter fails.
    """
    model: Any = open_trained(student)
    if LINE_5:
        model.set_attn_implementation("eager")
    config = model.config
    bands = torch.zeros(_ROWS, config.num_mel_bins, 2 * config.max_source_positions)
    ids, heads = torch.ones(_ROWS, _READ, dtype=torch.int64), config.decoder_attention_heads
    states = torch.zeros(_ROWS, config.max_source_positions, config.d_model)
    names, past, axes = list[str](), list[Tensor](), dict[str, dict[int, str]]()
    for i in range(config.decoder_layers):
        for kind, length, axis in (("decoder", _BEFORE, "past_sequence_length"), ("encoder", states.shape[1], "steps")):
            for part in ("key", "value"):
                names.append(f"{i}.{kind}.{part}")
                past.append(torch.zeros(_ROWS, heads, length, config.d_model // heads))
                axes[f"{PAST}{names[-1]}"] = {0: "batch_size", 2: axis}
                axes[f"{PRESENT}{names[-1]}"] = {0: "batch_size", 2: f"{axis}_now"}
    axes |= {
        "input_features": {0: "batch_size"}, "last_hidden_state": {0: "batch_size"},
        "encoder_hidden_states": {0: "batch_size", 1: "steps"},
        "input_ids": {0: "batch_size", 1: "sequence_length"}, "logits": {0: "batch_size", 1: "sequence_length"},
    }  # fmt: skip
    first, later = work / "decoder_model.onnx", work / "decoder_with_past_model.onnx"
    present = [f"{PRESENT}{name}" for name in names]
    own = [name for name in present if ".decoder." in name]
    read = ["input_ids", "encoder_hidden_states"]
    try:
        _trace(_Encoder(model), [bands], ["input_features"], ["last_hidden_state"], axes, encoder)
        _trace(_Decoder(model), [ids, states], read, ["logits", *present], axes, first)
        inputs = [*read, *(f"{PAST}{name}" for name in names)]
        _trace(_Decoder(model), [ids, states, *past], inputs, ["logits", *own], axes, later)
    except Exception as error:  # exporters raise whatever a model's code or torch raises
        what = f"{config.model_type} models can't be exported to ONNX: {first_line(error)}"
        raise ModelError(what, "Take a student of CTC: conv:96") from None
    for file in (first, later):
        graph = onnx.load(file)
        share_table(graph)
        onnx.save(graph, file)
    return first, later


def merge_decoders(first: Path, later: Path, out: Path) -> None:
    """Write both decoders as one file, which runs the second where `use_cache_branch` is true."""
    merged = merge(onnx.load(first), onnx.load(later), "use_cache_branch")
    onnx.helper.set_model_props(merged, {"made_by": "kdexport", "graph": "plain", "exporter": "torchscript"})
    onnx.save(merged, out)


def _trace(
    part: nn.Module, values: list[Tensor], inputs: list[str], outputs: list[str], axes: dict[str, Any], file: Path
) -> None:
    there = {name: axes[name] for name in (*inputs, *outputs)}
    with quiet(), masks_without_vmap(), torch.no_grad():
        torch.onnx.export(
            part.eval(), tuple(values), file, dynamo=False, input_names=inputs, output_names=outputs,
            dynamic_axes=there, opset_version=OPSET,
        )  # fmt: skip

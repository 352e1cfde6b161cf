"""The Triton model that tokenises texts for the ONNX model. Needs only `numpy` and `tokenizers`.

`kdexport export --layout triton` copies this file as `1/model.py`, beside `task.json` and `tokenizer.json`. A test
holds it to `encode` and `decode` of kdexport's task.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found] # only inside Triton
from tokenizers import Encoding, Tokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

# Tokenizers split at a single space between letters or digits; cut elsewhere, 128 more tokens must follow.
BREAK = re.compile(r"\w (?=\w)")


class TritonPythonModel:
    """`text` (and `text_pair`) → `label`, its `score`, and the `scores` of all labels; or a vector.

    Triton's batcher collects texts of many requests, which are padded and run as one batch; in the ONNX model's own
    batcher, lengths would have to match.
    """

    def initialize(self, args: dict[str, Any]) -> None:
        """Open the task and its tokenizer."""
        folder = Path(args["model_repository"]) / args["model_version"]
        self.task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
        parameters = json.loads(args["model_config"])["parameters"]
        self.onnx_model = parameters["onnx_model"]["string_value"]
        self.output = parameters["output"]["string_value"]
        vectors = self.task["embedding"]
        self.prompt = vectors["prompts"].get(vectors["default_prompt"], "") if vectors else ""
        self.labels = np.array([label.encode() for label in self.task["labels"]], dtype=object)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.finisher = Tokenizer(BPE())  # truncates and adds special tokens
        self.finisher.post_processor = self.tokenizer.post_processor or TemplateProcessing(pair="$A $B:1")
        self.finisher.enable_truncation(self.task["max_length"], direction=self.task["truncation_side"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """Return one response per request."""
        rows = [_rows(request) for request in requests]
        batch = self.encode([row for part in rows for row in part])
        inputs = [pb_utils.Tensor(name, array) for name, array in batch.items()]
        found = pb_utils.InferenceRequest(
            model_name=self.onnx_model, requested_output_names=[self.output], inputs=inputs
        ).exec()
        if found.has_error():
            return [pb_utils.InferenceResponse(error=found.error()) for _ in requests]
        logits = pb_utils.get_output_tensor_by_name(found, self.output).as_numpy()
        ends = np.cumsum([len(part) for part in rows])[:-1]
        if self.task["embedding"]:
            tensors = [pb_utils.Tensor(self.output, part) for part in np.split(logits, ends)]
            return [pb_utils.InferenceResponse(output_tensors=[tensor]) for tensor in tensors]
        return [self._response(part) for part in np.split(self.scores(logits), ends)]

    def encode(self, rows: list[Any]) -> dict[str, np.ndarray]:
        """Return the ONNX model's inputs, int64 [B, T], padded to the longest."""
        encodings = [self.encoding(row) for row in rows]
        longest = max(len(encoding.ids) for encoding in encodings)
        fill = {"input_ids": self.task["pad_id"], "token_type_ids": self.task["pad_type_id"]}
        columns = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
        batch = {}
        for name in self.task["inputs"]:
            batch[name] = np.full((len(rows), longest), fill.get(name, 0), dtype=np.int64)
            for row, encoding in zip(batch[name], encodings, strict=True):
                values = getattr(encoding, columns[name])
                if self.task["padding_side"] == "right":
                    row[: len(values)] = values
                else:
                    row[longest - len(values) :] = values
        return batch

    def encoding(self, row: Any) -> Encoding:
        """Encode a text or a pair, truncated."""
        if isinstance(row, str):
            return self.finisher.post_process(self.head(self.prompt + row))
        limit = self.task["max_length"]
        sides = [self.head(text) for text in row]
        sizes = [len(side) for side in sides]
        if min(sizes) > limit and (limit - self.finisher.num_special_tokens_to_add(True)) % 2:
            few = max(map(len, row)) <= 10_000
            sizes = [len(self.tokenizer.encode(text, add_special_tokens=False)) if few else len(text) for text in row]
        for side, size in zip(sides, sizes, strict=True):
            side.truncate(limit + 1 + (size > min(sizes)), direction=self.task["truncation_side"])
        return self.finisher.post_process(sides[0], sides[1])

    def head(self, text: str) -> Encoding:
        """Encode at least the `max_length` tokens of a text that are read, without special tokens."""
        limit, left = self.task["max_length"], self.task["truncation_side"] == "left"
        size = 6 * limit
        while True:
            begin = max(0, len(text) - size)
            if size >= len(text):
                cut, part = None, text
            elif left:
                cut = next(reversed([*BREAK.finditer(text, max(0, begin - 256), begin)]), None)
                part = text[cut.start() + 1 if cut else begin :]
            else:
                cut = BREAK.search(text, size, size + 256)
                part = text[: cut.start() + 1 if cut else size]
            (found,) = self.tokenizer.encode_batch_fast([part], add_special_tokens=False)
            if size >= len(text) or len(found) >= limit + 2 + (0 if cut else 128):
                return found
            size = 2 * len(part)

    def scores(self, logits: np.ndarray) -> np.ndarray:
        """Return scores, float64 [B, C], of logits [B, C]."""
        logits = logits.astype(np.float64)
        match self.task["function"]:
            case "softmax":
                powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
                return np.asarray(powers / powers.sum(axis=-1, keepdims=True))
            case "sigmoid":
                return np.asarray(np.exp(-np.logaddexp(0.0, -logits)))
        return logits

    def _response(self, scores: np.ndarray) -> Any:
        best = scores.argmax(axis=1)[:, None]
        highest = np.take_along_axis(scores, best, axis=1)
        found = {"label": self.labels[best], "score": highest.astype(np.float32), "scores": scores.astype(np.float32)}
        tensors = [pb_utils.Tensor(name, array) for name, array in found.items()]
        return pb_utils.InferenceResponse(output_tensors=tensors)


def _rows(request: Any) -> list[Any]:
    texts, pairs = (pb_utils.get_input_tensor_by_name(request, name) for name in ("text", "text_pair"))
    first = [_decoded(value) for value in texts.as_numpy().reshape(-1)]
    if pairs is None:
        return first
    return list(zip(first, (_decoded(value) for value in pairs.as_numpy().reshape(-1)), strict=True))


def _decoded(value: bytes) -> str:
    return value.decode("utf-8", "replace")

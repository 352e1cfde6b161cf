"""The handler that LitServe, BentoML and MLServer are given: texts → label and score, by tokenizers and ONNX Runtime.

What a careful user would write; it imports nothing of kdexport and runs in each peer's own environment.
"""

import json
import os
from pathlib import Path

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import onnxruntime
from tokenizers import Tokenizer


class Classifier:
    """One session; THREADS of ONNX Runtime, which do not spin while they wait."""

    def __init__(self) -> None:
        folder = Path(os.environ["ARTIFACT"])
        task = json.loads((folder / "kdexport.json").read_text())["task"]
        self.labels, self.inputs = task["labels"], task["inputs"]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(task["max_length"])
        self.tokenizer.enable_padding(pad_id=task["pad_id"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ["THREADS"])
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        model = folder / "onnx" / "model_quantized.onnx"
        self.session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])

    def __call__(self, texts: list[str]) -> list[dict]:
        encodings = self.tokenizer.encode_batch(texts)
        fields = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
        feed = {
            name: np.array([getattr(encoding, fields[name]) for encoding in encodings], dtype=np.int64)
            for name in self.inputs
        }
        logits = self.session.run(["logits"], feed)[0]
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
        best = scores.argmax(axis=1)
        return [{"label": self.labels[i], "score": float(row[i])} for i, row in zip(best, scores, strict=True)]

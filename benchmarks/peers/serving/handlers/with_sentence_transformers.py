"""FastAPI around Sentence-Transformers, with OpenAI's request: what most people write first.

$MODEL is a folder; with $FILE it is an artifact of which ONNX Runtime runs this file, else PyTorch runs the weights.
"""

import os

import onnxruntime
import torch
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer

threads = int(os.environ["THREADS"])
torch.set_num_threads(threads)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = threads
options.add_session_config_entry("session.intra_op.allow_spinning", "0")
file = os.environ.get("FILE")
onnx = {"backend": "onnx", "model_kwargs": {"file_name": file, "session_options": options}} if file else {}
model = SentenceTransformer(os.environ["MODEL"], device="cpu", **onnx)
app = FastAPI()


class Request(BaseModel):
    model: str = ""
    input: list[str]


class Embedding(BaseModel):
    object: str = "embedding"
    index: int
    embedding: list[float]


class Answer(BaseModel):
    object: str = "list"
    data: list[Embedding]


@app.post("/v1/embeddings")
def answer(request: Request) -> Answer:
    vectors = model.encode(request.input, normalize_embeddings=True).tolist()
    return Answer(data=[Embedding(index=i, embedding=vector) for i, vector in enumerate(vectors)])

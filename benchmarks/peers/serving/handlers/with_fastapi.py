"""FastAPI around a transformers pipeline over Optimum's ONNX Runtime model: what most people write first."""

import os

import onnxruntime
from fastapi import FastAPI
from optimum.onnxruntime import ORTModelForSequenceClassification
from pydantic import BaseModel
from transformers import AutoTokenizer, pipeline

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(os.environ["THREADS"])
options.add_session_config_entry("session.intra_op.allow_spinning", "0")
folder = os.environ["ARTIFACT"]
model = ORTModelForSequenceClassification.from_pretrained(
    folder, subfolder="onnx", file_name="model_quantized.onnx", session_options=options
)
classify = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(folder))
app = FastAPI()


class Request(BaseModel):
    inputs: str


class Answer(BaseModel):
    label: str
    score: float


@app.post("/classify")
def answer(request: Request) -> Answer:
    return Answer(**classify(request.inputs, truncation=True)[0])

"""BentoML: a service around the handler whose API is batchable, so that BentoML's adaptive batching runs."""

import os

import bentoml
from classifier import Classifier


@bentoml.service(workers=int(os.environ["WORKERS"]), logging={"access": {"enabled": False}})
class Classify:
    def __init__(self) -> None:
        self.classifier = Classifier()

    @bentoml.api(batchable=True, max_batch_size=int(os.environ["BATCH"]), max_latency_ms=1000)
    def classify(self, texts: list[str]) -> list[dict]:
        return self.classifier(texts)

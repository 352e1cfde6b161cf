"""MLServer: a model of one's own around the handler, behind MLServer's adaptive batching."""

import asyncio

import numpy as np
from classifier import Classifier
from mlserver import MLModel
from mlserver.codecs import NumpyCodec, StringCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Model(MLModel):
    async def load(self) -> bool:
        self.classify = Classifier()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        texts = StringCodec.decode_input(payload.inputs[0])
        # On a thread, so that the loop goes on taking requests meanwhile.
        answers = await asyncio.to_thread(self.classify, texts)
        labels = StringCodec.encode_output("label", [answer["label"] for answer in answers])
        scores = NumpyCodec.encode_output("score", np.array([[answer["score"]] for answer in answers]))
        return InferenceResponse(model_name=self.name, outputs=[labels, scores])

"""LitServe: a LitAPI around the handler; BATCH texts at once at most (1: no batching)."""

import os

import litserve
from classifier import Classifier


class Api(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.classify = Classifier()

    def decode_request(self, request: dict) -> str:
        return request["input"]

    def predict(self, texts: str | list[str]) -> dict | list[dict]:
        return self.classify([texts])[0] if isinstance(texts, str) else self.classify(texts)

    def encode_response(self, answer: dict) -> dict:
        return answer


if __name__ == "__main__":
    api = Api(max_batch_size=int(os.environ["BATCH"]), batch_timeout=0.0)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=int(os.environ["WORKERS"]), fast_queue=True)
    front_ends = int(os.environ["FRONT_ENDS"])
    server.run(
        host="127.0.0.1",
        port=int(os.environ["PORT"]),
        num_api_servers=front_ends,
        log_level="warning",
        generate_client_file=False,
    )

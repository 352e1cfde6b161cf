"""Talk to a server with KServe's own REST client, and print what it understood: JSON, one object.

`python tests/kserve_client.py URL MODEL TEXT…`, with a Python that has kserve: its pins (pandas 2, psutil 5) don't go
with ours, so it lives in an environment of its own.
"""

from __future__ import annotations

import asyncio
import json
import sys

import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput


def request(texts: tuple[str, ...], binary: bool, binary_out: bool | None) -> InferRequest:
    text = InferInput("text", [len(texts)], "BYTES")
    text.set_data_from_numpy(np.array([one.encode() for one in texts], dtype=np.object_), binary_data=binary)
    parameters = None if binary_out is None else {"binary_data": binary_out}
    wanted = [RequestedOutput(name, parameters) for name in ("label", "scores")]
    return InferRequest("m", [text], request_id="it-is-7", request_outputs=wanted)


async def main(url: str, model: str, *texts: str) -> None:
    found: dict[str, object] = {}
    async with InferenceRESTClient(RESTConfig(protocol="v2", retries=0)) as client:
        found["live"] = await client.is_server_live(url)
        found["ready"] = await client.is_server_ready(url)
        found["model"] = await client.is_model_ready(url, model)
        found["nobody"] = await client.is_model_ready(url, "nobody")
        for binary in (True, False):
            for binary_out in (True, False, None):
                answer = await client.infer(url, request(texts, binary, binary_out), model_name=model)
                outputs = {one.name: one.as_numpy() for one in answer.outputs}
                labels = [one.decode() if isinstance(one, bytes) else one for one in outputs["label"]]
                found[f"{binary} {binary_out}"] = [answer.id, answer.model_name, labels, outputs["scores"].tolist()]
        try:
            await client.infer(url, request(texts, True, None), model_name="nobody")
        except Exception as error:
            found["error"] = str(error)
    print(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

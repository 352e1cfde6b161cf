"""Ask with Triton's client: `pip install 'tritonclient[http]'`, then `python python_triton.py [URL] [MODEL]`."""

import sys

import numpy as np
import tritonclient.http as triton

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080"
model = sys.argv[2] if len(sys.argv) > 2 else "demo"
texts = ["Shares in the airline rose after it beat profit forecasts", "The striker scored twice"]

# Texts are BYTES; they travel raw, behind the JSON, unless binary_data=False.
text = triton.InferInput("text", [len(texts)], "BYTES")
text.set_data_from_numpy(np.array([one.encode() for one in texts], dtype=np.object_))
# `classification` asks for the best few as "value:index:label", here of the probabilities.
outputs = [triton.InferRequestedOutput("label"), triton.InferRequestedOutput("scores", class_count=2)]

with triton.InferenceServerClient(url.removeprefix("http://")) as client:
    # Where the server wants a key: client.infer(…, headers={"Authorization": f"Bearer {key}"})
    answer = client.infer(model, [text], outputs=outputs)

for label, best in zip(answer.as_numpy("label"), answer.as_numpy("scores"), strict=True):
    print(label.decode(), [one.decode() for one in best])

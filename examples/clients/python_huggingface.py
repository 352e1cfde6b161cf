"""Ask with Hugging Face's client: `pip install huggingface_hub`, then `python python_huggingface.py [URL]`."""

import sys

from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080"  # or {url}/models/NAME, for one of several

# Where the server wants a key, it is the token. Without one the library sends the Hub's, if you are logged in there.
client = InferenceClient(url, token="unused")
for text in ("Shares in the airline rose after it beat profit forecasts", "The striker scored twice"):
    best, second = client.text_classification(text, top_k=2)
    print(f"{best.label} {best.score:.3f}, not {second.label} {second.score:.3f}")

try:
    client.text_classification(text, top_k=0)
except HfHubHTTPError as error:  # 429 has a Retry-After header: there is too much work just now
    print(error.response.status_code, error.response.json()["error"])

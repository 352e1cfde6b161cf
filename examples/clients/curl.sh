#!/bin/sh
# One text, in each of the protocols that `kdexport serve runs/demo` speaks.
#   sh curl.sh [URL] [MODEL]        (--json needs curl 7.82)
# Where the server wants a key, add to each:  -H "Authorization: Bearer $KEY"
set -eu
url=${1:-http://127.0.0.1:8080} model=${2:-demo}
text='Shares in the airline rose after it beat profit forecasts'
post() { curl --silent --show-error --fail-with-body "$@" && echo; }

# Is it ready? 200 is yes, 503 not yet, or no more.
post "$url/v2/health/ready"

# Hugging Face's API: a list of labels for each text, best first.
post "$url/models/$model" --json "{\"inputs\": \"$text\", \"parameters\": {\"top_k\": 1}}"

# text-embeddings-inference's: a lone text gives one list with all labels; a batch is a list of lists.
post "$url/predict" --json "{\"inputs\": \"$text\"}"
post "$url/predict" --json "{\"inputs\": [[\"$text\"], [\"The striker scored twice\"]]}"

# Open Inference Protocol, as Triton and KServe speak it.
post "$url/v2/models/$model/infer" --json @- <<JSON
{
  "id": "42",
  "inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["$text"]}],
  "outputs": [{"name": "label"}, {"name": "score"}]
}
JSON

# What it counted. Metrics are on the admin port, which only this machine reaches:
#   curl http://127.0.0.1:8081/metrics

// Ask from JavaScript, without any package: node javascript.mjs [URL] [MODEL]
const [url = "http://127.0.0.1:8080", model = "demo"] = process.argv.slice(2);
const texts = ["Shares in the airline rose after it beat profit forecasts", "The striker scored twice"];

async function post(path, content) {
  const response = await fetch(url + path, {
    method: "POST",
    headers: { "Content-Type": "application/json" }, // and Authorization: `Bearer ${key}`, where a key is wanted
    body: JSON.stringify(content),
  });
  const answer = await response.json(); // errors are JSON, too
  if (!response.ok) throw new Error(`${response.status} ${answer.error}`);
  return answer;
}

// Hugging Face's form: for each text its labels, best first.
for (const [best] of await post(`/models/${model}`, { inputs: texts, parameters: { top_k: 1 } }))
  console.log(best.label, best.score.toFixed(3));

// The Open Inference Protocol: named tensors in and out.
const { outputs } = await post(`/v2/models/${model}/infer`, {
  inputs: [{ name: "text", datatype: "BYTES", shape: [texts.length], data: texts }],
  outputs: [{ name: "label" }, { name: "score" }],
});
const [labels, scores] = outputs.map((output) => output.data);
labels.forEach((label, i) => console.log(label, scores[i].toFixed(3)));

// Answers of transformers.js, under Node.js; see tests/export/test_transformers_js.py.
//
//     node transformers_js.mjs TASK FOLDER DTYPE < inputs.json > answers.json
//
// Inputs are texts, or the samples of sound at 16 kHz; vectors are the normalised mean over the tokens.
import { readFileSync } from "node:fs";
import { dirname, basename } from "node:path";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [task, folder, dtype, modules] = process.argv.slice(2);
const found = createRequire(`${modules}/`).resolve("@huggingface/transformers");
const { pipeline, env } = await import(pathToFileURL(found));
env.allowRemoteModels = false;
env.localModelPath = dirname(folder);
const pipe = await pipeline(task, basename(folder), { dtype });
const how = {
  "automatic-speech-recognition": { max_new_tokens: 24 },
  "feature-extraction": { pooling: "mean", normalize: true },
};
const answers = [];
for (const given of JSON.parse(readFileSync(0))) {
  const input = Array.isArray(given) ? Float32Array.from(given) : given;
  const answer = await pipe(input, how[task] ?? {});
  answers.push(answer.tolist?.() ?? answer);
}
process.stdout.write(JSON.stringify(answers));

"use strict";
// Whatever comes from a person, a model or the server goes into the page as textContent only.
const $ = (id) => document.getElementById(id);
const form = $("form"), key = $("key"), best = 5;
let asked;

/** How many tokens the model may write; 0 for a classifier. */
const writes = () => Number(model().dataset.writes);
const model = () => form.querySelector("[name=model]:checked, [name=model][type=hidden]");

/** What is to be sent, and where. */
function request() {
  if (writes()) {
    const parameters = { max_new_tokens: $("tokens").valueAsNumber, temperature: $("temperature").valueAsNumber };
    return [new URL(model().value, location.href).href, { inputs: $("text").value, parameters }];
  }
  const text = $("text").value, second = $("pair").open ? $("second").value : "";
  const inputs = second ? { text, text_pair: second } : text;
  return [new URL(model().value, location.href).href, { inputs, parameters: {} }];
}

// JSON is also Python and JavaScript. Control characters would be keystrokes to the terminal they are pasted into.
const json = (value) =>
  JSON.stringify(value).replace(/[\u007f-\u009f]/g, (c) => `\\u00${c.charCodeAt(0).toString(16)}`);
const shell = (text) => `'${text.replaceAll("'", "'\\''")}'`;

const classified = (body) => `for answer in client.text_classification(${json(body.inputs)}):
    print(answer.label, answer.score)`;
const written = ({ inputs, parameters: { max_new_tokens, temperature } }) =>
  `how = {"max_new_tokens": ${max_new_tokens}, "temperature": ${temperature}}
for text in client.text_generation(${json(inputs)}, stream=True, **how):
    print(text, end="", flush=True)`;

const ways = {
  curl: (url, body) => `curl ${shell(url)} \\
${key ? '  -H "Authorization: Bearer $KDEXPORT_API_KEY" \\\n' : ""}  -H 'Content-Type: application/json' \\
  -d ${shell(json(body))}`,
  python: (url, body) => `${key ? "import os\n\n" : ""}from huggingface_hub import InferenceClient

client = InferenceClient(${json(url)}${key ? ', token=os.environ["KDEXPORT_API_KEY"]' : ""})
${writes() ? written(body) : classified(body)}`,
  javascript: (url, body) => `const response = await fetch(${json(url)}, {
  method: "POST",
  headers: { ${key ? "Authorization: `Bearer ${process.env.KDEXPORT_API_KEY}`, " : ""}"Content-Type": "application/json" },
  body: JSON.stringify(${json(body)}),
});
const [answer] = await response.json();
console.log(answer${writes() ? ".generated_text" : ""});`,
};

function update() {
  $("pair").hidden = Boolean(writes());
  $("how").hidden = $("how").disabled = !writes();  // what is disabled is not checked either
  $("tokens").max = writes();
  $("go").textContent = writes() ? "Write" : "Classify";
  $("code").textContent = ways[document.querySelector("[name=way]:checked").value](...request());
  $("copied").textContent = "";
  for (const card of document.querySelectorAll("[data-model]")) card.hidden = card.dataset.model !== model().value;
}

function say(title, words, failed = false) {
  const [head, rest] = $("said").children;
  head.textContent = title;
  rest.textContent = words;
  $("said").classList.toggle("failed", failed);
}

const percent = (score) =>
  score < 0.0005 ? "< 0.1 %" : score < 1 && score >= 0.9995 ? "> 99.9 %" : `${(100 * score).toFixed(1)} %`;
const number = (score) => score.toPrecision(4);

/** One line for each label; `share` when scores are parts of 1 and a bar can show them. */
function list(scores, share) {
  $("scores").replaceChildren(...scores.map(({ label, score }) => {
    const item = document.createElement("li"), value = document.createElement("span");
    item.append(Object.assign(document.createElement("bdi"), { textContent: label }), value);
    value.textContent = (share ? percent : number)(score);
    if (share) {
      const bar = item.appendChild(document.createElement("i")).appendChild(document.createElement("i"));
      bar.style.width = `${100 * score}%`;
    }
    return item;
  }));
  $("more").hidden = scores.length <= best;
  more(false);
}

function more(all) {
  $("scores").classList.toggle("all", all);
  $("more").setAttribute("aria-expanded", all);
  $("more").textContent = all ? `Show the best ${best}` : `Show all ${$("scores").children.length}`;
}

async function send() {
  asked?.abort();  // only the last one is waited for
  const mine = (asked = new AbortController());
  const [url, body] = request(), { name, function: by } = model().dataset, share = by !== "none";
  const asks = writes() ? { ...body, stream: true } : body;
  const headers = { "Content-Type": "application/json" };
  // Headers are bytes; the server compares the key's UTF-8.
  if (key?.value) headers.Authorization = `Bearer ${String.fromCharCode(...new TextEncoder().encode(key.value))}`;
  $("answer").setAttribute("aria-busy", true);
  try {
    const began = performance.now();
    const response = await fetch(url, { method: "POST", headers, body: JSON.stringify(asks), signal: mine.signal });
    $("written").hidden = true;
    if (asks.stream && response.ok) {
      await show(response, name, began);
      return;
    }
    const text = await response.text(), ms = performance.now() - began;
    const answer = read(text), scores = response.ok && answer?.[0];
    list(scores || [], share);
    if (scores) {
      const score = (share ? percent : number)(scores[0].score);
      say(scores[0].label, `${score}, answered by ${name} in ${ms.toFixed(ms < 10 ? 1 : 0)} ms as this browser saw it`);
    } else {
      const after = response.headers.get("Retry-After"), words = answer?.error ?? "This is no answer of kdexport";
      say(`Error ${response.status}`, after ? `${words}. Come again in ${after} s.` : words, true);
    }
  } catch {
    if (mine.signal.aborted) return;
    list([], share);
    say("No answer", "The server can't be reached.", true);
  } finally {
    if (!mine.signal.aborted) {
      $("answer").setAttribute("aria-busy", false);
      $("answer").scrollIntoView({ block: "nearest" });  // on a phone it is below the fold
    }
  }
}

/** What a language model writes, while it comes. */
async function show(response, name, began) {
  const text = $("written"), since = () => `${(performance.now() - began).toFixed(0)} ms`;
  let tokens = 0, first, error;
  list([]);
  say("", `${name} writes`);
  text.textContent = "";
  text.hidden = false;
  $("answer").setAttribute("aria-busy", false);  // it does not pale while it grows
  for await (const event of events(response)) {
    error = event.error;
    if (error) break;
    first ??= since();
    tokens += 1;
    text.textContent += event.token.text;
  }
  if (error) say("Error", error, true);
  else say(`${tokens} tokens`, `by ${name} in ${since()}, the first after ${first}, as this browser saw it`);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = "", part; !(part = await reader.read()).done; ) {
    const whole = (text + part.value).split("\n\n");
    text = whole.pop();
    for (const one of whole) yield JSON.parse(one.slice("data: ".length));
  }
}

function read(text) {
  try { return JSON.parse(text); } catch { return null; }  // a proxy's page
}

async function copy() {
  try {
    await navigator.clipboard.writeText($("code").textContent);
    $("copied").textContent = "Copied";
  } catch {  // plain HTTP from another machine: browsers give no clipboard there
    getSelection().selectAllChildren($("code"));
    $("copied").textContent = document.execCommand("copy") ? "Copied" : "Marked: copy it with the keyboard";
  }
}

form.addEventListener("submit", (event) => { event.preventDefault(); send(); });
form.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); send(); }
});
form.addEventListener("input", update);
$("pair").addEventListener("toggle", update);
$("ways").addEventListener("change", update);
$("copy").addEventListener("click", copy);
$("more").addEventListener("click", () => more(!$("scores").classList.contains("all")));
addEventListener("pageshow", update);  // what a browser brings back on reload comes after this script
update();

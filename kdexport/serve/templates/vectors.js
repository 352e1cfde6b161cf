"use strict";
// Whatever comes from a person, a model or the server goes into the page as textContent only.
const $ = (id) => document.getElementById(`vectors-${id}`);
const key = $("key");
let asked;

function say(title, words, failed = false) {
  const [head, rest] = $("said").children;
  head.textContent = title;
  rest.textContent = words;
  $("said").classList.toggle("failed", failed);
}

async function compare() {
  asked?.abort();  // only the last one is waited for
  const mine = (asked = new AbortController()), { value, text: name } = $("model").selectedOptions[0];
  const headers = { "Content-Type": "application/json" };
  // Headers are bytes; the server compares the key's UTF-8.
  if (key?.value) headers.Authorization = `Bearer ${String.fromCharCode(...new TextEncoder().encode(key.value))}`;
  const body = JSON.stringify({ inputs: { source_sentence: $("first").value, sentences: [$("second").value] } });
  $("answer").setAttribute("aria-busy", true);
  try {
    const began = performance.now();
    const response = await fetch(value, { method: "POST", headers, body, signal: mine.signal });
    const answer = await response.json().catch(() => null), ms = (performance.now() - began).toFixed(0);
    if (typeof answer?.[0] === "number") say(answer[0].toFixed(3), `cosine, by ${name} in ${ms} ms as this browser saw it`);
    else say(`Error ${response.status}`, answer?.error ?? "This is no answer of kdexport", true);
  } catch {
    if (!mine.signal.aborted) say("No answer", "The server can't be reached.", true);
  } finally {
    if (!mine.signal.aborted) $("answer").setAttribute("aria-busy", false);
  }
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); compare(); });

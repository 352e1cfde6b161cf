"use strict";
// Whatever comes from a person, a model or the server goes into the page as textContent only.
const $ = (id) => document.getElementById(`speech-${id}`);
const key = $("key"), rate = 16000;
let asked, recorder;

const model = () => $("model").selectedOptions[0];

function say(title, words, text = "") {
  const [head, rest] = $("said").children;
  head.textContent = title;
  rest.textContent = words;
  $("said").classList.toggle("failed", Boolean(title));
  $("written").textContent = text;
}

async function send(sound) {
  asked?.abort();  // only the last one is waited for
  const mine = (asked = new AbortController()), { value, text: name } = model();
  const headers = { "Content-Type": "application/octet-stream" };
  // Headers are bytes; the server compares the key's UTF-8.
  if (key?.value) headers.Authorization = `Bearer ${String.fromCharCode(...new TextEncoder().encode(key.value))}`;
  $("answer").setAttribute("aria-busy", true);
  try {
    const began = performance.now();
    const response = await fetch(value, { method: "POST", headers, body: sound, signal: mine.signal });
    const answer = await response.json().catch(() => null), ms = (performance.now() - began).toFixed(0);
    if (typeof answer?.text !== "string") say(`Error ${response.status}`, answer?.error ?? "This is no answer of kdexport");
    else say("", `${answer.text ? "Heard" : "No words heard"} by ${name} in ${ms} ms as this browser saw it`, answer.text);
  } catch {
    if (!mine.signal.aborted) say("No answer", "The server can't be reached.");
  } finally {
    if (!mine.signal.aborted) $("answer").setAttribute("aria-busy", false);
  }
}

/** Record until the button is pressed again, or for as long as the model reads. */
async function record() {
  if (recorder?.state === "recording") return recorder.stop();
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  } catch (error) {
    return say("No microphone", error.message);
  }
  const parts = [], seconds = Number(model().dataset.seconds);
  recorder = new MediaRecorder(stream);
  const timer = setTimeout(() => recorder.stop(), 1000 * seconds);
  recorder.ondataavailable = ({ data }) => parts.push(data);
  recorder.onstop = async () => {
    clearTimeout(timer);
    for (const track of stream.getTracks()) track.stop();
    $("record").textContent = "Record";
    try {
      // Browsers record WebM or MP4, which the server does not read.
      const sound = await new OfflineAudioContext(1, 1, rate).decodeAudioData(await new Blob(parts).arrayBuffer());
      await send(wav(sound.getChannelData(0).subarray(0, seconds * rate)));
    } catch (error) {
      say("No recording", error.message);
    }
  };
  recorder.start();
  $("record").textContent = "Stop";
  say("", `Recording, for ${seconds.toFixed(1)} s at most`);
}

/** Samples as a WAV file of 16 bits. */
function wav(samples) {
  const size = 2 * samples.length, view = new DataView(new ArrayBuffer(44 + size));
  const head = ["RIFF", 36 + size, "WAVE", "fmt ", 16, [1, 1], rate, 2 * rate, [2, 16], "data", size];
  head.forEach((part, i) => {
    if (typeof part === "string") [...part].forEach((letter, j) => view.setUint8(4 * i + j, letter.charCodeAt(0)));
    else if (Array.isArray(part)) part.forEach((value, j) => view.setUint16(4 * i + 2 * j, value, true));
    else view.setUint32(4 * i, part, true);
  });
  samples.forEach((sample, i) => view.setInt16(44 + 2 * i, 32767 * Math.max(-1, Math.min(1, sample)), true));
  return view.buffer;
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); send($("file").files[0]); });
$("record").addEventListener("click", record);
$("record").hidden = !navigator.mediaDevices;  // browsers have a microphone for HTTPS and localhost only

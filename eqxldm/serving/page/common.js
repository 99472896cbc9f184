"use strict";
// What the pages share: the server's interface, one thing under way at a time, the form's numbers.
// A page has a function `fillForm`, and calls `connect` with the names of its sliders.
const $ = (id) => document.getElementById(id);
let model = null;       // what /v1/models says
let running = null;     // the AbortController of what is under way

// Talking to the server

function headers() {
  const found = { "Content-Type": "application/json" };
  const token = $("token").value || sessionStorage.getItem("token");
  if (token) found.Authorization = "Bearer " + token;
  return found;
}

async function refuse(response) {
  let message = response.status + " " + response.statusText;
  try { message = (await response.json()).error.message; } catch { /* no JSON: the status says it */ }
  const after = response.headers.get("Retry-After");
  if (response.status === 401) $("token-row").hidden = false;
  throw new Error(message + (after && !message.includes(after + " s") ? " (in " + after + " s)" : ""));
}

async function loadModel() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) await refuse(response);
  return (await response.json()).data[0];
}

// Sends a request and calls `show` with each event of its stream.
async function ask(path, body, show, signal) {
  const sent = JSON.stringify({ ...body, stream: true });
  const response = await fetch(path, { method: "POST", headers: headers(), body: sent, signal });
  if (!response.ok) await refuse(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The server ended the stream before all was there.");
    text += value;
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue;
      if (event === "data: [DONE]") return;
      const found = JSON.parse(event.slice(6));
      if (found.type === "error") throw new Error(found.error.message);
      show(found);
    }
  }
}

// The form

function number(id) {
  const value = $(id).valueAsNumber;
  if (Number.isNaN(value)) throw new Error($(id).labels[0].textContent + ": a number, please.");
  return value;
}

function randomSeed() { $("seed").value = Math.floor(Math.random() * 2 ** 32); }

// A slider and its number show the same; fields that have no slider need none of this.
function showSliders(names) {
  for (const id of names) if ($(id).value !== "") $(id + "-slider").value = $(id).value;
}

// What is under way: one thing at a time; `work` gets the signal that cancels it.
async function run(work) {
  if (running) return;
  running = new AbortController();
  $("error").hidden = true;
  $("go").disabled = true;
  $("cancel").disabled = false;
  const begun = performance.now();
  say("Waiting ...");
  try {
    await work(running.signal);
    say("Done in " + ((performance.now() - begun) / 1000).toFixed(2) + " s.");
  } catch (error) {
    if (error.name === "AbortError") say("Cancelled.");
    else { say(""); $("error").textContent = error.message; $("error").hidden = false; }
  } finally {
    running = null;
    $("go").disabled = false;
    $("cancel").disabled = true;
  }
}

function say(text) { $("status").textContent = text; }

async function begin() {
  try {
    model = await loadModel();
    $("error").hidden = true;
    $("go").disabled = false;
    fillForm();
    const ready = await fetch("readyz");
    say(ready.ok ? "Ready." : "The server is still getting ready.");
  } catch (error) {
    $("go").disabled = true;
    $("error").textContent = error.message;
    $("error").hidden = false;
  }
}

function connect(sliders) {
  for (const id of sliders) {
    $(id + "-slider").addEventListener("input", () => { $(id).value = $(id + "-slider").value; });
    $(id).addEventListener("input", () => { $(id + "-slider").value = $(id).value; });
  }
  $("random").addEventListener("click", randomSeed);
  $("cancel").addEventListener("click", () => running?.abort());
  $("token").addEventListener("change", () => { sessionStorage.setItem("token", $("token").value); begin(); });
  begin();
}

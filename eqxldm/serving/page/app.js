"use strict";
// One page without a build step. It asks /v1/models what may be said, sends what the form says, and
// shows the server's events as they come.
const $ = (id) => document.getElementById(id);
const png = (data) => "data:image/png;base64," + data;
let model = null;       // what /v1/models says
let running = null;     // the AbortController of what is under way
let frames = [];        // of the trajectory
let player = null;

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
async function generate(body, show, signal) {
  const sent = JSON.stringify({ ...body, stream: true });
  const response = await fetch("v1/images/generations",
    { method: "POST", headers: headers(), body: sent, signal });
  if (!response.ok) await refuse(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The server ended the stream before the image was there.");
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

const pairs = ["steps", "guidance", "n"];

function settings() {
  const body = { steps: number("steps"), solver: $("solver").value };
  if (model.guided && body.solver !== "map") body.guidance = number("guidance");
  if (model.labels.length) body.label = Number($("label").value);
  if (model.takes_text) body.prompt = $("prompt").value;
  if ($("seed").value !== "") body.seed = number("seed");
  return body;
}

function number(id) {
  const value = $(id).valueAsNumber;
  if (Number.isNaN(value)) throw new Error($(id).labels[0].textContent + ": a number, please.");
  return value;
}

function fillForm() {
  const { defaults, limits } = model;
  $("model").textContent = model.id;
  document.title = model.id;
  $("label-row").hidden = !model.labels.length;
  $("label").replaceChildren(...model.labels.map((name, i) => new Option(name, i)));
  $("prompt-row").hidden = !model.takes_text;
  $("prompt").maxLength = limits.prompt;
  $("guidance-row").hidden = !model.guided;
  $("solver").replaceChildren(...model.solvers.map((name) => new Option(name)));
  $("solver").value = defaults.solver;
  $("steps-slider").max = Math.min(limits.steps, 100);
  $("n-slider").max = limits.n;
  $("steps").value = defaults.steps;
  $("guidance").value = defaults.guidance;
  $("n").value = Math.min(4, limits.n);
  for (const id of pairs) $(id + "-slider").value = $(id).value;
  solverChosen();
}

function solverChosen() {
  for (const id of ["guidance", "guidance-slider"]) $(id).disabled = $("solver").value === "map";
}

function randomSeed() { $("seed").value = Math.floor(Math.random() * 2 ** 32); }

function figure(caption) {
  const made = document.createElement("figure"), image = document.createElement("img");
  const text = document.createElement("figcaption");
  const [width, height] = model.size.split("x").map(Number);
  image.width = width; image.height = height;
  image.style.aspectRatio = width + " / " + height;
  image.classList.toggle("small", width <= 128);
  image.alt = caption;
  text.textContent = caption;
  made.append(image, text);
  return made;
}

function put(made, data, finished) {
  const image = made.querySelector("img");
  image.src = png(data);
  image.classList.toggle("unfinished", !finished);
}

function title(body) {
  const what = model.labels.length ? model.labels[body.label] : body.prompt;
  return what ? what.slice(0, 40) : "image";
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

// Create

async function create(signal) {
  const body = { ...settings(), n: number("n"), partial_images: 10 };
  const made = Array.from({ length: body.n }, (_, i) => figure(title(body) + ", " + (i + 1)));
  $("images").replaceChildren(...made);
  await generate(body, (event) => {
    if (event.type === "image_generation.started") body.seed = event.seed;
    if (event.type === "image_generation.partial_image") {
      put(made[event.index], event.b64_json, false);
      say("Step " + event.step + " of " + event.of);
    }
    if (event.type === "image_generation.completed") {
      put(made[event.index], event.b64_json, true);
      remember(body, event);
    }
  }, signal);
}

function remember(body, event) {
  const entry = figure(title(body) + ", seed " + event.seed), button = document.createElement("button");
  put(entry, event.b64_json, true);
  button.type = "button";
  button.title = body.solver + ", " + body.steps + " steps, guidance " + (body.guidance ?? 1);
  button.append(entry);
  button.addEventListener("click", () => restore(body));
  const history = $("history");
  history.querySelector(".empty")?.remove();
  history.prepend(button);
  while (history.children.length > 60) history.lastChild.remove();
}

// The form as it was for an image of the history.
function restore(body) {
  if (body.label !== undefined) $("label").value = body.label;
  if (body.prompt !== undefined) $("prompt").value = body.prompt;
  for (const name of ["steps", "guidance", "solver", "seed", "n"]) {
    if (body[name] !== undefined) $(name).value = body[name];
  }
  for (const id of pairs) $(id + "-slider").value = $(id).value;
  solverChosen();
  say("The settings of that image are in the form again.");
}

// Compare: the same noise, one setting changed.

function variants() {
  const body = settings();
  body.seed ??= Math.floor(Math.random() * 2 ** 32);
  $("seed").value = body.seed;
  const rows = [];
  if (body.guidance !== undefined) {
    rows.push(["Guidance", [0, 1, 1.5, 2.5, 4, 8].map((guidance) => [String(guidance), { guidance }])]);
  }
  const most = model.limits.steps, counts = [1, 2, 4, 8, 20, 50].filter((n) => n <= most);
  rows.push(["Steps", counts.map((steps) => [String(steps), { steps }])]);
  rows.push(["Solver", model.solvers.map((solver) => [solver, { solver }])]);
  return [body, rows];
}

async function compare(signal) {
  const [body, rows] = variants(), jobs = [];
  $("rows").replaceChildren();
  for (const [name, changes] of rows) {
    const heading = document.createElement("h2"), strip = document.createElement("div");
    heading.textContent = name;
    strip.className = "strip";
    $("rows").append(heading, strip);
    for (const [caption, change] of changes) {
      const made = figure(caption), wanted = { ...body, ...change };
      if (wanted.solver === "map") delete wanted.guidance;
      strip.append(made);
      jobs.push([wanted, made]);
    }
  }
  let done = 0;
  const next = async () => {  // a few at once, which the server draws together
    for (let job; (job = jobs.shift());) {
      const [wanted, made] = job;
      await generate(wanted, (event) => {
        if (event.b64_json) put(made, event.b64_json, true);
      }, signal);
      say(++done + " images");
    }
  };
  await Promise.all(Array.from({ length: 4 }, next));
}

// Denoising

async function denoise(signal) {
  stop();
  frames = [];
  for (const id of ["reverse", "forward"]) $(id).replaceChildren();
  const body = { ...settings(), n: 1, trajectory: true };
  await generate(body, (event) => {
    if (event.type === "image_generation.started") $("seed").value = event.seed;
    if (event.type === "image_generation.partial_image") {
      frames.push(event);
      const made = figure("t = " + event.time.toFixed(2));
      put(made, event.state_b64_json, true);
      $("reverse").append(made);
      $("scrub").max = frames.length - 1;
      showFrame(frames.length - 1);
      say("Step " + event.step + " of " + event.of);
    }
    if (event.type === "forward") {
      $("forward").replaceChildren(...event.frames.map((frame, i) => {
        const made = figure("t = " + event.times[i].toFixed(2));
        put(made, frame, true);
        return made;
      }));
    }
  }, signal);
  $("scrub").disabled = $("play").disabled = false;
}

function showFrame(i) {
  const frame = frames[i];
  if (!frame) return;
  $("scrub").value = i;
  $("state").src = png(frame.state_b64_json);
  $("estimate").src = png(frame.b64_json);
  for (const id of ["state", "estimate"]) $(id).classList.toggle("small", parseInt(model.size) <= 128);
  $("where").textContent = "call " + frame.step + " of " + frame.of + ", at t = " + frame.time.toFixed(3);
  [...$("reverse").children].forEach((made, j) => made.classList.toggle("current", i === j));
}

function stop() { clearInterval(player); player = null; $("play").textContent = "Play"; }

function play() {
  if (player) { stop(); return; }
  let i = Number($("scrub").value) >= frames.length - 1 ? -1 : Number($("scrub").value);
  $("play").textContent = "Pause";
  player = setInterval(() => { if (++i >= frames.length) stop(); else showFrame(i); }, 150);
}

// Tabs, by mouse and by the arrow keys.

const tabs = [...document.querySelectorAll("[role=tab]")];
const work = { "tab-create": create, "tab-compare": compare, "tab-denoising": denoise };
const chosen = () => tabs.find((tab) => tab.getAttribute("aria-selected") === "true");

function choose(tab) {
  for (const other of tabs) {
    const is = other === tab;
    other.setAttribute("aria-selected", is);
    other.tabIndex = is ? 0 : -1;
    $(other.getAttribute("aria-controls")).hidden = !is;
  }
  $("n-row").hidden = tab.id !== "tab-create";
  $("go").textContent = { "tab-create": "Generate", "tab-compare": "Compare", "tab-denoising": "Denoise" }[tab.id];
}

for (const [i, tab] of tabs.entries()) {
  tab.addEventListener("click", () => choose(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(i + step + tabs.length) % tabs.length];
    choose(next);
    next.focus();
  });
}

for (const id of pairs) {
  $(id + "-slider").addEventListener("input", () => { $(id).value = $(id + "-slider").value; });
  $(id).addEventListener("input", () => { $(id + "-slider").value = $(id).value; });
}
$("solver").addEventListener("change", solverChosen);
$("random").addEventListener("click", randomSeed);
$("cancel").addEventListener("click", () => running?.abort());
$("play").addEventListener("click", play);
$("scrub").addEventListener("input", () => { stop(); showFrame(Number($("scrub").value)); });
$("token").addEventListener("change", () => { sessionStorage.setItem("token", $("token").value); begin(); });
$("settings").addEventListener("submit", (event) => {
  event.preventDefault();
  if (model) run(work[chosen().id]);
});

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
begin();

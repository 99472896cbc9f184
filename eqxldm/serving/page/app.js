"use strict";
// The page of a server of images, without a build step, after common.js. It asks /v1/models what may
// be said, sends what the form says, and shows the server's events as they come.
const png = (data) => "data:image/png;base64," + data;
let frames = [];        // of the trajectory
let player = null;

const generate = (body, show, signal) => ask("v1/images/generations", body, show, signal);

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
  showSliders(pairs);
  solverChosen();
}

function solverChosen() {
  for (const id of ["guidance", "guidance-slider"]) $(id).disabled = $("solver").value === "map";
}

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
  showSliders(pairs);
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

$("solver").addEventListener("change", solverChosen);
$("play").addEventListener("click", play);
$("scrub").addEventListener("input", () => { stop(); showFrame(Number($("scrub").value)); });
$("settings").addEventListener("submit", (event) => {
  event.preventDefault();
  if (model) run(work[chosen().id]);
});
connect(pairs);

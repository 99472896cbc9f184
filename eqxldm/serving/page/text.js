"use strict";
// The page of a server of text, after common.js: texts that appear in any order, step by step.
const pairs = ["calls", "temperature", "n"];
let frames = [];        // of each text: its steps, what is written after each, and the calls

function fillForm() {
  const { defaults, limits, context } = model;
  $("model").textContent = document.title = model.id;
  $("prompt").maxLength = limits.prompt;
  $("sampler").replaceChildren(...model.samplers.map((name) => new Option(name)));
  $("sampler").value = defaults.sampler;
  $("calls-slider").max = Math.min(limits.calls, context);
  $("length").max = context;
  $("n-slider").max = limits.n;
  $("calls").value = Math.max(1, Math.floor(context / 2));
  $("temperature").value = defaults.temperature;
  $("block").value = Math.min(defaults.block_size, context);
  $("n").value = Math.min(2, limits.n);
  showSliders(pairs);
  samplerChosen();
}

function samplerChosen() { $("block-row").hidden = $("sampler").value !== "blocks"; }

function settings() {
  const body = {
    prompt: $("prompt").value, calls: number("calls"), sampler: $("sampler").value,
    temperature: number("temperature"), n: number("n"),
  };
  if ($("infill").checked) body.infill = true;
  if (body.sampler === "blocks") body.block_size = number("block");
  if ($("length").value !== "") body.max_tokens = number("length");
  if ($("seed").value !== "") body.seed = number("seed");
  return body;
}

// A text, its prompt set apart and each blank marked; `whole` where the prompt is in the text.
function fill(card, body, text, whole) {
  const place = card.querySelector("p"), parts = text.split("_");
  place.replaceChildren();
  if (!whole && body.prompt) place.append(span("given", body.prompt));
  parts.forEach((part, i) => {
    if (i) place.append(span("blank", "_"));
    if (part) place.append(part);
  });
}

function span(kind, text) {
  const made = document.createElement("span");
  made.className = kind;
  made.textContent = text;
  return made;
}

function emptyCard() {
  const card = document.createElement("article");
  card.append(document.createElement("p"), span("caption", ""));
  return card;
}

async function write(signal) {
  const body = settings();
  const cards = Array.from({ length: body.n }, emptyCard);
  await ask("v1/completions", body, (event) => {
    if (!cards[0].isConnected) {  // what was there stays where a request is refused
      frames = cards.map(() => []);
      $("texts").replaceChildren(...cards);
      $("scrub").disabled = true;
    }
    body.seed = event.seed;
    for (const choice of event.choices) {
      const kept = frames[choice.index], last = kept[kept.length - 1];
      const of = choice.of ?? last?.of;
      const step = choice.step ?? (choice.finish_reason ? (last?.step ?? 0) + 1 : 0);
      kept.push({ step, of, shown: choice.shown, calls: choice.calls ?? 0 });
      show(cards[choice.index], body, kept[kept.length - 1], Boolean(choice.finish_reason));
      if (choice.finish_reason) remember(body, choice);
      else if (choice.step) say("Step " + choice.step + " of " + choice.of);
    }
  }, signal);
  $("scrub").max = Math.max(...frames.map((kept) => kept.length)) - 1;
  $("scrub").value = $("scrub").max;
  $("scrub").disabled = false;
  $("scrub").oninput = () => cards.forEach((card, i) => {
    const at = Math.min(Number($("scrub").value), frames[i].length - 1);
    show(card, body, frames[i][at], at === frames[i].length - 1);
    $("where").textContent = "step " + $("scrub").value + " of " + $("scrub").max;
  });
  $("scrub").oninput();
}

function show(card, body, frame, finished) {
  fill(card, body, frame.shown, body.infill);
  card.classList.toggle("unfinished", !finished);
  card.querySelector(".caption").textContent = frame.calls + (frame.calls === 1 ? " call" : " calls")
    + ", seed " + body.seed;
}

function remember(body, choice) {
  const line = document.createElement("li"), button = document.createElement("button");
  button.type = "button";
  button.title = body.sampler + ", " + body.calls + " calls, temperature " + body.temperature + ", seed " + body.seed;
  button.textContent = (body.infill ? "" : body.prompt) + choice.shown;
  button.addEventListener("click", () => restore(body));
  line.append(button);
  $("history").querySelector(".empty")?.remove();
  $("history").prepend(line);
  while ($("history").children.length > 60) $("history").lastChild.remove();
}

// The form as it was for a text of the history.
function restore(body) {
  const fields = { calls: "calls", sampler: "sampler", temperature: "temperature", n: "n", seed: "seed",
    prompt: "prompt", block_size: "block" };
  for (const [name, id] of Object.entries(fields)) if (body[name] !== undefined) $(id).value = body[name];
  $("length").value = body.max_tokens ?? "";
  $("infill").checked = Boolean(body.infill);
  showSliders(pairs);
  samplerChosen();
  say("The settings of that text are in the form again.");
}

$("sampler").addEventListener("change", samplerChosen);
$("settings").addEventListener("submit", (event) => {
  event.preventDefault();
  if (model) run(write);
});
// In the prompt Enter makes a line; with Ctrl it writes.
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("settings").requestSubmit();
});
connect(pairs);

// The depth page: settings, runs, and what the server is doing.

import { TokenReader, complete, get } from "./api.js";
import { Bars, Pane, Tip, element, shadeOf, showFigures } from "./pane.js";

const STORE = "mor-depth-page";
const POLL_RUNNING_MS = 500;
const POLL_IDLE_MS = 4000;

const $ = (id) => document.getElementById(id);
const form = $("form");
const fields = ["prompt", "temperature", "length", "seed", "compare", "numbers"];
const tip = new Tip($("tip"));
let server = null; // what /depths said of the model
let running = null; // the AbortController of the run in progress
let limit = Infinity; // recursions that somebody chose; what the slider shows once R is known
let panes = [];
let pageBars = null;
let poll = 0;

// -- settings -------------------------------------------------------------------------------

function restore() {
  let kept = {};
  try {
    kept = JSON.parse(localStorage.getItem(STORE)) ?? {};
  } catch {
    // Storage may be off, or hold something else; the page works without.
  }
  for (const name of fields) {
    const field = $(name);
    if (!(name in kept)) continue;
    if (field.type === "checkbox") field.checked = kept[name];
    else field.value = kept[name];
  }
  limit = kept.limit ?? Infinity;
}

function keep() {
  const values = fields.map((name) => {
    const field = $(name);
    return [name, field.type === "checkbox" ? field.checked : field.value];
  });
  const kept = { ...Object.fromEntries(values), limit }; // in JSON, no limit is null
  try {
    localStorage.setItem(STORE, JSON.stringify(kept));
  } catch {
    // As above.
  }
}

function showSettings() {
  $("temperature-value").value = Number($("temperature").value).toFixed(2);
  $("recursions-value").value = server ? `${$("recursions").value} of ${server.num_recursions}` : "";
  document.body.classList.toggle("numbers", $("numbers").checked);
}

function say(text, isError = false) {
  $("status").textContent = text.charAt(0).toUpperCase() + text.slice(1);
  $("status").classList.toggle("error", isError);
}

// -- runs -----------------------------------------------------------------------------------

/** The panes that the settings ask for, and the request of each. */
function plan() {
  const most = server.num_recursions;
  const request = {
    model: server.model,
    prompt: $("prompt").value,
    max_tokens: Number($("length").value),
    temperature: Number($("temperature").value),
    seed: Number($("seed").value),
    stream: true,
    stream_options: { include_usage: true },
    echo: true,
    logprobs: 0,
  };
  const note = limit < most ? `at most ${limit} of ${most} recursions` : `up to ${most} recursions`;
  const adaptive = limit < most ? { ...request, max_recursions: limit } : request;
  const runs = [{ title: most > 1 ? "Adaptive" : "Text", note, request: adaptive }];
  if ($("compare").checked && most > 1) {
    const full = { ...request, min_recursions: most, max_recursions: most };
    runs.push({ title: "Full depth", note: `all ${most} recursions for every token`, request: full });
  }
  return runs;
}

function layOut(runs) {
  panes = runs.map(({ title, note }) => new Pane(title, note, server.num_recursions, tip));
  $("panes").replaceChildren(...panes.map((pane) => pane.root));
  $("panes").classList.toggle("two", panes.length > 1);
}

async function follow(pane, request, signal) {
  const reader = new TokenReader();
  let usage = null;
  pane.start();
  try {
    for await (const event of complete(request, signal)) {
      usage = event.usage ?? usage;
      for (const choice of event.choices) pane.add(reader.read(choice));
    }
  } finally {
    pane.end(usage);
  }
}

async function run() {
  if (running || !form.reportValidity()) return;
  if (!server) {
    await look();
    if (!server) return;
  }
  const controller = new AbortController();
  running = controller;
  setRunning(true);
  const runs = plan();
  layOut(runs);
  say("Running …");
  schedule(POLL_RUNNING_MS);
  const done = await Promise.allSettled(
    runs.map(({ request }, i) => follow(panes[i], request, controller.signal)),
  );
  running = null;
  setRunning(false);
  const failed = done.find(({ reason }) => reason && reason.name !== "AbortError");
  if (failed) say(failed.reason.message, true);
  else say(`${controller.signal.aborted ? "Stopped" : "Done"}: ${panes.map(sentence).join("; ")}.`);
  look();
}

function sentence(pane) {
  const count = pane.generated;
  const words = `${count} token${count === 1 ? "" : "s"}`;
  return count ? `${words}, ${pane.mean.toFixed(2)} recursions on average` : words;
}

function setRunning(is) {
  const focused = document.activeElement;
  $("run").disabled = is;
  $("stop").disabled = !is;
  $("panes").setAttribute("aria-busy", is);
  if (is && focused === $("run")) $("stop").focus(); // a disabled button would lose the focus
  if (!is && focused === $("stop")) $("run").focus();
}

function stop() {
  running?.abort();
}

// -- the server -----------------------------------------------------------------------------

/** Ask what the engine is doing, and show it. */
async function look() {
  let state;
  try {
    state = await get("depths");
  } catch (error) {
    if (!running) say(error.message, true);
    schedule();
    return;
  }
  if (server?.model !== state.model || server.num_recursions !== state.num_recursions) {
    meet(state); // the first time, or another model is served there now
    if ($("status").classList.contains("error")) say("");
  }
  showServer(state);
  schedule();
}

function schedule(after) {
  clearTimeout(poll);
  poll = setTimeout(
    () => (document.hidden ? schedule() : look()),
    after ?? (running ? POLL_RUNNING_MS : POLL_IDLE_MS),
  );
}

/** Which model it is. */
function meet(state) {
  server = state;
  const most = state.num_recursions;
  const slider = $("recursions");
  slider.max = most;
  slider.value = Math.min(limit, most);
  slider.disabled = most < 2;
  $("compare").disabled = most < 2;
  $("model").replaceChildren(
    element("b", "", state.model),
    most > 1 ? `up to ${most} recursions per token` : "one pass for every token",
  );
  const keys = Array.from({ length: most }, (_, depth) => ({
    label: `${depth + 1}`,
    shade: shadeOf(depth + 1, most),
    about: `pass ${depth + 1}`,
  }));
  const around = { label: "around the block", shade: null, about: "layers around the block" };
  const cached = { label: "cached prefixes", shade: null, about: "cached prefixes" };
  pageBars = new Bars($("pages"), [...keys, around, cached]);
  showSettings();
  if (!panes.length) layOut(plan());
}

function showServer(state) {
  const total = state.kv_pages_total;
  const held = [...state.kv_pages_by_depth, state.kv_pages_unshared, state.kv_pages_cached];
  const used = held.reduce((sum, n) => sum + n, 0);
  const largest = Math.max(1, ...held);
  showFigures($("server-figures"), [
    ["tokens/s", state.tokens_per_s.toFixed(1)],
    ["running", `${state.running}`],
    ["waiting", `${state.waiting}`],
    ["pages in use", `${used.toLocaleString("en")} of ${total.toLocaleString("en")}`],
  ]);
  pageBars.show(
    held.map((n) => n / largest),
    held.map((n) => n.toLocaleString("en")),
  );
}

// -- listening ------------------------------------------------------------------------------

form.addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
form.addEventListener("input", ({ target }) => {
  if (target.id === "recursions") limit = target.value === target.max ? Infinity : +target.value;
  keep();
  showSettings();
});
$("compare").addEventListener("change", () => {
  if (server && !running && panes.every((pane) => !pane.tokens.length)) layOut(plan());
});
$("stop").addEventListener("click", stop);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    tip.hide();
    stop();
  } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    run();
  }
});
document.addEventListener("visibilitychange", () => document.hidden || look());

restore();
showSettings();
look();

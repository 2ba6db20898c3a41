// What the user set. Read when a message is sent; nothing is stored.

import { el } from "./draw.js";
import { readTools } from "./parts.js";

const $ = (id) => document.getElementById(id);

const NUMBERS = {
  temperature: { id: "temperature", name: "Temperature", least: 0, most: 2 },
  topP: { id: "top-p", name: "Top-p", least: 0, most: 1, above: true },
  maxTokens: { id: "max-tokens", name: "Max tokens", least: 1, most: 1e6, whole: true },
  seed: { id: "seed", name: "Seed", least: 0, most: Number.MAX_SAFE_INTEGER, whole: true, free: true },
};

const SWITCHES = ["enable_thinking", "thinking"]; // variables of chat templates: true or false
const EFFORT = "reasoning_effort";

/** Makes the button open and close the settings. */
export function wireSettings() {
  $("settings-button").addEventListener("click", () => open($("settings").hidden));
  $("settings").addEventListener("submit", (event) => event.preventDefault());
}

/** Opens the settings at the API key. */
export function showKey() {
  open(true);
  $("key").focus();
}

function open(shown) {
  $("settings").hidden = !shown;
  $("settings-button").setAttribute("aria-expanded", String(shown));
}

/** Offers reasoning as the model's chat template knows it: `options` are variables that it has. */
export function offerReasoning(options) {
  const name = [...SWITCHES, EFFORT].find((each) => options.includes(each)) ?? "";
  const select = $("reasoning");
  if (select.dataset.name === name) return; // what was chosen stays
  const values = !name ? [] : name === EFFORT ? ["low", "medium", "high"] : ["on", "off"];
  const texts = ["default", ...values];
  select.replaceChildren(...texts.map((text, i) => el("option", { value: i ? text : "" }, text)));
  select.dataset.name = name;
  $("reasoning-label").hidden = !name;
}

/** Returns what a request says of reasoning, as its own fields. */
function reasoningFields() {
  const { value, dataset: { name } } = $("reasoning");
  if (!value) return {};
  return name === EFFORT ? { [EFFORT]: value } : { chat_template_kwargs: { [name]: value === "on" } };
}

/** Returns the settings; null, with a message at the field, where one of them cannot be used. */
export function readSettings() {
  const settings = {
    model: $("model").value,
    several: $("model").options.length > 1,
    system: $("system").value,
    speculate: $("speculate").checked,
    key: $("key").value.trim(),
    reasoning: reasoningFields(),
    toolChoice: $("tool-choice").value,
  };
  let wrong = null;
  const read = readTools($("tools").value);
  settings.tools = read.tools;
  $("tools").setAttribute("aria-invalid", String(read.wrong !== null));
  if (read.wrong !== null) wrong = { input: $("tools"), words: read.wrong };
  for (const [field, limits] of Object.entries(NUMBERS)) {
    const input = $(limits.id);
    const words = complaint(input, limits);
    settings[field] = input.value === "" ? null : Number(input.value);
    input.setAttribute("aria-invalid", String(words !== null));
    if (words !== null && wrong === null) wrong = { input, words };
  }
  $("settings-error").hidden = wrong === null;
  $("settings-error").textContent = wrong?.words ?? "";
  if (wrong === null) return settings;
  open(true);
  if (wrong.input === $("tools")) $("tools-part").open = true;
  wrong.input.focus();
  return null;
}

function complaint(input, { name, least, most, whole, free, above }) {
  if (input.value === "" && !input.validity.badInput) return free ? null : `${name} is empty.`;
  const value = Number(input.value);
  const inside = value <= most && (above ? value > least : value >= least);
  if (!input.validity.badInput && inside && (!whole || Number.isSafeInteger(value))) return null;
  const kind = whole ? "a whole number" : "a number";
  if (most === NUMBERS.seed.most) return `${name} must be ${kind} of at least 0.`;
  return `${name} must be ${kind} ${above ? "above" : "from"} ${least} ${above ? "and at most" : "to"} ${most}.`;
}

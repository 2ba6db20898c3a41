// What the user set. Read when a message is sent; nothing is stored.

const $ = (id) => document.getElementById(id);

const NUMBERS = {
  temperature: { id: "temperature", name: "Temperature", least: 0, most: 2 },
  topP: { id: "top-p", name: "Top-p", least: 0, most: 1, above: true },
  maxTokens: { id: "max-tokens", name: "Max tokens", least: 1, most: 1e6, whole: true },
  seed: { id: "seed", name: "Seed", least: 0, most: Number.MAX_SAFE_INTEGER, whole: true, free: true },
};

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

/** Returns the settings; null, with a message at the field, where one of them cannot be used. */
export function readSettings() {
  const settings = {
    model: $("model").value,
    system: $("system").value,
    speculate: $("speculate").checked,
    key: $("key").value.trim(),
  };
  let wrong = null;
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

// Starts the page: the two sides, the state of the server, the colours.

import { Chat } from "./chat.js";
import { el } from "./draw.js";
import { offerReasoning, showKey, wireSettings } from "./settings.js";
import { StepsPanel } from "./steps.js";
import { listModels } from "./stream.js";

const RETRY_MS = 3000;
const $ = (id) => document.getElementById(id);
let timer = null;
let models = []; // {id, options}

/** Asks the server which models it has, again and again until it answers. */
async function look() {
  clearTimeout(timer);
  try {
    models = await listModels({ key: $("key").value.trim() });
    const ids = models.map(({ id }) => id);
    const chosen = $("model").value;
    $("model").replaceChildren(...ids.map((id) => el("option", { value: id }, id)));
    if (ids.includes(chosen)) $("model").value = chosen;
    $("model-label").hidden = ids.length < 2;
    offer();
    state(ids.length ? "ready" : "waiting", ids.length ? ids.join(", ") : "The server has no model.");
  } catch (error) {
    state(error.kind === "not-ready" ? "waiting" : "wrong", error.message);
    if (error.kind === "key") showKey();
    else timer = setTimeout(look, RETRY_MS);
  }
}

function offer() {
  offerReasoning(models.find(({ id }) => id === $("model").value)?.options ?? []);
}

function state(kind, words) {
  $("server").className = kind;
  // A status that is written again would be read out again.
  if ($("server-words").textContent !== words) $("server-words").textContent = words;
}

wireSettings();
new Chat(new StepsPanel());
$("model").addEventListener("change", offer);
$("key").addEventListener("change", look);
$("theme").addEventListener("change", () => {
  document.documentElement.dataset.theme = $("theme").value;
});
look();

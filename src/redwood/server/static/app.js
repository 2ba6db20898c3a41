// Starts the page: the two sides, the state of the server, the colours.

import { Chat } from "./chat.js";
import { el } from "./draw.js";
import { showKey, wireSettings } from "./settings.js";
import { StepsPanel } from "./steps.js";
import { listModels } from "./stream.js";

const RETRY_MS = 3000;
const $ = (id) => document.getElementById(id);
let timer = null;

/** Asks the server which models it has, again and again until it answers. */
async function look() {
  clearTimeout(timer);
  try {
    const ids = await listModels({ key: $("key").value.trim() });
    const chosen = $("model").value;
    $("model").replaceChildren(...ids.map((id) => el("option", { value: id }, id)));
    if (ids.includes(chosen)) $("model").value = chosen;
    state(ids.length ? "ready" : "waiting", ids.length ? ids.join(", ") : "The server has no model.");
  } catch (error) {
    state(error.kind === "not-ready" ? "waiting" : "wrong", error.message);
    if (error.kind === "key") showKey();
    else timer = setTimeout(look, RETRY_MS);
  }
}

function state(kind, words) {
  $("server").className = kind;
  // A status that is written again would be read out again.
  if ($("server-words").textContent !== words) $("server-words").textContent = words;
}

wireSettings();
new Chat(new StepsPanel());
$("key").addEventListener("change", look);
$("theme").addEventListener("change", () => {
  document.documentElement.dataset.theme = $("theme").value;
});
look();

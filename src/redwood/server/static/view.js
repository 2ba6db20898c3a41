// One answer on the page: reasoning and tool calls as parts that fold, and the text, with its Markdown
// as headings, lists, tables and code.

import { el } from "./draw.js";
import { markdownTree, plainTree } from "./markdown.js";
import { patch } from "./markup.js";
import { spacedJson } from "./parts.js";
import { count } from "./trace.js";

export class AnswerView {
  #parts = null;
  #thought = null; // {words, body} once there is reasoning
  #calls = []; // {name, body}
  #text = el("div", { className: "text" });
  #box;
  #running = true;
  #plain = false;

  /** `box`: an element of the page, filled here. */
  constructor(box) {
    this.#box = box;
    box.append(this.#text);
  }

  /** Shows the answer as far as it came. */
  show(parts, running) {
    this.#parts = parts;
    this.#running = running;
    if (parts.reasoning) this.#showReasoning(parts.reasoning);
    const text = parts.text;
    patch(this.#text, text ? (this.#plain ? plainTree(text) : markdownTree(text)) : []);
    parts.calls.forEach((call, i) => this.#showCall(call, i));
    // The dots that stand for a text to come are for where nothing else is there.
    this.#text.hidden = !text && (!running || !parts.empty);
  }

  /** Shows the text as the model wrote it, or with its Markdown read. */
  showPlain(plain) {
    this.#plain = plain;
    if (this.#parts) this.show(this.#parts, this.#running);
  }

  #showReasoning(text) {
    if (!this.#thought) {
      const words = el("span", { className: "hint" });
      const body = el("div", { className: "plain" });
      this.#thought = { words, body };
      this.#box.prepend(
        el("details", { className: "reasoning" }, el("summary", {}, "Reasoning ", words), body),
      );
    }
    const { words, body } = this.#thought;
    const length = text.match(/\S+/g)?.length ?? 0;
    words.textContent = count(length, "word") + (this.#running && !this.#parts.text ? " …" : "");
    patch(body, [text]);
  }

  #showCall(call, i) {
    if (!this.#calls[i]) {
      const name = el("code", {});
      const label = { className: "code", tabIndex: 0, role: "region", "aria-label": "Arguments" };
      const body = el("pre", label);
      const words = el("span", { className: "hint" });
      this.#calls[i] = { name, body, words };
      this.#box.append(el(
        "details", { className: "call", open: true },
        el("summary", {}, "Tool call ", name, words), body,
      ));
    }
    const { name, body, words } = this.#calls[i];
    if (name.textContent !== call.name) name.textContent = call.name;
    patch(body, [spacedJson(call.arguments)]);
    const cut = !this.#running && !this.#parts.wholeCalls.includes(call);
    words.textContent = cut ? " cut off: not to be run" : "";
  }
}

/** A text beside another one, as it came: for comparisons. */
export class PlainView {
  constructor(box) {
    this.box = box;
  }

  show(parts) {
    patch(this.box, [parts.plain]);
  }
}

/**
 * Returns a form for what the tools gave. `send` gets messages of the role tool, one for each call.
 */
export function resultsForm(calls, send) {
  const fields = calls.map((call) => el("textarea", { rows: 1, spellcheck: false }));
  const labels = calls.map(({ name }, i) =>
    el("label", {}, el("span", {}, "Result of ", el("code", {}, name)), fields[i]),
  );
  const form = el(
    "form", { className: "results" }, ...labels,
    el("button", { type: "submit" }, calls.length > 1 ? "Send results" : "Send result"),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send(calls.map(({ id }, i) => ({ role: "tool", tool_call_id: id, content: fields[i].value })));
  });
  return form;
}

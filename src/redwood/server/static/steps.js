// The right side of the page: the tree of a step, the numbers, the chart, the list, and replay.

import { drawChart, drawTree, el, tokenSpans, writeSources, writeTree } from "./draw.js";
import {
  History, Pacer, count, numbersOf, readRecording, readStep, writeRecording,
} from "./trace.js";

// Milliseconds between pictures while an answer is written. Server and browser often share a
// machine: what the page takes, the model lacks.
const LIVE = 100; // of the tree
const LIVE_REST = 300; // of the list, the chart and the numbers
const CALM = 1000; // of everything, for those who asked for less motion
const LARGEST_FILE = 64 * 1024 * 1024;
const $ = (id) => document.getElementById(id);
const number = (value, digits) => (value === null ? "–" : value.toFixed(digits));

export class StepsPanel {
  #history = new History();
  #answers = 0;
  #chosen = -1;
  #follow = true;
  #live = false;
  #player = null;
  #rows = new Map();
  #plain = { rate: null, ratio: null };
  #empty = $("tree").textContent;
  #pacer = new Pacer(() => this.#draw());
  #rest = new Pacer(() => this.#drawRest());
  #still = matchMedia("(prefers-reduced-motion: reduce)");

  constructor() {
    const on = (id, call) =>
      $(id).addEventListener("click", () => $(id).getAttribute("aria-disabled") !== "true" && call());
    on("first", () => this.#choose(this.#history.first));
    on("back", () => this.#choose(this.#chosen - 1));
    on("forward", () => this.#choose(this.#chosen + 1));
    on("live", () => this.#newest());
    on("play", () => (this.#player ? this.#pause() : this.#play()));
    on("save", () => this.#save());
    $("pace").addEventListener("change", () => this.#player && this.#play());
    $("list").addEventListener("keydown", (event) => this.#key(event));
    $("list").addEventListener("click", (event) => {
      const row = event.target.closest("[role=option]");
      if (row) this.#choose(Number(row.dataset.seq));
    });
    $("file").addEventListener("change", () => this.#open($("file").files[0]));
    $("outline").addEventListener("toggle", () => this.#show());
    addEventListener("resize", () => this.#show());
    this.#show();
  }

  /** Begins an answer; returns what takes its steps in: a function of a chunk's `redwood` field. */
  begin() {
    this.#pause();
    this.#answers += 1;
    this.#live = this.#follow = true;
    $("file").disabled = true;
    const own = this.#answers;
    return (answer, raw) => {
      const step = readStep(raw);
      const made = answer.add(step, performance.now() / 1000);
      this.#history.add(step, own, made, numbersOf(answer));
      this.#pacer.request(this.#still.matches ? CALM : LIVE);
      this.#rest.request(this.#still.matches ? CALM : LIVE_REST);
    };
  }

  /** Ends the answer that `begin` began. */
  end() {
    this.#live = $("file").disabled = false;
    this.#show();
  }

  /** Says that this server answers, but shows no trees. */
  forbidden() {
    this.#empty = "This server does not show its trees. A recording can still be opened below.";
    this.#show();
  }

  /** Says how fast plain decoding was, and how many times as fast speculation, when last tried. */
  setPlain(rate, ratio = null) {
    this.#plain = { rate, ratio };
    this.#show();
  }

  clear() {
    this.#pause();
    this.#history.clear();
    this.#answers = 0;
    this.#follow = true;
    this.#note("");
    this.#show();
  }

  #show() {
    this.#pacer.request();
    this.#rest.request();
  }

  #choose(seq) {
    this.#pause();
    this.#follow = false;
    this.#chosen = seq;
    this.#show();
  }

  #newest() {
    this.#pause();
    this.#follow = true;
    this.#show();
  }

  #key(event) {
    const page = 10;
    const to = {
      ArrowDown: this.#chosen + 1, ArrowUp: this.#chosen - 1, Home: this.#history.first,
      End: this.#history.last, PageDown: this.#chosen + page, PageUp: this.#chosen - page,
    }[event.key];
    if (to === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    this.#choose(to);
  }

  #play() {
    this.#pause();
    if (this.#chosen >= this.#history.last) this.#chosen = this.#history.first;
    this.#follow = false;
    this.#player = setInterval(() => {
      this.#chosen += 1;
      if (this.#chosen >= this.#history.last) this.#pause();
      this.#show();
    }, 1000 / Number($("pace").value));
    this.#show();
  }

  #pause() {
    clearInterval(this.#player);
    this.#player = null;
    this.#show();
  }

  async #open(file) {
    if (!file) return;
    $("file").value = ""; // so that the same file can be opened again
    if (file.size > LARGEST_FILE) return this.#note(`${file.name} is larger than 64 MiB.`, true);
    let text;
    try {
      text = await file.text();
    } catch {
      return this.#note(`${file.name} cannot be read.`, true);
    }
    if (this.#live) return; // an answer began meanwhile: its steps stay
    const { steps, skipped } = readRecording(text);
    const [bad] = skipped;
    const left = bad ? ` ${count(skipped.length, "line")} left out; line ${bad.line}: ${bad.reason}.` : "";
    if (!steps.length) return this.#note(`${file.name} has no steps.${left}`, true);
    this.clear();
    for (const { answer, step, made, ...numbers } of steps) {
      this.#history.add(step, answer, made, numbers);
    }
    this.#answers = steps.at(-1).answer;
    this.#note(`${file.name}: ${count(steps.length, "step")}.${left}`, Boolean(bad));
    this.#choose(this.#history.first);
  }

  #note(words, wrong = false) {
    $("file-note").textContent = words;
    $("file-note").hidden = !words;
    $("file-note").classList.toggle("error", wrong);
  }

  #save() {
    const blob = new Blob([writeRecording(this.#history.items)], { type: "application/jsonl" });
    const link = el("a", { href: URL.createObjectURL(blob), download: "redwood-steps.jsonl" });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  #draw() {
    this.#settle();
    const item = this.#history.get(this.#chosen);
    this.#drawButtons(item);
    if (item) this.#drawStep(item);
    else this.#drawNothing();
  }

  #drawRest() {
    this.#settle();
    this.#drawFacts(this.#history.get(this.#chosen));
    this.#drawList();
    drawChart($("chart"), this.#history.items, this.#chosen, (seq) => this.#choose(seq));
  }

  /** Keeps the chosen step among those that are there. */
  #settle() {
    const { first, last } = this.#history;
    const wanted = this.#follow ? last : this.#chosen;
    this.#chosen = Math.min(last, Math.max(first, wanted));
  }

  #drawNothing() {
    $("step-title").textContent = "No steps yet";
    $("tree").replaceChildren(el("p", { className: "hint" }, this.#empty));
    $("passage").replaceChildren();
    $("outline-body").replaceChildren();
    $("tree-note").hidden = true;
  }

  #drawStep(item) {
    const drafted = item.parents.length - 1;
    $("step-title").replaceChildren(
      `Answer ${item.answer}, step ${item.step} `,
      el("span", { className: "hint" }, drafted
        ? `${drafted} drafted, ${item.accepted.length - 1} accepted`
        : "nothing drafted: plain decoding"),
    );
    writeSources($("legend"), item);
    const left = drawTree($("tree"), item);
    $("tree-note").textContent = left ? `${count(left, "more node")} not drawn.` : "";
    $("tree-note").hidden = !left;
    const marks = item.made.map((part) =>
      el("mark", { className: part.bonus ? "bonus" : "accepted" }, part.text),
    );
    const before = el("span", { className: "before" }, this.#history.textBefore(item.seq, 160));
    $("passage").replaceChildren(el("span", {}, before, ...marks));
    if ($("outline").open) writeTree($("outline-body"), item);
  }

  #drawButtons(item) {
    const { first, last } = this.#history;
    const set = (id, off) => {
      // A disabled button loses the focus, and with it the place of who walks by keyboard.
      $(id).setAttribute("aria-disabled", String(off));
    };
    set("first", !item || this.#chosen <= first);
    set("back", !item || this.#chosen <= first);
    set("forward", !item || this.#chosen >= last);
    set("play", !item || first === last);
    set("save", !item);
    $("play").textContent = this.#player ? "Pause" : "Play";
    $("live").setAttribute("aria-pressed", String(this.#follow));
  }

  #drawFacts(item) {
    const { rate, ratio } = this.#plain;
    $("rate-now").textContent = number(item?.rateNow ?? null, 1);
    const beside = ratio === null ? " tokens/s" : ` tokens/s · speculation ${ratio.toFixed(2)}×`;
    $("rate-plain").replaceChildren(
      number(rate, 1), el("small", {}, rate === null ? " not compared yet" : beside),
    );
    $("per-step").textContent = number(item?.tokensPerStep ?? null, 2);
    const kept = item?.kept ?? null;
    $("kept").textContent = kept === null ? "–" : `${Math.round(100 * kept)} %`;
  }

  #drawList() {
    const list = $("list");
    const { items } = this.#history;
    const kept = new Set(items.map((item) => item.seq));
    for (const [seq, row] of this.#rows) {
      if (kept.has(seq)) continue;
      row.remove();
      this.#rows.delete(seq);
    }
    const fresh = items.filter((item) => !this.#rows.has(item.seq)).map((item) => this.#row(item));
    list.append(...fresh);
    list.querySelector("[aria-selected=true]")?.setAttribute("aria-selected", "false");
    const row = this.#rows.get(this.#chosen);
    if (!row) return list.removeAttribute("aria-activedescendant");
    row.setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", row.id);
    // By hand, since scrollIntoView would scroll the page too.
    const top = row.offsetTop; // within the list
    if (top < list.scrollTop) list.scrollTop = top;
    const below = top + row.offsetHeight - list.clientHeight;
    if (below > list.scrollTop) list.scrollTop = below;
  }

  #row(item) {
    const text = el("span", { className: "tokens" });
    for (const part of item.made) {
      text.append(el("span", { className: part.bonus ? "bonus" : "accepted" }, ...tokenSpans(part.text, 24)));
    }
    const unseen = (words) => el("span", { className: "unseen" }, words);
    const row = el(
      "div", { id: `step-${item.seq}`, role: "option", "aria-selected": "false" },
      el("span", {}, unseen("step "), String(item.step)),
      el("span", {}, String(item.parents.length - 1), unseen(" drafted, ")),
      el("span", {}, String(item.accepted.length - 1), unseen(" accepted, ")),
      text,
    );
    row.dataset.seq = item.seq;
    this.#rows.set(item.seq, row);
    return row;
  }
}

// The left side of the page: the conversation, and the comparison with plain decoding.

import { el } from "./draw.js";
import { Parts, conversation } from "./parts.js";
import { readSettings, showKey } from "./settings.js";
import { AskError, ask, mayRetry, requestBody } from "./stream.js";
import { Answer, Pacer, count, readStep, verdict } from "./trace.js";
import { AnswerView, PlainView, resultsForm } from "./view.js";

const LIVE = 100; // ms between redraws of a text
const LIVE_COMPARED = 500; // likewise while times are compared: the page is to take nothing from them
const REST = 9; // times as long as a redraw took until the next: long texts are drawn less often
const $ = (id) => document.getElementById(id);
const speed = (rate) => (rate === null ? "–" : `${rate.toFixed(1)} tokens/s`);

export class Chat {
  #turns = []; // {asked: messages, body, parts, result, answer: element}
  #stopper = null;
  #panel;
  #trace = true; // until the server says that it shows no trees
  #dirty = new Map(); // view -> what it is to show at the next redraw
  #cost = 0; // ms, of the last one
  #pacer = new Pacer(() => this.#flush());

  constructor(panel) {
    this.#panel = panel;
    $("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send($("prompt").value);
    });
    $("prompt").addEventListener("keydown", (event) => {
      // While an input method composes a word, Enter belongs to it.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#send($("prompt").value);
    });
    for (const sample of document.querySelectorAll(".sample")) {
      sample.addEventListener("click", () => this.#send(sample.textContent));
    }
    $("stop").addEventListener("click", () => this.#stopper?.abort());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.#stopper?.abort();
    });
    $("clear").addEventListener("click", () => this.#clear());
  }

  #clear() {
    this.#stopper?.abort();
    this.#turns = [];
    for (const message of $("log").querySelectorAll("article")) message.remove();
    $("welcome").hidden = false;
    this.#panel.clear();
    $("prompt").focus();
  }

  #send(question) {
    if (this.#stopper || !question.trim() || readSettings() === null) return;
    $("prompt").value = "";
    this.#ask([{ role: "user", content: question }], message("user", "You", question));
  }

  #ask(asked, shown) {
    $("welcome").hidden = true;
    const turn = { asked, answer: message("answer", "Model"), body: null, parts: null, result: null };
    this.#turns.push(turn);
    for (const form of $("log").querySelectorAll(".results")) form.remove(); // the chat went on
    $("log").append(shown, turn.answer);
    this.#answer(turn);
  }

  /** Asks for the answer of the last turn: the first time, or again after an error. */
  async #answer(turn) {
    const settings = readSettings();
    if (settings === null || this.#stopper) return;
    turn.parts = turn.result = null; // a second try does not build on the first
    // Forced calls end with their results: else no answer would ever be text.
    if (turn.asked[0].role === "tool") settings.toolChoice = "auto";
    const messages = conversation(this.#turns, turn.asked);
    turn.body = requestBody(settings.model, messages, settings, this.#trace);
    turn.answer.querySelector(":scope > h3").textContent = settings.several ? settings.model : "Model";
    turn.answer.querySelectorAll(":scope > :not(h3)").forEach((old) => old.remove());
    const box = el("div", {});
    turn.answer.append(box);
    const view = new AnswerView(box);
    const take = this.#panel.begin();
    let result = await this.#run(turn.body, settings.key, view, take);
    if (this.#trace && result.error?.param === "redwood") {
      this.#trace = turn.body.redwood.trace = false;
      result = await this.#run(turn.body, settings.key, view, take);
      this.#panel.forbidden();
    }
    this.#panel.end();
    if (!this.#turns.includes(turn)) return; // the chat was cleared meanwhile
    turn.result = result;
    turn.parts = result.parts;
    if (!turn.body.redwood.speculate && result.rate) this.#panel.setPlain(result.rate);
    this.#finish(turn, view, settings);
  }

  /**
   * Runs one request and shows it in `view`. Never throws.
   *
   * Returns `parts`, `text` (all of them as one), `whole` (it came to its end), `error` (AskError or
   * null), `rate`, `answer`, `tokens`, `usage`, `why` (the server's finish reason) and `unread`
   * (steps that could not be read).
   */
  async #run(body, key, view, take, pace = LIVE) {
    const answer = new Answer();
    const parts = new Parts();
    const result = { parts, text: "", whole: false, error: null, why: null, unread: 0, answer };
    let [began, ended, tokens] = [null, null, null];
    const stopper = this.#busy(new AbortController());
    try {
      for await (const chunk of ask(body, { key, signal: stopper.signal })) {
        if (chunk.redwood) {
          try {
            take(answer, chunk.redwood);
          } catch {
            result.unread += 1; // the text is good even where the trace is not
          }
        }
        const choice = chunk.choices?.[0];
        if (parts.add(choice?.delta)) {
          ended = performance.now() / 1000;
          began ??= ended;
          this.#write(view, parts, true, pace);
        }
        result.why = choice?.finish_reason ?? result.why;
        tokens = chunk.usage?.completion_tokens ?? tokens;
        result.usage = chunk.usage ?? result.usage;
      }
      result.whole = true;
    } catch (error) {
      result.error = error instanceof AskError ? error : new AskError("server", String(error));
    }
    this.#busy(null);
    result.text = parts.plain;
    this.#write(view, parts, false);
    this.#flush();
    result.tokens = tokens ?? answer.tokens;
    result.rate = answer.rate ?? (ended > began && tokens > 1 ? (tokens - 1) / (ended - began) : null);
    return result;
  }

  #busy(stopper) {
    this.#stopper = stopper;
    const running = stopper !== null;
    const held = [$("send"), $("stop"), document.body].includes(document.activeElement);
    $("send").hidden = running;
    $("stop").hidden = !running;
    $("log").setAttribute("aria-busy", String(running));
    document.body.classList.toggle("running", running);
    if (held) (running ? $("stop") : $("prompt")).focus({ preventScroll: true });
    return stopper;
  }

  #write(view, parts, running, pace = LIVE) {
    this.#dirty.set(view, { parts, running });
    this.#pacer.request(Math.max(pace, REST * this.#cost));
  }

  #flush() {
    const began = performance.now(); // before the browser's layout, which the next line asks for
    const log = $("log");
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    for (const [view, { parts, running }] of this.#dirty) view.show(parts, running);
    this.#dirty.clear();
    if (atEnd) log.scrollTop = log.scrollHeight;
    this.#cost = performance.now() - began;
  }

  #finish(turn, view, settings) {
    const { result, parts, answer } = turn;
    for (const why of parts.unread) {
      answer.append(el("p", { className: "hint" }, `A tool call could not be read: ${why}`));
    }
    if (result.error) {
      answer.append(trouble(result.error));
      if (result.error.kind === "key") showKey();
    }
    if (result.whole && parts.wholeCalls.length) this.#offerResults(turn);
    const bar = el("div", { className: "foot" }, el("span", {}, parts.empty ? "" : facts(result)));
    const add = (words, call) => {
      const button = el("button", { type: "button" }, words);
      button.addEventListener("click", () => this.#stopper || call(button));
      bar.append(button);
      return button;
    };
    if (parts.text) {
      const plain = add("Plain text", (button) => {
        const pressed = button.getAttribute("aria-pressed") !== "true";
        button.setAttribute("aria-pressed", String(pressed));
        view.showPlain(pressed);
      });
      plain.setAttribute("aria-pressed", "false");
    }
    if (!parts.empty) add("Compare with plain decoding", () => this.#compare(turn, settings));
    if (result.error && (mayRetry(result.error.kind) || result.error.kind === "key")) {
      add("Try again", (button) => {
        if (turn === this.#turns.at(-1)) this.#answer(turn);
        else button.disabled = true; // the conversation went on without this answer
      });
    }
    if (!parts.empty || bar.childElementCount > 1) answer.append(bar);
    $("log").scrollTop = $("log").scrollHeight;
    $("said").textContent = result.error ? result.error.message : `Answer complete. ${facts(result)}`;
  }

  /** Asks for what the called tools gave; the page runs none. */
  #offerResults(turn) {
    const calls = turn.parts.wholeCalls;
    const form = resultsForm(calls, (results) => {
      if (this.#stopper || readSettings() === null) return;
      const words = results.map(({ content }, i) => `${calls[i].name}: ${content}`);
      this.#ask(results, message("user", "Tools", words.join("\n")));
    });
    turn.answer.append(form);
  }

  /**
   * Runs a turn's request twice more, with speculation and without, and sets both side by side.
   * Both are new and neither is drawn, so that the times are of the model alone.
   */
  async #compare(turn, settings) {
    turn.answer.querySelector(".compare")?.remove();
    const key = readSettings()?.key ?? settings.key; // it may have been entered since
    const sides = [side("With speculation", true), side("Plain decoding", false)];
    const words = el("p", { className: "verdict", role: "status" });
    const block = el(
      "div", { className: "compare" }, words,
      el("div", { className: "sides" }, ...sides.map((each) => each.column)),
    );
    turn.answer.append(block);
    for (const each of sides) {
      words.textContent = `Running again, without pictures: ${each.name.toLowerCase()} …`;
      block.scrollIntoView({ block: "nearest" });
      const body = { ...turn.body, redwood: { ...turn.body.redwood, speculate: each.speculate } };
      each.result = await this.#run(body, key, new PlainView(each.box), takeNumbers, LIVE_COMPARED);
      const { error, text } = each.result;
      if (error) block.append(trouble(error));
      // What was stopped in the second run can still be compared as far as it came.
      if (error && (error.kind !== "stopped" || each === sides[0] || !text)) {
        words.textContent = "There is nothing to compare.";
        return;
      }
    }
    const [fast, plain] = sides.map((each) => each.result);
    if (plain.rate) this.#panel.setPlain(plain.rate, fast.rate && fast.rate / plain.rate);
    const best = Math.max(fast.rate ?? 0, plain.rate ?? 0, 1e-9);
    for (const { column, result, speculate } of sides) {
      column.querySelector(".speed").replaceChildren(
        el("strong", {}, speed(result.rate)), gauge((result.rate ?? 0) / best, speculate),
        el("small", {}, facts(result, false)),
      );
    }
    const found = verdict(fast, plain, settings);
    words.textContent = [found.words, ratio(fast, plain)].join(" ").trim();
    words.classList.add(found.same === null ? "free" : found.same ? "same" : "differ");
    if (found.at !== null) sides.forEach(({ box, result }) => markFrom(box, result.text, found.at));
  }
}

// The steps of a comparison count, but are not drawn: the picture stays at the answer's.
const takeNumbers = (answer, raw) => answer.add(readStep(raw), performance.now() / 1000);

function message(kind, who, text = null) {
  const made = el("article", { className: `message ${kind}` }, el("h3", {}, who));
  if (text !== null) made.append(el("div", { className: "text" }, text));
  return made;
}

function trouble(error) {
  const quiet = error.kind === "stopped";
  return el("p", { className: quiet ? "hint" : "error", role: quiet ? "note" : "alert" }, error.message);
}

/** Returns an answer's numbers as one line. */
function facts({ answer, tokens, rate, why, unread, usage }, withSpeed = true) {
  const parts = [count(tokens, "token")];
  if (answer.steps) parts.push(count(answer.steps, "step"), `${answer.tokensPerStep.toFixed(2)} tokens per step`);
  if (withSpeed && rate !== null) parts.push(speed(rate));
  if (usage?.prompt_tokens) parts.push(promptInWords(usage));
  if (why === "length") parts.push("cut at the token limit");
  if (unread) parts.push(`${count(unread, "step")} could not be read`);
  return parts.join(" · ");
}

/** Says how much of the prompt was read, and how much was kept from before. */
function promptInWords({ prompt_tokens: all, prompt_tokens_details: details }) {
  const kept = details?.cached_tokens ?? 0;
  return `prompt ${count(all, "token")}: ${all - kept} read, ${kept} kept`;
}

function ratio(fast, plain) {
  if (!fast.rate || !plain.rate) return "";
  return `Speculation was ${(fast.rate / plain.rate).toFixed(2)} times as fast.`;
}

/** Returns one column of a comparison. */
function side(name, speculate) {
  const label = `Text ${name.toLowerCase()}`;
  const box = el("div", { className: "text", tabIndex: 0, role: "region", "aria-label": label });
  const column = el("div", {}, el("h4", {}, name), el("p", { className: "speed" }, "…"), box);
  return { name, speculate, box, column, result: null };
}

function gauge(share, ours) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  made.setAttribute("class", `gauge ${ours ? "ours" : ""}`);
  made.setAttribute("aria-hidden", "true");
  for (const [width, name] of [[1, "rail"], [share, "fill"]]) {
    const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    rect.setAttribute("class", name);
    rect.setAttribute("width", `${(100 * width).toFixed(1)}%`);
    rect.setAttribute("height", "100%");
    made.append(rect);
  }
  return made;
}

function markFrom(box, text, at) {
  box.replaceChildren(text.slice(0, at), el("mark", {}, text.slice(at)));
}

// What is known of an answer's steps: reading them, the last 500 of them, and the statistics.
// Nothing here touches the page, so Node can test it.

import { readSources } from "./sources.js";

export const HISTORY = 500;
const MAX_NODES = 4096; // far above any tree that pays: more is a damaged file
const WINDOW = 16; // steps that "now" looks back
const FRAME = 50; // ms: 20 redraws per second are smooth enough, and leave the CPU to the model

const SIGNS = { "\n": "↵", "\r": "␍", "\t": "⇥", " ": "␣", "\u00A0": "⍽" };
// What would not be seen, or would change the order of what is: marks of direction, joiners, soft
// hyphens, tags, lone surrogates.
const UNSEEN = /[\u007F-\u009F\u00AD\u061C\u180E\u2000-\u200F\u2028-\u202F\u205F-\u206F\u3000\uFEFF\uFFF9-\uFFFB]|[\u{E0000}-\u{E0FFF}]|\p{Cs}/u;

/** Returns a token's text as parts {text, sign}: `sign` marks what stands for something unseen. */
export function visibleParts(text, limit = 14) {
  const parts = [];
  const add = (piece, sign) => {
    const last = parts.at(-1);
    if (last && last.sign === sign) last.text += piece;
    else parts.push({ text: piece, sign });
  };
  let length = 0;
  for (const sign of text) {
    const code = sign.codePointAt(0);
    let shown = sign;
    if (sign in SIGNS) shown = SIGNS[sign];
    else if (code < 0x20) shown = String.fromCodePoint(0x2400 + code);
    else if (UNSEEN.test(sign)) shown = `U+${code.toString(16).toUpperCase().padStart(4, "0")}`;
    if (length > 0 && length + shown.length > limit) {
      add("…", true);
      return parts;
    }
    add(shown, shown !== sign);
    length += shown.length;
  }
  return parts.length ? parts : [{ text: "∅", sign: true }];
}

/** Returns a token's text with everything visible, as one string. */
export function visible(text, limit = 14) {
  return visibleParts(text, limit).map((part) => part.text).join("");
}

const isCount = (value) => Number.isSafeInteger(value) && value >= 0;

function need(condition, words) {
  if (!condition) throw new Error(words);
}

/**
 * Returns the step that a chunk's `redwood` field describes.
 *
 * Result: `step`, `parents`, `tokens`, `texts`, `sources` (by node id, 0 is the root; of each node
 * the names of what drafted it, none where it is not known), `accepted` (node ids, the root first),
 * `bonus` ({token, text} or null), `seconds` (by kind, this answer so far),
 * `generated`. Throws an Error that says what is wrong.
 */
export function readStep(raw) {
  need(raw !== null && typeof raw === "object", "it is no object");
  need(isCount(raw.step), "it has no step number");
  need(Array.isArray(raw.nodes) && raw.nodes.length > 0, "it has no nodes");
  need(raw.nodes.length <= MAX_NODES, `it has more than ${MAX_NODES} nodes`);
  raw.nodes.forEach((node, i) => {
    const parent = node?.parent;
    need(i === 0 ? parent === -1 : isCount(parent) && parent < i, `node ${i} has no parent above`);
  });
  const parents = raw.nodes.map((node) => node.parent);
  const accepted = raw.accepted;
  need(Array.isArray(accepted) && accepted[0] === 0, "its accepted path does not start at the root");
  accepted.forEach((node, i) => {
    need(i === 0 || parents[node] === accepted[i - 1], "its accepted path is no path of the tree");
  });
  const seconds = {};
  for (const [kind, value] of Object.entries(raw.seconds ?? {})) {
    if (Number.isFinite(value) && value >= 0) seconds[kind] = value;
  }
  return {
    step: raw.step,
    parents,
    tokens: raw.nodes.map((node) => (isCount(node.token) ? node.token : null)),
    texts: raw.nodes.map((node) => String(node.text ?? "")),
    sources: raw.nodes.map((node, i) => (i === 0 ? [] : readSources(node.sources))),
    accepted: [...accepted],
    bonus: raw.bonus ? { token: raw.bonus.token ?? null, text: String(raw.bonus.text ?? "") } : null,
    seconds,
    generated: isCount(raw.generated) ? raw.generated : null,
  };
}

/** Seconds of decoding: reading the prompt is the same with and without speculation. */
const decoding = (seconds) => {
  const values = Object.entries(seconds).filter(([kind]) => kind !== "prefill");
  return values.length ? values.reduce((sum, [, value]) => sum + value, 0) : null;
};

/** One answer's numbers. It keeps sums, not steps, so that its size does not grow. */
export class Answer {
  steps = 0;
  tokens = 0; // of the whole answer
  made = 0; // of the steps seen
  drafted = 0;
  accepted = 0;
  seconds = {};
  #recent = []; // {tokens so far, time} of the last steps
  #first = null;

  /** Takes a step in and returns what it made: [{text, bonus}], cut where the answer was. */
  add(step, clock = null) {
    const made = step.accepted.slice(1).map((node) => ({ text: step.texts[node], bonus: false }));
    if (step.bonus) made.push({ text: step.bonus.text, bonus: true });
    // The end of the text and the limit of tokens cut a path: `generated` knows. A recording that
    // begins in the middle has no step before it to count from.
    const fresh = step.generated === null ? made.length : step.generated - this.tokens;
    const whole = this.steps > 0 || (step.generated ?? 0) <= made.length;
    if (whole && fresh >= 0 && fresh < made.length) made.length = fresh;
    this.steps += 1;
    this.tokens = step.generated ?? this.tokens + made.length;
    this.made += made.length;
    this.drafted += step.parents.length - 1;
    this.accepted += step.accepted.length - 1;
    this.seconds = step.seconds;
    const own = decoding(step.seconds);
    const time = own ?? clock;
    if (time !== null) {
      const mark = { tokens: this.tokens, time };
      // The server counts from the answer's beginning, the page's clock from anywhere.
      this.#first ??= own === null ? mark : { tokens: 0, time: 0 };
      if (whole && this.steps === 1) this.#recent.push(this.#first);
      this.#recent.push(mark);
      if (this.#recent.length > WINDOW + 1) this.#recent.shift();
    }
    return made;
  }

  /** Tokens per second over the last steps, or null. */
  get rateNow() {
    return rateBetween(this.#recent[0], this.#recent.at(-1));
  }

  /** Tokens per second of decoding, or null. */
  get rate() {
    return rateBetween(this.#first, this.#recent.at(-1));
  }

  get tokensPerStep() {
    return this.steps ? this.made / this.steps : null;
  }

  /** The share of drafted tokens that were accepted, or null where nothing was drafted. */
  get kept() {
    return this.drafted ? this.accepted / this.drafted : null;
  }
}

function rateBetween(from, to) {
  return from && to && to.time > from.time ? (to.tokens - from.tokens) / (to.time - from.time) : null;
}

/** The last steps of all answers. Every step has a number `seq` that stays its own. */
export class History {
  items = [];
  #next = 0;

  constructor(limit = HISTORY) {
    this.limit = limit;
  }

  /** Adds a step of answer number `answer`; `made` as `Answer.add` returned it. */
  add(step, answer, made, numbers = {}) {
    this.items.push({ seq: this.#next++, answer, made, ...numbers, ...step });
    if (this.items.length > this.limit) this.items.shift();
  }

  get first() {
    return this.items[0]?.seq ?? 0;
  }

  get last() {
    return this.items.at(-1)?.seq ?? -1;
  }

  /** Returns the step with this number, or null once it is gone. */
  get(seq) {
    return this.items[seq - this.first] ?? null;
  }

  clear() {
    this.items = [];
  }

  /** Returns up to `length` characters that the answer had before step `seq`. */
  textBefore(seq, length) {
    const answer = this.get(seq)?.answer;
    let text = "";
    for (let at = seq - 1; text.length < length && this.get(at)?.answer === answer; at--) {
      text = this.get(at).made.map((part) => part.text).join("") + text;
    }
    // A cut between the halves of a character leaves the second one: it goes too.
    return text.length > length ? `…${text.slice(-length).replace(/^[\uDC00-\uDFFF]/, "")}` : text;
  }
}

/**
 * Reads a recording: a line per step, each a chunk of the server or its `redwood` field alone. A
 * stream that was saved as it came (`data: ...`) is one too.
 *
 * Returns `steps` ({answer, step, made}) and `skipped` ([{line, reason}]). Only the last `HISTORY`
 * steps are kept.
 */
export function readRecording(text) {
  const steps = [];
  const skipped = [];
  let number = 0;
  let answer = null;
  let before = null;
  let id = null;
  text.split(/\r?\n/).forEach((raw, i) => {
    const line = raw.replace(/^\uFEFF/, "").replace(/^data:/, "").trim();
    if (!line || line === "[DONE]" || line.startsWith(":")) return;
    try {
      const chunk = JSON.parse(line);
      if (chunk?.choices && !chunk.redwood) return; // a chunk of text only: nothing to draw
      const step = readStep(chunk?.redwood ?? chunk);
      if (answer === null || step.step <= before || (chunk.id ?? id) !== id) {
        number += 1;
        answer = new Answer();
      }
      id = chunk.id ?? null;
      before = step.step;
      const made = answer.add(step);
      steps.push({ answer: number, step, made, ...numbersOf(answer) });
      if (steps.length > HISTORY) steps.shift();
    } catch (error) {
      skipped.push({
        line: i + 1, reason: error instanceof SyntaxError ? "it is not JSON" : error.message,
      });
    }
  });
  return { steps, skipped };
}

/** The numbers that the page shows beside a step. */
export function numbersOf(answer) {
  return {
    rateNow: answer.rateNow, tokensPerStep: answer.tokensPerStep, kept: answer.kept,
    count: answer.tokens,
  };
}

/** Returns a recording that `readRecording` reads, of what the history has. */
export function writeRecording(items) {
  return items
    .map((item) => {
      const nodes = item.parents.map((parent, node) => ({
        parent, token: item.tokens[node], text: item.texts[node], sources: item.sources[node],
      }));
      const { step, accepted, bonus, seconds, generated } = item;
      const redwood = { step, nodes, accepted, bonus, seconds, generated };
      return `${JSON.stringify({ id: `answer-${item.answer}`, redwood })}\n`;
    })
    .join("");
}

/** Returns a step in words, for those who do not see the picture. */
export function stepInWords(item) {
  const drafted = item.parents.length - 1;
  const kept = item.accepted.slice(1).map((node) => visible(item.texts[node]));
  const parts = [drafted ? `${count(drafted, "drafted token")}` : "nothing drafted"];
  if (drafted) {
    parts.push(kept.length ? `${kept.length} accepted: ${kept.join(" ")}` : "none accepted");
  }
  if (item.bonus) parts.push(`bonus token: ${visible(item.bonus.text)}`);
  return `Step ${item.step}: ${parts.join("; ")}.`;
}

/** Says whether two runs of one question gave one text: {same: true | false | null, words}. */
export function verdict(first, second, { temperature, seed }) {
  const length = Math.min(
    first.whole ? Infinity : first.text.length, second.whole ? Infinity : second.text.length,
  );
  const [a, b] = [first.text.slice(0, length), second.text.slice(0, length)];
  const part = length === Infinity ? "" : " as far as both came";
  if (a === b) return { same: true, at: null, words: `The two texts are equal${part}.` };
  const at = firstDifference(a, b);
  if (temperature === 0 || seed !== null) {
    return {
      same: false,
      at,
      words: `The two texts differ from character ${at + 1} on. They should be equal: a near-tie ` +
        "between two tokens can do this, anything else is a fault worth a report.",
    };
  }
  return {
    same: null,
    at,
    words: "The two texts need not be equal: without a seed every run draws anew. The chance of " +
      "each text is the same. Set a seed or temperature 0 to compare them.",
  };
}

function firstDifference(a, b) {
  let at = 0;
  while (at < a.length && at < b.length && a[at] === b[at]) at++;
  return at;
}

/** Returns "1 token", "2 tokens". */
export function count(number, noun) {
  return `${number} ${noun}${number === 1 ? "" : "s"}`;
}

/** Calls `draw` soon after `request`, but never sooner than `interval` ms after the last time. */
export class Pacer {
  #due = null;
  #timer = null;
  #last = -Infinity;

  constructor(draw, { now, later, cancel } = {}) {
    this.draw = draw;
    this.now = now ?? (() => performance.now());
    this.later = later ?? ((call, ms) => setTimeout(call, ms));
    this.cancel = cancel ?? ((timer) => clearTimeout(timer));
  }

  request(interval = FRAME) {
    const due = Math.max(this.now(), this.#last + interval);
    if (this.#due !== null) {
      if (this.#due <= due) return;
      this.cancel(this.#timer);
    }
    this.#due = due;
    this.#timer = this.later(() => {
      this.#due = null;
      this.#last = this.now();
      this.draw();
    }, due - this.now());
  }
}

// What an answer consists of: text, reasoning, tool calls; and the conversation made of answers.
// Nothing here touches the page, so Node can test it.

const MOST_CALLS = 128;
const NO_RESULT = "(no result)"; // of a call that was left alone: templates want one for each
const LONGEST_SPACED = 100_000; // characters
const isText = (value) => typeof value === "string" && value !== "";

/** One answer, gathered from the deltas of its stream. */
export class Parts {
  text = "";
  reasoning = "";
  calls = []; // {id, name, arguments}: arguments as the model wrote them
  unread = []; // why a call was none

  /** Takes a delta in; returns whether it had something. */
  add(delta) {
    let had = false;
    for (const [field, kind] of [["content", "text"], ["reasoning_content", "reasoning"]]) {
      if (!isText(delta?.[field])) continue;
      this[kind] += delta[field];
      had = true;
    }
    for (const call of listOf(delta?.tool_calls)) had = this.#call(call) || had;
    for (const each of listOf(delta?.redwood?.malformed_calls)) {
      this.unread.push(String(each?.reason ?? "it is no call"));
      had = true;
    }
    return had;
  }

  #call(raw) {
    const index = raw?.index;
    if (!Number.isSafeInteger(index) || index < 0 || index >= MOST_CALLS) return false;
    while (this.calls.length <= index) this.calls.push({ id: "", name: "", arguments: "" });
    const call = this.calls[index];
    if (isText(raw.id)) call.id ||= raw.id;
    if (isText(raw.function?.name)) call.name ||= raw.function.name;
    if (isText(raw.function?.arguments)) call.arguments += raw.function.arguments;
    return true;
  }

  get empty() {
    return !this.text && !this.reasoning && !this.calls.length;
  }

  /** The calls that came whole: a limit of tokens, or Stop, cuts the last one. */
  get wholeCalls() {
    return this.calls.filter((call) => call.name && call.id && isObject(call.arguments || "{}"));
  }

  /** All of it as one text, for comparing; the answer's text alone where there is nothing else. */
  get plain() {
    const calls = this.calls.map((call) => `[call ${call.name}] ${call.arguments}`);
    const reasoning = this.reasoning ? [`[reasoning] ${this.reasoning}`] : [];
    return [...reasoning, ...(this.text ? [this.text] : []), ...calls].join("\n\n");
  }

  /** The answer as a message of the conversation; null where it says nothing to build on. */
  get message() {
    const calls = this.wholeCalls;
    if (!this.text && !calls.length) return null;
    const message = { role: "assistant", content: this.text };
    if (this.reasoning) message.reasoning_content = this.reasoning;
    if (calls.length) {
      message.tool_calls = calls.map(({ id, name, arguments: given }) => ({
        id, type: "function", function: { name, arguments: given || "{}" },
      }));
    }
    return message;
  }
}

/**
 * Returns the messages to send: those of the answered turns, then `asked`.
 *
 * `turns`: {asked: messages, parts: Parts or null}, oldest first. A question that got no answer is left
 * out: two in a row are what templates refuse. A call without a result gets an empty one.
 */
export function conversation(turns, asked) {
  const messages = [];
  let open = [];
  const add = (those) => {
    const given = new Set(those.map((message) => message.tool_call_id));
    for (const { id } of open) {
      if (!given.has(id)) messages.push({ role: "tool", tool_call_id: id, content: NO_RESULT });
    }
    messages.push(...those);
  };
  for (const turn of turns) {
    const answer = turn.parts?.message ?? null;
    if (answer === null) continue;
    add(turn.asked);
    messages.push(answer);
    open = turn.parts.wholeCalls;
  }
  add(asked);
  return messages;
}

/** Reads what was entered as tools: {tools: list, wrong: null or what is wrong}. */
export function readTools(text) {
  if (!text.trim()) return { tools: [], wrong: null };
  let tools;
  try {
    tools = JSON.parse(text);
  } catch {
    return { tools: [], wrong: "Tools are no JSON." };
  }
  if (!Array.isArray(tools)) return { tools: [], wrong: "Tools must be a JSON list: [ … ]." };
  const bad = tools.findIndex((tool) => tool?.type !== "function" || !isText(tool.function?.name));
  if (bad < 0) return { tools, wrong: null };
  return {
    tools: [],
    wrong: `Tool ${bad + 1} must have "type": "function" and a "function" with a "name".`,
  };
}

/** Returns JSON on several lines. Only white space is added: numbers and texts stay as written. */
export function spacedJson(text) {
  if (text.length > LONGEST_SPACED || !isJson(text)) return text;
  let [made, level, before] = ["", 0, ""];
  const line = () => `\n${"  ".repeat(Math.min(level, 16))}`;
  for (const [token] of text.matchAll(/"[^"\\]*(?:\\.[^"\\]*)*"|[{}[\],:]|[^\s{}[\],:"]+/g)) {
    const closes = token === "}" || token === "]";
    if (closes) level -= 1;
    const opened = before === "{" || before === "[";
    if ((opened || closes || before === ",") && !(opened && closes)) made += line();
    made += token === ":" ? ": " : token;
    if (token === "{" || token === "[") level += 1;
    before = token;
  }
  return made;
}

const listOf = (value) => (Array.isArray(value) ? value : []);

function isJson(text) {
  try {
    JSON.parse(text);
    return true;
  } catch {
    return false;
  }
}

function isObject(text) {
  try {
    const value = JSON.parse(text);
    return value !== null && typeof value === "object" && !Array.isArray(value);
  } catch {
    return false;
  }
}

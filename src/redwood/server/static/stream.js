// Talking to the server: server-sent events, one streamed answer, and what went wrong in plain words.
// Nothing here touches the page, so Node can test it.

/** Turns pieces of a `text/event-stream` into the data of its events, however they were cut. */
export class SseParser {
  #rest = "";
  #data = [];
  #started = false;

  /** Returns the data of every event that `text` completes, in order. */
  push(text) {
    this.#rest += text;
    if (!this.#started && this.#rest) {
      this.#started = true;
      if (this.#rest.startsWith("\uFEFF")) this.#rest = this.#rest.slice(1);
    }
    const events = [];
    for (;;) {
      const end = this.#rest.search(/[\r\n]/);
      // A CR at the very end may be the first half of a CRLF: wait for what follows.
      if (end < 0 || (this.#rest[end] === "\r" && end === this.#rest.length - 1)) return events;
      const line = this.#rest.slice(0, end);
      this.#rest = this.#rest.slice(end + (this.#rest.startsWith("\r\n", end) ? 2 : 1));
      this.#line(line, events);
    }
  }

  #line(line, events) {
    if (line === "") {
      if (this.#data.length) events.push(this.#data.join("\n"));
      this.#data = [];
    } else if (line === "data") {
      this.#data.push("");
    } else if (line.startsWith("data:")) {
      this.#data.push(line.slice(line[5] === " " ? 6 : 5));
    } // Comments (":") and other fields say nothing that the page needs.
  }
}

/** An answer that did not come, or not to its end. `kind` decides what the page offers. */
export class AskError extends Error {
  constructor(kind, message, retryAfter = null) {
    super(message);
    this.kind = kind;
    this.retryAfter = retryAfter;
    this.param = null; // the field of the request that the server did not take
  }
}

const AGAIN = new Set(["full", "not-ready", "network", "lost", "server"]);

/** Tells whether the same question may succeed a little later. */
export const mayRetry = (kind) => AGAIN.has(kind);

/** Puts an HTTP status into words. `said` is the server's own message, or "". */
export function explain(status, said, retryAfter = null) {
  const own = said ? ` The server says: ${said}` : "";
  const wait = retryAfter === null ? "in a moment" : `in ${retryAfter} s`;
  if (status === 401 || status === 403) {
    return new AskError("key", `The API key is missing or wrong. Enter it under Settings.${own}`);
  }
  if (status === 429) {
    return new AskError(
      "full", `The server is full: it answers others just now. Try again ${wait}.`, retryAfter,
    );
  }
  if (status === 503) {
    return new AskError("not-ready", `The server is not ready. Try again ${wait}.${own}`, retryAfter);
  }
  if (status === 413) return new AskError("refused", `The request is too long.${own}`);
  if (status >= 400 && status < 500) {
    return new AskError("refused", `The server refused the request (${status}).${own}`);
  }
  return new AskError("server", `The server failed (${status}).${own}`);
}

async function errorOf(response) {
  let said = "";
  let param = null;
  try {
    const { error } = await response.json();
    if (typeof error?.message === "string") said = error.message;
    param = error?.param ?? null;
  } catch {
    // A proxy's HTML page says nothing that the status does not.
  }
  const header = response.headers.get("retry-after") ?? "";
  const told = explain(response.status, said, /^\d+$/.test(header) ? Number(header) : null);
  told.param = param;
  return told;
}

function headers(key) {
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function reach(fetcher, url, options) {
  let response;
  try {
    response = await fetcher(url, options);
  } catch (error) {
    if (error.name === "AbortError") throw new AskError("stopped", "Stopped.");
    throw new AskError("network", "The server does not answer. Is `redwood serve` running?");
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

/**
 * Returns the models that the server has, as {id, options}: the variables of its chat template that a
 * request may set. Throws AskError.
 */
export async function listModels({ key = "", fetcher = fetch } = {}) {
  const response = await reach(fetcher, "v1/models", { headers: headers(key), cache: "no-store" });
  try {
    return (await response.json()).data.map((model) => {
      const options = model.redwood?.template_options;
      return { id: String(model.id), options: Array.isArray(options) ? options : [] };
    });
  } catch {
    throw new AskError("server", "This is no Redwood server: its list of models cannot be read.");
  }
}

/** Asks for one streamed answer and yields its chunks. Throws AskError; an abort is "stopped". */
export async function* ask(body, { key = "", signal, fetcher = fetch } = {}) {
  const response = await reach(fetcher, "v1/chat/completions", {
    method: "POST", headers: headers(key), body: JSON.stringify(body), signal, cache: "no-store",
  });
  const parser = new SseParser();
  const decoder = new TextDecoder();
  const reader = response.body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      for (const data of parser.push(decoder.decode(value, { stream: true }))) {
        if (data === "[DONE]") return;
        if (signal?.aborted) throw new AskError("stopped", "Stopped.");
        yield chunkOf(data);
      }
    }
  } catch (error) {
    if (error instanceof AskError) throw error;
    if (signal?.aborted) throw new AskError("stopped", "Stopped.");
  } finally {
    reader.cancel().catch(() => {}); // Leaves no connection open after an error in the stream.
  }
  throw new AskError(
    "lost", "The connection was lost in the middle of the answer. What came is kept.",
  );
}

function chunkOf(data) {
  let chunk;
  try {
    chunk = JSON.parse(data);
  } catch {
    throw new AskError("server", "The server sent something that cannot be read.");
  }
  if (chunk?.error) {
    const said = typeof chunk.error.message === "string" ? ` ${chunk.error.message}` : "";
    throw new AskError("server", `The server stopped in the middle of the answer.${said}`);
  }
  return chunk;
}

/**
 * Returns the body of a request. `messages`: oldest first; `settings`: as read from the page;
 * `trace`: whether the answer is to come with its trees, which an operator may have forbidden.
 */
export function requestBody(model, messages, settings, trace = true) {
  const system = settings.system.trim();
  const body = {
    model,
    messages: [...(system ? [{ role: "system", content: settings.system }] : []), ...messages],
    temperature: settings.temperature,
    top_p: settings.topP,
    max_tokens: settings.maxTokens,
    stream: true,
    stream_options: { include_usage: true },
    redwood: { trace, speculate: settings.speculate },
  };
  if (settings.seed !== null) body.seed = settings.seed;
  if (settings.tools?.length) {
    body.tools = settings.tools;
    body.tool_choice = settings.toolChoice;
  }
  return { ...body, ...settings.reasoning };
}

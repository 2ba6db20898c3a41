// The page's logic without a page; tests/test_page_logic.py runs it and sets STATIC, the folder.

import assert from "node:assert/strict";
import { test } from "node:test";
import { pathToFileURL } from "node:url";

const load = (name) => import(pathToFileURL(`${process.env.STATIC}/${name}`));
const layout = await load("layout.js");
const { SseParser, ask, explain, listModels, mayRetry, requestBody } = await load("stream.js");
const trace = await load("trace.js");
const sources = await load("sources.js");

const settings = { system: "", temperature: 0, topP: 1, maxTokens: 8, seed: null, speculate: true };

/** A step of a chain: `size` nodes, the first `accepted` after the root kept. */
function raw(step, { size = 4, accepted = 2, generated = undefined, bonus = "!" } = {}) {
  return {
    step,
    nodes: Array.from({ length: size }, (_, i) => ({ parent: i - 1, token: i, text: `t${i}` })),
    accepted: Array.from({ length: accepted + 1 }, (_, i) => i),
    bonus: bonus === null ? null : { token: 99, text: bonus },
    seconds: { prefill: 3, target: step * 0.1, other: step * 0.1 },
    ...(generated === undefined ? {} : { generated }),
  };
}

function random(seed) {
  let state = seed;
  return (below) => {
    state = (state * 1103515245 + 12345) % 2147483648;
    return Math.floor((state / 2147483648) * below);
  };
}

function randomTree(size, seed) {
  const draw = random(seed);
  return [-1, ...Array.from({ length: size - 1 }, (_, i) => draw(i + 1))];
}

// ---- server-sent events

test("events are the same however the stream is cut", () => {
  const stream = "\uFEFF: ping\r\ndata: {\"a\":1}\r\n\r\ndata:two\ndata: lines\n\nevent: x\nid: 1\n\ndata\r\rdata: end\n\n";
  const whole = new SseParser().push(stream);
  assert.deepEqual(whole, ["{\"a\":1}", "two\nlines", "", "end"]);
  for (let size = 1; size < 9; size++) {
    const parser = new SseParser();
    const events = [];
    for (let at = 0; at < stream.length; at += size) events.push(...parser.push(stream.slice(at, at + size)));
    assert.deepEqual(events, whole, `pieces of ${size}`);
  }
});

test("an event without its empty line is not given out", () => {
  assert.deepEqual(new SseParser().push("data: half\n"), []);
});

// ---- one answer

function server(pieces, { status = 200, headers = {}, fail = false } = {}) {
  const calls = [];
  const fetcher = async (url, options) => {
    calls.push({ url, ...options });
    const body = new ReadableStream({
      pull(controller) {
        if (pieces.length) controller.enqueue(new TextEncoder().encode(pieces.shift()));
        else if (fail) controller.error(new TypeError("network error"));
        else controller.close();
      },
    });
    return new Response(body, { status, headers });
  };
  return { fetcher, calls };
}

async function collect(iterator) {
  const chunks = [];
  try {
    for await (const chunk of iterator) chunks.push(chunk);
  } catch (error) {
    return { chunks, error };
  }
  return { chunks, error: null };
}

test("an answer is its chunks up to [DONE], with the key in the header", async () => {
  const { fetcher, calls } = server(["data: {\"x\":", "1}\n\n: ping\n\ndata: [DO", "NE]\n\ndata: {}\n\n"]);
  const { chunks, error } = await collect(ask({ a: 1 }, { key: "secret", fetcher }));
  assert.equal(error, null);
  assert.deepEqual(chunks, [{ x: 1 }]);
  assert.equal(calls[0].headers.Authorization, "Bearer secret");
  assert.equal(calls[0].body, "{\"a\":1}");
});

test("characters cut between two pieces arrive whole", async () => {
  const bytes = new TextEncoder().encode("data: {\"t\":\"东\"}\n\ndata: [DONE]\n\n");
  const body = new ReadableStream({
    start(controller) {
      for (const byte of bytes) controller.enqueue(new Uint8Array([byte]));
      controller.close();
    },
  });
  const { chunks } = await collect(ask({}, { fetcher: async () => new Response(body) }));
  assert.deepEqual(chunks, [{ t: "东" }]);
});

test("an end without [DONE] and a broken stream are a lost connection", async () => {
  for (const fail of [false, true]) {
    const { fetcher } = server(["data: {\"x\":1}\n\n"], { fail });
    const { chunks, error } = await collect(ask({}, { fetcher }));
    assert.equal(chunks.length, 1);
    assert.equal(error.kind, "lost");
  }
});

test("an error in the stream and damaged JSON end the answer with words", async () => {
  const inside = server(["data: {\"error\": {\"message\": \"engine died\", \"type\": \"x\"}}\n\n"]);
  const first = await collect(ask({}, inside));
  assert.equal(first.error.kind, "server");
  assert.match(first.error.message, /engine died/);
  const second = await collect(ask({}, server(["data: {oops\n\n"])));
  assert.equal(second.error.kind, "server");
});

test("an abort is no error of the server", async () => {
  const stopper = new AbortController();
  const fetcher = async () => { throw new DOMException("gone", "AbortError"); };
  const { error } = await collect(ask({}, { fetcher, signal: stopper.signal }));
  assert.equal(error.kind, "stopped");
  assert.equal(mayRetry("stopped"), false);
});

test("every refusal is put into words", async () => {
  const answer = (status, body, headers) =>
    collect(ask({}, server([body], { status, headers }))).then(({ error }) => error);
  const own = JSON.stringify({ error: { message: "no such model" } });
  assert.equal((await answer(401, own, {})).kind, "key");
  const full = await answer(429, own, { "retry-after": "7" });
  assert.deepEqual([full.kind, full.retryAfter], ["full", 7]);
  assert.match(full.message, /7 s/);
  assert.equal((await answer(503, "<html>", { "retry-after": "soon" })).kind, "not-ready");
  assert.match((await answer(404, own, {})).message, /no such model/);
  assert.equal((await answer(413, "", {})).kind, "refused");
  assert.equal((await answer(500, "", {})).kind, "server");
  assert.equal(explain(403, "").kind, "key");
  const unreachable = async () => { throw new TypeError("failed to fetch"); };
  assert.equal((await collect(ask({}, { fetcher: unreachable }))).error.kind, "network");
});

test("models are listed, and something else is not taken for a list", async () => {
  const data = [{ id: "a", redwood: { template_options: ["thinking"] } }, { id: "b" }];
  assert.deepEqual(await listModels(server([JSON.stringify({ data })])), [
    { id: "a", options: ["thinking"] }, { id: "b", options: [] },
  ]);
  await assert.rejects(listModels(server(["<html>"])), { kind: "server" });
});

test("a request holds what was set and nothing else", () => {
  const messages = [{ role: "user", content: "hi" }];
  const body = requestBody("m", messages, settings);
  assert.deepEqual(body, {
    model: "m", messages, temperature: 0, top_p: 1, max_tokens: 8, stream: true,
    stream_options: { include_usage: true }, redwood: { trace: true, speculate: true },
  });
  const more = requestBody("m", messages, { ...settings, seed: 0, system: "be brief" });
  assert.equal(more.seed, 0);
  assert.deepEqual(more.messages[0], { role: "system", content: "be brief" });
});

// ---- the tree

test("the accepted path is the top row and nothing overlaps or crosses", () => {
  for (let seed = 1; seed <= 60; seed++) {
    const parents = randomTree(64, seed);
    const draw = random(seed + 1000);
    const path = [0];
    for (;;) {
      const below = parents.flatMap((parent, node) => (parent === path.at(-1) ? [node] : []));
      if (!below.length || draw(4) === 0) break;
      path.push(below[draw(below.length)]);
    }
    const { rows, depths } = layout.placeRows(parents, new Set(path));
    for (const node of path) assert.equal(rows[node], 0);
    const places = parents.map((_, node) => `${depths[node]}:${rows[node]}`);
    assert.equal(new Set(places).size, parents.length);
    // In the gap after a column, a parent's trunk reaches from its own row to its last child's.
    const trunks = parents.map((_, node) => {
      const below = parents.flatMap((parent, child) => (parent === node ? [rows[child]] : []));
      return below.length ? { depth: depths[node], from: rows[node], to: Math.max(...below) } : null;
    });
    for (const a of trunks) {
      for (const b of trunks) {
        if (a && b && a !== b && a.depth === b.depth) assert.ok(a.to < b.from || b.to < a.from);
      }
    }
    parents.forEach((parent, node) => parent >= 0 && assert.ok(rows[node] >= rows[parent]));
  }
});

test("a chain is one straight line and a root alone is a picture too", () => {
  const chain = layout.layoutTree([-1, 0, 1], [40, 50, 60], new Set([0]));
  assert.equal(new Set(chain.nodes.map((node) => node.y)).size, 1);
  assert.ok(chain.nodes[2].x > chain.nodes[1].x + 50);
  assert.ok(chain.edges.every(({ d }) => /^M[\d.]+ [\d.]+H[\d.]+$/.test(d)));
  const alone = layout.layoutTree([-1], [40], new Set([0]));
  assert.ok(alone.width > 40 && alone.height > 20);
  assert.deepEqual(alone.edges, []);
});

test("large trees are cut, with the accepted path whole", () => {
  const parents = [-1, ...Array.from({ length: 999 }, (_, i) => i)]; // a chain
  const wide = [-1, ...new Array(999).fill(0)];
  assert.deepEqual(layout.nodesToDraw(wide, [0, 900], 10), [0, 1, 2, 3, 4, 5, 6, 7, 8, 900]);
  assert.equal(layout.nodesToDraw(parents, [0, 1], 256).length, 256);
  assert.deepEqual(layout.nodesToDraw([-1, 0], [0], 256), [0, 1]);
});

test("labels count wide characters twice", () => {
  assert.equal(layout.labelWidth(""), 24);
  assert.ok(layout.labelWidth("東京東京") > layout.labelWidth("abcd"));
  assert.ok(layout.labelWidth("😀😀") > layout.labelWidth("ab"));
});

// ---- the chart

test("the chart's numbers", () => {
  assert.deepEqual(layout.movingMean([2, 4, 6, 8], 2), [2, 3, 5, 7]);
  const box = { left: 10, right: 110, upper: 0, lower: 100, top: 4 };
  assert.equal(layout.linePoints([0, 4, 2], box), "10,100 60,0 110,50");
  assert.equal(layout.linePoints([1], box), "10,75");
  assert.equal(layout.indexAt(61, 3, box), 1);
  assert.equal(layout.indexAt(-5, 3, box), 0);
  assert.equal(layout.indexAt(500, 3, box), 2);
});

// ---- text

test("what cannot be seen is shown", () => {
  assert.equal(trace.visible("\n"), "↵");
  assert.equal(trace.visible(" a\tb"), "␣a⇥b");
  assert.equal(trace.visible(""), "∅");
  assert.equal(trace.visible("\u0000\u001b"), "␀␛");
  assert.equal(trace.visible("a\u202Eb", 40), "aU+202Eb");
  assert.equal(trace.visible("\u200B", 40), "U+200B");
  assert.equal(trace.visible("\uDC00", 40), "U+DC00");
  assert.equal(trace.visible("👩‍💻", 40), "👩U+200D💻");
  assert.equal(trace.visible("x".repeat(30)), `${"x".repeat(14)}…`);
  assert.equal(trace.visible("<b>&amp;"), "<b>&amp;");
  assert.deepEqual(trace.visibleParts(" a"), [{ text: "␣", sign: true }, { text: "a", sign: false }]);
});

// ---- steps

test("a step is read, and what is none is refused with the reason", () => {
  const step = trace.readStep(raw(3, { generated: 5 }));
  assert.deepEqual(step.parents, [-1, 0, 1, 2]);
  assert.deepEqual(step.accepted, [0, 1, 2]);
  assert.deepEqual(step.bonus, { token: 99, text: "!" });
  assert.equal(trace.readStep(raw(1, { bonus: null })).bonus, null);
  const bad = (change, words) =>
    assert.throws(() => trace.readStep({ ...raw(1), ...change }), words);
  bad({ step: "1" }, /step number/);
  bad({ nodes: [] }, /no nodes/);
  bad({ nodes: [{ parent: 0 }] }, /node 0/);
  bad({ nodes: [{ parent: -1 }, { parent: 1 }] }, /node 1/);
  bad({ nodes: [{ parent: -1 }, null] }, /node 1/);
  bad({ nodes: new Array(5000).fill({ parent: -1 }) }, /more than/);
  bad({ accepted: [0, 2] }, /no path/);
  bad({ accepted: [] }, /root/);
  bad({ accepted: 3 }, /root/);
  assert.throws(() => trace.readStep(null), /object/);
});

test("an answer's numbers", () => {
  const answer = new trace.Answer();
  assert.deepEqual([answer.rate, answer.rateNow, answer.kept, answer.tokensPerStep], [null, null, null, null]);
  for (let step = 1; step <= 40; step++) {
    const made = answer.add(trace.readStep(raw(step, { generated: 3 * step })));
    assert.deepEqual(made.map((part) => part.text), ["t1", "t2", "!"]);
    assert.deepEqual(made.map((part) => part.bonus), [false, false, true]);
  }
  assert.equal(answer.tokens, 120);
  assert.equal(answer.tokensPerStep, 3);
  assert.ok(Math.abs(answer.kept - 2 / 3) < 1e-12);
  assert.ok(Math.abs(answer.rate - 15) < 1e-9); // 3 tokens in 0.2 s
  assert.ok(Math.abs(answer.rateNow - 15) < 1e-9);
});

test("the last step is cut where the answer was", () => {
  const answer = new trace.Answer();
  answer.add(trace.readStep(raw(1, { generated: 3 })));
  assert.equal(answer.add(trace.readStep(raw(2, { generated: 4 }))).length, 1);
  assert.equal(answer.tokens, 4);
});

test("a recording from the middle of an answer does not lose its first step", () => {
  const answer = new trace.Answer();
  assert.equal(answer.add(trace.readStep(raw(50, { generated: 150 }))).length, 3);
  assert.equal(answer.tokensPerStep, 3);
  assert.equal(answer.add(trace.readStep(raw(51, { generated: 152 }))).length, 2);
});

test("without seconds from the server the page's clock counts", () => {
  const answer = new trace.Answer();
  for (let step = 1; step <= 3; step++) {
    answer.add(trace.readStep({ ...raw(step), seconds: undefined }), step * 0.5);
  }
  assert.ok(Math.abs(answer.rate - 6) < 1e-9);
});

test("the history keeps the last steps and their numbers", () => {
  const history = new trace.History(5);
  for (let i = 0; i < 12; i++) history.add({ step: i }, i < 9 ? 1 : 2, [{ text: `w${i} `, bonus: false }]);
  assert.deepEqual([history.items.length, history.first, history.last], [5, 7, 11]);
  assert.equal(history.get(6), null);
  assert.equal(history.get(9).step, 9);
  assert.equal(history.textBefore(11, 100), "w9 w10 "); // not of the answer before
  assert.equal(history.textBefore(11, 3), "…10 ");
});

test("a recording is read back as it was written", () => {
  const lines = [1, 2, 1, 2, 3].map((step) => JSON.stringify(raw(step)));
  const { steps, skipped } = trace.readRecording(lines.join("\n"));
  assert.deepEqual(skipped, []);
  assert.deepEqual(steps.map((item) => item.answer), [1, 1, 2, 2, 2]);
  const history = new trace.History();
  for (const { step, answer, made } of steps) history.add(step, answer, made);
  const again = trace.readRecording(trace.writeRecording(history.items));
  assert.deepEqual(again.steps, steps);
});

test("a saved stream is a recording, and damage is named", () => {
  const chunk = JSON.stringify({ id: "c", choices: [{ delta: {} }], redwood: raw(1) });
  const text = [
    ": ping", `data: ${chunk}`, "", "data: {\"choices\": []}", "{broken", "{\"step\": 1}", "data: [DONE]",
  ].join("\r\n");
  const { steps, skipped } = trace.readRecording(`\uFEFF${text}`);
  assert.equal(steps.length, 1);
  assert.deepEqual(skipped.map((item) => item.line), [5, 6]);
  assert.equal(skipped[0].reason, "it is not JSON");
});

test("long recordings keep the last 500 steps", () => {
  const text = Array.from({ length: 1000 }, (_, i) => JSON.stringify(raw(i + 1))).join("\n");
  const { steps } = trace.readRecording(text);
  assert.deepEqual([steps.length, steps[0].step.step], [500, 501]);
});

test("a step in words", () => {
  const item = trace.readStep(raw(3));
  assert.equal(trace.stepInWords(item), "Step 3: 3 drafted tokens; 2 accepted: t1 t2; bonus token: !.");
  const plain = trace.readStep(raw(1, { size: 1, accepted: 0 }));
  assert.equal(trace.stepInWords(plain), "Step 1: nothing drafted; bonus token: !.");
});

// ---- comparing

test("what may be said of two texts", () => {
  const run = (text, whole = true) => ({ text, whole });
  const fixed = { temperature: 0, seed: null };
  const free = { temperature: 1, seed: null };
  assert.equal(trace.verdict(run("abc"), run("abc"), fixed).same, true);
  const differ = trace.verdict(run("abc"), run("abd"), { temperature: 1, seed: 7 });
  assert.deepEqual([differ.same, differ.at], [false, 2]);
  assert.equal(trace.verdict(run("abc"), run("abd"), free).same, null);
  assert.equal(trace.verdict(run("ab", false), run("abcd"), fixed).same, true);
  assert.match(trace.verdict(run("ab", false), run("abcd"), fixed).words, /as far as/);
  assert.equal(trace.verdict(run("abx", false), run("abcd"), fixed).same, false);
  assert.equal(trace.verdict(run("ab"), run("abcd"), fixed).same, false);
});

// ---- pace

test("redraws keep their distance, and an earlier wish overtakes a later one", () => {
  let clock = 0;
  let timers = [];
  const drawn = [];
  const pacer = new trace.Pacer(() => drawn.push(clock), {
    now: () => clock,
    later: (call, ms) => {
      const timer = { call, at: clock + ms };
      timers.push(timer);
      return timer;
    },
    cancel: (timer) => { timers = timers.filter((other) => other !== timer); },
  });
  for (clock = 0; clock < 1000; clock++) {
    pacer.request();
    const due = timers.filter((timer) => timer.at <= clock);
    timers = timers.filter((timer) => timer.at > clock);
    due.forEach((timer) => timer.call());
  }
  assert.equal(drawn.length, 20);
  clock = 2000;
  pacer.request();
  timers.shift().call();
  pacer.request(1000);
  assert.equal(timers[0].at, 3000);
  pacer.request();
  assert.deepEqual(timers.map((timer) => timer.at), [2050]);
});

// ---- sources

test("sources are read, shown in one order, and kept in recordings", () => {
  const value = raw(1);
  value.nodes[0].sources = ["text"]; // the root was not drafted
  value.nodes[1].sources = ["model", "text", "text"];
  value.nodes[2].sources = ["grammar", "oracle", 7, "", "x".repeat(25)];
  value.nodes[3].sources = "text";
  const step = trace.readStep(value);
  assert.deepEqual(step.sources, [[], ["model", "text"], ["grammar", "oracle"], []]);
  const shown = sources.sourcesOf(step);
  assert.deepEqual(shown.map((each) => each.letter), ["T", "M", "G", "O"]);
  assert.equal(shown.at(-1).kind, "from-other");
  assert.equal(new Set(["text", "datastore", "table", "prediction", "model", "grammar"]
    .map((name) => sources.shownSource(name).letter)).size, 6);
  assert.equal(sources.sourcesInWords([]), "");
  assert.match(sources.sourcesInWords(["text", "model"]), /the text itself and a draft model/);
  assert.deepEqual(trace.readStep(raw(2)).sources, [[], [], [], []]); // an older recording
  const written = trace.writeRecording([{ ...step, answer: 1 }]);
  assert.deepEqual(trace.readStep(JSON.parse(written).redwood).sources, step.sources);
});

// Answers without a page: their Markdown, their parts, what is sent of them. See logic.test.mjs.

import assert from "node:assert/strict";
import { test } from "node:test";
import { pathToFileURL } from "node:url";

const load = (name) => import(pathToFileURL(`${process.env.STATIC}/${name}`));
const { markdownTree } = await load("markdown.js");
const { Parts, conversation, readTools, spacedJson } = await load("parts.js");
const { requestBody } = await load("stream.js");

const TAGS = new Set(
  "div p h4 h5 h6 blockquote ul ol li table thead tbody tr th td em strong s a code pre span br hr".split(" "),
);
const ATTRIBUTES = new Set(
  "class href title target rel start tabindex role aria-label data-language".split(" "),
);
const SIZE = 100_000; // the longest text that is read as Markdown
const LONGEST_MS = 10_000; // of a hostile text; a busy machine is slow, a hanging one slower

/** Returns a tree as short text: `tag[attribute=value](children)`. */
function short(nodes) {
  return nodes.map((node) => {
    if (typeof node === "string") return JSON.stringify(node);
    const { tag, attributes: { title, target, rel, tabindex, role, "aria-label": label, ...rest }, children } = node;
    const shown = Object.entries(rest).map(([name, value]) => `${name}=${value}`).join(" ");
    return `${tag}${shown ? `[${shown}]` : ""}(${short(children)})`;
  }).join(" ");
}

function* walk(nodes, depth = 1) {
  for (const node of nodes) {
    yield [node, depth];
    if (typeof node !== "string") yield* walk(node.children, depth + 1);
  }
}

const textOf = (nodes) => [...walk(nodes)].map(([node]) => (typeof node === "string" ? node : "")).join("");

/** Asserts that a tree has nothing but what answers may have. */
function harmless(nodes) {
  for (const [node, depth] of walk(nodes)) {
    assert.ok(depth < 100);
    if (typeof node === "string") continue;
    assert.ok(TAGS.has(node.tag), node.tag);
    for (const [name, value] of Object.entries(node.attributes)) {
      assert.ok(ATTRIBUTES.has(name), name);
      assert.equal(typeof value, "string");
      if (name === "href") assert.match(value, /^(https?:\/\/|mailto:)/);
      if (name === "class") assert.match(value, /^(plain|code|wide-box|right|center)$/);
      if (name === "start") assert.match(value, /^\d+$/);
      if (name === "data-language") assert.match(value, /^[\w+#.-]+$/);
    }
    if (node.tag === "a") assert.match(node.attributes.rel, /noopener noreferrer/);
  }
}

// ---- Markdown

test("Markdown becomes the elements that it means", () => {
  const cases = {
    "one\ntwo": 'p("one\\ntwo")',
    "# Big\n### small": 'h4("Big") h6("small")',
    "a *b* **c** ~~d~~ `e<f>`": 'p("a " em("b") " " strong("c") " " s("d") " " code("e<f>"))',
    "- a\n- b\n  1. c": 'ul(li(p("a")) li(p("b") ol(li(p("c")))))',
    "7. a\n8. b": 'ol[start=7](li(p("a")) li(p("b")))',
    "> q\n\n---": 'blockquote(p("q")) hr()',
    "```py\nx = '<b>'\n\n```": 'pre[class=code data-language=py](code("x = \'<b>\'\\n"))',
    "    indented": 'pre[class=code](code("indented"))',
    "|a|b|\n|-|-:|\n|c|d|":
      'div[class=wide-box](table(thead(tr(th("a") th[class=right]("b"))) tbody(tr(td("c") td[class=right]("d")))))',
    "[x](https://a.b/c?d=e \"t\")": 'p(a[href=https://a.b/c?d=e]("x"))',
    "<https://a.b>": 'p(a[href=https://a.b/]("https://a.b"))',
    "![tree](https://a.b/t.png)": 'p(a[href=https://a.b/t.png]("tree"))',
    "hard  \nbreak": 'p("hard" br() "break")',
    "para\n-": 'p("para\\n-")', // no heading, not even while a list begins
    "[a]: https://b.c\n[a]": 'p("[a]: " "https://b.c\\n[a]")'.replace('" "', ""),
  };
  for (const [text, tree] of Object.entries(cases)) assert.equal(short(markdownTree(text)), tree, text);
});

test("a text that is cut anywhere has a tree too", () => {
  const text = "# A\n\n- *b* `c`\n  - [d](https://e.f)\n\n|g|h|\n|-|-|\n|i|j|\n\n```js\nk(`l`)\n```\n**m**";
  for (let end = 0; end <= text.length; end++) harmless(markdownTree(text.slice(0, end)));
});

const HOSTILE = {
  script: "<script>window.hacked=1</script>",
  handler: "<img src=x onerror='window.hacked=1'>\n\n<svg onload=alert(1)>\n\n<iframe srcdoc='x'></iframe>",
  style: "<style>*{display:none}</style><div style='position:fixed'>over</div>",
  links: "[a](javascript:alert(1)) [b](JaVaScRiPt&colon;alert(1)) [c](data:text/html,x) [d](vbscript:x) "
    + "[e](file:///etc/passwd) [f](/v1/models) [g](//evil.example) [h](\u0001javascript:x) [i](blob:x) [j](#settings)",
  auto: "<javascript:alert(1)> <data:text/html;base64,x>",
  picture: "![p](javascript:alert(1)) ![q](data:image/svg+xml;base64,AAAA) ![r](https://a.b/c.png)",
  info: "```\" onclick=alert(1) x\ny\n```\n```<b>\nz\n```",
  titles: "[a](https://b.c \"\\\" onclick=alert(1)\")",
  entities: "&lt;script&gt; &#60;img src=x&#62; &#0; &#xD800; &#x202E;",
  proto: "[__proto__](https://a.b) `constructor`\n\n```__proto__\nx\n```",
};

test("hostile Markdown is text and harmless elements", () => {
  for (const [name, text] of Object.entries(HOSTILE)) {
    const tree = markdownTree(text);
    harmless(tree);
    const links = [...walk(tree)].filter(([node]) => node.tag === "a").map(([node]) => node.attributes.href);
    if (["links", "auto"].includes(name)) assert.deepEqual(links, [], name);
  }
  assert.equal(textOf(markdownTree(HOSTILE.script)), HOSTILE.script);
  const links = markdownTree(HOSTILE.picture);
  assert.deepEqual([...walk(links)].filter(([node]) => node.tag === "a").length, 1);
});

const filled = (text) => text.repeat(Math.ceil(SIZE / text.length)).slice(0, SIZE);
const stairs = (line) => {
  let text = "";
  for (let i = 0; text.length + 2 * i < SIZE - 8; i++) text += `${"  ".repeat(i)}${line}\n`;
  return text;
};

test("texts that are made to take long are read in time, whole, and not deep", () => {
  const cases = {
    nestedLists: stairs("* a"), numbered: stairs("1. a"), oneLine: filled("* "), quotes: filled("> "),
    mixed: filled("> * 1. "), brackets: filled("["), pictures: filled("!["), open: filled("[a]("),
    angle: filled("[a](<b"), stars: filled("*a "), strong: filled("**a *b "), under: filled("_a__b"),
    ticks: filled("`a``b"), tags: filled("<a"), comments: filled("<!--"), cdata: filled("<![CDATA["),
    strikes: filled("~~a "), entities: filled("&#x1;"), rules: filled("---\n"), items: filled("- a\n"),
    row: `${filled("|a")}\n${filled("|-")}`.slice(0, SIZE), cells: `|a|b|\n|-|-|\n${filled("|c|d\n")}`.slice(0, SIZE),
    wide: `${"|x".repeat(1000)}\n${"|-".repeat(1000)}\n${filled("|\n")}`.slice(0, SIZE),
    deepEmphasis: `${"*a _b ".repeat(800)}${" c_ d*".repeat(800)}`, backslashes: filled("\\["), lines: filled("\n"),
    autolinks: filled("<http://a.b>"), words: filled("w".repeat(99_999)), spaces: filled("a ".padEnd(5000)),
  };
  for (const [name, text] of Object.entries(cases)) {
    const began = performance.now();
    const tree = markdownTree(text);
    assert.ok(performance.now() - began < LONGEST_MS, name);
    harmless(tree);
    const letters = (some) => some.replace(/[^a-z]/g, "").length;
    if (!["open", "angle", "entities", "autolinks", "wide"].includes(name)) {
      assert.equal(letters(textOf(tree)), letters(text), name);
    }
  }
});

test("what lies too deep, or is too long, comes back as it was", () => {
  for (const text of [`${"> ".repeat(300)}end`, `${"* ".repeat(300)}end`, "a".repeat(SIZE + 1), filled("a *b* ")]) {
    assert.deepEqual(short(markdownTree(text)), `div[class=plain](${JSON.stringify(text)})`);
  }
  for (let depth = 1; depth < 60; depth++) { // nothing is lost on either side of the limit
    for (const mark of ["> ", "* ", "1. "]) assert.match(textOf(markdownTree(`${mark.repeat(depth)}end`)), /end$/);
  }
});

test("random marks make harmless trees and lose no letters", () => {
  const marks = ["*", "**", "_", "`", "```\n", "\n", "\n\n", "# ", "- ", "1. ", "> ", "|", "|-|\n", "[", "](", ")",
    "![", "<", ">", "&amp;", "\\", "~~", "    ", "http:", "//", "x", "y ", "zz"];
  let state = 7;
  const draw = (below) => {
    state = (state * 1103515245 + 12345) % 2147483648;
    return Math.floor((state / 2147483648) * below);
  };
  for (let i = 0; i < 3000; i++) {
    const text = Array.from({ length: 1 + draw(60) }, () => marks[draw(marks.length)]).join("");
    const tree = markdownTree(text);
    harmless(tree);
    // Addresses of links stand in attributes, the words after ``` say a language.
    if (!/\(|```|<|\|/.test(text)) {
      const letters = (some) => some.replaceAll("&amp;", "&").replace(/[^xyz]/g, "");
      assert.equal(letters(textOf(tree)), letters(text), JSON.stringify(text));
    }
  }
});

// ---- parts of an answer

const call = (index, name, given, id = `c${index}`) => ({
  tool_calls: [{ index, id, type: "function", function: { name, arguments: given } }],
});
const more = (index, given) => ({ tool_calls: [{ index, function: { arguments: given } }] });

function gathered(...deltas) {
  const parts = new Parts();
  for (const delta of deltas) parts.add(delta);
  return parts;
}

test("an answer is gathered from its deltas", () => {
  const parts = gathered(
    { role: "assistant", content: "" }, { reasoning_content: "Let me " }, { reasoning_content: "see." },
    { content: "I will" }, { content: " add." }, call(0, "add", ""), more(0, '{"a": '), more(0, "1}"), call(1, "now", ""),
  );
  assert.equal(parts.text, "I will add.");
  assert.equal(parts.reasoning, "Let me see.");
  assert.deepEqual(parts.calls.map((each) => each.arguments), ['{"a": 1}', ""]);
  assert.equal(parts.plain, '[reasoning] Let me see.\n\nI will add.\n\n[call add] {"a": 1}\n\n[call now] ');
  assert.deepEqual(parts.message, {
    role: "assistant", content: "I will add.", reasoning_content: "Let me see.",
    tool_calls: [
      { id: "c0", type: "function", function: { name: "add", arguments: '{"a": 1}' } },
      { id: "c1", type: "function", function: { name: "now", arguments: "{}" } },
    ],
  });
  const plain = gathered({ content: "just" }, { content: " text" });
  assert.deepEqual([plain.plain, plain.message], ["just text", { role: "assistant", content: "just text" }]);
});

test("a call that was cut is shown and never sent back", () => {
  const parts = gathered(call(0, "add", '{"a": 1}'), call(1, "add", '{"a": "1'));
  assert.deepEqual(parts.wholeCalls.map((each) => each.id), ["c0"]);
  assert.equal(parts.message.tool_calls.length, 1);
  assert.equal(gathered(call(0, "add", '{"a"')).message, null);
  assert.equal(gathered({ reasoning_content: "only thoughts" }).message, null);
});

test("damaged deltas do no harm", () => {
  const parts = new Parts();
  for (const odd of [null, undefined, 3, "x", [], {}, { content: 3 }, { tool_calls: 7 }, { tool_calls: [null, 1, "x"] },
    { tool_calls: [{ index: -1 }, { index: 1e9 }, { index: "0" }, { index: 0.5 }] }, { redwood: { malformed_calls: "x" } },
    { content: ["a"] }, { content: "" }]) parts.add(odd);
  assert.deepEqual(parts.calls, []);
  assert.equal(parts.text + parts.reasoning, "");
  assert.equal(parts.message, null);
  parts.add({ content: "<tool_call>", redwood: { malformed_calls: [{ text: "x", reason: "no end" }, null] } });
  assert.deepEqual(parts.unread, ["no end", "it is no call"]);
});

test("a conversation has every result in its place, and no question without an answer", () => {
  const user = (content) => ({ role: "user", content });
  const result = (id, content) => ({ role: "tool", tool_call_id: id, content });
  const called = gathered(call(0, "add", "{}"), call(1, "add", "{}"));
  const said = gathered({ content: "3" });
  const turns = [
    { asked: [user("a")], parts: called },
    { asked: [result("c0", "1"), result("c1", "2")], parts: said },
    { asked: [user("lost")], parts: new Parts() },
    { asked: [user("b")], parts: called },
  ];
  const roles = (messages) => messages.map((each) => each.role);
  const whole = conversation([...turns, { asked: [user("c")], parts: null }], [user("c")]);
  assert.deepEqual(
    roles(whole), ["user", "assistant", "tool", "tool", "assistant", "user", "assistant", "tool", "tool", "user"],
  );
  assert.deepEqual(whole.slice(7, 9), [result("c0", "(no result)"), result("c1", "(no result)")]);
  assert.equal(whole[3].content, "2");
  assert.deepEqual(conversation([], [user("a")]), [user("a")]);
});

test("tools are read or refused in words, and sent with the choice", () => {
  const tool = { type: "function", function: { name: "add" } };
  assert.deepEqual(readTools(" \n"), { tools: [], wrong: null });
  assert.deepEqual(readTools(JSON.stringify([tool])), { tools: [tool], wrong: null });
  for (const [text, words] of [["[", "no JSON"], ["{}", "list"], ["3", "list"], ["[null]", "Tool 1"],
    [JSON.stringify([tool, { type: "web_search" }]), "Tool 2"], ['[{"type": "function"}]', "name"]]) {
    assert.match(readTools(text).wrong, new RegExp(words), text);
  }
  const settings = { system: "", temperature: 0, topP: 1, maxTokens: 8, seed: null, speculate: true };
  const body = requestBody("m", [], {
    ...settings, tools: [tool], toolChoice: "required", reasoning: { reasoning_effort: "low" },
  });
  assert.deepEqual([body.tools, body.tool_choice, body.reasoning_effort], [[tool], "required", "low"]);
  assert.ok(!("tools" in requestBody("m", [], { ...settings, tools: [], toolChoice: "required", reasoning: {} })));
});

test("JSON on several lines is the same JSON, to the letter", () => {
  assert.equal(spacedJson('{"a":[1,{"b":"x, {y}:"}],"c":{},"d":[ ]}'),
    '{\n  "a": [\n    1,\n    {\n      "b": "x, {y}:"\n    }\n  ],\n  "c": {},\n  "d": []\n}');
  const exact = '{"n": 12345678901234567890, "e": 1.10e400, "s": "\\u00e9\\"\\n \\\\", "t": [true, null, -0.0]}';
  const words = (text) => text.match(/"(?:[^"\\]|\\.)*"|[^\s"]/g).join("");
  assert.equal(words(spacedJson(exact)), words(exact));
  for (const text of ["", "{", '{"a": 1', "no JSON", "[".repeat(9) ]) assert.equal(spacedJson(text), text);
  const deep = "[".repeat(40_000) + "]".repeat(40_000);
  assert.ok(spacedJson(deep).length < 40 * deep.length);
  assert.equal(spacedJson(`"${"a".repeat(200_000)}"`).length, 200_002);
});

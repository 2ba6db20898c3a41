// The pictures: the token tree and the line chart as SVG, and the tree as a list.
// Text from the model enters the page by `textContent` only, never as markup.

import * as layout from "./layout.js";
import { shownSource, sourcesInWords, sourcesOf } from "./sources.js";
import { stepInWords, visible, visibleParts } from "./trace.js";

const DRAWN = 256; // nodes in one picture
const LARGEST = 1.25; // small trees in a large box: letters no larger than the page's
const SMALLEST = 0.62; // below this scale labels cannot be read: the box scrolls instead
const MEAN_OVER = 16;
const LETTER = 7; // width of a source's letter
const STRIP = 3; // height of the strip that shows sources

/** Returns an HTML element. `children` are elements or text. */
export function el(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** Returns a token's text as spans, signs for unseen characters set apart. */
export function tokenSpans(text, limit) {
  return visibleParts(text, limit).map((part) =>
    el("span", { className: part.sign ? "sign" : "" }, part.text),
  );
}

/** Draws the tree of a step into `box`. */
export function drawTree(box, item) {
  const shown = layout.nodesToDraw(item.parents, item.accepted, DRAWN);
  const place = new Map(shown.map((node, i) => [node, i]));
  const parents = shown.map((node) => (node === 0 ? -1 : place.get(item.parents[node])));
  const texts = shown.map((node) => item.texts[node]);
  const path = new Set(item.accepted.map((node) => place.get(node)));
  const kinds = shown.map((node, i) => (i === 0 ? "root" : path.has(i) ? "accepted" : "refused"));
  const titles = shown.map((node) => titleOf(item, node));
  const sources = shown.map((node) => item.sources[node].map(shownSource));
  if (item.bonus) {
    path.add(parents.length);
    parents.push(place.get(item.accepted.at(-1)));
    texts.push(item.bonus.text);
    kinds.push("bonus");
    titles.push(`${visible(item.bonus.text, 60)} · bonus token ${item.bonus.token ?? ""}`);
  }
  const room = texts.map((_, i) => (sources[i]?.length ? sources[i].length * LETTER + 2 : 0));
  const widths = texts.map((text, i) => layout.labelWidth(visible(text)) + room[i]);
  const placed = layout.layoutTree(parents, widths, path);

  const picture = svg("svg", {
    viewBox: `0 0 ${placed.width} ${placed.height}`, role: "img", "aria-label": stepInWords(item),
  });
  // Edges of the accepted path come last, so that they lie over the others.
  const edges = [...placed.edges].sort((a, b) => path.has(a.to) - path.has(b.to));
  for (const { to, d } of edges) {
    picture.append(svg("path", { d, class: `edge ${kinds[to]}` }));
  }
  placed.nodes.forEach((node, i) => {
    const top = node.y - layout.PILL / 2;
    const label = svg("text", { x: node.x + (node.width - room[i]) / 2, y: node.y + 4.5 });
    for (const part of visibleParts(texts[i])) {
      label.append(svg("tspan", part.sign ? { class: "sign" } : {}, part.text));
    }
    const frame = { x: node.x, y: top, width: node.width, height: layout.PILL, rx: 6 };
    const title = svg("title", {}, titles[i]);
    const marks = sourceMarks(sources[i] ?? [], node, top);
    const drawn = [title, svg("rect", frame), label, ...marks];
    picture.append(svg("g", { class: `node ${kinds[i]}` }, ...drawn));
  });
  const space = { width: box.clientWidth - 2, height: box.clientHeight - 2 };
  const fit = Math.min(LARGEST, space.width / placed.width, space.height / placed.height);
  const scale = Math.max(SMALLEST, fit);
  picture.setAttribute("width", Math.floor(placed.width * scale));
  picture.setAttribute("height", Math.floor(placed.height * scale));
  box.replaceChildren(picture);
  return item.parents.length - shown.length;
}

/** A strip at the bottom of a node, a part for each source, and their letters at its right end. */
function sourceMarks(sources, node, top) {
  const part = (node.width - 8) / sources.length;
  return sources.flatMap((source, i) => {
    const strip = `M${node.x + 4 + i * part} ${top + layout.PILL - STRIP - 1}h${part}v${STRIP}h${-part}z`;
    const x = node.x + node.width - 4 - (sources.length - i - 0.5) * LETTER;
    return [
      svg("path", { d: strip, class: `source ${source.kind}` }),
      svg("text", { x, y: top + 10, class: `letter ${source.kind}` }, source.letter),
    ];
  });
}

/** Writes the sources of a step's nodes into the legend `list`, behind what stands there always. */
export function writeSources(list, item) {
  list.querySelectorAll(".source").forEach((old) => old.remove());
  for (const { kind, letter, words } of sourcesOf(item)) {
    const key = el("span", { className: `key letter ${kind}` }, letter);
    list.append(el("li", { className: "source" }, key, words));
  }
}

function titleOf(item, node) {
  const token = `${visible(item.texts[node], 60)} · token ${item.tokens[node] ?? "?"} · node ${node}`;
  if (node === 0) return `${token} · root: the last token of the text so far`;
  const state = item.accepted.includes(node) ? "accepted" : "drafted, not accepted";
  return `${token} · ${state}${sourcesInWords(item.sources[node])}`;
}

/** Writes the tree of a step as nested lists into `box`. */
export function writeTree(box, item) {
  const lists = [el("ul")];
  const parts = item.parents.map((parent, node) => {
    const on = item.accepted.includes(node);
    const state = node === 0 ? "root" : on ? "accepted" : "not accepted";
    const words = ` – ${state}${sourcesInWords(item.sources[node])}`;
    const part = el("li", {}, ...tokenSpans(item.texts[node], 60), words);
    if (parent < 0) lists[0].append(part);
    return part;
  });
  const under = (node, part) => {
    lists[node + 1] ??= el("ul");
    lists[node + 1].append(part);
    parts[node].append(lists[node + 1]);
  };
  item.parents.forEach((parent, node) => parent >= 0 && under(parent, parts[node]));
  if (item.bonus) {
    const bonus = el("li", {}, ...tokenSpans(item.bonus.text, 60), " – bonus token");
    under(item.accepted.at(-1), bonus);
  }
  box.replaceChildren(lists[0]);
}

const BOX = { left: 30, upper: 10 };

/** Draws tokens per step of `items` into `box`: each step, and the mean of the last 16. */
export function drawChart(box, items, selected, onPick) {
  const width = Math.max(200, box.clientWidth);
  const height = Math.max(90, box.clientHeight);
  const area = { ...BOX, right: width - 10, lower: height - 20 };
  const values = items.map((item) => item.made.length);
  const top = Math.max(4, 2 * Math.ceil(Math.max(0, ...values) / 2));
  const means = layout.movingMean(values, MEAN_OVER);
  const mean = values.reduce((sum, value) => sum + value, 0) / (values.length || 1);
  const words = values.length
    ? `Tokens per step over the last ${values.length} steps: mean ${mean.toFixed(2)}, ` +
      `least ${Math.min(...values)}, most ${Math.max(...values)}.`
    : "Tokens per step: no steps yet.";
  const picture = svg("svg", { width, height, role: "img", "aria-label": words });
  const at = (i) => area.left + (values.length > 1 ? i / (values.length - 1) : 0) * (area.right - area.left);
  for (const value of [0, top / 2, top]) {
    const y = area.lower - (value / top) * (area.lower - area.upper);
    picture.append(
      svg("line", { x1: area.left, x2: area.right, y1: y, y2: y, class: "grid" }),
      svg("text", { x: area.left - 8, y: y + 4, class: "axis" }, String(value)),
    );
  }
  items.forEach((item, i) => {
    if (i === 0 || item.answer === items[i - 1].answer) return;
    const x = (at(i) + at(i - 1)) / 2;
    picture.append(svg("line", { x1: x, x2: x, y1: area.upper, y2: area.lower, class: "answer" }));
  });
  if (values.length) {
    picture.append(
      svg("polyline", { points: layout.linePoints(values, { ...area, top }), class: "steps" }),
      svg("polyline", { points: layout.linePoints(means, { ...area, top }), class: "mean" }),
    );
    const chosen = items.findIndex((item) => item.seq === selected);
    if (chosen >= 0) {
      const y = area.lower - (values[chosen] / top) * (area.lower - area.upper);
      picture.append(
        svg("line", { x1: at(chosen), x2: at(chosen), y1: area.upper, y2: area.lower, class: "here" }),
        svg("circle", { cx: at(chosen), cy: y, r: 3.5, class: "here" }),
      );
    }
    const ends = [items[0], items.at(-1)].map((item) => `step ${item.step}`);
    picture.append(
      svg("text", { x: area.left, y: height - 5, class: "axis start" }, ends[0]),
      svg("text", { x: area.right, y: height - 5, class: "axis" }, values.length > 1 ? ends[1] : ""),
    );
    picture.addEventListener("click", (event) => {
      const x = event.clientX - picture.getBoundingClientRect().left;
      onPick(items[layout.indexAt(x, values.length, area)].seq);
    });
  }
  box.replaceChildren(picture);
}

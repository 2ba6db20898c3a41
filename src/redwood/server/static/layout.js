// Where things stand in the pictures: the token tree and the line chart. Numbers in, numbers out.

export const ROW = 30; // height of a row of the tree, with its gap
export const PILL = 22; // height of a node
export const GAP = 26; // between two columns: room for the edges
export const MARGIN = 10;
const CHARACTER = 7.6; // width of a character of the fixed-width font at 12.5 px

/** Returns the width of a label: East Asian characters and emoji count twice. */
export function labelWidth(text) {
  let units = 0;
  for (const sign of text) units += isWide(sign.codePointAt(0)) ? 2 : 1;
  return Math.max(24, Math.round(units * CHARACTER + 14));
}

function isWide(code) {
  return (
    (code >= 0x1100 && code <= 0x115f) || (code >= 0x2e80 && code <= 0xa4cf) ||
    (code >= 0xac00 && code <= 0xd7a3) || (code >= 0xf900 && code <= 0xfaff) ||
    (code >= 0xfe30 && code <= 0xfe4f) || (code >= 0xff00 && code <= 0xff60) ||
    (code >= 0x1f300 && code <= 0x1faff) || (code >= 0x20000 && code <= 0x3fffd)
  );
}

/**
 * Returns at most `limit` nodes to draw, in order, parents with their children: the accepted path
 * whole, then the first nodes of the tree. Pictures of a thousand nodes are slow and say nothing.
 */
export function nodesToDraw(parents, accepted, limit) {
  if (parents.length <= limit) return parents.map((_, node) => node);
  const kept = new Set(accepted);
  for (let node = 0; node < parents.length && kept.size < limit; node++) {
    if (node === 0 || kept.has(parents[node])) kept.add(node);
  }
  return [...kept].sort((a, b) => a - b);
}

/**
 * Gives every node a row: the accepted path is the straight top row, so that it reads as text, and
 * what was refused hangs below. Edges never cross.
 *
 * A node, its first child, that one's first child and so on share a row. Branches are placed from
 * the deep end up, each in the first row that is free in all of its columns.
 */
export function placeRows(parents, onPath) {
  const children = parents.map(() => []);
  const depths = parents.map(() => 0);
  parents.forEach((parent, node) => {
    if (parent < 0) return;
    depths[node] = depths[parent] + 1;
    if (onPath.has(node)) children[parent].unshift(node);
    else children[parent].push(node);
  });
  const rows = parents.map(() => 0);
  const free = new Array(Math.max(...depths) + 1).fill(0);
  const place = (start, floor) => {
    const chain = [start];
    while (children[chain.at(-1)].length) chain.push(children[chain.at(-1)][0]);
    const row = Math.max(floor, ...chain.map((node) => free[depths[node]]));
    for (const node of chain) {
      rows[node] = row;
      free[depths[node]] = row + 1;
    }
    for (const node of chain.reverse()) {
      for (const child of children[node].slice(1)) place(child, row + 1);
    }
  };
  place(0, 0);
  return { rows, depths };
}

/**
 * Lays a tree out from left to right.
 *
 * `parents`: -1 first, a parent before its children. `widths`: of the nodes, in pixels. `onPath`:
 * the nodes of the straight row, a Set. Returns `nodes` ({x, y, width}, y the middle), `edges`
 * ({from, to, d}) and the size of the whole.
 */
export function layoutTree(parents, widths, onPath) {
  const { rows, depths } = placeRows(parents, onPath);
  const columns = new Array(Math.max(...depths) + 1).fill(0);
  depths.forEach((depth, node) => {
    columns[depth] = Math.max(columns[depth], widths[node]);
  });
  const starts = [MARGIN];
  for (const width of columns) starts.push(starts.at(-1) + width + GAP);
  const nodes = parents.map((_, node) => ({
    x: starts[depths[node]], y: MARGIN + PILL / 2 + rows[node] * ROW, width: widths[node],
  }));
  const edges = parents.flatMap((parent, node) =>
    parent < 0 ? [] : [{ from: parent, to: node, d: edgePath(nodes[parent], nodes[node]) }],
  );
  return {
    nodes,
    edges,
    width: starts.at(-1) - GAP + MARGIN,
    height: 2 * MARGIN + PILL + Math.max(...rows) * ROW,
  };
}

function edgePath(from, to) {
  const start = `M${from.x + from.width} ${from.y}`;
  if (from.y === to.y) return `${start}H${to.x}`;
  const bend = to.x - GAP / 2; // the same for all nodes of a column: siblings share their trunk
  return `${start}H${bend - 6}Q${bend} ${from.y} ${bend} ${from.y + 6}V${to.y - 6}` +
    `Q${bend} ${to.y} ${bend + 6} ${to.y}H${to.x}`;
}

/** Returns the mean of the last `window` values at every place. */
export function movingMean(values, window) {
  let sum = 0;
  return values.map((value, i) => {
    sum += value - (i >= window ? values[i - window] : 0);
    return sum / Math.min(i + 1, window);
  });
}

/** Returns the points of a line, "x,y x,y ...": `values` from 0 to `top` in a box. */
export function linePoints(values, { left, right, upper, lower, top }) {
  const step = values.length > 1 ? (right - left) / (values.length - 1) : 0;
  return values
    .map((value, i) => `${round(left + i * step)},${round(lower - (value / top) * (lower - upper))}`)
    .join(" ");
}

/** Returns which of `count` values stands nearest to `x`. */
export function indexAt(x, count, { left, right }) {
  if (count < 2) return 0;
  const place = Math.round(((x - left) / (right - left)) * (count - 1));
  return Math.min(count - 1, Math.max(0, place));
}

function round(number) {
  return Math.round(number * 10) / 10;
}

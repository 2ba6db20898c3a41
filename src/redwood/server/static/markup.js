// Brings an element's content to a tree of `markdown.js`, changing only what differs: what stays is
// not drawn anew, keeps its selection and its place, and an answer that grows does not flicker.

// What the trees have. Anything else, above all what would run or load something, is left out.
const TAGS = new Set([
  "div", "p", "h4", "h5", "h6", "blockquote", "ul", "ol", "li", "table", "thead", "tbody", "tr", "th",
  "td", "em", "strong", "s", "a", "code", "pre", "span", "br", "hr",
]);
const ATTRIBUTES = new Set([
  "class", "href", "title", "target", "rel", "start", "tabindex", "role", "aria-label", "data-language",
]);

/** Makes `nodes` (texts, and elements {tag, attributes, children}) the content of `parent`. */
export function patch(parent, nodes) {
  let old = parent.firstChild;
  for (const node of nodes) {
    const next = old?.nextSibling ?? null;
    if (old === null) parent.append(made(node));
    else if (fits(old, node)) update(old, node);
    else old.replaceWith(made(node));
    old = next;
  }
  while (old !== null) {
    const next = old.nextSibling;
    old.remove();
    old = next;
  }
}

const tagOf = (node) => (TAGS.has(node.tag) ? node.tag : "span");

function made(node) {
  if (typeof node === "string") return document.createTextNode(node);
  const element = document.createElement(tagOf(node));
  update(element, node);
  return element;
}

function fits(old, node) {
  if (typeof node === "string") return old.nodeType === Node.TEXT_NODE;
  return old.nodeType === Node.ELEMENT_NODE && old.localName === tagOf(node);
}

function update(old, node) {
  if (typeof node === "string") {
    if (old.data === node) return;
    if (node.startsWith(old.data)) old.appendData(node.slice(old.data.length));
    else old.data = node;
    return;
  }
  const wanted = Object.entries(node.attributes).filter(([name]) => ATTRIBUTES.has(name));
  for (const { name } of [...old.attributes]) if (!(name in node.attributes)) old.removeAttribute(name);
  for (const [name, value] of wanted) {
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  patch(old, node.children);
}

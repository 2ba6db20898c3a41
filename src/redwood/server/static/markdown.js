// From an answer's Markdown to a tree of the few elements that an answer may have. The tree is data:
// nothing here makes markup, and what is not in the lists below cannot be in it. Node can test it.

import markdownit from "./vendor/markdown-it.esm.min.mjs";

const LONGEST = 100_000; // characters; longer texts stay as they came
const MOST = 20_000; // elements and texts
const DEEPEST = 40; // levels, of blocks and of what is inside a line

// Raw HTML is text. Without `lheading` a paragraph does not flash up as a heading while the list
// below it begins ("-"); without `reference` no line changes what stands far above it.
const reader = markdownit({ html: false, linkify: false, maxNesting: DEEPEST })
  .disable(["lheading", "reference"]);

const TAGS = new Set([
  "p", "blockquote", "ul", "ol", "li", "table", "thead", "tbody", "tr", "th", "td", "em", "strong", "s",
]);
const HEADINGS = { h1: "h4", h2: "h5" }; // below the page's own three; deeper ones are h6
const ALIGNED = { "text-align:right": "right", "text-align:center": "center" };

const element = (tag, attributes = {}, children = []) => ({ tag, attributes, children });

/** Returns a text as it came, as a tree. */
export const plainTree = (text) => [element("div", { class: "plain" }, [text])];

/**
 * Returns the tree of a Markdown text: a list of texts and of elements `{tag, attributes,
 * children}`. A text that is too long, too deep or too much for that comes back as it is.
 */
export function markdownTree(text) {
  if (text.length > LONGEST) return plainTree(text);
  try {
    const builder = new Builder();
    for (const token of reader.parse(text, {})) builder.take(token);
    return builder.root.children;
  } catch (error) {
    if (error instanceof TooMuch || error instanceof RangeError) return plainTree(text);
    throw error;
  }
}

class TooMuch extends Error {}

class Builder {
  root = element("div");
  #open = [this.root];
  #count = 0;

  take(token) {
    // The parser drops what lies deeper than its limit; the text is to be whole.
    if (token.level > DEEPEST - 4) throw new TooMuch();
    if (token.nesting > 0) this.#begin(this.#opened(token));
    else if (token.nesting < 0) this.#open.pop();
    else this.#single(token);
  }

  #opened(token) {
    const { tag } = token;
    if (/^h[1-6]$/.test(tag)) return element(HEADINGS[tag] ?? "h6");
    if (tag === "a") return link(token.attrGet("href"));
    if (tag === "ol") return element("ol", numbered(token.attrGet("start")));
    if (tag === "th" || tag === "td") {
      const side = ALIGNED[token.attrGet("style")];
      return element(tag, side ? { class: side } : {});
    }
    return element(TAGS.has(tag) ? tag : "span");
  }

  #single(token) {
    switch (token.type) {
      case "inline":
        for (const inner of token.children) this.take(inner);
        return;
      case "softbreak": // as the model wrote it: the style keeps line breaks
        return this.#text("\n");
      case "hardbreak":
        return this.#leaf(element("br"));
      case "hr":
        return this.#leaf(element("hr"));
      case "code_inline":
        return this.#leaf(element("code", {}, [token.content]));
      case "fence":
      case "code_block":
        return this.#leaf(code(token.content, token.info));
      case "image": { // nothing is fetched: a picture is a link to it
        const shown = link(token.attrGet("src"));
        shown.children = [token.content || "picture"];
        return this.#leaf(shown);
      }
      default:
        return this.#text(token.content);
    }
  }

  #begin(made) {
    if (made.tag === "table") { // wide ones scroll by themselves
      const label = { class: "wide-box", tabindex: "0", role: "region", "aria-label": "Table" };
      this.#leaf(element("div", label, [made]));
    } else {
      this.#leaf(made);
    }
    this.#open.push(made);
    if (this.#open.length > DEEPEST) throw new TooMuch();
  }

  #leaf(made) {
    if (++this.#count > MOST) throw new TooMuch();
    this.#open.at(-1).children.push(made);
  }

  #text(text) {
    if (!text) return;
    const siblings = this.#open.at(-1).children;
    if (typeof siblings.at(-1) === "string") siblings.push(siblings.pop() + text);
    else this.#leaf(text);
  }
}

/** Returns a link to another site; only text where the address is of this one, or no page's. */
function link(address) {
  let url;
  try {
    url = new URL(address);
  } catch {
    return element("span");
  }
  if (!["http:", "https:", "mailto:"].includes(url.protocol)) return element("span");
  return element("a", {
    href: url.href, title: url.href, target: "_blank", rel: "noopener noreferrer nofollow",
  });
}

function numbered(start) {
  return /^\d{1,9}$/.test(start ?? "") ? { start: String(start) } : {};
}

function code(text, info) {
  const language = /^[\w+#.-]{1,24}/.exec(info.trim())?.[0] ?? "";
  const attributes = { class: "code", tabindex: "0", role: "region", "aria-label": "Code" };
  if (language) attributes["data-language"] = language;
  return element("pre", attributes, [element("code", {}, [text.replace(/\n$/, "")])]);
}

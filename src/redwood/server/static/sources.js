// Where drafted tokens come from: a letter and a colour each. The letter says what the colour says.
// Nothing here touches the page, so Node can test it.

const KNOWN = new Map([
  ["text", { letter: "T", words: "the text itself" }],
  ["datastore", { letter: "D", words: "stored texts" }],
  ["table", { letter: "S", words: "what the model said before" }],
  ["prediction", { letter: "P", words: "the predicted answer" }],
  ["model", { letter: "M", words: "a draft model" }],
  ["grammar", { letter: "G", words: "the grammar" }],
]);
const MOST = 8; // of a node, and of letters drawn
const LONGEST = 24;

/** Returns the names of a node's sources; what is no list of names is left out. */
export function readSources(raw) {
  if (!Array.isArray(raw)) return [];
  const named = raw.filter((name) => typeof name === "string" && name && name.length <= LONGEST);
  return [...new Set(named)].slice(0, MOST);
}

/** Returns a source as it is shown: {name, letter, words, kind}; `kind` is a class of the page. */
export function shownSource(name) {
  const known = KNOWN.get(name);
  if (known) return { name, ...known, kind: `from-${name}` };
  return { name, letter: [...name][0].toUpperCase(), words: name, kind: "from-other" };
}

/** Returns the sources of a step as they are shown, each once: known ones first, in their order. */
export function sourcesOf(item) {
  const names = new Set(item.sources.flat());
  const known = [...KNOWN.keys()].filter((name) => names.delete(name));
  return [...known, ...names].map(shownSource);
}

/** Returns ", from the text itself and a draft model"; "" where nothing is known. */
export function sourcesInWords(names) {
  return names.length ? `, from ${names.map((name) => shownSource(name).words).join(" and ")}` : "";
}

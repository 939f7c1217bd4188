// Stores the search in the page's URL, so that a link shows the same search. Its path names the index, if there are several.

/** What comes before each path: the server's place behind a proxy, if any, then "/indexes/NAME", if the page is of one. */
export const BASE = new URL("..", import.meta.url).pathname.slice(0, -1);

const ROOT = BASE.replace(/\/indexes\/[^/]+$/, "");

/** Whether the page's address names an index. */
export const NAMES_INDEX = BASE !== ROOT;

/** The page of an index. */
export function pageOf(name) {
  return `${ROOT}/indexes/${encodeURIComponent(name)}/`;
}

/** The fields of a search request, with help, default, bounds and choices; none until the server has named them. */
let fields = null;

export const DEFAULTS = {
  q: "",
  filter: "",
  rank: "iem", // until the server has said its default (/page/settings.json), as for k
  beside: false,
  exact: false,
  hybrid: null, // BM25's share in percent; null: not fused
  k: 10,
  source: "", // as the index does
  open: "", // the passage whose document is shown
};

/** Read addresses by the server's fields of a search from now on. */
export function useFields(ofServer) {
  fields = ofServer;
  DEFAULTS.k = Math.min(fields.top_k.default, fields.top_k.maximum);
  DEFAULTS.rank = fields.rescore.default;
}

/** The search described by a query string; invalid values are replaced by defaults. */
export function readAddress(text) {
  const parameters = new URLSearchParams(text);
  const number = (name, low, high) => {
    const value = Number(parameters.get(name));
    return parameters.has(name) && Number.isInteger(value) && value >= low && value <= high ? value : DEFAULTS[name];
  };
  const choice = (name, choices) => {
    const value = parameters.get(name);
    return value !== null && (!choices || choices.includes(value)) ? value : DEFAULTS[name];
  };
  const { top_k, hybrid } = fields || { top_k: { minimum: 1 }, hybrid: { minimum: 0, maximum: 1 } };
  return {
    q: parameters.get("q") || "",
    filter: parameters.get("filter") || "",
    rank: choice("rank", fields?.rescore.enum),
    beside: parameters.get("beside") === "1",
    exact: parameters.get("exact") === "1",
    hybrid: number("hybrid", 100 * hybrid.minimum, 100 * hybrid.maximum),
    k: Math.min(number("k", top_k.minimum, Infinity), top_k.maximum ?? Infinity),
    source: choice("source", fields && [...fields.sources.items.enum, "both"]),
    open: parameters.get("open") || "",
  };
}

/** The query string of a search, without default values. */
export function writeAddress(state) {
  const parts = new URLSearchParams();
  for (const [name, value] of Object.entries(state)) {
    if (value !== DEFAULTS[name]) parts.set(name, value === true ? "1" : String(value));
  }
  const text = parts.toString();
  return text ? `?${text}` : location.pathname;
}

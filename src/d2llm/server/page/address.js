// Stores the search in the page's URL, so that a link shows the same search. Its path names the index, if there are several.

/** What comes before each path: empty, or "/indexes/NAME". */
export const BASE = /^\/indexes\/[^/]+/.exec(location.pathname)?.[0] || "";

/** The page of an index. */
export function pageOf(name) {
  return `/indexes/${encodeURIComponent(name)}/`;
}

/** Make links to the server's other pages stay with the index. */
export function keepIndexInLinks() {
  for (const link of document.querySelectorAll(".top a")) link.href = BASE + link.getAttribute("href");
}

export const DEFAULTS = {
  q: "",
  filter: "",
  rank: "iem",
  beside: false,
  exact: false,
  hybrid: null, // BM25's share in percent; null: not fused
  k: 10, // until the server has said its default (/page/settings.json)
  source: "", // as the index does
  open: "", // the passage whose document is shown
};
const RANKS = ["none", "iem", "teacher", "cascade"];
const SOURCES = ["", "vectors", "ann", "bm25", "both"];

/** The search described by a query string; invalid values are replaced by defaults. */
export function readAddress(text) {
  const parameters = new URLSearchParams(text);
  const number = (name, low, high) => {
    const value = Number(parameters.get(name));
    return parameters.has(name) && Number.isInteger(value) && value >= low && value <= high ? value : DEFAULTS[name];
  };
  return {
    q: parameters.get("q") || "",
    filter: parameters.get("filter") || "",
    rank: RANKS.includes(parameters.get("rank")) ? parameters.get("rank") : DEFAULTS.rank,
    beside: parameters.get("beside") === "1",
    exact: parameters.get("exact") === "1",
    hybrid: number("hybrid", 0, 100),
    k: number("k", 1, 1000),
    source: SOURCES.includes(parameters.get("source")) ? parameters.get("source") : DEFAULTS.source,
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

// What is asked, kept in the page's address, so that a link shows the same search.

export const DEFAULTS = {
  q: "",
  filter: "",
  rank: "iem",
  beside: false,
  exact: false,
  hybrid: null, // BM25's share in percent; null: not fused
  k: 10,
  source: "vectors",
};
const RANKS = ["none", "iem", "teacher", "cascade"];
const SOURCES = ["vectors", "ann", "bm25", "both"];

/** The search in an address; what cannot be understood has its default. */
export function readAddress(text) {
  const given = new URLSearchParams(text);
  const number = (name, low, high) => {
    const value = Number(given.get(name));
    return given.has(name) && Number.isInteger(value) && value >= low && value <= high ? value : DEFAULTS[name];
  };
  return {
    q: given.get("q") || "",
    filter: given.get("filter") || "",
    rank: RANKS.includes(given.get("rank")) ? given.get("rank") : DEFAULTS.rank,
    beside: given.get("beside") === "1",
    exact: given.get("exact") === "1",
    hybrid: number("hybrid", 0, 100),
    k: number("k", 1, 1000),
    source: SOURCES.includes(given.get("source")) ? given.get("source") : DEFAULTS.source,
  };
}

/** The address of a search, without what is as by default. */
export function writeAddress(state) {
  const parts = new URLSearchParams();
  for (const [name, value] of Object.entries(state)) {
    if (value !== DEFAULTS[name]) parts.set(name, value === true ? "1" : String(value));
  }
  const text = parts.toString();
  return text ? `?${text}` : "/";
}

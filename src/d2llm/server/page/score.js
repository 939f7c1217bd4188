// What a ranking is sorted by and where its candidates came from, in words. The facts are those of GET /v1/index.

import { isReranked } from "./search.js";

/** The parts of a student's score, by their names in explanations: what they are called, and what they add. */
export const PARTS = {
  dot: ["vectors", "their inner product"],
  windows: ["best window", "added by its best two sentences"],
  tokens: ["tokens", "added by its most similar tokens"],
  lexical: ["words", "added by BM25"],
  interaction: ["IEM", "added by the interaction"],
};
const SOURCES = { ann: "approximate index", bm25: "BM25" };

/** The name of a ranking: a reranker, or what the student's score adds up. */
export function rankName(rank, index) {
  const name = isReranked(rank) ? rank : sumText(rank, index);
  return name[0].toUpperCase() + name.slice(1);
}

/** The rankings to choose from: a student's score that is the inner product alone is offered once. */
export function ranksOf(index) {
  const isInnerProduct = index.score_parts.join() === "dot";
  return index.rescore.filter((rank) => rank !== "none" || !isInnerProduct);
}

/** The parts that count in a ranking by the student. */
export function partsOf(rank, index) {
  return rank === "none" ? ["dot"] : index.score_parts;
}

/** The parts of the score as a sum. */
export function sumText(rank, index) {
  return partsOf(rank, index)
    .map((part) => PARTS[part][0])
    .join(" + ");
}

/** The heading of a ranking. `hybrid` is BM25's share, if it is fused. */
export function rankHeading(rank, index, hybrid) {
  const fused = hybrid === undefined ? "" : `, fused with BM25 (${Math.round(hybrid * 100)}%)`;
  return `Ranked by ${rankName(rank, index)}${fused}`;
}

export function sourceName(source) {
  return SOURCES[source] || source;
}

/** Names several sources of candidates. */
export function sourcesText(sources) {
  return sources.map(sourceName).join(" and ");
}

/** The choices of sources, as [value, name]: "" is what the index does by default. */
export function sourceChoices(index) {
  const others = [
    ["vectors", ["vectors"]],
    ...(index.has_ann ? [["ann", ["ann"]]] : []),
    ["bm25", ["bm25"]],
    ["both", ["vectors", "bm25"]],
  ];
  const own = index.candidate_sources;
  return [
    ["", own.length ? sourcesText(own) : "all passages"],
    ...others.filter(([, names]) => names.join() !== own.join()).map(([value, names]) => [value, sourcesText(names)]),
  ];
}

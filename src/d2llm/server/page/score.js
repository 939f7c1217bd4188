// What a ranking is sorted by and where its candidates came from, in words. The facts are those of GET /v1/index.

import { isReranked } from "./search.js";

/** The parts of a student's score, by their names in explanations: what they are called, and what they add. */
export const PARTS = {
  dot: ["inner product", "from the two vectors alone"],
  windows: ["best window", "added by its best two sentences"],
  tokens: ["tokens", "added by its most similar tokens"],
  lexical: ["words", "added by BM25"],
  interaction: ["IEM", "added by the interaction"],
};
const SOURCES = { vectors: "inner product", ann: "approximate index", bm25: "BM25" };
const INNER_PRODUCT = "Inner product";

/** The name of a ranking. The student's is named after what counts in its score: an interaction that adds nothing does not. */
export function rankName(rank, index) {
  if (rank === "none") return INNER_PRODUCT;
  if (isReranked(rank)) return rank[0].toUpperCase() + rank.slice(1);
  const parts = index.score_parts.join();
  if (parts === "dot") return INNER_PRODUCT;
  return parts === "interaction" || parts === "dot,interaction" ? "IEM" : "Full score";
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

/** Says what the scores of a ranking are; empty if its notes say so. `hybrid` is BM25's share, if it is fused. */
export function scoreText(rank, index, hybrid) {
  if (isReranked(rank)) return "";
  const sum = sumText(rank, index);
  if (hybrid === undefined) return `Score: ${sum}.`;
  return `Score: places by ${sum} and places by BM25, fused (${Math.round(hybrid * 100)}% BM25).`;
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

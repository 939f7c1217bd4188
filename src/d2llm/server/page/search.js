// Searches as the user types: one search at a time, or one for each ranking side by side.

import { ask } from "./api.js";

/** What the server says of each kind of reranker: what its scores are, and whether it needs a calibrated index. */
let rerankers = {};

/** Know the server's kinds of rerankers from now on. */
export function useRerankers(ofServer) {
  rerankers = ofServer;
}

/** The rerankers that read only what the student is unsure of, for which the index must be calibrated. */
export function calibratedRerankers() {
  return Object.keys(rerankers).filter((kind) => rerankers[kind].needs_calibration);
}

/** What the scores of a ranking are. */
export function scoreNameOf(rank) {
  return rerankers[rank]?.score_name || "score";
}

/** Whether a reranker ranks, such as a teacher, which takes seconds. */
export function isReranked(rank) {
  return rank !== "none" && rank !== "iem";
}

/** The rankings to show for a state, left to right. Side by side, the chosen one is the last. */
export function rankingsOf(state, offered) {
  if (!state.beside) return [offered.includes(state.rank) ? state.rank : "iem"];
  return [...new Set(["none", "iem", lastOf(state.rank, offered)])].filter((rank) => offered.includes(rank));
}

/** The last ranking side by side, if `rank` is chosen. */
export function lastOf(rank, offered) {
  if (isReranked(rank) && offered.includes(rank)) return rank;
  return calibratedRerankers().find((kind) => offered.includes(kind)) || "iem";
}

/** The body of a search request. Options that a ranking does not support are omitted, and named by `leftOut`. */
export function requestOf(state, rank) {
  const body = { query: state.q, top_k: state.k, rescore: rank, explain: true };
  if (state.filter.trim()) body.filter = state.filter;
  if (state.exact && rank === "iem") body.exact = true;
  else if (state.hybrid !== null && !isReranked(rank)) body.hybrid = state.hybrid / 100;
  else if (state.hybrid === null && state.source) body.sources = state.source === "both" ? ["vectors", "bm25"] : [state.source];
  return body;
}

/** Describes the options of a state that a ranking does not support; empty if it supports all. */
export function leftOut(state, rank) {
  if (state.exact && rank !== "iem") return "Not exact: only the ranking by the student’s own score can be proved.";
  if (state.exact && state.hybrid !== null) return "Not fused with BM25: an exact search ranks by the student’s score alone.";
  if (state.hybrid !== null && isReranked(rank)) return "Not fused with BM25: a reranker starts from the student’s scores.";
  return "";
}

/**
 * Runs searches, the first of them with the `facets()` that are to be counted; a new one cancels the previous one, and outdated answers are never shown. `onDone` gets the rankings;
 * if the last ranking is a reranker’s, it first gets the others with a last one that is `waiting`.
 */
export class Search {
  constructor({ onStart, onDone, facets }) {
    Object.assign(this, { onStart, onDone, facets, counts: false, number: 0, controller: null, timer: null });
  }

  /** Search after `wait` milliseconds without another request. */
  soon(state, offered, wait) {
    clearTimeout(this.timer);
    this.cancel();
    this.timer = setTimeout(() => this.now(state, offered), wait);
  }

  async now(state, offered) {
    clearTimeout(this.timer);
    this.cancel();
    if (!state.q.trim()) {
      this.onDone(state, []);
      return;
    }
    const number = this.number;
    this.controller = new AbortController();
    const { signal } = this.controller;
    const ranks = rankingsOf(state, offered);
    const last = ranks.at(-1);
    this.onStart(isReranked(last) && ranks.length === 1);
    const facets = this.facets(); // are the same for all rankings of the same candidates
    this.counts = facets.length > 0;
    const searches = ranks.map((rank, index) => searchBy(state, rank, index ? [] : facets, signal));
    if (isReranked(last) && ranks.length > 1) {
      const quick = await Promise.all(searches.slice(0, -1));
      if (number !== this.number) return;
      if (quick.some((ranking) => ranking.answer)) this.onDone(state, [...quick, { rank: last, waiting: true }]);
    }
    const answers = await Promise.all(searches);
    if (number === this.number) this.onDone(state, answers);
  }

  cancel() {
    this.number += 1;
    this.controller?.abort();
  }
}

async function searchBy(state, rank, facets, signal) {
  const startTime = performance.now();
  try {
    const request = facets.length ? { ...requestOf(state, rank), facets } : requestOf(state, rank);
    const answer = await ask("/v1/search", request, signal);
    return { rank, answer, error: null, total: (performance.now() - startTime) / 1000 };
  } catch (error) {
    return { rank, answer: null, error, total: 0 };
  }
}

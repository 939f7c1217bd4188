// Highlighting: the query's words at once; words by their weight when a card is opened. The server says where words are.

import { element, signed } from "./dom.js";

const MIN_SHARE = 0.08; // of the strongest word's weight
// These are not marked at first, since they would hide the important words; opening a card shows their weights.
const FUNCTION_WORDS = new Set(
  ("a about an and are as at be by can do doe doesn for from ha have he how i if in into is it no not of on or she so " +
    "than that the their them then there they this to was we were what when where which who why will with you your").split(" "),
);

/** Title and text as nodes, with the query's terms marked; `spansByTerm` says where each is, as for `markWeights`. */
export function markTerms(title, text, spansByTerm) {
  const words = Object.entries(spansByTerm)
    .filter(([term]) => !FUNCTION_WORDS.has(term))
    .flatMap(([, spans]) => spans.map(([start, end]) => ({ start, end })));
  return markSpans(title, text, words, () => ["mark", { class: "term" }]);
}

/** Title and text as nodes, with each word shaded by its weight. */
export function markWeights(title, text, words) {
  const most = Math.max(...words.map((word) => Math.abs(word.weight)), 1e-9);
  const strong = words.filter((word) => Math.abs(word.weight) / most >= MIN_SHARE);
  return markSpans(title, text, strong, (span) => {
    const level = Math.min(5, Math.ceil((Math.abs(span.weight) / most) * 5));
    const kind = span.weight < 0 ? "against" : "for";
    return ["mark", { class: `weight ${kind} level-${level}`, title: `${signed(span.weight)} to the score` }];
  });
}

/**
 * Title and text as nodes with some words marked. Their places count code points, as in Python, in the title, a line
 * break and the text, or in the text alone if there is no title. Of words that overlap, the longest of the first counts.
 */
function markSpans(title, text, words, dress) {
  const full = title ? `${title}\n${text}` : text;
  const units = unitsOf(full);
  const spans = words
    .map((word) => ({ ...word, start: units[word.start], end: units[word.end] }))
    .filter((span) => span.end > span.start)
    .sort((one, other) => one.start - other.start || other.end - one.end);
  const begin = full.length - text.length;
  const inText = spans
    .filter((span) => span.start >= begin)
    .map((span) => ({ ...span, start: span.start - begin, end: span.end - begin }));
  const inTitle = spans.filter((span) => span.end <= title.length);
  return { title: mark(title, title ? inTitle : [], dress), text: mark(text, inText, dress) };
}

/** The UTF-16 offset of each code point of a text, plus one for the end. */
function unitsOf(text) {
  const units = [];
  let offset = 0;
  for (const sign of text) {
    units.push(offset);
    offset += sign.length;
  }
  units.push(offset);
  return units;
}

function mark(text, spans, dress) {
  const nodes = [];
  let done = 0;
  for (const span of spans) {
    if (span.start < done) continue;
    if (span.start > done) nodes.push(text.slice(done, span.start));
    const [name, properties] = dress(span);
    nodes.push(element(name, properties, text.slice(span.start, span.end)));
    done = span.end;
  }
  if (done < text.length) nodes.push(text.slice(done));
  return nodes;
}

// Highlighting: words with the stems of the query at once; words by their weight when a card is opened.

import { element, signed } from "./dom.js";

const WORD = /[\p{L}\p{N}]+/gu;
const MIN_SHARE = 0.08; // of the strongest word's weight
// These are not marked at first, since they would hide the important words; opening a card shows their weights.
const FUNCTION_WORDS = new Set(
  ("a about an and are as at be by can do doe doesn for from ha have he how i if in into is it no not of on or she so " +
    "than that the their them then there they this to was we were what when where which who why will with you your").split(" "),
);
const MAX_SUFFIX = 5; // letters after a stem: "connect" also marks "connections"

/** The text as nodes, with words that have one of the stems marked. */
export function markTerms(text, stems) {
  const marked = stems.map((stem) => stem.toLowerCase()).filter((stem) => stem && !FUNCTION_WORDS.has(stem));
  if (!marked.length) return [text];
  const spans = [];
  for (const match of text.matchAll(WORD)) {
    const word = match[0].toLowerCase();
    if (marked.some((stem) => hasStem(word, stem))) {
      spans.push({ start: match.index, end: match.index + match[0].length });
    }
  }
  return mark(text, spans, () => ["mark", { class: "term" }]);
}

function hasStem(word, stem) {
  const near = stem.length > 2 ? MAX_SUFFIX : 0;
  if (word.startsWith(stem)) return word.length - stem.length <= near;
  // The stem of "happy" is "happi".
  return stem.endsWith("i") && word === `${stem.slice(0, -1)}y`;
}

/**
 * Title and text as nodes, with each word shaded by its weight. Positions count code points, as in Python, in the title,
 * a line break and the text, or in the text alone if there is no title.
 */
export function markWeights(title, text, words) {
  const full = title ? `${title}\n${text}` : text;
  const units = unitsOf(full);
  const most = Math.max(...words.map((word) => Math.abs(word.weight)), 1e-9);
  const spans = words
    .map((word) => ({ start: units[word.start], end: units[word.end], weight: word.weight }))
    .filter((span) => span.end > span.start && Math.abs(span.weight) / most >= MIN_SHARE)
    .sort((one, other) => one.start - other.start);
  const dress = (span) => {
    const level = Math.min(5, Math.ceil((Math.abs(span.weight) / most) * 5));
    const kind = span.weight < 0 ? "against" : "for";
    return ["mark", { class: `weight ${kind} level-${level}`, title: `${signed(span.weight)} to the score` }];
  };
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
  let place = 0;
  for (const sign of text) {
    units.push(place);
    place += sign.length;
  }
  units.push(place);
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

// Explains a passage's rank: the parts of its score, its words, its sources, and the teacher's score.

import { ask, problemText } from "./api.js";
import { element, milliseconds, percent, signed } from "./dom.js";
import { markWeights } from "./highlight.js";
import { PARTS, partsOf, sourceName } from "./score.js";

const LEAST_SHOWN = 0.005; // less is rounded to 0.00

/** The panel of a card. `passage` is a ranked passage; `context` has the query and whether there is a teacher. */
export function whyPanel(passage, context, { onWords, labelledBy, id }) {
  const words = element("p", { class: "quiet", "aria-live": "polite" }, "Weighing words …");
  const panel = element(
    "section",
    { class: "why", id, "aria-labelledby": labelledBy },
    scoreParts(passage, context),
    estimate(passage),
    proposers(passage),
    context.index.teacher === null ? null : verdict(passage, context),
    words, // last, as it grows when they are weighed: a button below it would move while it is pressed
  );
  weigh(passage, context, words, onWords);
  return panel;
}

async function weigh(passage, context, note, onWords) {
  try {
    const explanation = await ask("/v1/explain", { query: context.query, passage_id: passage.id });
    onWords(markWeights(explanation.title, explanation.text, explanation.words));
    note.replaceChildren(
      "Words that ",
      element("mark", { class: "weight for level-4" }, "raise"),
      ` the ${vectorsPart(context.index)} are shaded, words that `,
      element("mark", { class: "weight against level-4" }, "lower"),
      " it are underlined; stronger marks weigh more.",
      explanation.truncated ? " The end of this passage was too long for the student and was not read." : "",
      explanation.no_interaction ? ` The score has no interaction: ${explanation.no_interaction}.` : "",
    );
  } catch (error) {
    note.replaceChildren(`Words could not be weighed: ${problemText(error)}`);
  }
}

/** What the words of a passage weigh in: the part of the score that comes from the vectors of whole texts. */
function vectorsPart(index) {
  const parts = index.score_parts.filter((part) => part === "dot" || part === "interaction");
  return parts.length === index.score_parts.length ? "score" : `score of the ${parts.map((part) => PARTS[part][0]).join(" and ")}`;
}

/** The parts that count in the ranking; of others, those that are not 0 for this passage. */
function scoreParts(passage, { rank, index }) {
  const explanation = passage.explanation || {};
  if (typeof explanation.dot !== "number" || typeof explanation.interaction !== "number") {
    return element("p", {}, `Score ${passage.score.toFixed(3)}. It is one number, without parts.`);
  }
  const counting = partsOf(rank, index);
  const parts = Object.keys(PARTS)
    .map((name) => ({ name, value: explanation[name] ?? 0 }))
    .filter(({ name, value }) => counting.includes(name) || Math.abs(value) >= LEAST_SHOWN);
  const most = Math.max(...parts.map(({ value }) => Math.abs(value)), 1e-9);
  const sum = parts.reduce((total, { value }) => total + value, 0);
  return element(
    "dl",
    { class: "parts" },
    parts.map(({ name, value }) => part(...PARTS[name], value, most)),
    element("div", { class: "sum" }, element("dt", {}, "Student’s score"), element("dd", {}, signed(sum))),
  );
}

/** The student's probability, if its scores are calibrated. */
function estimate({ probability, weak }) {
  if (typeof probability !== "number") return null;
  return element("p", {}, `The student’s estimate that it fits the query: ${percent(probability)}${weak ? ", a weak match" : ""}.`);
}

function part(name, hint, value, most) {
  const bar = element("span", { class: `bar ${value < 0 ? "minus" : "plus"}` });
  bar.style.setProperty("--share", `${(Math.abs(value) / most) * 50}%`);
  return element(
    "div",
    {},
    element("dt", {}, name.charAt(0).toUpperCase() + name.slice(1), element("small", {}, ` ${hint}`)),
    element("dd", {}, element("span", { class: "track", "aria-hidden": "true" }, bar), signed(value)),
  );
}

function proposers(passage) {
  const explanation = passage.explanation || { source_ranks: {}, source_scores: {}, terms: {} };
  const lines = Object.entries(explanation.source_ranks).map(([source, rank]) => {
    const score = explanation.source_scores[source];
    return element("li", {}, `${sourceName(source)}: rank ${rank}${score === undefined ? "" : `, score ${score.toFixed(2)}`}`);
  });
  if (passage.student_rank !== null && passage.student_rank !== passage.rank) {
    lines.push(element("li", {}, `student: rank ${passage.student_rank}`));
  }
  if (passage.log_odds !== null) lines.push(element("li", {}, `teacher: log-odds ${signed(passage.log_odds)}`));
  const terms = Object.entries(explanation.terms).map(([term, count]) => (count > 1 ? `${term} ×${count}` : term));
  if (terms.length) lines.push(element("li", {}, `query stems in the passage: ${terms.join(", ")}`));
  return lines.length ? element("ul", { class: "sources", "aria-label": "Ranks by source" }, lines) : null;
}

function verdict(passage, context) {
  const status = element("span", { class: "verdict", role: "status" });
  const button = element("button", { type: "button", class: "small" }, "Ask the teacher");
  const waiting = (now) => {
    button.setAttribute("aria-disabled", String(now)); // not `disabled`, which would lose the focus
    status.className = now ? "verdict working" : "verdict";
  };
  button.addEventListener("click", async () => {
    if (button.getAttribute("aria-disabled") === "true") return;
    waiting(true);
    status.textContent = "The teacher is reading …";
    try {
      const request = { query: context.query, passage_id: passage.id, teacher: true };
      const { teacher } = await ask("/v1/explain", request);
      const share = Math.round(teacher.probability * 100);
      waiting(false);
      status.textContent =
        `${share}% that it answers the query (log-odds ${signed(teacher.log_odds)}, ${milliseconds(teacher.seconds)})` +
        (teacher.truncated ? "; it read only a part of the passage" : "");
    } catch (error) {
      waiting(false);
      status.classList.add("problem");
      status.textContent = `The teacher did not answer: ${problemText(error)}`;
    }
  });
  return element("p", { class: "ask-teacher" }, button, status);
}

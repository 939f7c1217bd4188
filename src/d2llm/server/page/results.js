// Shows one ranking, or several side by side with lines between them.

import { card, certificateText, latency, missingText, readingText, weakNote } from "./cards.js";
import { counted, element } from "./dom.js";
import { drawLines, followCards } from "./lines.js";
import { rankHeading, rankName, sourcesText } from "./score.js";
import { leftOut, requestOf } from "./search.js";

const READING = "Reading again …";

/** The part of the page that shows rankings. */
export class Results {
  constructor({ area, status }, { onValue, onOpen }) {
    Object.assign(this, { area, status, onValue, onOpen, answers: [] });
    area.addEventListener("card-resized", () => this.redraw());
    followCards(area);
    new ResizeObserver(() => this.redraw()).observe(area);
  }

  /** Show that a search is in progress, if it takes noticeably long. */
  loading(teacher) {
    this.area.setAttribute("aria-busy", "true");
    this.area.querySelector(":scope > .working")?.remove();
    this.area.prepend(element("p", { class: "working" }, teacher ? READING : "Searching …"));
    if (teacher) this.status.textContent = READING;
  }

  /** Show a message instead of results. */
  message(title, text, { kind = "empty", more = [] } = {}) {
    this.area.removeAttribute("aria-busy");
    this.answers = [];
    this.area.className = "results";
    this.area.replaceChildren(
      element("div", { class: `message ${kind}` }, element("h2", {}, title), text ? element("p", {}, text) : null, ...more),
    );
  }

  /** Show rankings, left to right. A ranking that was pending is filled in without redrawing the others. */
  show(state, answers, index) {
    this.area.removeAttribute("aria-busy");
    const compact = answers.length > 1;
    const context = { query: state.q, index, compact, onValue: this.onValue, onOpen: this.onOpen };
    const make = (ranking, position) => this.#column(state, ranking, answers[position - 1], context);
    const waiting = this.area.querySelector(":scope > .waiting");
    const fillsIn = waiting && this.answers.slice(0, -1).every((ranking, position) => ranking === answers[position]);
    this.answers = answers;
    this.status.textContent = summary(answers, index);
    if (fillsIn) {
      waiting.replaceWith(make(answers.at(-1), answers.length - 1));
      this.redraw();
      return;
    }
    const columns = answers.map(make);
    this.area.className = compact ? `results beside columns-${answers.length}` : "results";
    const hadFocus = this.area.contains(document.activeElement);
    this.area.replaceChildren(...columns);
    if (hadFocus) this.area.focus({ preventScroll: true }); // so that Tab continues at the first card, not at the top of the page
    this.redraw();
  }

  /** The passages shown, each once. */
  passages() {
    const shown = this.answers.flatMap(({ answer }) => answer?.passages || []);
    return [...new Map(shown.reverse().map((passage) => [passage.id, passage])).values()].reverse();
  }

  redraw() {
    drawLines(this.area);
  }

  #column(state, { rank, answer, error, total, waiting }, left, context) {
    const title = rankHeading(rank, context.index, requestOf(state, rank).hybrid);
    const column = element("section", { class: "column", "aria-label": title }, element("h2", {}, title));
    if (waiting) {
      column.classList.add("waiting");
      column.append(element("p", { class: "working" }, READING));
      return column;
    }
    if (error) {
      column.append(element("p", { class: "problem", role: "alert" }, error.message));
      if (error.requestId) column.append(element("p", { class: "quiet" }, `Request ${error.requestId}`));
      return column;
    }
    const before = left?.answer ? new Map(left.answer.passages.map((one) => [one.id, one.rank])) : null;
    const weak = weakNote(answer.passages);
    const notes = [leftOut(state, rank)];
    if (answer.truncated) notes.push("The query is longer than the student reads; its end is ignored.");
    for (const [word, corrected] of Object.entries(answer.corrections)) notes.push(`No passage has “${word}”: “${corrected}” was searched.`);
    if (answer.missing_shards.length) notes.push(missingText(answer.missing_shards.length));
    if (answer.certificate) notes.push(certificateText(answer.certificate, answer.passages.length));
    if (answer.reranking) notes.push(readingText(answer.reranking));
    column.append(
      element(
        "div",
        { class: "about" },
        weak ? element("p", { class: "note nothing" }, weak) : null,
        answer.passages.length ? countOf(answer, before) : null,
        latency(answer.seconds, total),
        notes.filter(Boolean).map((note) => element("p", { class: "note" }, note)),
      ),
    );
    if (!answer.passages.length) {
      column.append(
        element("p", { class: "quiet" }, state.filter.trim() ? "No passage matches the filter." : "No passages found."),
      );
      return column;
    }
    const cards = answer.passages.map((passage) => {
      const rankBefore = before ? (before.get(passage.id) ?? null) : undefined;
      return element("li", {}, card(passage, { ...context, rank }, rankBefore));
    });
    column.append(element("ol", { class: "cards" }, cards));
    return column;
  }
}

function countOf({ passages, num_candidates, candidate_sources: sources }, before) {
  const from = sources.length ? `${counted(num_candidates, "candidate")} by ${sourcesText(sources)}` : `all, of which ${num_candidates.toLocaleString("en")} got the full score`;
  const count = `The first ${counted(passages.length, "passage")} of ${from}. `;
  return element("p", { class: "count" }, count, before ? element("b", {}, changes(passages, before)) : null);
}

/** Describes how a ranking differs from the one to its left. */
function changes(passages, before) {
  const fresh = passages.filter((one) => !before.has(one.id)).length;
  const moved = passages.filter((one) => before.has(one.id) && before.get(one.id) !== one.rank).length;
  if (!fresh && !moved) return "Same order as on the left.";
  return [moved ? `${moved} moved` : "", fresh ? `${fresh} new` : ""].filter(Boolean).join(", ") + ".";
}

function summary(answers, index) {
  return answers
    .map(({ rank, answer, error, waiting }) => {
      const name = answers.length > 1 ? `${rankName(rank, index)}: ` : "";
      if (waiting) return `${name}${READING}`;
      if (error) return `${name}${error.message}`;
      const first = answer.passages[0];
      if (!first) return `${name}no passages`;
      if (weakNote(answer.passages)) return `${name}only weak matches: nothing seems to fit`;
      return `${name}${counted(answer.passages.length, "passage")}, the first: ${first.title || first.id}`;
    })
    .join(". ");
}

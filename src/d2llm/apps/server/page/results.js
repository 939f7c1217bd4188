// Showing rankings: one, or several side by side with lines between them.

import { card, certificateText, latency, readingText } from "./cards.js";
import { counted, element, svg } from "./dom.js";
import { drawLines, followCards } from "./lines.js";
import { leftOut, RANK_NAMES } from "./search.js";

/** The part of the page that rankings are shown in. */
export class Results {
  constructor({ area, status }, { onValue }) {
    Object.assign(this, { area, status, onValue, canvas: null });
    area.addEventListener("card-resized", () => this.redraw());
    new ResizeObserver(() => this.redraw()).observe(area);
  }

  loading() {
    this.area.setAttribute("aria-busy", "true");
  }

  /** A message in place of results. */
  message(title, text, kind = "empty") {
    this.area.removeAttribute("aria-busy");
    this.canvas = null;
    this.area.className = "results";
    this.area.replaceChildren(
      element("div", { class: `message ${kind}` }, element("h2", {}, title), text ? element("p", {}, text) : null),
    );
  }

  /** Rankings, left to right. */
  show(state, answers, { hasTeacher }) {
    this.area.removeAttribute("aria-busy");
    const compact = answers.length > 1;
    const context = { query: state.q, hasTeacher, compact, onValue: this.onValue };
    const columns = answers.map((found, place) => this.#column(state, found, answers[place - 1], context));
    this.area.className = compact ? `results beside columns-${answers.length}` : "results";
    this.canvas = compact ? svg("svg", { class: "lines", "aria-hidden": "true", focusable: "false" }) : null;
    this.area.replaceChildren(...(this.canvas ? [this.canvas] : []), ...columns);
    if (this.canvas) followCards(this.area, this.canvas);
    this.redraw();
    this.status.textContent = summary(answers);
  }

  redraw() {
    if (this.canvas) drawLines(this.area, this.canvas);
  }

  #column(state, { rank, answer, error, total }, left, context) {
    const heading = element("h2", { class: context.compact ? "" : "hidden" }, `Ranked by ${RANK_NAMES[rank]}`);
    const column = element("section", { class: "column", "aria-label": `Ranked by ${RANK_NAMES[rank]}` }, heading);
    if (error) {
      column.append(element("p", { class: "problem", role: "alert" }, error.message));
      if (error.requestId) column.append(element("p", { class: "quiet" }, `Request ${error.requestId}`));
      return column;
    }
    const before = left?.answer ? new Map(left.answer.passages.map((one) => [one.id, one.rank])) : null;
    const notes = [leftOut(state, rank)];
    if (answer.certificate) notes.push(certificateText(answer.certificate, answer.passages.length));
    if (answer.cascade) notes.push(readingText(answer.cascade, rank));
    column.append(
      element(
        "div",
        { class: "about" },
        element(
          "p",
          { class: "count" },
          `The first ${counted(answer.passages.length, "passage")} of ${counted(answer.num_candidates, "candidate")}`,
          before ? element("b", {}, `. ${changes(answer.passages, before)}`) : null,
        ),
        latency(answer.seconds, total),
        notes.filter(Boolean).map((note) => element("p", { class: "note" }, note)),
      ),
    );
    if (!answer.passages.length) {
      column.append(
        element("p", { class: "quiet" }, state.filter.trim() ? "No passage fits the filter." : "No passage was found."),
      );
      return column;
    }
    const cards = answer.passages.map((passage) => {
      const rankBefore = before ? (before.get(passage.id) ?? null) : undefined;
      return element("li", {}, card(passage, context, rankBefore));
    });
    column.append(element("ol", { class: "cards" }, cards));
    return column;
  }
}

/** What a ranking changes of the one to its left, in words. */
function changes(passages, before) {
  const fresh = passages.filter((one) => !before.has(one.id)).length;
  const moved = passages.filter((one) => before.has(one.id) && before.get(one.id) !== one.rank).length;
  if (!fresh && !moved) return "The same order as to the left.";
  return [moved ? `${moved} moved` : "", fresh ? `${fresh} new` : ""].filter(Boolean).join(", ") + ".";
}

function summary(answers) {
  return answers
    .map(({ rank, answer, error }) => {
      const name = answers.length > 1 ? `${RANK_NAMES[rank]}: ` : "";
      if (error) return `${name}${error.message}`;
      const first = answer.passages[0];
      if (!first) return `${name}no passages`;
      return `${name}${counted(answer.passages.length, "passage")}, the first: ${first.title || first.id}`;
    })
    .join(". ");
}

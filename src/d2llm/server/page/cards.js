// Cards of a ranking, and the notes above it: how long it took and what is proved.

import { counted, element, milliseconds, percent } from "./dom.js";
import { markTerms } from "./highlight.js";
import { documentName, fileFacts, isNamedBy, ownFields, ownId, positionsOf } from "./origin.js";
import { scoreNameOf } from "./search.js";
import { whyPanel } from "./why.js";

const STAGES = ["queue", "encode", "candidates", "score", "rerank", "transfer"];
let numbered = 0;

/** The card of a ranked passage. `before` is its rank in the ranking to the left: null if not in it, undefined if there is none. */
export function card(passage, context, before) {
  const identity = `card-${(numbered += 1)}`;
  const title = element("h3", { id: `${identity}-title`, dir: "auto" });
  if (!passage.title) title.classList.add("identity");
  const text = element("p", { class: "text", dir: "auto" });
  const show = (words) => {
    title.replaceChildren(...(passage.title ? words.title : [passage.id]));
    text.replaceChildren(...words.text);
  };
  const plain = () => markTerms(passage.title, passage.text, passage.explanation?.term_spans || {});
  show(plain());
  const button = element(
    "button",
    {
      type: "button",
      id: `${identity}-ask`,
      class: "small toggle-why",
      "aria-expanded": "false",
      "aria-controls": `${identity}-why`,
      "aria-labelledby": `${identity}-ask ${identity}-title`, // "Why", and what
    },
    "Why",
  );
  const heading = passage.title || passage.id;
  const open = element(
    "button",
    {
      type: "button",
      id: `${identity}-open`,
      class: "small open-document",
      "aria-labelledby": `${identity}-open ${identity}-title`, // "Open", and what
      on: { click: () => context.onOpen(passage) },
    },
    "Open",
  );
  const identifier = ownId(passage, heading);
  const made = element(
    "article",
    { class: "card", tabindex: "0", "aria-labelledby": `${identity}-title`, "data-id": passage.id },
    element(
      "header",
      {},
      element("span", { class: "rank" }, element("span", { class: "hidden" }, "Rank "), String(passage.rank)),
      title,
      movement(passage.rank, before),
    ),
    text,
    context.compact ? null : originLine(passage, heading),
    context.compact ? null : metadata(passage, context),
    element(
      "footer",
      {},
      element("span", { class: "score" }, `${scoreName(passage, context.rank)} `, element("b", {}, passage.score.toFixed(3))),
      passage.weak ? element("span", { class: "weak", title: weakText(passage) }, "weak match") : null,
      identifier ? element("span", { class: "source-id", dir: "auto" }, identifier) : null,
      element("span", { class: "buttons" }, open, button),
    ),
  );
  button.addEventListener("click", () => toggle(made, passage, context, { button, identity, show, plain }));
  return made;
}

function toggle(made, passage, context, { button, identity, show, plain }) {
  const open = made.querySelector(".why");
  button.setAttribute("aria-expanded", String(!open));
  made.classList.toggle("open", !open);
  if (open) {
    open.remove();
    show(plain());
  } else {
    const onWords = (words) => {
      if (made.classList.contains("open")) show(words);
    };
    const options = { onWords, labelledBy: `${identity}-title`, id: `${identity}-why` };
    made.append(whyPanel(passage, context, options));
  }
  made.dispatchEvent(new CustomEvent("card-resized", { bubbles: true }));
}

/** How likely the student holds it that a weak match answers the query. */
function weakText({ probability }) {
  return `The student’s estimate that it fits the query: ${percent(probability)}`;
}

/** The name of the number that a ranking is sorted by. */
function scoreName(passage, rank) {
  return passage.log_odds !== null ? "teacher’s log-odds" : scoreNameOf(rank);
}

function movement(rank, before) {
  if (before === undefined) return null;
  if (before === null) return element("span", { class: "moved new" }, "new");
  if (before === rank) {
    return element("span", { class: "moved same" }, "=", element("span", { class: "hidden" }, " same rank"));
  }
  const direction = before > rank ? "up" : "down";
  return element(
    "span",
    { class: `moved ${direction}` },
    element("span", { "aria-hidden": "true" }, direction === "up" ? "▲ " : "▼ "),
    `${before} → ${rank}`,
    element("span", { class: "hidden" }, `, ${direction}`),
  );
}

/** The document of a passage and its place in it; names that the heading has are not repeated. */
function originLine(passage, heading) {
  const name = documentName(passage);
  const facts = [
    !isNamedBy(heading, name) ? element("bdi", { class: "path" }, name) : null,
    ...[...positionsOf(passage), ...fileFacts(passage)].map((fact) => element("span", {}, fact)),
  ].filter(Boolean);
  return facts.length ? element("p", { class: "origin" }, facts) : null;
}

function metadata(passage, context) {
  const fields = ownFields(passage, context.index.fields);
  if (!fields.length) return null;
  const items = fields.map(([name, value, text]) =>
    element(
      "div",
      {},
      element("dt", {}, name),
      element(
        "dd",
        {},
        element(
          "button",
          {
            type: "button",
            class: "value",
            dir: "auto",
            title: "Filter by this value",
            on: { click: () => context.onValue(name, value) },
          },
          text,
        ),
      ),
    ),
  );
  return element("dl", { class: "metadata" }, items);
}

/** The time of a search by stage, as a stacked bar and as numbers. */
export function latency(seconds, total) {
  const known = STAGES.map((stage) => [stage, seconds[stage] || 0]);
  const inside = known.reduce((sum, [, value]) => sum + value, 0);
  known[STAGES.length - 1][1] = Math.max(0, total - inside);
  const shown = known.filter(([, value]) => value > 0);
  const bar = element("span", { class: "latency-bar", "aria-hidden": "true" });
  for (const [stage, value] of shown) {
    const piece = element("span", { class: `stage ${stage}` });
    piece.style.flexGrow = String(value);
    bar.append(piece);
  }
  const numbers = shown.map(([stage, value]) =>
    element("li", {}, element("span", { class: `swatch ${stage}`, "aria-hidden": "true" }), `${stage} `, element("b", {}, milliseconds(value))),
  );
  const sum = element("li", { class: "total" }, "total ", element("b", {}, milliseconds(Math.max(total, inside))));
  return element("div", { class: "latency" }, bar, element("ul", { "aria-label": "Time by stage" }, sum, numbers));
}

/** Says that nothing fits, if every passage of a ranking is a weak match; else "". */
export function weakNote(passages) {
  if (!passages.length || !passages.every((passage) => passage.weak)) return "";
  const most = Math.max(...passages.map(({ probability }) => probability));
  return `Nothing in this index seems to fit. These are only the nearest passages, all of them weak matches: the student’s estimate for the best is ${percent(most)}.`;
}

/** Says how many shards gave no answer. */
export function missingText(numShards) {
  const passages = numShards === 1 ? "its passages are" : "their passages are";
  return `${counted(numShards, "shard")} of the index gave no answer: ${passages} not among these.`;
}

/** Describes what an exact search proves. */
export function certificateText(certificate, numPlaces) {
  const all = certificate.num_scored + certificate.num_left;
  const proved = certificate.proved === numPlaces ? `All ${numPlaces}` : `The first ${certificate.proved} of ${numPlaces}`;
  let text = `${proved} places are proved: ${certificate.num_scored.toLocaleString("en")} of ${counted(all, "passage")} got the full score`;
  if (certificate.num_left > 0 && certificate.highest_bound_left !== null) {
    text += `, and none of the others can score more than ${certificate.highest_bound_left.toFixed(3)}`;
  }
  if (certificate.num_left > 0 && certificate.kth_score !== null) {
    text += ` (the last place scores ${certificate.kth_score.toFixed(3)})`;
  }
  return `${text}.`;
}

/** Describes what a reranker read, and whether its time ran out. */
export function readingText({ read, unsure, num_truncated, seconds, out_of_time }) {
  if (!read.length) {
    return out_of_time
      ? "Time ran out before any passage was read: the order is the student’s estimate."
      : "The student was sure of every place, so no passage was read.";
  }
  const number = counted(read.length, "passage");
  const which = unsure.length ? `${number} that the student was unsure of` : `The first ${number}`;
  const were = read.length === 1 ? "was" : "were";
  const cut = num_truncated ? `, ${num_truncated} of them in part` : "";
  const rest = unsure.length ? "are ranked by the student’s estimate" : "follow in the student’s order";
  const ended = out_of_time ? ` Then time ran out: the others ${rest}.` : "";
  return `${which} ${were} read${cut}, in ${milliseconds(seconds)}.${ended}`;
}

// The search page: connects its parts and keeps the search in the URL.

import { DEFAULTS, NAMES_INDEX, pageOf, readAddress, useFields, writeAddress } from "./address.js";
import { apiKey, ask, keepApiKey, problemText } from "./api.js";
import { byId, counted, element } from "./dom.js";
import { facetFields, showFacets } from "./facets.js";
import { factList } from "./facts.js";
import { DocumentView } from "./document.js";
import { conditionFor, FilterBuilder, hasCondition, joined, without } from "./filters.js";
import { installKeyboard } from "./keyboard.js";
import { Results } from "./results.js";
import { rankName, ranksOf, sourceChoices, sumText } from "./score.js";
import { lastOf, Search, useRerankers } from "./search.js";
import { installTheme } from "./theme.js";
import { Upload } from "./upload.js";

const TYPING_PAUSE = 160; // milliseconds without a key press before a search
const STARTING_PAUSE = 1000; // milliseconds between requests to a server that is starting
const WIDE = matchMedia("(min-width: 48.01rem)"); // else controls are folded away
const TWO_COLUMNS = matchMedia("(min-width: 62.01rem)"); // else adding documents is above the results

let state = readAddress(location.search);
let index = null; // GET /v1/index
let limits = { max_body_bytes: 16_000_000, file_types: [], excluded: [] };

const box = byId("query");
const status = byId("status");
const results = new Results({ area: byId("results"), status }, { onValue: filterByValue, onOpen: openDocument });
const reader = new DocumentView({
  onFilter: filterByValue,
  onClose: () => keep({ open: "" }),
});
const search = new Search({
  onStart: (teacher) => results.loading(teacher),
  onDone: showAnswers,
  facets: () => (byId("filters").open ? facetFields(index.fields, limits.search.facets.maxItems) : []),
});
const builder = new FilterBuilder(
  { field: byId("field"), operator: byId("operator"), value: byId("value"), add: byId("add") },
  (newCondition) => change({ filter: joined(state.filter, newCondition) }),
);

function showAnswers(request, answers) {
  showFilterError("");
  showFacets(byId("facets"), answers[0]?.answer?.facets || {}, index, request.filter, toggleFacet);
  if (!answers.length) {
    welcome();
    openKept();
    return;
  }
  const failed = answers.filter((answer) => answer.error);
  if (failed.some((answer) => answer.error.name === "AbortError")) return;
  if (failed.length && failed.length === answers.length) showProblem(failed[0].error);
  else results.show(request, answers, index);
  openKept();
}

/** Show the document of a passage, and keep it in the URL. */
function openDocument(passage) {
  keep({ open: passage.id });
  reader.open(passage, results.passages());
}

/** Show the document of the passage that the URL names, unless one is shown. */
async function openKept() {
  const id = state.open;
  if (!id || byId("document").open) return;
  const known = results.passages().find((passage) => passage.id === id);
  try {
    reader.open(known || (await ask(`/v1/passages/${encodeURIComponent(id)}`)), results.passages());
  } catch (error) {
    keep({ open: "" });
    status.textContent = error.message;
  }
}

function showProblem(error) {
  if (error.status === 401) askForKey(error.message);
  if (error.field === "filter" || error.message.startsWith("filter")) {
    showFilterError(error.message);
    results.message("The filter is invalid", "See the message next to it.", { kind: "error" });
  } else {
    results.message(error.status === 401 ? "An API key is required" : "The search failed", problemText(error), { kind: "error" });
  }
  status.textContent = error.message;
}

function showFilterError(message) {
  byId("filter-error").textContent = message;
  byId("filter").setAttribute("aria-invalid", String(Boolean(message)));
  if (message) byId("options").open = byId("filters").open = true;
}

function welcome() {
  if (index.num_passages === 0) {
    results.message("This index is empty", index.writable ? "Drop files or folders on this page, or choose some under “Add documents”." : "");
  } else {
    const how = `A sentence works better than keywords. The best of ${counted(index.num_passages, "passage")} are ranked by ${sumText("iem", index)}.`;
    results.message("Ask a question", how, { more: examples() });
  }
  status.textContent = "";
}

/** Queries from the index itself, to try with a click. */
function examples() {
  if (!index.example_queries.length) return [];
  const tryOut = (q) => {
    byId("results").focus({ preventScroll: true }); // the button disappears
    change({ q });
  };
  const buttons = index.example_queries.map((q) =>
    element("li", {}, element("button", { type: "button", class: "plain example", dir: "auto", on: { click: () => tryOut(q) } }, q)),
  );
  return [element("p", { id: "examples" }, "For example, from its documents:"), element("ul", { class: "examples", "aria-labelledby": "examples" }, buttons)];
}

function filterByValue(name, value) {
  const type = name === "document_id" ? "string" : index.fields[name];
  byId("options").open = byId("filters").open = true; // first, so that the search counts facets
  change({ filter: joined(state.filter, conditionFor(name, type, value)) });
}

/** Filter by the value of a facet, or no longer. */
function toggleFacet(name, value) {
  const condition = conditionFor(name, index.fields[name], value);
  change({ filter: hasCondition(state.filter, condition) ? without(state.filter, condition) : joined(state.filter, condition) });
}

/** Update the search, the controls and the URL, then search. */
function change(parts, { wait = 0 } = {}) {
  keep(parts);
  showState();
  if (!index) return;
  if (wait) search.soon(state, ranksOf(index), wait);
  else search.now(state, ranksOf(index));
}

/** Update the search and the URL. */
function keep(parts) {
  state = { ...state, ...parts };
  history.replaceState(null, "", writeAddress(state));
}

function showState() {
  const set = (input, value) => {
    if (input.value !== value) input.value = value;
  };
  set(box, state.q);
  set(byId("filter"), state.filter);
  byId("clear").hidden = !state.filter;
  byId("filters-count").textContent = state.filter.trim() ? " (on)" : "";
  byId("options-chosen").textContent = chosenOptions();
  showRank();
  byId("beside").checked = state.beside;
  byId("exact").checked = state.exact;
  byId("hybrid-on").checked = state.hybrid !== null;
  byId("hybrid").hidden = state.hybrid === null;
  set(byId("hybrid"), String(state.hybrid ?? 50));
  byId("hybrid-share").textContent = state.hybrid === null ? "" : `${state.hybrid}% BM25`;
  set(byId("source"), state.source);
  byId("sources").hidden = state.hybrid !== null || state.exact; // these have sources of their own
  set(byId("k"), String(state.k));
  document.title = state.q ? `${state.q} – d2llm` : "d2llm search";
  document.body.classList.toggle("comparing", state.beside);
}

/** The options that differ from the defaults, for the line that stands for all of them where they are folded away. */
function chosenOptions() {
  const chosen = [
    state.rank !== "iem" && index ? rankName(state.rank, index) : "",
    state.beside ? "side by side" : "",
    state.exact ? "exact" : "",
    state.hybrid === null ? "" : `${state.hybrid}% BM25`,
    state.filter.trim() ? "filter" : "",
    state.k === DEFAULTS.k ? "" : `${state.k} shown`,
  ].filter(Boolean);
  return chosen.length ? `: ${chosen.join(", ")}` : "";
}

/** Show the chosen ranking; side by side, options that make no difference are disabled. */
function showRank() {
  const offered = index ? ranksOf(index) : [];
  const chosen = state.beside ? lastOf(state.rank, offered) : state.rank;
  for (const input of document.querySelectorAll("input[name=rank]")) {
    input.checked = input.value === chosen;
    input.disabled = state.beside && lastOf(input.value, offered) !== input.value;
  }
}

function listen() {
  box.addEventListener("input", () => change({ q: box.value }, { wait: TYPING_PAUSE }));
  byId("search").addEventListener("submit", (event) => {
    event.preventDefault();
    change({ q: box.value });
  });
  byId("filter").addEventListener("input", () => change({ filter: byId("filter").value }, { wait: 3 * TYPING_PAUSE }));
  byId("filters").addEventListener("toggle", () => {
    if (index && byId("filters").open && !search.counts) search.now(state, ranksOf(index));
  });
  byId("clear").addEventListener("click", () => {
    change({ filter: "" });
    byId("filter").focus();
  });
  byId("beside").addEventListener("change", (event) => {
    change({ beside: event.target.checked });
    byId("adding").open = TWO_COLUMNS.matches && !state.beside; // it is beside one ranking, but above several
  });
  byId("exact").addEventListener("change", (event) => change({ exact: event.target.checked }));
  byId("hybrid-on").addEventListener("change", (event) => change({ hybrid: event.target.checked ? 50 : null }));
  byId("hybrid").addEventListener("input", (event) => change({ hybrid: Number(event.target.value) }, { wait: TYPING_PAUSE }));
  byId("source").addEventListener("change", (event) => change({ source: event.target.value }));
  byId("k").addEventListener("change", (event) => change({ k: numResults(event.target) }));
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    keepApiKey(byId("key").value.trim());
    byId("key").value = "";
    byId("key-dialog").close();
    begin();
  });
  byId("key-cancel").addEventListener("click", () => byId("key-dialog").close());
  byId("key-forget").addEventListener("click", () => {
    keepApiKey("");
    byId("key-dialog").close();
    begin();
  });
  byId("key-open").addEventListener("click", () => askForKey(""));
  byId("index").addEventListener("change", (event) => {
    const search = writeAddress({ ...state, filter: "" }); // the other index may not have its fields
    location.assign(pageOf(event.target.value) + (search.startsWith("?") ? search : ""));
  });
  addEventListener("popstate", () => {
    state = readAddress(location.search);
    change({});
  });
}

function numResults(input) {
  const number = Math.round(Number(input.value)) || DEFAULTS.k;
  return Math.max(Number(input.min), Math.min(number, Number(input.max)));
}

function askForKey(message) {
  byId("key-message").textContent = message;
  byId("key-forget").hidden = !apiKey();
  byId("key-open").hidden = false;
  if (!byId("key-dialog").open) byId("key-dialog").showModal();
}

function showRanks() {
  const ranks = ranksOf(index);
  const choices = ranks.map((rank) =>
    element(
      "label",
      {},
      element("input", { type: "radio", name: "rank", value: rank, on: { change: () => change({ rank }) } }),
      element("span", {}, rankName(rank, index)),
    ),
  );
  byId("ranks").replaceChildren(...choices);
  byId("ranking").hidden = byId("beside-label").hidden = ranks.length < 2;
  if (!ranks.includes(state.rank)) state.rank = "iem";
  if (ranks.length < 2) state.beside = false;
  const sources = sourceChoices(index);
  byId("source").replaceChildren(...sources.map(([value, name]) => element("option", { value }, name)));
  if (!sources.some(([value]) => value === state.source)) state.source = "";
}

/** Fold away what a small screen has no room for, and open it where it has. */
function fold() {
  byId("options").open = byId("about").open = WIDE.matches;
  byId("adding").open = (TWO_COLUMNS.matches && !state.beside) || index?.num_passages === 0;
}

async function readIndex() {
  index = await ask("/v1/index");
  byId("facts").replaceChildren(...factList(index));
  byId("index-name").textContent = index.name;
  byId("index").value = index.name;
  byId("adding").hidden = !index.writable;
  if (index.num_passages === 0) byId("adding").open = true;
  builder.setFields(index.fields);
  showRanks();
}

/** Show a choice of indexes, if there is one; returns whether this page shows one of them. */
async function readIndexes() {
  const names = (await ask("/v1/indexes")).indexes.map(({ name }) => name);
  byId("index").replaceChildren(...names.map((name) => element("option", { value: name }, name)));
  byId("index-choice").hidden = names.length < 2;
  byId("index-name").hidden = names.length >= 2;
  if (NAMES_INDEX || names.length < 2) return true;
  location.replace(pageOf(names[0]) + location.search);
  return false;
}

/** Give the controls the names, help texts and bounds of the server's fields of a search. */
function describeControls({ rescore, exact, hybrid, sources, top_k, filter }) {
  const controls = { ranking: rescore, exact, "hybrid-on": hybrid, hybrid, source: sources, k: top_k, filter };
  for (const [id, field] of Object.entries(controls)) {
    (byId(id).closest("label") || byId(id)).title = field.description;
    for (const name of document.querySelectorAll(`[data-of="${id}"]`)) name.textContent = field.title;
  }
  byId("hybrid").ariaLabel = `${hybrid.title}: BM25 in percent`;
  const bound = (id, low, high) => Object.assign(byId(id), { min: String(low), max: String(high) });
  bound("k", top_k.minimum, top_k.maximum);
  bound("hybrid", 100 * hybrid.minimum, 100 * hybrid.maximum);
  byId("filter").placeholder = filter.examples[0];
}

/** Load the facts about the index, then run the search in the URL. */
async function begin() {
  byId("key-open").hidden = !apiKey();
  try {
    limits = await ask("/page/settings.json");
    byId("report-link").hidden = !limits.has_report;
    byId("files").accept = limits.file_types.join();
    byId("file-types").textContent = limits.file_types.join(" ");
    useFields(limits.search);
    useRerankers(limits.rerankers);
    describeControls(limits.search);
    state = readAddress(location.search);
    if (!(await readIndexes())) return;
    await readIndex();
  } catch (error) {
    if (error.status === 503) {
      results.message("Not ready yet", error.message);
      setTimeout(begin, STARTING_PAUSE);
    } else if (error.status === 404) {
      results.message("No index is served here", `${error.message}. The API page lists what this server can do.`);
    } else {
      showProblem(error);
    }
    return;
  }
  change({});
}

installTheme(byId("theme"));
installKeyboard(box, byId("results"), byId("letters"));
new Upload(
  {
    panel: byId("adding"),
    folder: byId("folder"),
    files: byId("files"),
    stop: byId("upload-stop"),
    bar: byId("upload-bar"),
    report: byId("upload-report"),
  },
  {
    limits: () => limits,
    isWritable: () => Boolean(index?.writable),
    onDone: async () => {
      await readIndex();
      change({});
    },
  },
);
listen();
fold();
for (const width of [WIDE, TWO_COLUMNS]) width.addEventListener("change", fold);
showState();
begin();

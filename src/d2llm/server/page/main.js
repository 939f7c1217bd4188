// The search page: connects its parts and keeps the search in the URL.

import { BASE, keepIndexInLinks, pageOf, readAddress, writeAddress } from "./address.js";
import { apiKey, ask, keepApiKey, problemText } from "./api.js";
import { byId, counted, element } from "./dom.js";
import { factList } from "./facts.js";
import { conditionFor, FilterBuilder, joined } from "./filters.js";
import { installKeyboard } from "./keyboard.js";
import { Results } from "./results.js";
import { lastOf, RANK_NAMES, Search } from "./search.js";
import { installTheme } from "./theme.js";
import { Upload } from "./upload.js";

const TYPING_PAUSE = 160; // milliseconds without a key press before a search
const STARTING_PAUSE = 1000; // milliseconds between requests to a server that is starting

let state = readAddress(location.search);
let index = null; // GET /v1/index
let limits = { max_texts: 512, max_body_bytes: 16_000_000 };

const box = byId("query");
const status = byId("status");
const results = new Results({ area: byId("results"), status }, { onValue: filterByValue });
const search = new Search({
  onStart: (teacher) => results.loading(teacher),
  onDone: showAnswers,
});
const builder = new FilterBuilder(
  { field: byId("field"), operator: byId("operator"), value: byId("value"), add: byId("add") },
  (newCondition) => change({ filter: joined(state.filter, newCondition) }),
);

function showAnswers(request, answers) {
  showFilterError("");
  if (!answers.length) {
    welcome();
    return;
  }
  const failed = answers.filter((answer) => answer.error);
  if (failed.some((answer) => answer.error.name === "AbortError")) return;
  if (failed.length && failed.length === answers.length) showProblem(failed[0].error);
  else results.show(request, answers, { hasTeacher: index.teacher !== null });
}

function showProblem(error) {
  if (error.status === 401) askForKey(error.message);
  if (error.field === "filter" || error.message.startsWith("filter")) {
    showFilterError(error.message);
    results.message("The filter is invalid", "See the message next to it.", "error");
  } else {
    results.message(error.status === 401 ? "An API key is required" : "The search failed", problemText(error), "error");
  }
  status.textContent = error.message;
}

function showFilterError(message) {
  byId("filter-error").textContent = message;
  byId("filter").setAttribute("aria-invalid", String(Boolean(message)));
  if (message) byId("filters").open = true;
}

function welcome() {
  if (index.num_passages === 0) {
    results.message("This index is empty", index.writable ? "Drop a folder onto “Add documents” to fill it." : "");
  } else {
    results.message("Ask a question", `Search ${counted(index.num_passages, "passage")}. A sentence works better than keywords.`);
  }
  status.textContent = "";
}

function filterByValue(name, value) {
  const type = name === "document_id" ? "string" : index.fields[name];
  change({ filter: joined(state.filter, conditionFor(name, type, value)) });
  byId("filters").open = true;
}

/** Update the search, the controls and the URL, then search. */
function change(parts, { wait = 0 } = {}) {
  state = { ...state, ...parts };
  history.replaceState(null, "", writeAddress(state));
  showState();
  if (!index) return;
  if (wait) search.soon(state, index.rescore, wait);
  else search.now(state, index.rescore);
}

function showState() {
  const set = (input, value) => {
    if (input.value !== value) input.value = value;
  };
  set(box, state.q);
  set(byId("filter"), state.filter);
  byId("clear").hidden = !state.filter;
  byId("filters-count").textContent = state.filter.trim() ? " (on)" : "";
  showRank();
  byId("beside").checked = state.beside;
  byId("exact").checked = state.exact;
  byId("hybrid-on").checked = state.hybrid !== null;
  byId("hybrid").hidden = state.hybrid === null;
  set(byId("hybrid"), String(state.hybrid ?? 50));
  byId("hybrid-share").textContent = state.hybrid === null ? "" : `${state.hybrid}% BM25`;
  set(byId("source"), state.source);
  byId("source").disabled = state.hybrid !== null || state.exact;
  set(byId("k"), String(state.k));
  document.title = state.q ? `${state.q} – d2llm` : "d2llm search";
  document.body.classList.toggle("comparing", state.beside);
}

/** Show the chosen ranking; side by side, options that make no difference are disabled. */
function showRank() {
  const offered = index?.rescore || [];
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
  byId("clear").addEventListener("click", () => {
    change({ filter: "" });
    byId("filter").focus();
  });
  byId("beside").addEventListener("change", (event) => change({ beside: event.target.checked }));
  byId("exact").addEventListener("change", (event) => change({ exact: event.target.checked }));
  byId("hybrid-on").addEventListener("change", (event) => change({ hybrid: event.target.checked ? 50 : null }));
  byId("hybrid").addEventListener("input", (event) => change({ hybrid: Number(event.target.value) }, { wait: TYPING_PAUSE }));
  byId("source").addEventListener("change", (event) => change({ source: event.target.value }));
  byId("k").addEventListener("change", (event) => change({ k: places(event.target) }));
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

function places(input) {
  const number = Math.round(Number(input.value)) || 10;
  return Math.max(1, Math.min(number, Number(input.max)));
}

function askForKey(message) {
  byId("key-message").textContent = message;
  byId("key-forget").hidden = !apiKey();
  byId("key-open").hidden = false;
  if (!byId("key-dialog").open) byId("key-dialog").showModal();
}

function showRanks() {
  const choices = index.rescore.map((rank) =>
    element(
      "label",
      {},
      element("input", { type: "radio", name: "rank", value: rank, on: { change: () => change({ rank }) } }),
      element("span", {}, RANK_NAMES[rank]),
    ),
  );
  byId("ranks").replaceChildren(...choices);
  byId("beside-label").hidden = index.rescore.length < 2;
  if (!index.rescore.includes(state.rank)) state.rank = "iem";
  if (index.rescore.length < 2) state.beside = false;
  byId("source").querySelector("[value=ann]").disabled = !index.has_ann;
}

async function readIndex() {
  index = await ask("/v1/index");
  byId("facts").replaceChildren(...factList(index));
  byId("index-name").textContent = index.name;
  byId("index").value = index.name;
  byId("adding").hidden = !index.writable;
  builder.setFields(index.fields);
  showRanks();
}

/** Show a choice of indexes, if there is one; returns whether this page shows one of them. */
async function readIndexes() {
  const names = (await ask("/v1/indexes")).indexes.map(({ name }) => name);
  byId("index").replaceChildren(...names.map((name) => element("option", { value: name }, name)));
  byId("index-choice").hidden = names.length < 2;
  byId("index-name").hidden = names.length >= 2;
  if (BASE || names.length < 2) return true;
  location.replace(pageOf(names[0]) + location.search);
  return false;
}

/** Load the facts about the index, then run the search in the URL. */
async function begin() {
  byId("key-open").hidden = !apiKey();
  try {
    limits = await ask("/page/settings.json");
    byId("report-link").hidden = !limits.has_report;
    const most = Math.min(limits.max_top_k, 1000);
    byId("k").max = String(most);
    state.k = Math.min(state.k, most);
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
    place: byId("adding"),
    folder: byId("folder"),
    files: byId("files"),
    stop: byId("upload-stop"),
    bar: byId("upload-bar"),
    report: byId("upload-report"),
  },
  {
    types: () => index.fields,
    limits: () => limits,
    onDone: async () => {
      await readIndex();
      change({});
    },
  },
);
keepIndexInLinks();
listen();
showState();
begin();

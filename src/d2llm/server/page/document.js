// Shows a whole document in a dialog: all its passages in order, with the results of the search in it marked.

import { ask, problemText } from "./api.js";
import { byId, counted, element } from "./dom.js";
import { markTerms } from "./highlight.js";
import { addressesOf, documentName, fileFacts, isNamedBy, outsideLink, positionsOf, SEPARATOR } from "./origin.js";

/** The dialog with a document. `onFilter` gets the field and the value that only this document, or its file, has. */
export class DocumentView {
  constructor({ onFilter, onClose }) {
    Object.assign(this, { dialog: byId("document"), text: byId("document-text"), onFilter, number: 0, marked: [], at: 0 });
    byId("document-close").addEventListener("click", () => this.dialog.close());
    byId("document-previous").addEventListener("click", () => this.#go(this.at - 1));
    byId("document-next").addEventListener("click", () => this.#go(this.at + 1));
    byId("document-only").addEventListener("click", () => {
      this.dialog.close();
      this.onFilter(...this.filter);
    });
    this.dialog.addEventListener("close", onClose);
    this.dialog.addEventListener("click", (event) => {
      if (event.target === this.dialog) this.dialog.close(); // the backdrop
    });
  }

  /** Show the document of a passage. `results` are the passages of the ranking; those in the document are marked. */
  async open(passage, results) {
    const number = (this.number += 1);
    this.filter = filterOf(passage);
    byId("document-title").replaceChildren(titlesOf([passage])[0] || documentName(passage));
    byId("document-facts").replaceChildren();
    byId("document-only").hidden = !this.filter;
    byId("document-only").textContent = this.filter?.[0] === "path" ? "Search only this file" : "Search only this document";
    this.#mark([]);
    this.text.replaceChildren(element("p", { class: "working" }, "Loading the document …"));
    if (!this.dialog.open) this.dialog.showModal();
    try {
      const { passages, repeated } = await this.#read(passage);
      if (number === this.number) this.#show(passage, passages, repeated, results);
    } catch (error) {
      if (number === this.number) this.text.replaceChildren(element("p", { class: "problem", role: "alert" }, problemText(error)));
    }
  }

  async #read(passage) {
    if (!passage.document_id) return { passages: [passage], repeated: [0] };
    return ask(`/v1/documents/${encodeURIComponent(passage.document_id)}`);
  }

  #show(passage, passages, repeated, results) {
    const ranks = new Map(results.map((result) => [result.id, result]));
    const titles = titlesOf(passages);
    byId("document-title").replaceChildren(titles[0] || documentName(passage));
    byId("document-facts").replaceChildren(...factsOf(passage, passages, titles[0]));
    const parts = passages.map((one, index) => {
      const heading = titles[1][index];
      const isNew = heading && (index === 0 || heading !== titles[1][index - 1]);
      return part(one, {
        heading: isNew ? heading : "",
        text: shownText(passages, repeated, index, passage.id),
        result: ranks.get(one.id),
        isOpened: one.id === passage.id,
      });
    });
    this.text.replaceChildren(...parts);
    this.#mark(parts.filter((one) => one.classList.contains("marked")));
    this.#go(Math.max(0, this.marked.findIndex((one) => one.classList.contains("opened"))));
    this.text.focus({ preventScroll: true });
  }

  #mark(parts) {
    this.marked = parts;
    for (const name of ["document-previous", "document-next", "document-position"]) byId(name).hidden = parts.length < 2;
  }

  #go(index) {
    if (!this.marked.length) return;
    this.at = (index + this.marked.length) % this.marked.length;
    byId("document-position").textContent = `Result ${this.at + 1} of ${this.marked.length} in this document`;
    this.marked[this.at].scrollIntoView({ block: "center" });
  }
}

/** What only a passage's document has, or the table that it is a row of; null if there is no more than the passage. */
function filterOf({ document_id: documentId, metadata }) {
  if (typeof metadata.row === "number" && metadata.path) return ["path", metadata.path];
  return documentId ? ["document_id", documentId] : null;
}

/** The title that all passages share, and the headings of each below it. */
function titlesOf(passages) {
  const paths = passages.map((one) => one.title.split(SEPARATOR));
  let shared = 0;
  while (paths.every((path) => path.length > shared && path[shared] === paths[0][shared])) shared += 1;
  return [paths[0].slice(0, shared).join(SEPARATOR), paths.map((path) => path.slice(shared).join(SEPARATOR))];
}

function factsOf(passage, passages, title) {
  const name = documentName(passage);
  const addresses = addressesOf(passage);
  const facts = [
    isNamedBy(title, name) || addresses.includes(name) ? null : element("bdi", { class: "path" }, name),
    ...positionsOf({ ...passage, metadata: { ...passage.metadata, num_passages: null, page: null }, document_id: "" }),
    ...fileFacts(passage),
    passages.length > 1 ? counted(passages.length, "passage") : null,
    ...addresses.map(outsideLink),
  ];
  return facts.filter(Boolean).map((fact) => element("li", {}, fact));
}

/**
 * The text of a passage without what it repeats of the one before: words, or the header of a table. The opened passage
 * is whole: the end of the passage before it is left out instead.
 */
function shownText(passages, repeated, index, openedId) {
  const signs = [...passages[index].text];
  const header = headerOf(passages[index].text);
  const isSameTable = header && index > 0 && headerOf(passages[index - 1].text) === header;
  const begin = passages[index].id === openedId ? 0 : repeated[index] || (isSameTable ? [...header].length : 0);
  const next = passages[index + 1];
  const end = next && next.id === openedId ? signs.length - repeated[index + 1] : signs.length;
  return signs.slice(begin, Math.max(begin, end)).join("");
}

/** The header of the table that a passage begins with: each passage of a long table has it. */
function headerOf(text) {
  return /^\|.*\n\|[ :|-]*-[ :|-]*\n/.exec(text)?.[0] || "";
}

function part(passage, { heading, text, result, isOpened }) {
  const positions = positionsOf(passage).filter((position) => !position.startsWith("row"));
  const label = isOpened ? "This result" : result ? `Result ${result.rank}` : "";
  const made = element(
    "section",
    { class: "part", "data-id": passage.id },
    heading ? element("h3", { dir: "auto" }, heading) : null,
    label ? element("p", { class: "label" }, [label, ...positions].join(", ")) : null,
    element("p", { class: "text", dir: "auto" }, result && text === passage.text ? markTerms("", text, shifted(result)).text : text),
  );
  if (label) made.classList.add("marked");
  if (isOpened) made.classList.add("opened");
  return made;
}

/** Where the query's terms are in the text of a result; the server counts from the title on. */
function shifted({ title, explanation }) {
  const before = title ? [...title].length + 1 : 0;
  return Object.fromEntries(
    Object.entries(explanation?.term_spans || {}).map(([term, spans]) => [
      term,
      spans.filter(([start]) => start >= before).map(([start, end]) => [start - before, end - before]),
    ]),
  );
}

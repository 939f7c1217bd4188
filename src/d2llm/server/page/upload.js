// Adds documents: reads them in the browser, sends them in batches, and names all that were skipped.

import { ask } from "./api.js";
import { counted, element } from "./dom.js";
import { droppedFiles, readFile } from "./files.js";

const BATCH_DOCUMENTS = 16; // small, so that the progress bar moves and the server can answer searches in between
const BATCH_CHARACTERS = 200_000;
const MAX_RETRIES = 5;
const LISTED = 100;

/** Send documents; the index splits them into passages. `onProgress` gets the number done and the total; `signal` stops between batches. */
export async function sendDocuments(documents, limits, { onProgress, signal }) {
  const sum = { num_documents: 0, num_added: 0, num_updated: 0, num_unchanged: 0, num_truncated: 0, num_deleted: 0 };
  const skipped = [];
  let done = 0;
  const send = async (part) => {
    try {
      const report = await patient(() => ask("/v1/documents", { documents: part }, signal), signal);
      for (const name of Object.keys(sum)) sum[name] += report[name] || 0;
    } catch (error) {
      if (error.name === "AbortError" || [0, 401, 403, 429, 503].includes(error.status)) throw error;
      // Some document makes the batch fail: send them one by one to find it.
      if (part.length > 1) {
        for (const one of part) await send([one]);
        return;
      }
      skipped.push({ path: part[0].id, reason: error.message });
    }
    done += part.length;
    onProgress(done, documents.length);
  };
  let problem = null;
  try {
    for (const part of batches(documents, limits)) {
      signal.throwIfAborted();
      await send(part);
    }
  } catch (error) {
    problem = error.name === "AbortError" ? "Stopped." : error.message;
  }
  return { sum, skipped, problem, numLeft: documents.length - done };
}

function* batches(documents, limits) {
  let [part, characters] = [[], 0];
  for (const one of documents) {
    const full = part.length >= Math.min(BATCH_DOCUMENTS, limits.max_texts);
    if (part.length && (full || characters + one.text.length > BATCH_CHARACTERS)) {
      yield part;
      [part, characters] = [[], 0];
    }
    part.push(one);
    characters += one.text.length;
  }
  if (part.length) yield part;
}

/** Retry while the server is busy. */
async function patient(work, signal) {
  for (let wait = 0; ; wait += 1) {
    try {
      return await work();
    } catch (error) {
      if (![429, 503].includes(error.status) || wait >= MAX_RETRIES) throw error;
      await new Promise((resolve) => setTimeout(resolve, 1000 * Math.min(error.retryAfter || 1, 30)));
      signal.throwIfAborted();
    }
  }
}

/** The part of the page for adding documents. */
export class Upload {
  constructor({ place, folder, files, stop, bar, report }, { types, limits, onDone }) {
    Object.assign(this, { place, stop, bar, report, types, limits, onDone });
    for (const input of [folder, files]) {
      input.addEventListener("change", () => {
        this.#take([...input.files].map((file) => [file, file.webkitRelativePath || file.name]));
        input.value = "";
      });
    }
    stop.addEventListener("click", () => this.controller?.abort());
    for (const event of ["dragenter", "dragover"]) {
      place.addEventListener(event, (dragged) => {
        dragged.preventDefault();
        place.classList.add("dropping");
      });
    }
    for (const event of ["dragleave", "drop"]) place.addEventListener(event, () => place.classList.remove("dropping"));
    place.addEventListener("drop", async (event) => {
      event.preventDefault();
      if (this.controller) return; // the running upload is on the page
      try {
        this.#take(await droppedFiles(event.dataTransfer));
      } catch (error) {
        this.report.replaceChildren(`What was dropped cannot be read: ${error.message || error}`);
      }
    });
  }

  async #take(files) {
    if (this.controller || !files.length) return;
    this.controller = new AbortController();
    this.stop.hidden = this.bar.hidden = false;
    this.bar.removeAttribute("value");
    this.report.replaceChildren(`Reading ${counted(files.length, "file")} …`);
    try {
      const { documents, skipped } = await this.#read(files);
      const onProgress = (done, all) => {
        [this.bar.max, this.bar.value] = [all, done];
        this.report.replaceChildren(`${done.toLocaleString("en")} of ${counted(all, "document")} sent …`);
      };
      if (documents.length) onProgress(0, documents.length);
      const options = { onProgress, signal: this.controller.signal };
      const sent = await sendDocuments(documents, this.limits(), options);
      this.#showReport(sent, [...skipped, ...sent.skipped]);
      if (sent.sum.num_documents) this.onDone();
    } catch (error) {
      this.report.replaceChildren(element("p", { class: "problem" }, error.message));
    } finally {
      this.stop.hidden = this.bar.hidden = true;
      this.controller = null;
    }
  }

  async #read(files) {
    const [documents, skipped, ids] = [[], [], new Set()];
    for (const [file, path] of files) {
      const contents = await readFile(file, path, this.types());
      skipped.push(...contents.skipped);
      for (const one of contents.documents) {
        const reason = this.#refusal(one, ids);
        if (reason) skipped.push({ path: one.id, reason });
        else documents.push(one);
        ids.add(one.id);
      }
    }
    return { documents, skipped };
  }

  #refusal(one, ids) {
    if (ids.has(one.id)) return "another document has the same id";
    if (new Blob([JSON.stringify(one)]).size > this.limits().max_body_bytes - 1000) {
      return "it is larger than the server accepts";
    }
    return "";
  }

  #showReport({ sum, problem, numLeft }, skipped) {
    const passages = sum.num_added + sum.num_updated + sum.num_unchanged;
    const lines = [
      sum.num_documents
        ? `${counted(sum.num_documents, "document")} in ${counted(passages, "passage")}: ${sum.num_added} new, ` +
          `${sum.num_updated} changed, ${sum.num_unchanged} unchanged.`
        : "No document was added.",
    ];
    if (sum.num_truncated) lines.push(`${counted(sum.num_truncated, "passage")} read only in part by the student.`);
    if (sum.num_deleted) lines.push(`${counted(sum.num_deleted, "passage")} deleted: the documents no longer have them.`);
    const parts = lines.map((line) => element("p", {}, line));
    if (problem) {
      parts.push(element("p", { class: "problem" }, `${problem} ${counted(numLeft, "document")} not sent.`));
    }
    if (skipped.length) parts.push(skippedList(skipped));
    this.report.replaceChildren(...parts);
  }
}

function skippedList(skipped) {
  const shown = skipped
    .slice(0, LISTED)
    .map(({ path, reason }) => element("li", {}, element("bdi", { class: "path" }, path), `: ${reason}`));
  if (skipped.length > LISTED) shown.push(element("li", {}, `and ${skipped.length - LISTED} more`));
  return element(
    "details",
    { class: "skipped", open: skipped.length <= 5 },
    element("summary", {}, `${counted(skipped.length, "item")} skipped`),
    element("ul", {}, shown),
  );
}

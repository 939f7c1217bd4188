// Adds documents: sends files in batches to POST /v1/files, where they are read, and names all that were skipped.

import { fetchResponse } from "./api.js";
import { counted, element } from "./dom.js";
import { droppedFiles, isLeftOut, mostBytes, refusalOf } from "./files.js";

const BATCH_FILES = 16; // small, so that the progress bar moves and the server can answer searches in between
const BATCH_BYTES = 4_000_000;
const MAX_RETRIES = 5;
const LISTED = 100;
const FATAL = [0, 401, 403, 404, 429, 503]; // what other files would meet, too
const OUTCOMES = { num_added: "new", num_updated: "changed", num_metadata: "with other metadata", num_unchanged: "unchanged" };
const COUNTS = ["num_documents", ...Object.keys(OUTCOMES), "num_truncated", "num_deleted"];

/** Send files, as [file, path]. `onProgress` gets the number done and the total; `signal` stops the request in progress. */
export async function sendFiles(files, limits, { onProgress, signal }) {
  const sum = Object.fromEntries(COUNTS.map((name) => [name, 0]));
  const [skipped, leftOut] = [[], {}];
  let [done, numSent] = [0, 0];
  const send = async (part) => {
    try {
      const report = await patient(() => post(part, signal), signal);
      for (const name of COUNTS) sum[name] += report[name] || 0;
      for (const [field, count] of Object.entries(report.left_out)) leftOut[field] = (leftOut[field] || 0) + count;
      for (const { file, part: name, reason } of report.skipped) skipped.push({ path: name ? `${file}, ${name}` : file, reason });
      numSent += part.length;
    } catch (error) {
      if (error.name === "AbortError" || FATAL.includes(error.status)) throw error;
      // Some file makes the batch fail: send them one by one to find it.
      if (part.length > 1) {
        for (const one of part) await send([one]);
        return;
      }
      const [[, path]] = part;
      skipped.push({ path, reason: reasonOf(error.message, path) });
    }
    done += part.length;
    onProgress(done, files.length);
  };
  let problem = null;
  try {
    for (const part of batches(files, limits)) {
      signal.throwIfAborted();
      await send(part);
    }
  } catch (error) {
    problem = error.name === "AbortError" ? "Stopped." : error.message;
  }
  return { sum, numSent, skipped, leftOut, problem, numLeft: files.length - done };
}

/** Metadata values that do not fit their fields are left out and counted, as when a folder is read. */
async function post(part, signal) {
  const form = new FormData();
  for (const [file, path] of part) form.append("file", file, path);
  return (await fetchResponse("/v1/files?lenient_metadata=true", { method: "POST", form, signal })).json();
}

/** The reason in a server's message, which names the file first, and the line if there is one. */
function reasonOf(message, path) {
  if (!message.startsWith(`${path}:`)) return message;
  return message.slice(path.length + 1).trim().replace(/^\d+: /, "line $&");
}

function* batches(files, limits) {
  let [part, size] = [[], 0];
  for (const one of files) {
    const [{ size: bytes }] = one;
    if (part.length && (part.length >= BATCH_FILES || size + bytes > Math.min(BATCH_BYTES, mostBytes(limits) / 2))) {
      yield part;
      [part, size] = [[], 0];
    }
    part.push(one);
    size += bytes;
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
  constructor({ panel, folder, files, stop, bar, report }, { limits, isWritable, onDone }) {
    Object.assign(this, { panel, stop, bar, report, limits, isWritable, onDone });
    for (const input of [folder, files]) {
      input.addEventListener("change", () => {
        this.#take([...input.files].map((file) => [file, file.webkitRelativePath || file.name]));
        input.value = "";
      });
    }
    stop.addEventListener("click", () => this.controller?.abort());
    this.#acceptDrops();
  }

  /** Files may be dropped anywhere on the page. */
  #acceptDrops() {
    const hasFiles = (event) => event.dataTransfer?.types.includes("Files") && this.isWritable();
    for (const event of ["dragenter", "dragover"]) {
      document.addEventListener(event, (dragged) => {
        if (!hasFiles(dragged)) return;
        dragged.preventDefault();
        document.body.classList.add("dropping");
      });
    }
    const end = () => document.body.classList.remove("dropping");
    document.addEventListener("dragleave", (event) => {
      if (!event.relatedTarget) end(); // it left the window
    });
    document.addEventListener("drop", async (event) => {
      end();
      if (!hasFiles(event)) return;
      event.preventDefault();
      try {
        this.#take(await droppedFiles(event.dataTransfer));
      } catch (error) {
        this.#say(element("p", { class: "problem" }, `What was dropped cannot be read: ${error.message || error}`));
      }
    });
  }

  async #take(files) {
    if (!files.length) return;
    if (this.controller) {
      this.numLate += files.length; // the report says so
      return;
    }
    this.controller = new AbortController();
    this.numLate = 0;
    this.stop.hidden = this.bar.hidden = false;
    this.bar.removeAttribute("value");
    try {
      const { chosen, skipped, numLeftOut } = this.#choose(files);
      const onProgress = (done, all) => {
        [this.bar.max, this.bar.value] = [all, done];
        this.#say(`Reading files: ${done.toLocaleString("en")} of ${all.toLocaleString("en")} …`);
      };
      if (chosen.length) onProgress(0, chosen.length);
      const result = await sendFiles(chosen, this.limits(), { onProgress, signal: this.controller.signal });
      this.#showReport({ ...result, skipped: [...skipped, ...result.skipped], numLeftOut });
      if (result.sum.num_documents || result.sum.num_deleted) this.onDone();
    } catch (error) {
      this.#say(element("p", { class: "problem" }, error.message));
    } finally {
      this.stop.hidden = this.bar.hidden = true;
      this.controller = null;
    }
  }

  /** The files to send, those that cannot be read with the reason, and how many are in folders that are left out. */
  #choose(files) {
    const [chosen, skipped, paths] = [[], [], new Set()];
    let numLeftOut = 0;
    for (const [file, path] of files) {
      if (isLeftOut(path, this.limits().excluded)) {
        numLeftOut += 1;
        continue;
      }
      const reason = paths.has(path) ? "another file has the same name" : refusalOf(file, path, this.limits());
      paths.add(path);
      if (reason) skipped.push({ path, reason });
      else chosen.push([file, path]);
    }
    return { chosen, skipped, numLeftOut };
  }

  #say(...contents) {
    this.panel.open = true;
    this.report.replaceChildren(...contents);
  }

  #showReport({ sum, numSent, skipped, leftOut, numLeftOut, problem, numLeft }) {
    const passages = Object.keys(OUTCOMES).reduce((total, name) => total + sum[name], 0);
    const outcomes = Object.entries(OUTCOMES)
      .filter(([name]) => sum[name])
      .map(([name, word]) => `${sum[name].toLocaleString("en")} ${word}`);
    const lines = [
      sum.num_documents
        ? `${counted(numSent, "file")} read: ${counted(sum.num_documents, "document")} in ${counted(passages, "passage")}: ${outcomes.join(", ")}.`
        : "No document was added.",
    ];
    if (sum.num_truncated) lines.push(`${counted(sum.num_truncated, "passage")} read only in part by the student.`);
    if (sum.num_deleted) lines.push(`${counted(sum.num_deleted, "passage")} deleted: the documents no longer have them.`);
    for (const [field, count] of Object.entries(leftOut)) {
      lines.push(`${counted(count, "value")} of the field ${field} left out: of another type than those in the index.`);
    }
    if (this.numLate) lines.push(`${counted(this.numLate, "file")} not added, because others were being read: add them again.`);
    if (numLeftOut) lines.push(`${counted(numLeftOut, "hidden file")} left out, as when a folder is read.`);
    const parts = lines.map((line) => element("p", {}, line));
    if (problem) {
      parts.push(element("p", { class: "problem" }, `${problem} ${counted(numLeft, "file")} not sent.`));
    }
    if (skipped.length) parts.push(skippedList(skipped));
    this.#say(...parts);
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

// Facts about the index.

import { bytes, element } from "./dom.js";
import { sourcesText, sumText } from "./score.js";
import { calibratedRerankers } from "./search.js";

const MAX_FIELDS = 8; // the filter lists all of them

function shardText(index) {
  const numMissing = index.missing_shards.length;
  return `${index.num_shards}${numMissing ? `, ${numMissing} of them missing` : ""}`;
}

/** The facts about an index, as list items. */
export function factList(index) {
  const { student } = index;
  const fields = Object.entries(index.fields).map(([name, type]) => `${name} (${type})`);
  if (fields.length > MAX_FIELDS) fields.push(`and ${fields.splice(MAX_FIELDS).length} more`);
  const facts = [
    ["Index", index.name],
    ["Passages", index.num_passages.toLocaleString("en")],
    ["Documents", cutText(index.chunking)],
    ...(index.num_shards === null ? [] : [["Shards", shardText(index)]]),
    ["Version", String(index.version)],
    ["On disk", `${bytes(index.num_bytes)}, ${bytes(index.bytes_per_passage)} per passage`],
    ["Vectors", `${student.dim} × ${index.vector_format}${index.vector_copies === 2 ? ", stored twice" : ""}`],
    ["Student", student.name],
    ["Score", sumText("iem", index)],
    ["Candidates", index.candidate_sources.length ? sourcesText(index.candidate_sources) : "all passages"],
    ["Backbone", student.backbone],
    ["Teacher", teacherText(index)],
    ["Fields", fields.join(", ") || "none"],
    ["Shortcuts", index.has_ann ? "approximate index" : "none"],
    ["Snapshots", index.snapshots.join(", ") || "none"],
    ["Task", index.task],
    ["d2llm", index.d2llm],
  ];
  return facts.map(([name, value]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, element("bdi", {}, value))),
  );
}

function cutText(chunking) {
  if (!chunking) return "none yet, only passages";
  return chunking.chunk_tokens ? `split at ${chunking.chunk_tokens} tokens` : "not split";
}

function teacherText({ teacher, rescore }) {
  if (!teacher) return "none";
  const without = calibratedRerankers().filter((kind) => !rescore.includes(kind));
  return without.length ? `${teacher}, not calibrated: no ${without.join(", no ")}` : teacher;
}

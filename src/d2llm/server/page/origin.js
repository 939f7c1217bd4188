// Where a passage is from: its document, its place in it, the file and the address, each said once.

import { bytes, element, timestamp } from "./dom.js";

/** What stands between a document's title and the headings above a passage. */
export const SEPARATOR = " > ";
/** Fields that files have; the page words them itself. */
export const FILE_FIELDS = ["path", "modified", "file_bytes", "page", "row", "num_rows", "num_passages", "heading"];
const IN_BYTES = /(^|_)bytes$/;

/** The id of a passage's document: its own, if it belongs to none. */
export function documentOf(passage) {
  return passage.document_id || passage.id;
}

/** The name of a passage's document: the path of its file, or its id. A row of a table is named after the table. */
export function documentName(passage) {
  const { path } = passage.metadata;
  return typeof path === "string" && path ? path : documentOf(passage);
}

/** Whether a title is a document's name, or begins with it: that of a text without one, above its headings. */
export function isNamedBy(title, name) {
  return title === name || title.startsWith(`${name}${SEPARATOR}`);
}

/** Whether a passage's id is its document's and its number, as in documents that were split here. */
function isNumbered({ id, document_id: documentId, position }) {
  return Boolean(documentId) && id === `${documentId}#${position}`;
}

/** Where in its document a passage is, as short texts. */
export function positionsOf(passage) {
  const { page, row, num_rows: numRows, num_passages: numPassages } = passage.metadata;
  const positions = [];
  if (typeof page === "number") positions.push(`page ${page}`);
  if (typeof row === "number") positions.push(`row ${row}${numRows ? ` of ${numRows.toLocaleString("en")}` : ""}`);
  if (numPassages > 1) positions.push(`passage ${passage.position} of ${numPassages.toLocaleString("en")}`);
  else if (!numPassages && isNumbered(passage)) positions.push(`passage ${passage.position}`);
  return positions;
}

/** Size and time of a passage's file, as short texts. */
export function fileFacts({ metadata }) {
  const facts = [];
  if (!metadata.path) return facts;
  if (typeof metadata.file_bytes === "number") facts.push(bytes(metadata.file_bytes));
  if (typeof metadata.modified === "string") facts.push(`changed ${timestamp(metadata.modified)}`);
  return facts;
}

/** Metadata of a passage's own, as [name, value, text]; not what says again where the passage is. */
export function ownFields(passage, types) {
  const said = new Set([documentName(passage), documentOf(passage), passage.id]);
  return Object.entries(passage.metadata)
    .filter(([name, value]) => value !== null && value !== "" && !isFileField(name, passage) && !said.has(value))
    .map(([name, value]) => [name, value, valueText(name, value, types[name])]);
}

/** A passage's id, if it is more than the document and a number, and not the heading of its card; else "". */
export function ownId(passage, heading) {
  const isSaid = [heading, documentName(passage), documentOf(passage)].includes(passage.id);
  return isSaid || isNumbered(passage) ? "" : passage.id;
}

/** The web addresses in a passage's metadata. */
export function addressesOf({ metadata, ...passage }) {
  const values = [...Object.values(metadata), passage.document_id, passage.id];
  return [...new Set(values.filter((value) => typeof value === "string" && isAddress(value)))];
}

/** A link to an address that a document names, without telling it where the reader comes from. */
export function outsideLink(address) {
  return element("a", { href: address, target: "_blank", rel: "noopener noreferrer", class: "outside" }, address, " ↗");
}

function isAddress(text) {
  if (!/^https?:\/\/\S+$/i.test(text)) return false;
  try {
    return Boolean(new URL(text).host);
  } catch {
    return false;
  }
}

/** Whether a field is one that the page words itself; documents that are no files may have fields of these names. */
function isFileField(name, { metadata, title }) {
  if (!FILE_FIELDS.includes(name)) return false;
  if (name === "heading") return title.endsWith(String(metadata.heading));
  if (name === "path") return typeof metadata.path === "string";
  if (name === "modified" || name === "file_bytes") return Boolean(metadata.path);
  return typeof metadata[name] === "number";
}

function valueText(name, value, type) {
  if (type === "timestamp") return timestamp(value);
  if (typeof value === "number" && Number.isInteger(value) && IN_BYTES.test(name)) return bytes(value);
  return String(value);
}

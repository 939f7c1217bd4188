// Reads documents from files in the browser: text, Markdown, HTML, CSV and JSON Lines.

const MAX_BYTES = 8_000_000; // per file
const TEXT_COLUMNS = ["text", "body", "content", "passage"];
const ID_COLUMNS = ["id", "_id"];
const RESERVED = new Set(["id", "_id", "title", "text", "document_id", "position"]);
const FIELD_NAME = /^[A-Za-z_][A-Za-z0-9_]{0,63}$/;
const INVISIBLE = "script, style, template, noscript, svg, head";
const BLOCKS = new Set(
  ("ADDRESS ARTICLE ASIDE BLOCKQUOTE BR DD DIV DL DT FIGCAPTION FIGURE FOOTER FORM H1 H2 H3 H4 H5 H6 HEADER HR LI MAIN " +
    "NAV OL P PRE SECTION TABLE TD TH TR UL").split(" "),
);
const READERS = {
  txt: (text, path) => [{ id: path, title: "", text, metadata: {} }],
  md: (text, path) => [{ id: path, title: /^#\s+(.+?)\s*#*$/m.exec(text)?.[1] || "", text, metadata: {} }],
  html: readHtml,
  htm: readHtml,
  csv: readCsv,
  jsonl: readJsonLines,
};

/** The documents of a file, and the parts that were skipped, with reasons. `types` are the types of the index's fields. */
export async function readFile(file, path, types) {
  const skip = (reason) => ({ documents: [], skipped: [{ path, reason }] });
  const ending = /\.([^./\\]+)$/.exec(path)?.[1].toLowerCase();
  if (!ending || !Object.hasOwn(READERS, ending)) return skip("its file type is not supported");
  if (file.size > MAX_BYTES) return skip("it is larger than 8 MB");
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
  } catch {
    return skip("it is not UTF-8 text, or cannot be read");
  }
  try {
    const skipped = [];
    const note = (reason, place) => skipped.push({ path: place ? `${path}, ${place}` : path, reason });
    const documents = READERS[ending](text, path, note, types).filter((one) => {
      if (one.text.trim()) return true;
      note("it has no text", one.id === path ? "" : one.id);
      return false;
    });
    return { documents, skipped };
  } catch (error) {
    return skip(error.message);
  }
}

/** The visible text of HTML. A document that is only parsed runs no scripts and loads nothing. */
export function readHtml(text, path) {
  const page = new DOMParser().parseFromString(text, "text/html");
  const title = (page.querySelector("title")?.textContent || "").trim().replace(/\s+/g, " ");
  for (const node of page.querySelectorAll(INVISIBLE)) node.remove();
  const parts = [];
  const read = (node) => {
    if (node.nodeType === Node.TEXT_NODE) parts.push(node.data.replace(/\s+/g, " "));
    if (node.nodeType !== Node.ELEMENT_NODE) return;
    const block = BLOCKS.has(node.tagName);
    if (block) parts.push("\n");
    node.childNodes.forEach(read);
    if (block) parts.push("\n");
  };
  if (page.body) read(page.body);
  const plain = parts.join("").replace(/ *\n\s*/g, "\n").trim();
  return [{ id: path, title, text: plain, metadata: {} }];
}

/** The rows of a CSV file (RFC 4180): quoted fields may hold commas, quotes and line breaks. */
export function csvRows(text) {
  const rows = [];
  let [row, field, inQuotes] = [[], "", false];
  const endField = () => {
    row.push(field);
    field = "";
  };
  const endRow = () => {
    endField();
    if (row.length > 1 || row[0] !== "") rows.push(row);
    row = [];
  };
  for (let place = text.startsWith("\ufeff") ? 1 : 0; place < text.length; place += 1) {
    const sign = text[place];
    if (inQuotes && sign === '"' && text[place + 1] === '"') {
      field += '"';
      place += 1;
    } else if (sign === '"' && (inQuotes || field === "")) inQuotes = !inQuotes;
    else if (inQuotes) field += sign;
    else if (sign === ",") endField();
    else if (sign === "\n") endRow();
    else if (sign !== "\r") field += sign;
  }
  if (inQuotes) throw new Error("it has an unterminated quoted field");
  if (field || row.length) endRow();
  return rows;
}

function readCsv(text, path, note, types) {
  const [header = [], ...rows] = csvRows(text);
  const names = header.map((name) => name.trim());
  const column = (candidates) => names.findIndex((name) => candidates.includes(name.toLowerCase()));
  const [texts, ids, titles] = [column(TEXT_COLUMNS), column(ID_COLUMNS), column(["title"])];
  if (texts < 0) throw new Error("its first line has no column named text");
  return rows.flatMap((row, number) => {
    if (row.length !== names.length) {
      note(`it has ${row.length} fields, but the first line has ${names.length}`, `row ${number + 1}`);
      return [];
    }
    const values = Object.fromEntries(
      names.map((name, place) => [name, row[place]]).filter((_, place) => ![texts, ids, titles].includes(place)),
    );
    const id = (ids >= 0 && row[ids].trim()) || `${path}:${number + 1}`;
    return [{ id, title: titles < 0 ? "" : row[titles], text: row[texts], metadata: metadataOf(values, types) }];
  });
}

function readJsonLines(text, path, note, types) {
  return text.split("\n").flatMap((line, number) => {
    if (!line.trim()) return [];
    let record;
    try {
      record = JSON.parse(line);
    } catch {
      note("it is not valid JSON", `line ${number + 1}`);
      return [];
    }
    const body = TEXT_COLUMNS.map((name) => record?.[name]).find((value) => typeof value === "string");
    if (body === undefined) {
      note("it has no field named text", `line ${number + 1}`);
      return [];
    }
    const id = String(record.id ?? record._id ?? `${path}:${number + 1}`);
    const { metadata, ...others } = record;
    for (const name of TEXT_COLUMNS) if (others[name] === body) delete others[name];
    const values = metadata && typeof metadata === "object" ? metadata : others;
    return [{ id, title: String(record.title ?? ""), text: body, metadata: metadataOf(values, types) }];
  });
}

/** The values that can be metadata, converted to the types of the index's existing fields. */
function metadataOf(values, types) {
  const fields = {};
  for (const [name, value] of Object.entries(values)) {
    const isBlank = typeof value === "string" && !value.trim();
    if (!FIELD_NAME.test(name) || RESERVED.has(name) || isBlank || (value !== null && typeof value === "object")) {
      continue;
    }
    fields[name] = typeof value === "string" ? typed(value, types[name]) : value;
  }
  return fields;
}

function typed(value, type) {
  if (type === "boolean" && /^(true|false)$/i.test(value)) return value.toLowerCase() === "true";
  if ((type === "integer" || type === "number") && Number.isFinite(Number(value))) return Number(value);
  return value;
}

/** All dropped files, including those inside dropped folders, as [file, path] pairs. */
export async function droppedFiles(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files].map((file) => [file, file.name]);
  const results = [];
  const walk = async (entry, path) => {
    if (entry.isFile) {
      results.push([await new Promise((resolve, reject) => entry.file(resolve, reject)), path]);
      return;
    }
    const reader = entry.createReader();
    for (;;) {
      // A reader returns part of a folder at a time, and an empty list at the end.
      const part = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
      if (!part.length) return;
      for (const inside of part) await walk(inside, `${path}/${inside.name}`);
    }
  };
  for (const entry of entries) await walk(entry, entry.name);
  return results;
}

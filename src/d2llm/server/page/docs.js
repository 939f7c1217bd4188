// The API documentation from /openapi.json: operations, bodies with their fields, answers, and a form to try each.

import { BASE } from "./address.js";
import { apiKey, fetchResponse } from "./api.js";
import { byId, element, milliseconds } from "./dom.js";
import { installTheme } from "./theme.js";

const FORM_TYPE = "multipart/form-data";
const METHODS = ["get", "post", "put", "patch", "delete"];
const MAX_DEPTH = 6; // of nested schemas
let api;

async function show() {
  try {
    api = await (await fetchResponse("/openapi.json")).json();
  } catch (error) {
    byId("operations").replaceChildren(element("p", { class: "problem" }, error.message));
    return;
  }
  byId("title").textContent = `${api.info.title} ${api.info.version}`;
  byId("summary").textContent = api.info.summary || "";
  const groups = new Map();
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const method of METHODS.filter((name) => methods[name])) {
      const tag = methods[method].tags?.[0] || "others";
      if (!groups.has(tag)) groups.set(tag, []);
      groups.get(tag).push({ path, method, about: methods[method] });
    }
  }
  byId("contents").replaceChildren(
    ...[...groups.keys()].map((tag) => element("a", { href: `#group-${tag}` }, tag)),
  );
  byId("operations").replaceChildren(
    ...[...groups].map(([tag, operations]) =>
      element("section", { id: `group-${tag}` }, element("h2", {}, tag), operations.map(operationOf)),
    ),
  );
}

function operationOf({ path, method, about }) {
  const content = about.requestBody?.content || {};
  const body = (content["application/json"] || Object.values(content)[0])?.schema;
  const answers = Object.entries(about.responses || {});
  return element(
    "details",
    { class: "operation" },
    element(
      "summary",
      {},
      element("span", { class: `method ${method}` }, method.toUpperCase()),
      element("code", { class: "path" }, path),
      element("span", { class: "quiet" }, withCode(firstSentence(about.description || about.summary || ""))),
    ),
    element("p", {}, withCode(about.description || about.summary || "")),
    parameters(about.parameters || []),
    body ? [element("h3", {}, "Body"), fieldsOf(body, 0)] : null,
    element("h3", {}, "Answers"),
    answers.map(([status, answer]) => responseOf(status, answer)),
    trial(path, method, about.parameters || [], body, FORM_TYPE in content),
  );
}

/** A text with ``names`` rendered as code. */
function withCode(text) {
  return text.split("``").map((part, index) => (index % 2 ? element("code", {}, part) : part));
}

function firstSentence(text) {
  return text.split(/[.:\n]/, 1)[0];
}

function parameters(list) {
  if (!list.length) return null;
  const rows = list.map((one) => row(one.name, one.schema || {}, one.required, `in the ${one.in}`));
  return [element("h3", {}, "Parameters"), element("dl", { class: "fields" }, rows)];
}

function responseOf(status, answer) {
  const schema = answer.content?.["application/json"]?.schema;
  const heading = [element("b", {}, status), ` ${answer.description || ""}`];
  if (!schema || !Object.keys(schema).length) return element("p", { class: "answer" }, heading);
  const open = status.startsWith("2");
  return element("details", { class: "answer", open }, element("summary", {}, heading), fieldsOf(schema, 0));
}

/** A schema with its references resolved. */
function resolved(schema) {
  let definition = schema;
  while (definition.$ref) {
    const target = definition.$ref.split("/").slice(1).reduce((schema, name) => schema?.[name], api);
    definition = { ...target, ...Object.fromEntries(Object.entries(definition).filter(([name]) => name !== "$ref")) };
  }
  return definition;
}

function fieldsOf(schema, depth) {
  const definition = resolved(schema);
  const inside = innerOf(definition);
  if (!inside || depth >= MAX_DEPTH) return element("p", { class: "type" }, typeOf(definition));
  const required = new Set(inside.required || []);
  const rows = Object.entries(inside.properties).map(([name, one]) => row(name, one, required.has(name), "", depth));
  return element("dl", { class: "fields" }, rows);
}

/** The object schema that a schema is, is a list of, or has as an alternative. */
function innerOf(schema) {
  const definition = resolved(schema);
  if (definition.properties) return definition;
  if (definition.items) return innerOf(definition.items);
  for (const one of definition.anyOf || definition.oneOf || []) {
    const inner = innerOf(one);
    if (inner) return inner;
  }
  return null;
}

function row(name, schema, required, where, depth = 0) {
  const definition = resolved(schema);
  const remarks = [where, required ? "required" : "", ...limitsOf(definition)].filter(Boolean).join(", ");
  const inner = innerOf(definition);
  return element(
    "div",
    {},
    element("dt", {}, element("code", {}, name), element("span", { class: "type" }, ` ${typeOf(definition)}`)),
    element(
      "dd",
      {},
      definition.description ? element("p", {}, withCode(definition.description)) : null,
      remarks ? element("p", { class: "quiet" }, remarks) : null,
      inner && depth < MAX_DEPTH
        ? element("details", {}, element("summary", {}, inner.title || "fields"), fieldsOf(inner, depth + 1))
        : null,
    ),
  );
}

function typeOf(schema) {
  const definition = resolved(schema);
  if (definition.const !== undefined) return JSON.stringify(definition.const);
  if (definition.enum) return definition.enum.map((value) => JSON.stringify(value)).join(" | ");
  const several = definition.anyOf || definition.oneOf;
  if (several) return several.map(typeOf).join(" | ");
  if (definition.type === "array") return `${typeOf(definition.items || {})}[]`;
  if (definition.properties) return definition.title || "object";
  if (definition.additionalProperties && typeof definition.additionalProperties === "object") {
    return `{name: ${typeOf(definition.additionalProperties)}}`;
  }
  return definition.type || "anything";
}

function limitsOf(schema) {
  const words = {
    default: "default",
    minimum: "at least",
    maximum: "at most",
    exclusiveMinimum: "more than",
    minLength: "minimum length",
    maxLength: "maximum length",
    minItems: "minimum number of items",
    maxItems: "maximum number of items",
    pattern: "pattern",
  };
  const parts = [schema, ...(schema.anyOf || [])];
  return Object.entries(words).flatMap(([name, word]) => {
    const value = parts.map((one) => one[name]).find((one) => one !== undefined && one !== null);
    return value === undefined ? [] : [`${word} ${JSON.stringify(value)}`];
  });
}

/** An example value for a schema. */
function exampleOf(schema, depth = 0) {
  const definition = resolved(schema);
  if (definition.examples?.length) return definition.examples[0];
  if (definition.example !== undefined) return definition.example;
  if (definition.default !== undefined) return definition.default;
  if (definition.const !== undefined) return definition.const;
  if (definition.enum) return definition.enum[0];
  if (definition.anyOf || definition.oneOf) return exampleOf((definition.anyOf || definition.oneOf)[0], depth);
  if (definition.properties) {
    const needed = (definition.required || Object.keys(definition.properties)).filter((name) => definition.properties[name]);
    return depth < MAX_DEPTH ? Object.fromEntries(needed.map((name) => [name, exampleOf(definition.properties[name], depth + 1)])) : {};
  }
  if (definition.type === "array") return [exampleOf(definition.items || {}, depth + 1)];
  return { string: "text", integer: definition.minimum ?? 1, number: 0.5, boolean: false, object: {} }[definition.type] ?? null;
}

function trial(path, method, parameters, body, isForm) {
  const inputs = parameters
    .filter((one) => one.in === "path" || one.in === "query")
    .map((one) => ({ about: one, input: element("input", { type: "text", "aria-label": `Parameter ${one.name}` }) }));
  const files = isForm ? element("input", { type: "file", multiple: true, "aria-label": `Files of ${method} ${path}` }) : null;
  const area = body && !isForm
    ? element("textarea", { rows: 8, spellcheck: "false", "aria-label": `Body of ${method} ${path}` }, JSON.stringify(exampleOf(body), null, 2))
    : null;
  const output = element("pre", { class: "output", tabindex: "0", "aria-label": "Answer", hidden: true });
  const heading = element("p", { role: "status", class: "quiet" }, apiKey() ? "Sent with this tab’s API key." : "");
  const button = element("button", { type: "button", class: "strong" }, "Send");
  button.addEventListener("click", () => send(path, method, inputs, area || files, output, heading));
  return element(
    "section",
    { class: "trial" },
    element("h3", {}, "Try it"),
    inputs.map(({ about, input }) => element("label", {}, `${about.name} `, input)),
    area,
    files,
    element("p", {}, button),
    heading,
    output,
  );
}

async function send(path, method, inputs, area, output, heading) {
  const query = new URLSearchParams();
  let address = BASE + path;
  for (const { about, input } of inputs) {
    if (about.in === "path") address = address.replace(`{${about.name}}`, encodeURIComponent(input.value));
    else if (input.value) query.set(about.name, input.value);
  }
  if ([...query].length) address += `?${query}`;
  const headers = apiKey() ? { Authorization: `Bearer ${apiKey()}` } : {};
  if (area && area.type !== "file") headers["Content-Type"] = "application/json";
  heading.textContent = "Waiting …";
  const startTime = performance.now();
  try {
    // The body is sent unchanged, so that users can also see the errors for invalid bodies.
    const response = await fetch(address, { method: method.toUpperCase(), headers, body: bodyOf(area) });
    const text = await response.text();
    heading.textContent = `${response.status} ${response.statusText}, ${milliseconds((performance.now() - startTime) / 1000)}`;
    output.textContent = pretty(text);
    output.hidden = false;
  } catch {
    heading.textContent = "The server cannot be reached.";
  }
}

/** What a text area or a choice of files holds, as the body of a request; undefined without either. */
function bodyOf(area) {
  if (area?.type !== "file") return area?.value;
  const form = new FormData();
  for (const file of area.files) form.append("file", file);
  return form;
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

installTheme(byId("theme"));
show();

// Metadata filters: controls that write conditions in the server's filter language.

import { element } from "./dom.js";

const PASSAGE_FIELDS = { id: "string", title: "string", document_id: "string", position: "integer" };
const COMPARISONS = [
  ["=", "is"],
  ["<>", "is not"],
];
const ORDER = [
  ["<", "less than"],
  ["<=", "at most"],
  [">", "more than"],
  [">=", "at least"],
];
const EMPTY = [
  ["IS NULL", "is empty"],
  ["IS NOT NULL", "is not empty"],
];
const OPERATORS = {
  string: [...COMPARISONS, ["contains", "contains"], ["begins", "begins with"], ...EMPTY],
  integer: [...COMPARISONS, ...ORDER, ...EMPTY],
  number: [...COMPARISONS, ...ORDER, ...EMPTY],
  boolean: [["IS TRUE", "is true"], ["IS FALSE", "is false"], ...EMPTY],
  timestamp: [...COMPARISONS, ["<", "before"], [">=", "not before"], [">", "after"], ...EMPTY],
};
const AND = " AND ";
const INPUTS = { integer: "number", number: "number", timestamp: "date" };

/** One condition, as text; null if its value is not valid. */
export function condition(field, type, operator, value) {
  if (operator.startsWith("IS ")) return `${field} ${operator}`;
  const text = value.trim();
  if (type === "integer") return /^-?\d+$/.test(text) ? `${field} ${operator} ${text}` : null;
  if (type === "number") {
    return text !== "" && Number.isFinite(Number(text)) ? `${field} ${operator} ${Number(text)}` : null;
  }
  if (type === "timestamp") return text ? `${field} ${operator} ${quoted(text)}` : null;
  const pattern = value.replace(/[\\%_]/g, (sign) => `\\${sign}`);
  if (operator === "contains") return value ? `${field} LIKE ${quoted(`%${pattern}%`)}` : null;
  if (operator === "begins") return value ? `${field} LIKE ${quoted(`${pattern}%`)}` : null;
  return `${field} ${operator} ${quoted(value)}`;
}

/** A condition that a field equals a value, as shown on a passage's card. */
export function conditionFor(field, type, value) {
  if (type === "boolean") return condition(field, type, value ? "IS TRUE" : "IS FALSE", "");
  return condition(field, type, "=", String(value));
}

/** Combine a filter with another condition by AND; a condition that is null changes nothing. */
export function joined(filter, more) {
  if (more === null) return filter;
  if (!filter.trim()) return more;
  // Also around "(a) OR (b)", which only looks like one group; parentheses too many do no harm.
  const first = /\bOR\b/i.test(filter) ? `(${filter.trim()})` : filter.trim();
  return first + AND + more;
}

/** Whether a filter is this condition, or joins it by AND. */
export function hasCondition(filter, one) {
  return filter.split(AND).includes(one);
}

/** A filter without a condition that it has. */
export function without(filter, one) {
  return filter
    .split(AND)
    .filter((other) => other !== one)
    .join(AND);
}

function quoted(text) {
  return `'${text.replaceAll("'", "''")}'`;
}

/** The filter controls. Their fields come from the index; each new condition is added to the filter box. */
export class FilterBuilder {
  constructor({ field, operator, value, add }, onCondition) {
    Object.assign(this, { field, operator, value, add, onCondition });
    this.types = {};
    field.addEventListener("change", () => this.#showOperators());
    operator.addEventListener("change", () => this.#showValue());
    add.addEventListener("click", () => this.#add());
    value.addEventListener("keydown", (event) => {
      if (event.key === "Enter") this.#add();
    });
  }

  /** Show the fields of an index. */
  setFields(fields) {
    this.types = { ...fields, ...PASSAGE_FIELDS };
    const chosen = this.field.value;
    const option = (name) => element("option", { value: name }, name);
    const groups = [
      ["Metadata", Object.keys(fields)],
      ["Every passage", Object.keys(PASSAGE_FIELDS)],
    ];
    this.field.replaceChildren(
      ...groups
        .filter(([, names]) => names.length)
        .map(([label, names]) => element("optgroup", { label }, names.map(option))),
    );
    if (chosen in this.types) this.field.value = chosen;
    this.#showOperators();
  }

  #showOperators() {
    const operators = OPERATORS[this.types[this.field.value]] || OPERATORS.string;
    this.operator.replaceChildren(...operators.map(([value, label]) => element("option", { value }, label)));
    this.#showValue();
  }

  #showValue() {
    const type = this.types[this.field.value];
    const input = INPUTS[type] || "text";
    if (this.value.type !== input) this.value.value = "";
    this.value.type = input;
    this.value.step = type === "number" ? "any" : "1";
    this.value.hidden = this.operator.value.startsWith("IS ");
    this.value.setCustomValidity("");
  }

  #add() {
    const type = this.types[this.field.value];
    const newCondition = condition(this.field.value, type, this.operator.value, this.value.value);
    if (newCondition === null) {
      this.value.setCustomValidity(type === "integer" ? "Enter a whole number" : "Enter a value");
      this.value.reportValidity();
      this.value.addEventListener("input", () => this.value.setCustomValidity(""), { once: true });
      return;
    }
    this.value.value = "";
    this.onCondition(newCondition);
  }
}

// How often the values of metadata fields occur, as buttons that filter by them.

import { element } from "./dom.js";
import { conditionFor, hasCondition } from "./filters.js";
import { FILE_FIELDS } from "./origin.js";

const COUNTED = ["string", "boolean", "integer"]; // types whose values recur
const SHOWN = 8; // values of a field

/** The fields to count, at most `most`. */
export function facetFields(fields, most) {
  return Object.keys(fields)
    .filter((name) => COUNTED.includes(fields[name]) && (name === "path" || !FILE_FIELDS.includes(name)))
    .slice(0, most);
}

/** Show the counts of a search; the focus stays on its button. */
export function showFacets(area, facets, index, filter, onValue) {
  const { facet } = area.contains(document.activeElement) ? document.activeElement.dataset : {};
  area.replaceChildren(...facetGroups(facets, index, filter, onValue));
  if (facet) [...area.querySelectorAll("button")].find((one) => one.dataset.facet === facet)?.focus();
}

/** A group for each field whose values say more than which passage it is. */
function facetGroups(facets, index, filter, onValue) {
  return Object.entries(facets).flatMap(([name, { values, num_values: numValues }]) => {
    const isOn = ({ value }) => hasCondition(filter, conditionFor(name, index.fields[name], value));
    if (!values.some(isOn) && (numValues < 2 || values[0].num_passages < 2)) return [];
    const buttons = values.slice(0, SHOWN).map((one) => element("li", {}, button(name, one, isOn(one), onValue)));
    if (numValues > SHOWN) buttons.push(element("li", { class: "quiet" }, `and ${(numValues - SHOWN).toLocaleString("en")} more`));
    return [element("div", { class: "facet" }, element("dt", {}, name), element("dd", {}, element("ul", {}, buttons)))];
  });
}

function button(name, { value, num_passages: all, num_candidates: found }, isOn, onValue) {
  return element(
    "button",
    {
      type: "button",
      class: "small",
      "data-facet": `${name}: ${value}`,
      "aria-pressed": String(isOn),
      title: `${all.toLocaleString("en")} passages, ${found.toLocaleString("en")} of them candidates of this question`,
      on: { click: () => onValue(name, value) },
    },
    element("bdi", {}, String(value)),
    element("span", { class: "count" }, all.toLocaleString("en")),
  );
}

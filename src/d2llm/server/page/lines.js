// Lines between rankings side by side, joining the places of the same passage. Visual only; cards also say it in words.

import { svg } from "./dom.js";

/** Redraw the lines between columns: one drawing for each gap, so that lines never overlap text. */
export function drawLines(area) {
  for (const old of area.querySelectorAll(":scope > .lines")) old.remove();
  const columns = [...area.querySelectorAll(".column")];
  const frame = area.getBoundingClientRect();
  const drawings = columns.slice(1).map((right, index) => drawing(columns[index], right, frame, area.dataset.traced));
  area.prepend(...drawings.filter(Boolean)); // after measuring, to avoid a layout for each of hundreds of lines
}

/** The lines from a column to the next; null if one is below the other. */
function drawing(left, right, frame, traced) {
  const [begin, end] = [left.getBoundingClientRect().right, right.getBoundingClientRect().left];
  if (end <= begin) return null;
  const from = new Map([...left.querySelectorAll(".card")].map((one) => [one.dataset.id, one]));
  const lines = [...right.querySelectorAll(".card")]
    .filter((card) => from.has(card.dataset.id))
    .map((card) => line(from.get(card.dataset.id), card, { top: frame.top, width: end - begin }));
  for (const one of lines) one.classList.toggle("traced", one.dataset.id === traced);
  const size = { width: end - begin, height: frame.height };
  const made = svg("svg", { class: "lines", ...size, "aria-hidden": "true", focusable: "false" }, lines);
  made.style.left = `${begin - frame.left}px`;
  return made;
}

function line(left, right, { top, width }) {
  const [y1, y2] = [left, right].map((card) => {
    const box = card.querySelector("header").getBoundingClientRect();
    return box.top + box.height / 2 - top;
  });
  const [before, now] = [left, right].map((card) => Number(card.querySelector(".rank").lastChild.data));
  const direction = now < before ? "up" : now > before ? "down" : "same";
  const middle = width / 2;
  return svg(
    "g",
    { class: `line ${direction}`, "data-id": right.dataset.id },
    svg("path", { d: `M 0 ${y1} C ${middle} ${y1}, ${middle} ${y2}, ${width} ${y2}` }),
    svg("circle", { cx: 0, cy: y1, r: 3 }),
    svg("circle", { cx: width, cy: y2, r: 3 }),
  );
}

/** Highlight a card's lines while it has the pointer or the focus. */
export function followCards(area) {
  const show = (event) => {
    const leaving = event.type === "pointerout" || event.type === "focusout";
    const identity = leaving ? undefined : event.target.closest?.(".card")?.dataset.id;
    if (identity === undefined) delete area.dataset.traced;
    else area.dataset.traced = identity;
    for (const one of area.querySelectorAll(".line")) one.classList.toggle("traced", one.dataset.id === identity);
  };
  for (const event of ["pointerover", "pointerout", "focusin", "focusout"]) area.addEventListener(event, show);
}

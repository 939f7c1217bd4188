// Lines between rankings side by side: they join the places of one passage. For the eye alone; cards say it in words.

import { svg } from "./dom.js";

/** Draw the lines between columns into an SVG that covers them. */
export function drawLines(area, canvas) {
  const columns = [...area.querySelectorAll(".column")];
  const frame = area.getBoundingClientRect();
  canvas.replaceChildren();
  canvas.setAttribute("viewBox", `0 0 ${frame.width} ${frame.height}`);
  canvas.setAttribute("width", frame.width);
  canvas.setAttribute("height", frame.height);
  columns.slice(1).forEach((right, place) => {
    const left = columns[place];
    if (right.getBoundingClientRect().left < left.getBoundingClientRect().right) return; // one below the other
    const from = new Map([...left.querySelectorAll(".card")].map((one) => [one.dataset.id, one]));
    for (const card of right.querySelectorAll(".card")) {
      const other = from.get(card.dataset.id);
      if (other) canvas.append(line(other, card, frame));
    }
  });
}

function line(left, right, frame) {
  const [a, b] = [left.getBoundingClientRect(), right.getBoundingClientRect()];
  const [x1, x2] = [a.right - frame.left, b.left - frame.left];
  const [y1, y2] = [left, right].map((card) => {
    const box = card.querySelector("header").getBoundingClientRect();
    return box.top + box.height / 2 - frame.top;
  });
  const [before, now] = [left, right].map((card) => Number(card.querySelector(".rank").lastChild.data));
  const direction = now < before ? "up" : now > before ? "down" : "same";
  const middle = (x1 + x2) / 2;
  return svg(
    "g",
    { class: `line ${direction}`, "data-id": right.dataset.id },
    svg("path", { d: `M ${x1} ${y1} C ${middle} ${y1}, ${middle} ${y2}, ${x2} ${y2}` }),
    svg("circle", { cx: x1, cy: y1, r: 3 }),
    svg("circle", { cx: x2, cy: y2, r: 3 }),
  );
}

/** Let a card's lines stand out while it has the pointer or the focus. */
export function followCards(area, canvas) {
  const show = (event) => {
    const identity = event.target.closest?.(".card")?.dataset.id;
    const leaving = event.type === "pointerout" || event.type === "focusout";
    area.classList.toggle("tracing", !leaving && identity !== undefined);
    for (const one of canvas.querySelectorAll(".line")) {
      one.classList.toggle("traced", !leaving && one.dataset.id === identity);
    }
  };
  for (const event of ["pointerover", "pointerout", "focusin", "focusout"]) area.addEventListener(event, show);
}

// Keyboard navigation: "/" focuses the search box, arrows or h j k l move between cards, Enter explains,
// o opens the document, Escape closes.

const KEPT = "d2llm-letters";
const STEPS = { ArrowDown: [1, 0], j: [1, 0], ArrowUp: [-1, 0], k: [-1, 0], ArrowRight: [0, 1], l: [0, 1], ArrowLeft: [0, -1], h: [0, -1] };

/** `letters` is the checkbox for single-letter keys, which speech input and accidental key presses can trigger. */
export function installKeyboard(box, results, letters) {
  letters.checked = localStorage.getItem(KEPT) !== "off";
  letters.addEventListener("change", () => {
    if (letters.checked) localStorage.removeItem(KEPT);
    else localStorage.setItem(KEPT, "off");
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    if (event.key.length === 1 && !letters.checked) return;
    if (document.querySelector("dialog[open]")) return; // it has keys of its own
    const card = event.target.closest?.(".card") || null;
    if (event.key === "/" && !isTyping(event.target)) {
      event.preventDefault();
      box.focus();
      box.select();
    } else if (event.key === "Escape") {
      leave(event, card, box);
    } else if (event.target === box && event.key === "ArrowDown") {
      event.preventDefault();
      results.querySelector(".card")?.focus();
    } else if (card && event.key in STEPS && !isTyping(event.target)) {
      event.preventDefault();
      step(card, ...STEPS[event.key], box, results);
    } else if (event.key === "Enter" && event.target === card) {
      event.preventDefault();
      card.querySelector(".toggle-why").click();
    } else if (event.key === "o" && event.target === card) {
      event.preventDefault();
      card.querySelector(".open-document").click();
    }
  });
}

function leave(event, card, box) {
  if (card) {
    if (card.classList.contains("open")) card.querySelector(".toggle-why").click();
    if (event.target !== card) card.focus();
    else if (!event.defaultPrevented && !card.classList.contains("open")) event.preventDefault();
  } else if (event.target === box && box.value) {
    event.preventDefault();
    box.value = "";
    box.dispatchEvent(new Event("input", { bubbles: true }));
  }
}

function step(card, down, across, box, results) {
  const columns = [...results.querySelectorAll(".column")].map((column) => [...column.querySelectorAll(".card")]);
  const column = columns.findIndex((cards) => cards.includes(card));
  const row = columns[column].indexOf(card);
  const cards = columns[column + across];
  if (!cards?.length) return;
  if (row + down < 0) {
    box.focus();
    return;
  }
  const next = cards[Math.min(row + down, cards.length - 1)];
  next.focus();
  next.scrollIntoView({ block: "nearest" });
}

function isTyping(target) {
  return target.matches?.("input:not([type=radio]):not([type=checkbox]):not([type=range]):not([type=file]), textarea, select, [contenteditable]");
}

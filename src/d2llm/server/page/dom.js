// Creating elements. Texts become text nodes, never markup, so that contents of documents are only displayed.

/** Create an element. Properties: `class`, `on` (listeners by event), `data-*`, `aria-*` and other attributes; null omits one. */
export function element(name, properties = {}, ...children) {
  return fill(document.createElement(name), properties, children);
}

/** Create an SVG element. */
export function svg(name, properties = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), properties, children);
}

function fill(made, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) made.addEventListener(event, listener);
    } else if (value === true) {
      made.setAttribute(name, "");
    } else if (value !== null && value !== undefined && value !== false) {
      made.setAttribute(name, String(value));
    }
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

/** The element of this page with an id. */
export function byId(id) {
  return document.getElementById(id);
}

/** A time in a readable unit. */
export function milliseconds(seconds) {
  if (seconds >= 1) return `${seconds.toFixed(1)} s`;
  const value = seconds * 1000;
  return `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;
}

export function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let place = 0;
  for (; count >= 1000 && place < units.length - 1; place += 1) count /= 1000;
  return `${place && count < 100 ? count.toFixed(1) : Math.round(count)} ${units[place]}`;
}

export function signed(value) {
  const digits = Math.abs(value).toFixed(2);
  return `${value < 0 && Number(digits) ? "−" : "+"}${digits}`;
}

export function counted(count, noun, plural = `${noun}s`) {
  return `${count.toLocaleString("en")} ${count === 1 ? noun : plural}`;
}

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

/** A time: in milliseconds, from ten seconds on in seconds. */
export function milliseconds(seconds) {
  if (seconds >= 10) return `${seconds.toFixed(1)} s`;
  const value = seconds * 1000;
  if (value > 0 && value < 0.1) return "under 0.1 ms";
  return `${value < 10 ? value.toFixed(1) : Math.round(value).toLocaleString("en")} ms`;
}

/** A point in time to the minute, in the reader's time zone; a date without a time stays one. */
export function timestamp(text) {
  const day = /^(\d{4}-\d{2}-\d{2})(?:T00:00:00(?:\.0+)?(?:Z|[+-]00:00)?)?$/.exec(text);
  if (day) return day[1];
  const moment = new Date(/[Z]$|[+-]\d{2}:\d{2}$/.test(text) ? text : `${text}Z`);
  if (Number.isNaN(moment.getTime())) return text;
  const two = (number) => String(number).padStart(2, "0");
  const date = [moment.getFullYear(), two(moment.getMonth() + 1), two(moment.getDate())].join("-");
  return `${date} ${two(moment.getHours())}:${two(moment.getMinutes())}`;
}

/** A size, in KB, MB and so on. */
export function bytes(count) {
  const units = ["KB", "MB", "GB", "TB"];
  let [value, unit] = [count && Math.max(count / 1000, 0.1), 0];
  for (; value >= 999.5 && unit < units.length - 1; unit += 1) value /= 1000;
  return `${value < 99.95 ? value.toFixed(1) : Math.round(value)} ${units[unit]}`;
}

/** A probability. */
export function percent(value) {
  return value < 0.01 ? "under 1%" : value > 0.99 ? "over 99%" : `${Math.round(value * 100)}%`;
}

export function signed(value) {
  const digits = Math.abs(value).toFixed(2);
  return `${value < 0 && Number(digits) ? "−" : "+"}${digits}`;
}

export function counted(count, noun, plural = `${noun}s`) {
  return `${count.toLocaleString("en")} ${count === 1 ? noun : plural}`;
}

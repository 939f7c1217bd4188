// The evaluation report, in a sandboxed frame without scripts or network access.

import { fetchResponse } from "./api.js";
import { byId, element } from "./dom.js";
import { installTheme } from "./theme.js";

async function show() {
  try {
    const response = await fetchResponse("/evaluation");
    // Fetched instead of framed by URL, because a frame cannot send the API key.
    const frame = element("iframe", { class: "report", sandbox: "", title: "Evaluation report" });
    frame.srcdoc = await response.text();
    byId("report").replaceChildren(frame);
  } catch (error) {
    const hint = error.status === 401 ? " Enter the key on the search page first." : "";
    byId("report").replaceChildren(element("div", { class: "message error" }, element("h2", {}, "No report"), element("p", {}, error.message + hint)));
  }
}

installTheme(byId("theme"));
show();

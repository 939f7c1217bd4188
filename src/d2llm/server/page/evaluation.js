// The report of an evaluation, in a frame that may run no script and reach nothing.

import { fetchAnswer } from "./api.js";
import { byId, element } from "./dom.js";
import { installTheme } from "./theme.js";

async function show() {
  try {
    const response = await fetchAnswer("/evaluation");
    // Fetched, not framed by its address: a frame cannot send the API key.
    const frame = element("iframe", { class: "report", sandbox: "", title: "Report of the evaluation" });
    frame.srcdoc = await response.text();
    byId("report").replaceChildren(frame);
  } catch (error) {
    const hint = error.status === 401 ? " Give the key on the search page first." : "";
    byId("report").replaceChildren(element("div", { class: "message error" }, element("h2", {}, "No report"), element("p", {}, error.message + hint)));
  }
}

installTheme(byId("theme"));
show();

// Requests to the server. The API key stays in this tab (sessionStorage) and is sent in a header, never in a URL.

import { BASE } from "./address.js";

const KEY = "d2llm-api-key";

/** An error response; `kind`, `field` and `requestId` come from the server, `retryAfter` is in seconds. */
export class ApiError extends Error {
  constructor(status, error, retryAfter) {
    super(error.message || `the server answered ${status}`);
    this.name = "ApiError";
    this.status = status;
    this.kind = error.kind || "internal";
    this.field = error.field || null;
    this.requestId = error.request_id || "";
    this.retryAfter = retryAfter;
  }
}

/** The message of an error, with the request id to find it in the server's log. */
export function problemText(error) {
  return error.requestId ? `${error.message} (request ${error.requestId})` : error.message;
}

export function apiKey() {
  return sessionStorage.getItem(KEY) || "";
}

export function keepApiKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

/**
 * Fetch a response of any type, from the index that the page's address names; throws an `ApiError` if it is an error.
 * `body` is sent as JSON, a `form` as it is.
 */
export async function fetchResponse(path, { method = "GET", body, form, signal } = {}) {
  const headers = {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (apiKey()) headers.Authorization = `Bearer ${apiKey()}`;
  let response;
  try {
    response = await fetch(BASE + path, {
      method,
      headers,
      signal,
      body: body === undefined ? form : JSON.stringify(body),
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { kind: "unreachable", message: "The server cannot be reached. Is it running?" });
  }
  if (!response.ok) {
    const problem = await response.json().catch(() => ({}));
    const retryAfter = Number(response.headers.get("Retry-After")) || null;
    throw new ApiError(response.status, problem.error || {}, retryAfter);
  }
  return response;
}

/** Fetch JSON: by POST if there is a body, else by GET. */
export async function ask(path, body, signal) {
  return (await fetchResponse(path, { method: body === undefined ? "GET" : "POST", body, signal })).json();
}

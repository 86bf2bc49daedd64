// How the page talks to its server: addresses beside its own, the API key if the server wants one, errors in words.

const KEY = "pagebrain-api-key";

export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** Talks to the server; `onKeyWanted(rejected)` is called when it answers that it does not know us. */
export class Session {
  constructor() {
    this.onKeyWanted = () => {};
    this.key = null;
    // Only who knows it may stop what this page has sent. randomUUID is not to be had over plain HTTP.
    this.secret = Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
    try {
      this.key = sessionStorage.getItem(KEY);
    } catch {
      // storage is switched off: the key lives as long as the page
    }
  }

  setKey(key) {
    this.key = key || null;
    try {
      if (this.key) sessionStorage.setItem(KEY, this.key);
      else sessionStorage.removeItem(KEY);
    } catch {
      // as above
    }
  }

  /** A response that is all right; otherwise a ServerError that says what is wrong. */
  async request(path, { body, signal } = {}) {
    const headers = {};
    if (this.key) headers.Authorization = `Bearer ${this.key}`;
    if (body !== undefined) Object.assign(headers, { "Content-Type": "application/json", "X-PageBrain-Page": this.secret });
    let response;
    try {
      response = await fetch(path, {
        method: body === undefined ? "GET" : "POST",
        headers,
        body: body === undefined ? undefined : JSON.stringify(body),
        signal,
        cache: "no-store",
      });
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new ServerError("The server cannot be reached.", 0);
    }
    if (response.ok) return response;
    if (response.status === 401) this.onKeyWanted(Boolean(this.key));
    throw new ServerError(await inWords(response), response.status);
  }
}

/** What the server says is wrong, cut to a length that can be read. */
async function inWords(response) {
  let message = "";
  try {
    const body = await response.json();
    message = body.error?.message ?? (typeof body.detail === "string" ? body.detail : "");
  } catch {
    // not JSON: the status has to do
  }
  return (message || `The server answered ${response.status} ${response.statusText}.`).slice(0, 400);
}

// The page's requests to its server: relative addresses, the API key, and error messages.

const KEY = "pagebrain-api-key";

export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** Sends requests. Calls `onKeyWanted(rejected)` when the server answers 401. */
export class Session {
  constructor() {
    this.onKeyWanted = () => {};
    this.key = null;
    // The server stops a request of this page only with this secret. randomUUID is not available over plain HTTP.
    this.secret = Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
    try {
      this.key = sessionStorage.getItem(KEY);
    } catch {
      // storage is switched off: the key is kept until the page is closed
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

  /** Returns a response with a status of success. Throws a ServerError otherwise. */
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

/** The server's error message, cut to a readable length. */
async function inWords(response) {
  let message = "";
  try {
    const body = await response.json();
    message = body.error?.message ?? (typeof body.detail === "string" ? body.detail : "");
  } catch {
    // not JSON: the message is made from the status
  }
  return (message || `The server answered ${response.status} ${response.statusText}.`).slice(0, 400);
}

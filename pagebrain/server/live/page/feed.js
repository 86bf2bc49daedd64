// The live feed: connects, reads, and connects again after growing pauses when the connection is lost.

import { readEvents } from "./events.js";

const FIRST_WAIT_MS = 500;
const LONGEST_WAIT_MS = 10_000;
const SILENCE_MS = 40_000; // the server sends something every 15 s

/** Calls `on.hello` and `on.update` with the data, `on.status` with {state: "connecting" | "live" | "lost" | "locked" | "off", ...}. */
export class Feed {
  constructor(session, on) {
    this.session = session;
    this.on = on;
    this.run = null;
  }

  start() {
    if (this.run) return;
    this.run = new AbortController();
    this.#stay(this.run.signal);
  }

  stop() {
    this.run?.abort();
    this.run = null;
    this.on.status({ state: "off" });
  }

  restart() {
    this.stop();
    this.start();
  }

  async #stay(signal) {
    let wait = FIRST_WAIT_MS;
    while (!signal.aborted) {
      let reason = "";
      try {
        this.on.status({ state: "connecting" });
        reason = await this.#read(signal, () => (wait = FIRST_WAIT_MS));
      } catch (error) {
        if (signal.aborted) return;
        if (error.status === 401) {
          this.on.status({ state: "locked" });
          this.run = null;
          return; // main.js starts the feed again when it has a key
        }
        reason = error.status === undefined ? "" : error.message;
      }
      if (signal.aborted) return;
      const seconds = Math.round(wait / 100) / 10;
      this.on.status({ state: "lost", reason, seconds });
      await sleep(wait * (0.85 + 0.3 * Math.random()), signal);
      wait = Math.min(2 * wait, LONGEST_WAIT_MS);
    }
  }

  /** Read until the feed ends. Returns the server's reason, or "". */
  async #read(signal, onLive) {
    const connection = new AbortController();
    const giveUp = () => connection.abort();
    signal.addEventListener("abort", giveUp, { once: true });
    let watchdog = setTimeout(giveUp, SILENCE_MS);
    try {
      const response = await this.session.request("live/feed", { signal: connection.signal });
      for await (const { event, data } of readEvents(response)) {
        clearTimeout(watchdog);
        watchdog = setTimeout(giveUp, SILENCE_MS);
        if (signal.aborted) return "";
        if (event === "hello") {
          onLive();
          this.on.hello(JSON.parse(data));
          this.on.status({ state: "live" });
        } else if (event === "update") {
          this.on.update(JSON.parse(data));
        } else if (event === "end") {
          return JSON.parse(data).reason;
        }
      }
      return "";
    } finally {
      clearTimeout(watchdog);
      signal.removeEventListener("abort", giveUp);
      connection.abort();
    }
  }
}

function sleep(ms, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });
}

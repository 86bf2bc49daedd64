// The form that sends prompts. All lines and copies go into one HTTP request: a browser opens only six connections to a server,
// the feed takes one, and one must stay free for pausing.

import { readEvents } from "./events.js";
import { Cards } from "./cards.js";

const MAX_STREAMS = 4;
const MAX_TEXTS = 64; // in one request

export class Prompts {
  constructor(root, session, model, on) {
    this.session = session;
    this.model = model;
    this.form = root.querySelector("form");
    this.error = root.querySelector(".form-error");
    this.button = this.form.querySelector("button[type=submit]");
    this.cards = new Cards(root, model, on);
    this.change = on.change;
    this.numStreams = 0;
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    this.form.addEventListener("input", () => this.#count());
    this.form.elements.prompts.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault();
      this.form.requestSubmit();
    });
    this.#count();
  }

  /** Remove old errors after a new connection. */
  forget() {
    this.#refuse("");
    this.cards.forget();
  }

  draw(selected) {
    this.cards.draw(selected);
  }

  #read() {
    const fields = this.form.elements;
    const lines = fields.prompts.value.split("\n").map((line) => line.trim()).filter(Boolean);
    const copies = Math.round(Number(fields.copies.value)) || 1;
    const samples = Math.round(Number(fields.samples.value)) || 1;
    return { prompts: lines.flatMap((line) => Array(copies).fill(line)), samples };
  }

  #count() {
    const { prompts, samples } = this.#read();
    const texts = prompts.length * samples;
    this.button.textContent = texts === 1 ? "Send" : `Send ${texts}`;
    this.button.disabled = texts === 0;
  }

  #refuse(message) {
    this.error.textContent = message;
    this.error.hidden = message === "";
  }

  async #submit() {
    const { prompts, samples } = this.#read();
    const fields = this.form.elements;
    if (!this.model.hello) return this.#refuse("Not connected: the prompts were not sent.");
    if (prompts.length * samples > MAX_TEXTS) return this.#refuse(`At most ${MAX_TEXTS} texts at a time.`);
    if (this.numStreams >= MAX_STREAMS) {
      return this.#refuse(`${MAX_STREAMS} sends are streaming, which is the most: wait for one to end, or stop it.`);
    }
    this.#refuse("");
    const body = {
      model: this.model.hello.model,
      prompt: prompts.length === 1 ? prompts[0] : prompts,
      n: samples,
      max_tokens: Number(fields.max_tokens.value),
      temperature: Number(fields.temperature.value),
      stream: true,
    };
    if (fields.seed.value !== "") body.seed = Number(fields.seed.value);
    const connection = new AbortController();
    const stream = { isShared: prompts.length > 1, stop: () => connection.abort() };
    const cards = prompts.flatMap((prompt, index) =>
      Array.from({ length: samples }, (_, sample) => this.cards.add(prompt, index, sample, (card) => this.#stop(card, stream, cards))),
    );
    this.numStreams += 1;
    try {
      await this.#stream(body, cards, connection.signal);
      for (const card of cards) card.end("ended", "the stream ended early");
    } catch (error) {
      const stopped = connection.signal.aborted;
      for (const card of cards) card.end(stopped ? "stopped" : "failed", stopped ? "" : error.message ?? String(error));
      if (!stopped) this.#refuse(error.message ?? String(error));
    } finally {
      connection.abort();
      this.numStreams -= 1;
      this.change();
    }
  }

  async #stream(body, cards, signal) {
    const response = await this.session.request("v1/completions", { body, signal });
    for await (const { event, data } of readEvents(response)) {
      if (event === "comment") continue;
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      for (const choice of chunk.choices ?? []) {
        const card = cards[choice.index];
        if (!card) continue;
        card.known(chunk.id, body.prompt);
        if (choice.text) card.append(choice.text);
        if (choice.finish_reason) card.end(choice.finish_reason === "abort" ? "stopped" : "finished", choice.finish_reason);
      }
      this.change();
    }
  }

  /** Stop a text. The last one of a stream closes the connection; otherwise the server is asked to stop the one request. */
  async #stop(card, stream, cards) {
    if (!stream.isShared || cards.every((other) => other === card || other.isOver)) return stream.stop();
    try {
      await this.session.request("live/stop", { body: { request_id: card.requestId } });
    } catch (error) {
      this.#refuse(error.message);
    }
  }
}

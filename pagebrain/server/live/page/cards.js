// The generated texts: a card for each, coloured like its sequence. The number of cards is limited: the oldest that are over go.

import { dress, letter } from "./palette.js";

const MAX_CARDS = 64;
const MAX_CHARACTERS = 20_000;

class Card {
  constructor(element, prompt, promptIndex, sample, stop) {
    this.element = element;
    this.promptIndex = promptIndex;
    this.sample = sample;
    this.requestId = null;
    this.seqId = null;
    this.isOver = false;
    this.ending = "";
    this.fresh = "";
    this.length = 0;
    this.name = element.querySelector(".chip");
    this.status = element.querySelector(".card-status");
    this.text = element.querySelector(".card-text");
    this.button = element.querySelector(".stop");
    element.querySelector(".card-prompt").textContent = prompt;
    this.button.addEventListener("click", () => stop(this));
  }

  /** Set the request's id. Each of several prompts is a request of its own. */
  known(id, prompt) {
    this.requestId ??= Array.isArray(prompt) ? `${id}-${this.promptIndex}` : id;
  }

  append(text) {
    this.fresh += text;
  }

  /** End the card. `how`: "finished", "stopped", "failed" or "ended". A second call has no effect. */
  end(how, why) {
    if (this.isOver) return;
    this.isOver = true;
    this.ending = { stop: "finished", length: "finished: token limit", abort: "stopped" }[why] ?? (why ? `${how}: ${why}` : how);
    this.element.classList.add("over", how);
    this.button.hidden = true;
  }

  /** Remove the connection to a sequence; the text stays. */
  leave() {
    this.element.classList.remove("failed", "ended");
    this.requestId = this.seqId = null;
    dress(this.element, null);
    dress(this.name, null);
    this.name.textContent = "·";
    this.name.disabled = true;
    this.name.removeAttribute("aria-label");
  }
}

export class Cards {
  constructor(root, model, on) {
    this.model = model;
    this.on = on;
    this.list = root.querySelector(".cards");
    this.template = root.querySelector("#card");
    this.none = root.querySelector(".no-cards");
    this.clear = root.querySelector("#clear");
    this.all = [];
    this.clear.addEventListener("click", () => this.#drop((card) => card.isOver));
  }

  add(prompt, promptIndex, sample, stop) {
    const element = this.template.content.firstElementChild.cloneNode(true);
    const card = new Card(element, prompt, promptIndex, sample, stop);
    card.name.addEventListener("click", () => card.seqId !== null && this.on.select(card.seqId));
    this.all.push(card);
    this.list.append(element);
    let extra = this.all.length - MAX_CARDS;
    if (extra > 0) this.#drop((one) => one.isOver && extra-- > 0);
    this.on.change();
    return card;
  }

  /** After a new connection the engine may be another one, so failed cards no longer belong to one of its sequences. */
  forget() {
    for (const card of this.all.filter((one) => one.element.matches(".failed, .ended"))) card.leave();
  }

  draw(selected) {
    this.none.hidden = this.all.length > 0;
    this.clear.hidden = !this.all.some((card) => card.isOver);
    for (const card of this.all) this.#draw(card, selected);
  }

  #draw(card, selected) {
    if (card.seqId === null && card.requestId !== null) {
      const seqId = this.model.sequenceOf.get(`${card.requestId}/${card.sample}`);
      if (seqId !== undefined) {
        card.seqId = seqId;
        dress(card.element, seqId);
        dress(card.name, seqId);
        card.name.textContent = letter(seqId);
        card.name.disabled = false;
        card.name.setAttribute("aria-label", `sequence ${letter(seqId)}: show its block table`);
        card.button.setAttribute("aria-label", `${card.button.textContent} ${letter(seqId)}`);
      }
    }
    if (card.fresh) {
      const atEnd = card.text.scrollHeight - card.text.scrollTop - card.text.clientHeight < 24;
      if (card.length < MAX_CHARACTERS) card.text.append(card.fresh);
      card.length += card.fresh.length;
      card.fresh = "";
      if (card.text.childNodes.length > 200) card.text.normalize();
      if (atEnd) card.text.scrollTop = card.text.scrollHeight;
    }
    const status = card.isOver ? card.ending : card.seqId === null ? "sent" : this.model.status(card.seqId);
    if (card.status.textContent !== status) {
      card.status.textContent = status;
      card.element.classList.toggle("preempted", status === "preempted");
    }
    card.element.classList.toggle("selected", card.seqId !== null && card.seqId === selected);
  }

  #drop(which) {
    this.all = this.all.filter((card) => {
      const gone = which(card);
      if (gone) card.element.remove();
      return !gone;
    });
    this.on.change();
  }
}

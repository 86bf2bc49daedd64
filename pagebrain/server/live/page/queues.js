// The queues as rows of chips, in the scheduler's order.

import { dress, letter } from "./palette.js";

const MAX_CHIPS = 256; // they scroll

export class Queues {
  /** Calls `select(seqId)` when a chip is chosen. */
  constructor(root, model, select) {
    this.model = model;
    this.select = select;
    this.rows = ["running", "waiting", "preempted"].map((kind) => {
      const row = root.querySelector(`[data-queue="${kind}"]`);
      return { kind, count: row.querySelector(".count"), chips: row.querySelector(".chips"), more: row.querySelector(".more") };
    });
  }

  draw(selected) {
    const { running, waiting, preempted } = this.model.state;
    const lost = new Set(preempted);
    const queues = { running, preempted, waiting: waiting.filter((seqId) => !lost.has(seqId)) };
    for (const row of this.rows) this.#fill(row, queues[row.kind], selected);
  }

  #fill({ kind, count, chips, more }, queue, selected) {
    setText(count, String(queue.length));
    const shown = queue.slice(0, MAX_CHIPS);
    while (chips.children.length > shown.length) chips.lastElementChild.remove();
    while (chips.children.length < shown.length) chips.append(this.#newChip());
    shown.forEach((seqId, place) => {
      const chip = chips.children[place].firstElementChild;
      const isSelected = String(seqId === selected);
      if (chip.dataset.seq !== String(seqId)) {
        dress(chip, seqId);
        chip.textContent = letter(seqId);
        chip.setAttribute("aria-label", `sequence ${letter(seqId)}, ${kind}`);
      }
      if (chip.getAttribute("aria-pressed") !== isSelected) chip.setAttribute("aria-pressed", isSelected);
    });
    setText(more, queue.length > shown.length ? `+${queue.length - shown.length}` : queue.length ? "" : "none");
  }

  #newChip() {
    const item = document.createElement("li");
    const chip = document.createElement("button");
    chip.type = "button";
    chip.className = "chip seq";
    chip.addEventListener("click", () => this.select(Number(chip.dataset.seq)));
    item.append(chip);
    return item;
  }
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

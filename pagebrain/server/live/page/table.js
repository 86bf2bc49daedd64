// The block table of one sequence: logical blocks in order, the physical block below each, and the slots of the last one.

import { dress, letter } from "./palette.js";

const MAX_CELLS = 256;
const MAX_SLOTS = 64;

export class BlockTable {
  /** Calls `on.point(block | null)` for the physical block under the pointer, `on.look(block)` when one is chosen. */
  constructor(root, model, on) {
    this.model = model;
    this.on = on;
    this.name = root.querySelector(".table-name");
    this.facts = root.querySelector(".table-facts");
    this.list = root.querySelector(".table-cells");
    this.more = root.querySelector(".table-more");
    this.slots = root.querySelector(".slots");
    this.slotsLine = root.querySelector(".slots-line");
    this.formula = root.querySelector(".formula");
    this.lastSeq = null;
  }

  draw(seqId, isChosen) {
    const { model } = this;
    if (seqId === null) {
      this.#say("", "No sequence yet. Send a prompt, or choose a block, a chip or a row of the timeline.");
      return this.#cells(null, []);
    }
    const table = model.table(seqId);
    const status = model.status(seqId);
    const request = model.state.requests[seqId];
    dress(this.name, seqId);
    this.#say(letter(seqId), this.#inWords(seqId, table, status, isChosen));
    this.name.title = request ? `sequence ${seqId}, request ${request[0]}, sample ${request[1]}` : `sequence ${seqId}`;
    this.#cells(seqId, table);
  }

  #inWords(seqId, table, status, isChosen) {
    if (status === "finished") return "finished: its blocks were handed back.";
    if (status === "preempted") return "preempted: it holds no block and waits; its K and V will be computed again or swapped in.";
    if (status === "waiting" && !table.length) return "waiting: it holds no block yet.";
    const blocks = `${table.length} block${table.length === 1 ? "" : "s"}`;
    return `${status}: context length ${this.model.context(seqId)}, ${blocks}${isChosen ? "" : " (the oldest)"}`;
  }

  #say(name, facts) {
    if (this.name.textContent !== name) this.name.textContent = name;
    this.name.hidden = name === "";
    if (this.facts.textContent !== facts) this.facts.textContent = facts;
  }

  #cells(seqId, table) {
    const shown = Math.min(table.length, MAX_CELLS);
    while (this.list.children.length > shown) this.list.lastElementChild.remove();
    while (this.list.children.length < shown) this.list.append(this.#newCell(this.list.children.length));
    for (let logical = 0; logical < shown; logical += 1) {
      const cell = this.list.children[logical];
      const [physical] = cell.getElementsByClassName("physical");
      const block = table[logical];
      const filled = this.model.filled(seqId, logical);
      const isShared = this.model.sharers.has(block);
      const key = `${seqId} ${block} ${filled} ${isShared}`;
      if (cell.dataset.key === key) continue;
      cell.dataset.key = key;
      dress(physical, seqId);
      physical.dataset.block = block;
      physical.textContent = block;
      physical.classList.toggle("shared", isShared);
      physical.style.setProperty("--filled", `${(100 * filled) / this.model.blockSize}%`);
      physical.classList.toggle("partly", filled < this.model.blockSize);
      const words = `logical block ${logical} is physical block ${block}, ${filled} of ${this.model.blockSize} slots filled`;
      physical.setAttribute("aria-label", isShared ? `${words}, shared` : words);
    }
    this.more.textContent = table.length > shown ? `and ${table.length - shown} more` : "";
    this.#slots(seqId, table);
  }

  #newCell(logical) {
    const cell = document.createElement("li");
    const index = document.createElement("span");
    index.className = "logical";
    index.textContent = logical;
    const physical = document.createElement("button");
    physical.type = "button";
    physical.className = "physical seq";
    const point = () => this.on.point(Number(physical.dataset.block));
    physical.addEventListener("pointerenter", point);
    physical.addEventListener("focus", point);
    physical.addEventListener("click", point);
    physical.addEventListener("pointerleave", () => this.on.point(null));
    physical.addEventListener("blur", () => this.on.point(null));
    cell.append(index, physical);
    return cell;
  }

  /** Show each slot of the last block that holds a token, and the slot of the next token. */
  #slots(seqId, table) {
    const size = this.model.blockSize;
    const context = seqId === null ? 0 : this.model.context(seqId);
    const logical = Math.min(table.length - 1, Math.max(0, Math.ceil(context / size) - 1));
    const hasSlots = table.length > 0 && size <= MAX_SLOTS;
    const filled = table.length ? this.model.filled(seqId, logical) : 0;
    const key = hasSlots ? `${seqId} ${table[logical]} ${filled}` : "";
    if (this.slots.dataset.key === key) return;
    this.slots.dataset.key = key;
    const count = hasSlots ? size : 0;
    while (this.slots.children.length > count) this.slots.lastElementChild.remove();
    while (this.slots.children.length < count) this.slots.append(document.createElement("span"));
    dress(this.slots, hasSlots ? seqId : null);
    for (let slot = 0; slot < count; slot += 1) {
      this.slots.children[slot].className = slot < filled ? "full" : slot === filled ? "next" : "";
    }
    this.slotsLine.textContent = table.length
      ? `Logical block ${logical}: ${filled} of ${size} slots filled`
      : "";
    if (table.length && filled) {
      const offset = filled - 1;
      const block = table[logical];
      this.formula.textContent = `Token ${context - 1} is in slot ${block} × ${size} + ${offset} = ${block * size + offset}`;
    } else {
      this.formula.textContent = "";
    }
  }
}

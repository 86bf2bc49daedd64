// The map of the physical pool: a cell for each block, coloured by its holder. In a huge pool a cell stands for many blocks.

import { onResize, outline, rounded, Sheet, themeColours } from "./canvas.js";
import { MAX_NEXT_FREE } from "./model.js";
import { colour, letter, textColour, texture } from "./palette.js";
import { blocksOf, boxOf, cellAt, layOut } from "./pool_grid.js";

const NUMBERED = 25; // CSS pixels: from this size a cell shows the number of its block, and which logical block it is
const NAMED = 17; // from this size it shows the holder's letter
const MARKED = 12; // from this size it shows that it was just allocated
const FONT = '"Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif';

export class PoolMap {
  /** Calls `on.select(seqId)` when a block is chosen, `on.look(words)` for the block under the pointer, `on.change()` to be drawn. */
  constructor(root, model, on) {
    this.model = model;
    this.on = on;
    this.stage = root.querySelector(".pool-stage");
    this.canvas = root.querySelector("canvas");
    this.sheet = new Sheet(this.canvas);
    this.grid = null;
    this.cursor = null; // the cell under the pointer
    this.selected = null;
    this.pointedBlock = null; // the block under the pointer in the block table
    this.meaning = root.querySelector(".cell-meaning");
    this.nextFirst = root.querySelector(".next-first");
    this.marks = [...root.querySelectorAll(".legend [data-mark]")];
    onResize(this.stage, () => this.on.change());
    this.stage.addEventListener("pointermove", (event) => this.#point(this.#cellOf(event)));
    this.stage.addEventListener("pointerleave", () => this.#point(null));
    this.stage.addEventListener("click", (event) => this.#choose(this.#cellOf(event)));
    this.stage.addEventListener("keydown", (event) => this.#key(event));
    this.stage.addEventListener("blur", () => this.#point(null));
  }

  draw() {
    const { model, stage } = this;
    const context = this.sheet.begin(stage.clientWidth, stage.clientHeight);
    if (!model.hello || !stage.clientWidth) return;
    this.grid = layOut(model.numBlocks, stage.clientWidth, stage.clientHeight);
    this.colours = themeColours();
    const places = new Map(model.state.next_free.map((block, place) => [block, place]));
    const cell = this.grid.perCell === 1 ? (index) => this.#block(context, index, places) : (index) => this.#heap(context, index);
    for (let index = 0; index < this.grid.cells; index += 1) cell(index);
    this.#trail(context);
    this.#cursor(context);
    this.#explain();
    if (this.cursor !== null) this.on.look(this.describe(this.cursor));
  }

  /** The box of a cell without the gap. */
  box(cell) {
    return boxOf(this.grid, cell);
  }

  describe(cell) {
    return this.grid.perCell === 1 ? this.model.describe(cell) : this.model.describeMany(...this.#blocksOf(cell));
  }

  #blocksOf(cell) {
    return blocksOf(this.grid, cell, this.model.numBlocks);
  }

  /** Update the legend. Marks that cannot appear keep their places, so that the map does not move. */
  #explain() {
    const { model, grid } = this;
    const [isBlock, { w, h }] = [grid.perCell === 1, this.box(0)];
    const plain = Math.min(w, h) < NAMED ? "Colour shows the sequence." : "Colour and letter show the sequence.";
    const meaning = isBlock ? plain : `A square is ${grid.perCell} blocks.`;
    if (this.meaning.textContent !== meaning) this.meaning.textContent = meaning;
    const appears = {
      free: true, next: isBlock, holders: !isBlock, partly: isBlock,
      sharing: isBlock && model.hasShared, fresh: isBlock && Math.min(w, h) >= MARKED, lost: isBlock,
    };
    for (const mark of this.marks) mark.classList.toggle("absent", !appears[mark.dataset.mark]);
    this.nextFirst.textContent = model.numBlocks > MAX_NEXT_FREE ? `(first ${MAX_NEXT_FREE})` : "";
  }

  #block(context, block, places) {
    const { model, colours } = this;
    const box = this.box(block);
    const size = Math.min(box.w, box.h);
    const radius = size >= 22 ? 4 : size >= 12 ? 2 : 0;
    const seqId = model.owner[block];
    context.lineWidth = 1;
    if (seqId < 0) this.#freeBlock(context, block, box, radius, places.get(block));
    else this.#heldBlock(context, block, seqId, box, radius);
    if (model.lost.has(block)) this.#lostMark(context, block, box, radius);
    else if (model.fresh.has(block) && size >= MARKED) this.#freshMark(context, box, size);
    if (size >= NUMBERED) this.#number(context, block, box, seqId);
  }

  #freeBlock(context, block, box, radius, place) {
    const { colours } = this;
    const size = Math.min(box.w, box.h);
    rounded(context, box, radius);
    context.fillStyle = colours.free;
    context.fill();
    outline(context, box, radius, place === undefined ? colours.line : colours.muted, 1, 0.5, place === undefined ? [] : [3, 2.5]);
    if (place === undefined || size < 7) return;
    context.fillStyle = colours.muted;
    if (size >= NUMBERED && place < 9) {
      context.font = `600 ${Math.min(13, size * 0.4)}px ${FONT}`;
      context.textAlign = "center";
      context.textBaseline = "middle";
      context.fillText(ORDINALS[place], box.x + box.w / 2, box.y + box.h * 0.6);
    } else {
      context.beginPath();
      context.arc(box.x + box.w / 2, box.y + box.h * (size >= NUMBERED ? 0.62 : 0.5), Math.max(1, size * (0.16 - 0.003 * place)), 0, 2 * Math.PI);
      context.fill();
    }
  }

  #heldBlock(context, block, seqId, box, radius) {
    const { model, colours } = this;
    const size = Math.min(box.w, box.h);
    const logical = model.logical[block];
    const share = model.filled(seqId, logical) / model.blockSize;
    context.save();
    rounded(context, box, radius);
    context.clip();
    if (share < 1) {
      context.globalAlpha = 0.22;
      context.fillStyle = colour(seqId);
      context.fillRect(box.x, box.y, box.w, box.h);
      context.globalAlpha = 1;
      if (size >= 12) {
        context.fillStyle = this.sheet.hatch(colours.faint);
        context.fillRect(box.x, box.y, box.w, box.h);
      }
    }
    context.fillStyle = this.sheet.fill(seqId);
    context.fillRect(box.x, box.y, box.w * share, box.h);
    const others = model.sharers.get(block);
    if (others?.length > 1) {
      const corner = Math.max(4, 0.42 * size);
      context.beginPath();
      context.moveTo(box.x + box.w, box.y + box.h);
      context.lineTo(box.x + box.w - corner, box.y + box.h);
      context.lineTo(box.x + box.w, box.y + box.h - corner);
      context.closePath();
      context.fillStyle = colour(others[1][0]);
      context.fill();
      context.strokeStyle = colours.paper;
      context.lineWidth = 1.5;
      context.stroke();
    }
    context.restore();
    outline(context, box, radius, share < 1 ? colour(seqId) : "rgb(0 0 0 / 0.25)", 1, 0.5);
    if (size < NAMED) return;
    const names = (others ?? [[seqId, logical]]).map(([id]) => letter(id));
    const name = names.length < 3 ? names.join("+") : `${names[0]}+${names.length - 1}`;
    const text = size >= NUMBERED && names.length === 1 ? `${name}${subscript(logical)}` : name;
    let pixels = Math.min(15, size * 0.42);
    context.font = `700 ${pixels}px ${FONT}`;
    const wide = context.measureText(text).width;
    if (wide > box.w - 4) context.font = `700 ${(pixels *= (box.w - 4) / wide)}px ${FONT}`;
    if (pixels < 7) return;
    this.#label(context, text, box, size >= NUMBERED ? 0.6 : 0.53, seqId, share, pixels);
  }

  /** A name in the middle of a block, readable also where the block is half empty. */
  #label(context, text, box, height, seqId, share, pixels) {
    const x = box.x + box.w / 2;
    const y = box.y + box.h * height;
    context.textAlign = "center";
    context.textBaseline = "middle";
    const onColour = share >= 0.5;
    if (share < 1 && share > 0.05) {
      const wide = context.measureText(text).width + 4;
      context.fillStyle = onColour ? colour(seqId) : this.colours.paper;
      context.fillRect(x - wide / 2, y - pixels * 0.56, wide, pixels * 1.08);
    }
    if (onColour && texture(seqId) !== "plain") {
      context.strokeStyle = colour(seqId);
      context.lineWidth = 3.5;
      context.lineJoin = "round";
      context.strokeText(text, x, y + 0.5);
    }
    context.fillStyle = onColour ? textColour(seqId) : this.colours.ink;
    context.fillText(text, x, y + 0.5);
  }

  /** Blocks lost by preemption in the latest steps: a dashed frame, and the last holder's letter if the block is free. */
  #lostMark(context, block, box, radius) {
    const { model, colours } = this;
    const size = Math.min(box.w, box.h);
    if (size >= NAMED && model.owner[block] < 0) {
      rounded(context, box, radius);
      context.fillStyle = colours["alarm-soft"];
      context.fill();
      const text = letter(model.lost.get(block));
      const pixels = Math.min(14, size * 0.4);
      context.font = `700 ${pixels}px ${FONT}`;
      context.textAlign = "center";
      context.textBaseline = "middle";
      context.fillStyle = colours.alarm;
      const [x, y] = [box.x + box.w / 2, box.y + box.h * (size >= NUMBERED ? 0.6 : 0.53)];
      context.fillText(text, x, y);
      const wide = context.measureText(text).width;
      context.fillRect(x - wide / 2 - 3, y - 1, wide + 6, 1.6);
    }
    outline(context, box, radius, colours.alarm, size >= 12 ? 2 : 1, 1, size >= 12 ? [4, 2.5] : []);
  }

  /** Blocks allocated in the latest steps: a corner. */
  #freshMark(context, box, size) {
    const corner = Math.min(11, 0.36 * size);
    context.beginPath();
    context.moveTo(box.x + box.w, box.y);
    context.lineTo(box.x + box.w - corner, box.y);
    context.lineTo(box.x + box.w, box.y + corner);
    context.closePath();
    context.fillStyle = this.colours.ink;
    context.fill();
    context.strokeStyle = this.colours.paper;
    context.lineWidth = 1;
    context.stroke();
  }

  #number(context, block, box, seqId) {
    const { model } = this;
    const share = seqId < 0 ? 0 : model.filled(seqId, model.logical[block]) / model.blockSize;
    context.font = `${Math.max(8.5, Math.min(10, Math.min(box.w, box.h) * 0.27))}px ${FONT}`;
    context.textAlign = "left";
    context.textBaseline = "top";
    const isOnColour = share * box.w > 17;
    if (seqId >= 0 && !isOnColour) {
      context.strokeStyle = this.colours.paper;
      context.lineWidth = 2.5;
      context.lineJoin = "round";
      context.strokeText(String(block), box.x + 3.5, box.y + 3);
    }
    context.fillStyle = isOnColour ? textColour(seqId) : this.colours.muted;
    context.fillText(String(block), box.x + 3.5, box.y + 3);
  }

  /** A cell for many blocks: filled from below by the share that is held, a stripe for each holder. */
  #heap(context, cell) {
    const box = this.box(cell);
    const [first, last] = this.#blocksOf(cell);
    const counts = [...this.model.heldBy(first, last)];
    const used = counts.reduce((sum, [, count]) => sum + count, 0);
    context.fillStyle = this.colours.free;
    context.fillRect(box.x, box.y, box.w, box.h);
    if (!used) return;
    const high = Math.max(1.5, (box.h * used) / (last - first + 1));
    let under = 0;
    for (const [seqId, count] of counts) {
      // Each stripe is drawn up to the top, and the next one over it. This leaves no pale seam between two stripes.
      context.fillStyle = this.sheet.fill(seqId);
      context.fillRect(box.x, box.y + box.h - high, box.w, (high * (used - under)) / used);
      under += count;
    }
  }

  /** The selected sequence's blocks, framed. */
  #trail(context) {
    const table = this.selected === null ? [] : this.model.table(this.selected);
    const { colours } = this;
    if (!table.length) return;
    const cells = new Set(table.map((block) => Math.floor(block / this.grid.perCell)));
    const boxes = [...cells].map((cell) => this.box(cell));
    const size = Math.min(boxes[0].w, boxes[0].h);
    for (const box of boxes) {
      outline(context, box, size >= 22 ? 4 : size >= 12 ? 2 : 0, colours.paper, size >= 20 ? 5 : 3, -1);
      outline(context, box, size >= 22 ? 4 : size >= 12 ? 2 : 0, colours.ink, size >= 20 ? 2.5 : 1.5, -1);
    }
  }

  #cursor(context) {
    const { grid, colours } = this;
    for (const cell of [this.cursor, this.pointedBlock === null ? null : Math.floor(this.pointedBlock / grid.perCell)]) {
      if (cell === null || cell >= grid.cells) continue;
      const box = this.box(cell);
      outline(context, box, 4, colours.paper, 6, -2);
      outline(context, box, 4, colours.accent, 3, -2);
    }
  }

  #cellOf(event) {
    const place = this.stage.getBoundingClientRect();
    return this.grid && cellAt(this.grid, event.clientX - place.left, event.clientY - place.top);
  }

  #point(cell) {
    if (cell === this.cursor) return;
    this.cursor = cell;
    this.on.look(cell === null ? null : this.describe(cell));
    this.on.change();
  }

  #choose(cell) {
    if (cell === null) return;
    this.#point(cell);
    const many = this.grid.perCell > 1;
    const holders = many ? [...this.model.heldBy(...this.#blocksOf(cell)).keys()] : this.model.holders(cell).map(([id]) => id);
    if (!holders.length) return;
    // A second click on a cell with several holders selects the next one.
    this.on.select(holders[(holders.indexOf(this.selected) + 1) % holders.length]);
  }

  #key(event) {
    if (!this.grid || event.ctrlKey || event.metaKey || event.altKey) return;
    const { columns, cells } = this.grid;
    const at = this.cursor ?? 0;
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Home: -at, End: cells - 1 - at };
    if (event.key in moves) {
      const to = this.cursor === null ? 0 : at + moves[event.key];
      this.#point(to < 0 || to >= cells ? at : to);
    } else if (event.key === "Enter" || event.key === " ") {
      this.#choose(this.cursor);
    } else {
      return;
    }
    event.preventDefault();
  }
}

const ORDINALS = ["1st", "2nd", "3rd", "4th", "5th", "6th", "7th", "8th", "9th"];
const SUBSCRIPTS = "₀₁₂₃₄₅₆₇₈₉";

function subscript(number) {
  return [...String(number)].map((digit) => SUBSCRIPTS[digit]).join("");
}

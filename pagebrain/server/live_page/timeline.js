// The latest steps: a column a step, a row a sequence. Height says prefill or decode, as in the notebooks; colour says who.

import { onResize, Sheet, themeColours } from "./canvas.js";
import { colour, letter, textColour } from "./palette.js";

const FONT = '"Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif';
const GUTTER = 34; // for the letters
const FOOT = 18; // for the step numbers
const [LOWEST_ROW, HIGHEST_ROW] = [13, 24];
const COLUMN = 15;

export class Timeline {
  /** `on.select(seqId)` when a row is chosen, `on.look(words)` when a step is pointed at, `on.change()` when it must be drawn. */
  constructor(root, model, on) {
    this.model = model;
    this.on = on;
    this.stage = root.querySelector(".timeline-stage");
    this.sheet = new Sheet(root.querySelector("canvas"));
    this.back = 0; // columns scrolled into the past
    this.rows = [];
    this.shown = [];
    this.selected = null;
    this.pointed = null;
    onResize(this.stage, () => this.on.change());
    this.stage.addEventListener("click", (event) => this.#choose(event));
    this.stage.addEventListener("pointermove", (event) => this.#point(event));
    this.stage.addEventListener("pointerleave", () => this.#unpoint());
    this.stage.addEventListener("keydown", (event) => this.#key(event));
    this.stage.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
  }

  draw() {
    const [width, height] = [this.stage.clientWidth, this.stage.clientHeight];
    const context = this.sheet.begin(width, height);
    if (!this.model.hello || !width) return;
    this.colours = themeColours();
    const columns = Math.max(1, Math.floor((width - GUTTER - 4) / COLUMN));
    const { steps } = this.model;
    this.columns = columns;
    this.back = Math.max(0, Math.min(this.back, steps.length - columns));
    const end = steps.length - this.back;
    this.shown = steps.slice(Math.max(0, end - columns), end);
    this.rows = this.#rowsOf(this.shown, Math.floor((height - FOOT) / LOWEST_ROW));
    this.rowHeight = Math.max(LOWEST_ROW, Math.min(HIGHEST_ROW, (height - FOOT) / Math.max(1, this.rows.length)));
    this.#ground(context, width);
    this.rows.forEach((seqId, row) => this.#row(context, seqId, row));
    this.#foot(context);
    if (this.pointed) this.#say();
  }

  /** Sequences in these steps, the newest if there is not room for all, in order of their ids. */
  #rowsOf(steps, most) {
    const seen = new Set();
    for (const step of steps) {
      for (const seqId of step.rows.keys()) seen.add(seqId);
      for (const seqId of step.preempted) seen.add(seqId);
    }
    return [...seen].sort((a, b) => a - b).slice(-most);
  }

  #left(index) {
    return GUTTER + index * COLUMN;
  }

  #ground(context, width) {
    const { colours, shown, rows, rowHeight } = this;
    const bottom = rows.length * rowHeight;
    const selected = rows.indexOf(this.selected);
    if (selected >= 0) {
      context.fillStyle = colours.free;
      context.fillRect(0, selected * rowHeight, width, rowHeight);
    }
    if (this.pointed && shown[this.pointed.index]) {
      context.fillStyle = colours.free;
      context.fillRect(this.#left(this.pointed.index), 0, COLUMN, bottom);
    }
    shown.forEach((step, index) => {
      if (!step.skipped) return;
      context.strokeStyle = colours.muted;
      context.setLineDash([2, 3]);
      context.beginPath();
      context.moveTo(this.#left(index) - 0.5, 0);
      context.lineTo(this.#left(index) - 0.5, bottom);
      context.stroke();
      context.setLineDash([]);
    });
  }

  #row(context, seqId, row) {
    const { colours, shown, rowHeight } = this;
    const top = row * rowHeight;
    const middle = top + rowHeight / 2;
    const isSelected = seqId === this.selected;
    context.font = `700 ${Math.min(13, rowHeight * 0.72)}px ${FONT}`;
    context.textAlign = "left";
    context.textBaseline = "middle";
    context.fillStyle = this.sheet.fill(seqId);
    context.beginPath();
    context.roundRect(2, middle - 4.5, 9, 9, 2);
    context.fill();
    context.fillStyle = isSelected ? colours.ink : colours.muted;
    context.fillText(letter(seqId), 15, middle + 0.5, GUTTER - 17);
    let last = null; // the index where the sequence last did something, and what
    shown.forEach((step, index) => {
      const did = step.rows.get(seqId);
      const wasPreempted = step.preempted.includes(seqId);
      if (!did && !wasPreempted) return;
      if (last && index > last.index + 1) this.#pause(context, last, index, middle);
      if (wasPreempted) this.#preempted(context, index, top);
      else this.#computed(context, seqId, did, index, top);
      const ended = step.finished.includes(seqId);
      if (ended) this.#end(context, index, top);
      last = { index, wasPreempted, ended };
    });
    const isOver = !last || last.ended || this.model.status(seqId) === "finished";
    if (!isOver && last.index < shown.length - 1) this.#pause(context, last, shown.length, middle);
  }

  /** Between two of its steps: dotted while it waits after a preemption, a thin line while it is merely left out. */
  #pause(context, last, until, middle) {
    context.strokeStyle = last.wasPreempted ? this.colours.alarm : this.colours.line;
    context.lineWidth = last.wasPreempted ? 1.5 : 1;
    context.setLineDash(last.wasPreempted ? [2, 3] : []);
    context.beginPath();
    context.moveTo(this.#left(last.index + 1) + 1, middle);
    context.lineTo(this.#left(until) - 2, middle);
    context.stroke();
    context.setLineDash([]);
  }

  #computed(context, seqId, { count }, index, top) {
    const { rowHeight } = this;
    const isPrefill = count > 1;
    const high = rowHeight * (isPrefill ? 0.86 : 0.4);
    const [x, y] = [this.#left(index) + 0.5, top + (rowHeight - high) / 2];
    context.fillStyle = isPrefill ? this.sheet.fill(seqId) : colour(seqId);
    context.beginPath();
    context.roundRect(x, y, COLUMN - 1, high, isPrefill ? 2.5 : 1);
    context.fill();
    if (!isPrefill) return;
    context.strokeStyle = this.colours.ink;
    context.lineWidth = 1;
    context.stroke();
    if (count > 999) return;
    context.fillStyle = textColour(seqId);
    context.font = `700 ${count > 99 ? 7 : count > 9 ? 9 : 10}px ${FONT}`;
    context.textAlign = "center";
    context.fillText(String(count), x + (COLUMN - 1) / 2, top + rowHeight / 2 + 0.5, COLUMN - 2);
  }

  #preempted(context, index, top) {
    const { colours, rowHeight } = this;
    const high = rowHeight * 0.8;
    const [x, y] = [this.#left(index) + 1.5, top + (rowHeight - high) / 2];
    const wide = COLUMN - 3;
    context.fillStyle = colours["alarm-soft"];
    context.strokeStyle = colours.alarm;
    context.lineWidth = 1.6;
    context.beginPath();
    context.roundRect(x, y, wide, high, 2);
    context.fill();
    context.stroke();
    const [centre, middle, arm] = [x + wide / 2, top + rowHeight / 2, Math.min(3.5, high / 3)];
    context.beginPath();
    context.moveTo(centre - arm, middle - arm);
    context.lineTo(centre + arm, middle + arm);
    context.moveTo(centre + arm, middle - arm);
    context.lineTo(centre - arm, middle + arm);
    context.stroke();
  }

  #end(context, index, top) {
    context.fillStyle = this.colours.ink;
    context.fillRect(this.#left(index + 1) - 2.5, top + 1, 3, this.rowHeight - 2);
  }

  #foot(context) {
    const { shown, rows, rowHeight, colours } = this;
    const y = rows.length * rowHeight + 4;
    context.font = `11px ${FONT}`;
    context.fillStyle = colours.muted;
    context.textAlign = "center";
    context.textBaseline = "top";
    shown.forEach((step, index) => {
      if (step.step % 5 === 0) context.fillText(String(step.step), this.#left(index) + COLUMN / 2, y);
    });
  }

  #rowAt(event) {
    const row = Math.floor((event.clientY - this.stage.getBoundingClientRect().top) / this.rowHeight);
    return this.rows[row] ?? null;
  }

  #choose(event) {
    const seqId = this.#rowAt(event);
    if (seqId !== null) this.on.select(seqId);
  }

  #point(event) {
    const index = Math.floor((event.clientX - this.stage.getBoundingClientRect().left - GUTTER) / COLUMN);
    if (!this.shown[index]) return this.#unpoint();
    const seqId = this.#rowAt(event);
    if (this.pointed?.index === index && this.pointed.seqId === seqId) return;
    this.pointed = { index, seqId };
    this.#say();
    this.on.change();
  }

  #unpoint() {
    if (!this.pointed) return;
    this.pointed = null;
    this.on.look(null);
    this.on.change();
  }

  #say() {
    const step = this.shown[this.pointed.index];
    if (!step) return;
    const { seqId } = this.pointed;
    const sum = `${step.prefill_tokens} prefill and ${step.decode_tokens} decode tokens in ${step.ms.toFixed(1)} ms`;
    let words = `Step ${step.step}: ${sum}.`;
    const did = seqId === null ? undefined : step.rows.get(seqId);
    if (did?.count === 1) words += ` ${letter(seqId)}: decode of token ${did.start}.`;
    else if (did) words += ` ${letter(seqId)}: prefill of tokens ${did.start} to ${did.start + did.count - 1}.`;
    if (step.preempted.includes(seqId)) words += ` ${letter(seqId)} was preempted.`;
    this.on.look(words);
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const at = this.rows.indexOf(this.selected);
    if (event.key === "ArrowUp" || event.key === "ArrowDown") {
      const to = at < 0 ? 0 : at + (event.key === "ArrowUp" ? -1 : 1);
      if (this.rows[to] !== undefined) this.on.select(this.rows[to]);
    } else if (event.key === "ArrowLeft") this.#scroll(5);
    else if (event.key === "ArrowRight") this.#scroll(-5);
    else if (event.key === "Home") this.#scroll(Infinity);
    else if (event.key === "End") this.#scroll(-Infinity);
    else return;
    event.preventDefault();
  }

  #wheel(event) {
    const by = Math.abs(event.deltaX) > Math.abs(event.deltaY) ? event.deltaX : event.shiftKey ? event.deltaY : 0;
    if (!by) return;
    event.preventDefault();
    this.#scroll(-Math.round(by / COLUMN));
  }

  #scroll(columns) {
    this.back = Math.max(0, Math.min(this.back + columns, this.model.steps.length - this.columns));
    this.on.change();
  }
}

// The latest steps: a column for each step, a row for each sequence. Height shows prefill or decode, colour the sequence.

import { onResize, Sheet, themeColours } from "./canvas.js";
import { colour, letter, textColour } from "./palette.js";

const FONT = '"Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif';
const GUTTER = 34; // for the letters
const FOOT = 18; // for the step numbers
const [LOWEST_ROW, HIGHEST_ROW] = [13, 24];
const COLUMN = 15;
const NOTE = 15; // for the line with the number of hidden rows

export class Timeline {
  /**
   * Calls `on.select(seqId)` when a letter is chosen, `on.choose(seqId)` when a step is chosen in a row, `on.look(words)` for
   * the step under the pointer, `on.change()` to be drawn.
   */
  constructor(root, model, on) {
    this.model = model;
    this.on = on;
    this.stage = root.querySelector(".timeline-stage");
    this.sheet = new Sheet(root.querySelector("canvas"));
    this.note = root.querySelector(".timeline-note");
    this.back = 0; // columns scrolled into the past
    this.sequences = []; // all sequences in the steps shown
    this.rows = []; // those that fit
    this.shown = [];
    this.selected = null;
    this.pointed = null; // {index, seqId} under the mouse
    this.cursor = null; // the number of the step that was chosen by keyboard, tap or click
    onResize(this.stage, () => this.on.change());
    this.stage.addEventListener("click", (event) => this.#press(event));
    this.stage.addEventListener("pointermove", (event) => this.#point(event));
    this.stage.addEventListener("pointerleave", () => this.#unpoint());
    this.stage.addEventListener("keydown", (event) => this.#key(event));
    this.stage.addEventListener("blur", () => this.#choose(null));
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
    this.#keepCursorInSight();
    this.back = Math.max(0, Math.min(this.back, steps.length - columns));
    const end = steps.length - this.back;
    this.shown = steps.slice(Math.max(0, end - columns), end);
    this.#layOutRows(height - FOOT);
    this.#ground(context, width);
    this.rows.forEach((seqId, row) => this.#row(context, seqId, row));
    this.#foot(context);
    this.#say();
  }

  /** A row for each sequence in these steps, by id. If not all fit: the newest ones and the selected one. */
  #layOutRows(height) {
    const seen = new Set();
    for (const step of this.shown) {
      for (const seqId of step.rows.keys()) seen.add(seqId);
      for (const seqId of step.preempted) seen.add(seqId);
    }
    this.sequences = [...seen].sort((a, b) => a - b);
    const isTooMany = this.sequences.length * LOWEST_ROW > height;
    this.top = isTooMany ? NOTE : 0;
    const most = Math.max(1, Math.floor((height - this.top) / LOWEST_ROW));
    this.rows = this.sequences.slice(-most);
    if (seen.has(this.selected) && !this.rows.includes(this.selected)) this.rows.splice(0, 1, this.selected);
    this.rowHeight = Math.max(LOWEST_ROW, Math.min(HIGHEST_ROW, (height - this.top) / Math.max(1, this.rows.length)));
    this.note.hidden = !isTooMany;
    this.note.textContent = isTooMany ? this.#noteInWords() : "";
  }

  /** "3 more above: A to C"; "3 more not shown" if the selected row is not below all of them. */
  #noteInWords() {
    const left = this.sequences.filter((seqId) => !this.rows.includes(seqId));
    if (left.at(-1) > this.rows[0]) return `${left.length} more not shown`;
    return `${left.length} more above: ${letter(left[0])}${left.length > 1 ? ` to ${letter(left.at(-1))}` : ""}`;
  }

  /** Keep the chosen step in sight while new steps come, until it is deselected or dropped by the model. */
  #keepCursorInSight() {
    const { steps } = this.model;
    if (this.cursor === null) return;
    const place = steps.findIndex((step) => step.step === this.cursor);
    if (place < 0) this.cursor = null;
    else this.back = Math.min(Math.max(this.back, steps.length - this.columns - place), steps.length - 1 - place);
  }

  #left(index) {
    return GUTTER + index * COLUMN;
  }

  #ground(context, width) {
    const { colours, shown, rows, rowHeight, top } = this;
    const bottom = top + rows.length * rowHeight;
    const selected = rows.indexOf(this.selected);
    if (selected >= 0) {
      context.fillStyle = colours.free;
      context.fillRect(0, top + selected * rowHeight, width, rowHeight);
    }
    if (this.pointed && shown[this.pointed.index]) {
      context.fillStyle = colours.free;
      context.fillRect(this.#left(this.pointed.index), top, COLUMN, bottom - top);
    }
    const chosen = shown.findIndex((step) => step.step === this.cursor);
    if (chosen >= 0) {
      context.strokeStyle = colours.accent;
      context.lineWidth = 2;
      context.strokeRect(this.#left(chosen), top + 1, COLUMN, bottom - top - 2);
    }
    shown.forEach((step, index) => {
      if (!step.skipped) return;
      context.strokeStyle = colours.muted;
      context.setLineDash([2, 3]);
      context.beginPath();
      context.moveTo(this.#left(index) - 0.5, top);
      context.lineTo(this.#left(index) - 0.5, bottom);
      context.stroke();
      context.setLineDash([]);
    });
  }

  #row(context, seqId, row) {
    const { colours, shown, rowHeight } = this;
    const top = this.top + row * rowHeight;
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
    let last = null; // the sequence's last event and its index
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

  /** The line between two of a sequence's steps: dotted while it waits after a preemption, else thin. */
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

  #computed(context, seqId, { count, isDecode }, index, top) {
    const { rowHeight } = this;
    const isPrefill = !isDecode;
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
    const y = this.top + rows.length * rowHeight + 4;
    context.font = `11px ${FONT}`;
    context.fillStyle = colours.muted;
    context.textAlign = "center";
    context.textBaseline = "top";
    shown.forEach((step, index) => {
      if (step.step % 5 === 0) context.fillText(String(step.step), this.#left(index) + COLUMN / 2, y);
    });
  }

  /** The place under the pointer: {index, seqId}. The index is that of a step shown, or negative on the letters. */
  #placeOf(event) {
    const { left, top } = this.stage.getBoundingClientRect();
    const index = Math.floor((event.clientX - left - GUTTER) / COLUMN);
    return { index, seqId: this.rows[Math.floor((event.clientY - top - this.top) / this.rowHeight)] ?? null };
  }

  /** A click on a letter selects its sequence. A click in a row also chooses the step; a second one deselects the step. */
  #press(event) {
    const { index, seqId } = this.#placeOf(event);
    if (index < 0) {
      if (seqId !== null) this.on.select(seqId);
      return;
    }
    const step = this.shown[index];
    if (!step) return;
    this.#choose(step.step === this.cursor && (seqId === null || seqId === this.selected) ? null : step.step);
    if (seqId !== null) this.on.choose(seqId);
  }

  #choose(step) {
    if (step === this.cursor) return;
    this.cursor = step;
    this.on.change();
  }

  #point(event) {
    const { index, seqId } = this.#placeOf(event);
    if (!this.shown[index]) return this.#unpoint();
    if (this.pointed?.index === index && this.pointed.seqId === seqId) return;
    this.pointed = { index, seqId };
    this.on.change();
  }

  #unpoint() {
    if (!this.pointed) return;
    this.pointed = null;
    this.on.change();
  }

  /** A sentence about the step under the pointer or the chosen step, and its effect on the selected sequence. */
  #say() {
    const pointed = this.pointed && this.shown[this.pointed.index];
    if (pointed) this.on.look(inWords(pointed, this.pointed.seqId));
    else if (this.cursor === null) this.on.look(null);
    else this.on.look(inWords(this.shown.find((step) => step.step === this.cursor), this.selected));
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const { steps } = this.model;
    const at = this.sequences.indexOf(this.selected);
    const place = steps.findIndex((step) => step.step === (this.cursor ?? this.shown.at(-1)?.step));
    const by = this.cursor === null ? 0 : 1; // the first key press chooses the newest step in sight
    const moves = { ArrowLeft: -by, ArrowRight: by, Home: -place, End: steps.length - 1 - place };
    if (event.key === "ArrowUp" || event.key === "ArrowDown") {
      const to = at < 0 ? 0 : at + (event.key === "ArrowUp" ? -1 : 1);
      if (this.sequences[to] !== undefined) this.on.select(this.sequences[to]);
    } else if (event.key in moves) {
      const to = Math.min(steps.length - 1, Math.max(0, place + moves[event.key]));
      if (steps.length) this.#choose(steps[to].step);
    } else if (event.key === "Escape") {
      this.back = 0;
      return this.#choose(null);
    } else return;
    event.preventDefault();
  }

  #wheel(event) {
    const by = Math.abs(event.deltaX) > Math.abs(event.deltaY) ? event.deltaX : event.shiftKey ? event.deltaY : 0;
    if (!by) return;
    event.preventDefault();
    this.#scroll(-Math.round(by / COLUMN));
  }

  #scroll(columns) {
    this.cursor = null;
    this.back = Math.max(0, Math.min(this.back + columns, this.model.steps.length - this.columns));
    this.on.change();
  }
}

/** A sentence about a step and its effect on a sequence. */
function inWords(step, seqId) {
  const sum = `${step.prefill_tokens} prefill and ${step.decode_tokens} decode tokens in ${step.ms.toFixed(1)} ms`;
  const words = [`Step ${step.step}: ${sum}.`];
  const did = step.rows.get(seqId);
  if (did) {
    const last = did.start + did.count - 1;
    const tokens = did.count > 1 ? `tokens ${did.start} to ${last}` : `token ${last}`;
    words.push(`${letter(seqId)}: ${did.isDecode ? "decode" : "prefill"} of ${tokens}.`);
  }
  if (step.preempted.includes(seqId)) words.push(`${letter(seqId)} was preempted.`);
  if (step.finished.includes(seqId)) words.push(`${letter(seqId)} is finished.`);
  return words.join(" ");
}

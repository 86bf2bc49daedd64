// The page's data: the newest state, the holder of each block, the latest steps, the last minute. Bounded; draws nothing.

import { letter } from "./palette.js";

const MAX_STEPS = 600;
const HISTORY_S = 60;
const RATE_OVER_S = 1; // tokens/s are averaged over the last second
const NO_SEQUENCE = -1;
const MAX_NAMES = 6;

export const MAX_NEXT_FREE = 32; // most free blocks that the feed lists (live/feed.py), the next one first

const EMPTY = {
  step: 0, free_blocks: 0, next_free: [], tables: {}, shared: {}, waiting: [], running: [], preempted: [], context: {}, requests: {},
};

export class Model {
  constructor() {
    this.hello = null;
    this.reset();
  }

  /** Clear everything, and set the constants of the hello event. */
  reset() {
    this.state = EMPTY;
    this.totals = { steps: 0, prefill_tokens: 0, decode_tokens: 0, preemptions: 0 };
    this.paused = false;
    this.steps = []; // {step, ms, prefill_tokens, decode_tokens, rows: Map(seq -> {start, count, isDecode}), preempted, finished, skipped}
    this.history = { time: [], prefill: [], decode: [], prefillRate: [], decodeRate: [], usage: [] };
    this.owner = new Int32Array(0); // block -> sequence, or NO_SEQUENCE
    this.logical = new Int32Array(0); // block -> its index in that sequence's block table
    this.sharers = new Map(); // block -> [[sequence, logical block], ...] of blocks with more than one holder
    this.fresh = new Set(); // blocks that were allocated in the latest steps
    this.lost = new Map(); // block -> the sequence that lost it by preemption in the latest steps
    this.sequenceOf = new Map(); // "request/sample" -> sequence
    this.usedSlots = 0;
    this.hasShared = false; // whether any block ever had two holders
  }

  takeHello(hello) {
    this.reset();
    this.hello = hello;
    this.paused = hello.paused;
    this.owner = new Int32Array(hello.num_blocks).fill(NO_SEQUENCE);
    this.logical = new Int32Array(hello.num_blocks);
    this.state = { ...EMPTY, free_blocks: hello.num_blocks };
  }

  takeUpdate(update) {
    const known = this.totals.steps > 0;
    const before = this.owner;
    this.paused = update.paused;
    this.totals = update.totals;
    this.state = update.state;
    this.#index();
    this.#addSteps(update);
    if (update.steps.length) this.#compare(known ? before : null, update.steps);
    this.#addHistory(update.time_s);
  }

  /** Advance the charts while the engine idles: their lines go to zero. Returns whether anything changed. */
  idle(timeS) {
    const { prefillRate, decodeRate } = this.history;
    if (this.paused || !prefillRate.length) return false;
    if (prefillRate.every((rate) => rate === 0) && decodeRate.every((rate) => rate === 0)) return false;
    this.#addHistory(timeS);
    return true;
  }

  get numBlocks() {
    return this.hello ? this.hello.num_blocks : 0;
  }

  get blockSize() {
    return this.hello ? this.hello.block_size : 1;
  }

  get usage() {
    return this.numBlocks ? 1 - this.state.free_blocks / this.numBlocks : 0;
  }

  table(seqId) {
    return this.state.tables[seqId] ?? [];
  }

  context(seqId) {
    return this.state.context[seqId] ?? 0;
  }

  /** Number of slots that hold a token in a sequence's logical block. */
  filled(seqId, logical) {
    return Math.max(0, Math.min(this.blockSize, this.context(seqId) - logical * this.blockSize));
  }

  /** "running", "waiting", "preempted" or "finished". */
  status(seqId) {
    if (this.state.running.includes(seqId)) return "running";
    if (this.state.preempted.includes(seqId)) return "preempted";
    if (this.state.waiting.includes(seqId)) return "waiting";
    return "finished";
  }

  /** The holders of a block: [[sequence, logical block], ...]. */
  holders(block) {
    if (this.sharers.has(block)) return this.sharers.get(block);
    const seqId = this.owner[block];
    return seqId === NO_SEQUENCE || seqId === undefined ? [] : [[seqId, this.logical[block]]];
  }

  /** A sentence about a block. */
  describe(block) {
    const size = this.blockSize;
    const holders = this.holders(block);
    if (!holders.length) {
      const place = this.state.next_free.indexOf(block);
      const lost = this.lost.get(block);
      const further = this.state.next_free.length < this.state.free_blocks ? "is free, further back in line" : "is free";
      const words = place === 0 ? "is free, the next to be handed out" : place > 0 ? `is free, number ${place + 1} in line` : further;
      return `Block ${block} ${words}${lost === undefined ? "" : `; preemption just took it from ${letter(lost)}`}.`;
    }
    const [seqId, logical] = holders[0];
    const slots = `${this.filled(seqId, logical)} of ${size} slots hold a token`;
    if (holders.length > 1) {
      const names = holders.map(([id, index]) => `${letter(id)} (logical ${index})`);
      return `Block ${block} is shared by ${names.length} sequences: ${enumerate(names)}; ${slots}.`;
    }
    const lost = this.lost.get(block);
    const from = lost === undefined || lost === seqId ? "" : ` Preemption just took it from ${letter(lost)}.`;
    return `Block ${block} is ${letter(seqId)}’s logical block ${logical} of ${this.table(seqId).length}; ${slots}.${from}`;
  }

  /** Sequence -> number of blocks in `first .. last` that it holds, by id. A shared block counts for its first holder. */
  heldBy(first, last) {
    const counts = new Map();
    for (const seqId of this.owner.slice(first, last + 1).sort()) {
      if (seqId !== NO_SEQUENCE) counts.set(seqId, (counts.get(seqId) ?? 0) + 1);
    }
    return counts;
  }

  /** A sentence about many blocks: "Blocks 0 to 3: 4 of 4 held; A holds 2, B and C hold one each." */
  describeMany(first, last) {
    const byCount = new Map(); // number of blocks -> the sequences that hold so many
    let used = 0;
    for (const [seqId, count] of this.heldBy(first, last)) {
      used += count;
      byCount.set(count, [...(byCount.get(count) ?? []), letter(seqId)]);
    }
    const groups = [...byCount].sort(([a], [b]) => b - a).map(([count, names]) => {
      const number = count === 1 ? "one" : count;
      return names.length > 1 ? `${enumerate(names)} hold ${number} each` : `${names[0]} holds ${number}`;
    });
    return `Blocks ${first} to ${last}: ${used} of ${last - first + 1} held${used ? `; ${groups.join(", ")}` : ""}.`;
  }

  /** The holder of each block, from the block tables. Of several holders the one with the lowest id comes first. */
  #index() {
    const owner = new Int32Array(this.numBlocks).fill(NO_SEQUENCE);
    const logical = new Int32Array(this.numBlocks);
    const sharers = new Map(Object.keys(this.state.shared).map((block) => [Number(block), []]));
    let usedSlots = 0;
    for (const [name, table] of Object.entries(this.state.tables)) {
      const seqId = Number(name);
      for (let index = 0; index < table.length; index += 1) {
        const block = table[index];
        if (sharers.has(block)) sharers.get(block).push([seqId, index]);
        if (owner[block] !== NO_SEQUENCE) continue;
        owner[block] = seqId;
        logical[block] = index;
        usedSlots += this.filled(seqId, index);
      }
    }
    this.owner = owner;
    this.logical = logical;
    this.sharers = sharers;
    this.hasShared ||= sharers.size > 0;
    this.usedSlots = usedSlots;
    this.sequenceOf = new Map();
    for (const [name, [requestId, sample]] of Object.entries(this.state.requests)) {
      this.sequenceOf.set(`${requestId}/${sample}`, Number(name));
    }
  }

  #addSteps(update) {
    let skipped = update.skipped;
    for (const step of update.steps) {
      const rows = new Map(step.rows.map(([seqId, start, count, isDecode]) => [seqId, { start, count, isDecode }]));
      this.steps.push({ ...step, rows, skipped });
      skipped = 0;
    }
    if (this.steps.length > MAX_STEPS) this.steps.splice(0, this.steps.length - MAX_STEPS);
  }

  /** Find the blocks that were allocated or lost in the latest steps. */
  #compare(before, steps) {
    this.fresh = new Set();
    this.lost = new Map();
    if (!before) return;
    const preempted = new Set(steps.flatMap((step) => step.preempted));
    for (let block = 0; block < this.numBlocks; block += 1) {
      const [was, is] = [before[block], this.owner[block]];
      if (was === is) continue;
      if (is !== NO_SEQUENCE) this.fresh.add(block);
      if (preempted.has(was)) this.lost.set(block, was);
    }
  }

  #addHistory(timeS) {
    const history = this.history;
    const last = history.time.length - 1;
    if (last >= 0 && timeS <= history.time[last]) return;
    history.time.push(timeS);
    history.prefill.push(this.totals.prefill_tokens);
    history.decode.push(this.totals.decode_tokens);
    let from = history.time.length - 1;
    while (from > 0 && timeS - history.time[from] < RATE_OVER_S) from -= 1;
    const seconds = timeS - history.time[from];
    const rate = (totals) => (seconds > 0 ? (totals.at(-1) - totals[from]) / Math.max(seconds, RATE_OVER_S) : 0);
    history.prefillRate.push(rate(history.prefill));
    history.decodeRate.push(rate(history.decode));
    history.usage.push(100 * this.usage);
    let old = 0;
    while (timeS - history.time[old] > HISTORY_S) old += 1;
    if (old > 32) for (const values of Object.values(history)) values.splice(0, old);
  }
}

/** "A, B and C"; only the first if there are many. */
function enumerate(names) {
  const shown = names.slice(0, MAX_NAMES);
  const last = names.length > MAX_NAMES ? `${names.length - MAX_NAMES} more` : shown.pop();
  return shown.length ? `${shown.join(", ")} and ${last}` : last;
}

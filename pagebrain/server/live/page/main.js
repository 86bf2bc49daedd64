// The page: one model and its views. It is drawn at most once a frame, only after a change, and only while it is visible.

import { short, Charts } from "./charts.js";
import { Controls } from "./controls.js";
import { Feed } from "./feed.js";
import { Model } from "./model.js";
import { letter } from "./palette.js";
import { PoolMap } from "./pool.js";
import { Prompts } from "./prompts.js";
import { Queues } from "./queues.js";
import { Session } from "./session.js";
import { BlockTable } from "./table.js";
import { Timeline } from "./timeline.js";

const UNSEEN_MS = 10_000; // a page that is hidden for longer closes its feed
const IDLE_MS = 1000;

const find = (selector) => document.querySelector(selector);
const model = new Model();
const session = new Session();
const root = document.documentElement;

// Drawing ---------------------------------------------------------------------------------------------------------------

let frame = null;
let frames = 0;

function change() {
  if (frame === null && !document.hidden) frame = requestAnimationFrame(draw);
}

function draw() {
  frame = null;
  frames += 1;
  follow();
  pool.selected = timeline.selected = selected;
  pool.draw();
  table.draw(selected, isChosen);
  queues.draw(selected);
  timeline.draw();
  charts.draw();
  controls.draw();
  prompts.draw(selected);
  drawFigures();
}

function setText(selector, text) {
  const element = find(selector);
  if (element.textContent !== text) element.textContent = text;
}

function drawFigures() {
  const { hello, state, history } = model;
  if (!hello) return;
  const held = hello.num_blocks - state.free_blocks;
  const slots = held * hello.block_size;
  setText("#free", state.free_blocks.toLocaleString("en"));
  setText("#of-blocks", `of ${hello.num_blocks.toLocaleString("en")} blocks free`);
  setText("#usage", `${Math.round(100 * model.usage)}%`);
  find("#usage-bar").style.setProperty("--used", `${100 * model.usage}%`);
  find("#usage-bar").setAttribute("aria-valuenow", String(Math.round(100 * model.usage)));
  setText("#waste", slots ? `${Math.round(100 * (1 - model.usedSlots / slots))}%` : "0%");
  setText("#rate", short(history.decodeRate.at(-1) ?? 0));
  setText("#preemptions", model.totals.preemptions.toLocaleString("en"));
  setText("#step-number", model.totals.steps.toLocaleString("en"));
}

// Selection: the chosen sequence, else the oldest running one -----------------------------------------------------------

let selected = null;
let isChosen = false;

function select(seqId) {
  isChosen = !(isChosen && selected === seqId);
  selected = seqId;
  if (isChosen) say(`Sequence ${letter(seqId)}, ${model.status(seqId)}, ${model.table(seqId).length} blocks.`);
  change();
}

/** As `select`, but does not deselect a sequence that is chosen already. */
function choose(seqId) {
  if (!isChosen || selected !== seqId) select(seqId);
}

function follow() {
  if (isChosen || (selected !== null && model.status(selected) === "running")) return;
  const { running } = model.state;
  if (running.length) selected = Math.min(...running);
}

// Words -----------------------------------------------------------------------------------------------------------------

function say(words, isError = false) {
  const line = find("#said");
  line.textContent = words;
  line.classList.toggle("visually-hidden", !isError);
}

function looker(selector) {
  const line = find(selector);
  const usual = matchMedia("(hover: none)").matches ? line.dataset.touch : line.textContent;
  line.textContent = usual;
  return (words) => {
    if (line.textContent !== (words ?? usual)) line.textContent = words ?? usual;
  };
}

// Parts -----------------------------------------------------------------------------------------------------------------

const pool = new PoolMap(find("#pool"), model, { select, change, look: looker("#pool-look") });
const table = new BlockTable(find("#table"), model, {
  point(block) {
    pool.pointedBlock = block;
    change();
  },
});
const queues = new Queues(find("#queues"), model, select);
const timeline = new Timeline(find("#timeline"), model, { select, choose, change, look: looker("#timeline-look") });
const charts = new Charts(find("#charts"), model, change);
const controls = new Controls(find("#controls"), session, model, say);
const prompts = new Prompts(find("#prompts"), session, model, { select, change });

// The feed --------------------------------------------------------------------------------------------------------------

let lastUpdate = { at: 0, timeS: 0 };
let connection = "connecting";

const feed = new Feed(session, {
  hello(hello) {
    model.takeHello(hello);
    prompts.forget();
    say("");
    selected = null;
    isChosen = false;
    setText("#model", hello.model);
    setText("#block-size", String(hello.block_size));
    find("#facts").title = `${hello.num_blocks} blocks of ${hello.block_size} slots; at most ${hello.max_num_seqs} sequences and `
      + `${hello.max_num_batched_tokens} tokens a step; at most ${hello.max_model_len} tokens a sequence`;
    find("#max-tokens").max = hello.max_model_len;
    change();
  },
  update(update) {
    const before = model.totals.preemptions;
    model.takeUpdate(update);
    lastUpdate = { at: performance.now(), timeS: update.time_s };
    const taken = update.steps.flatMap((step) => step.preempted);
    if (model.paused && taken.length && model.totals.preemptions > before) {
      say(`Preempted: ${taken.map(letter).join(", ")}.`);
    }
    change();
  },
  status(status) {
    connection = status.state;
    root.dataset.connection = status.state;
    const words = {
      connecting: "connecting …",
      live: "live",
      lost: `${(status.reason || "Connection lost").replace(/\.?$/, ".")} Trying again in ${status.seconds} s.`,
      locked: "an API key is needed",
      off: "not watching",
    };
    setText("#connection", words[status.state]);
    find("#connection").title = words[status.state];
    change();
  },
});

setInterval(() => {
  const since = performance.now() - lastUpdate.at;
  if (connection !== "live" || document.hidden || since < IDLE_MS) return;
  if (model.idle(lastUpdate.timeS + since / 1000)) change();
}, IDLE_MS);

let unseen = null;
document.addEventListener("visibilitychange", () => {
  clearTimeout(unseen);
  if (document.hidden) {
    if (frame !== null) cancelAnimationFrame(frame);
    frame = null;
    unseen = setTimeout(() => feed.stop(), UNSEEN_MS);
  } else {
    if (connection !== "locked") feed.start();
    change();
  }
});

// The API key -----------------------------------------------------------------------------------------------------------

const keyForm = find("#key-form");
session.onKeyWanted = (rejected) => {
  keyForm.hidden = false;
  setText("#key-words", rejected ? "The server does not accept this API key." : "This server needs an API key.");
  keyForm.elements.key.focus();
};
keyForm.addEventListener("submit", (event) => {
  event.preventDefault();
  session.setKey(keyForm.elements.key.value.trim());
  keyForm.elements.key.value = "";
  keyForm.hidden = true;
  feed.restart();
});

// The rest --------------------------------------------------------------------------------------------------------------

find("#theme").addEventListener("click", () => document.dispatchEvent(new Event("pagebrain:toggle-theme")));
document.addEventListener("pagebrain:theme", change);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    isChosen = false;
    change();
  }
});

/** For tests and the browser's console: what is drawn, read-only. */
window.pagebrainLive = Object.freeze({
  snapshot() {
    const { state, totals } = model;
    return structuredClone({
      connection, frames, selected, isChosen, totals,
      hello: model.hello,
      state,
      paused: model.paused,
      next: state.next_free,
      fresh: [...model.fresh],
      lost: [...model.lost],
      grid: pool.grid,
      rows: timeline.rows,
      sequences: timeline.sequences,
      steps: model.steps.map(({ step, preempted, finished, skipped }) => ({ step, preempted, finished, skipped })),
      historyLength: model.history.time.length,
    });
  },
  /** The position of a block's cell on the map, in CSS pixels from the map's corner. */
  box: (block) => pool.box(Math.floor(block / pool.grid.perCell)),
});

feed.start();

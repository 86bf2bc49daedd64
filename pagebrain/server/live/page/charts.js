// Tokens a second and KV usage over the last minute, drawn by uPlot (a classic script, loaded before this module).

import { onResize, themeColours } from "./canvas.js";

const { uPlot } = window;
const WINDOW_S = 60;
const FONT = '11px "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif';

export class Charts {
  constructor(root, model, change) {
    this.model = model;
    this.rates = { place: root.querySelector(".chart-rates"), chart: null };
    this.usage = { place: root.querySelector(".chart-usage"), chart: null };
    this.theme = null;
    this.change = change;
    onResize(root, () => this.change());
  }

  draw() {
    const { time, prefillRate, decodeRate, usage } = this.model.history;
    const theme = document.documentElement.dataset.theme;
    if (theme !== this.theme) {
      this.theme = theme;
      this.#make();
    }
    const now = time.at(-1) ?? 0;
    const from = time.findIndex((second) => now - second <= WINDOW_S);
    const ago = time.slice(from).map((second) => second - now);
    const cut = (values) => values.slice(from);
    this.#show(this.rates, [ago, cut(decodeRate), cut(prefillRate)]);
    this.#show(this.usage, [ago, cut(usage)]);
  }

  #show({ place, chart }, data) {
    const [width, height] = [place.clientWidth, place.clientHeight];
    if (width && (chart.width !== width || chart.height !== height)) chart.setSize({ width, height });
    chart.setData(data);
  }

  #make() {
    const colours = themeColours();
    const dark = this.theme === "dark";
    const [blue, orange] = dark ? ["#56B4E9", "#E69F00"] : ["#0072B2", "#B34700"];
    for (const part of [this.rates, this.usage]) part.chart?.destroy();
    this.rates.chart = new uPlot(
      options(this.rates.place, colours, [
        { label: "decode", stroke: blue, width: 2, fill: `${blue}22` },
        { label: "prefill", stroke: orange, width: 2, dash: [5, 3] },
      ], (values) => values.map(short), (_, __, most) => [0, Math.max(10, 1.15 * most)]),
      [[], [], []],
      this.rates.place,
    );
    const steps = uPlot.paths.stepped({ align: 1 });
    this.usage.chart = new uPlot(
      options(this.usage.place, colours, [{ label: "KV usage", stroke: blue, width: 2, fill: `${blue}22`, paths: steps }],
        (values) => values.map((value) => `${value}%`), () => [0, 100]),
      [[], []],
      this.usage.place,
    );
  }
}

function options(place, colours, series, words, range) {
  const axis = {
    stroke: colours.muted,
    font: FONT,
    grid: { stroke: colours.line, width: 1 },
    ticks: { show: false },
  };
  return {
    width: Math.max(50, place.clientWidth),
    height: Math.max(40, place.clientHeight),
    padding: [6, 16, 0, 0],
    cursor: { show: false },
    legend: { show: false },
    scales: { x: { time: false, range: [-WINDOW_S, 0] }, y: { range } },
    axes: [
      { ...axis, size: 24, gap: 7, space: 60, values: (_, values) => values.map((value) => (value === 0 ? "now" : `${value} s`)) },
      { ...axis, size: 40, gap: 4, splits: (_, __, least, most) => [least, roundBelow(most)], values: (_, values) => words(values) },
    ],
    series: [{}, ...series.map((one) => ({ points: { show: false }, ...one }))],
  };
}

/** The largest of 1, 2, 5, 10, 20 ... that is at most the value. */
function roundBelow(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(1, value)));
  return power * (value >= 5 * power ? 5 : value >= 2 * power ? 2 : 1);
}

/** 1234 as 1.2k. */
export function short(value) {
  if (value < 1000) return String(Math.round(value));
  return value < 10_000 ? `${(value / 1000).toFixed(1)}k` : `${Math.round(value / 1000)}k`;
}

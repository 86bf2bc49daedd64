// Helpers for the two canvases: sharp pixels, the page's colours, fills for sequences, and frames.

import { colour, textColour, texture } from "./palette.js";

const NAMES = ["ink", "muted", "faint", "line", "paper", "free", "alarm", "alarm-soft", "accent"];

/** The current colours of the theme, from live.css. */
export function themeColours() {
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(NAMES.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

/** A canvas that fits its element on any screen. Sizes are CSS pixels. */
export class Sheet {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.width = 0;
    this.height = 0;
    this.ratio = 1;
    this.fills = new Map();
  }

  /** Set the size. Returns the context, cleared and in CSS pixels. */
  begin(width, height) {
    const ratio = Math.min(3, window.devicePixelRatio || 1);
    if (ratio !== this.ratio) this.fills.clear();
    if (width !== this.width || height !== this.height || ratio !== this.ratio) {
      [this.width, this.height, this.ratio] = [width, height, ratio];
      this.canvas.width = Math.round(width * ratio);
      this.canvas.height = Math.round(height * ratio);
      this.canvas.style.width = `${width}px`;
      this.canvas.style.height = `${height}px`;
    }
    this.context.setTransform(ratio, 0, 0, ratio, 0, 0);
    this.context.clearRect(0, 0, width, height);
    return this.context;
  }

  /** The fill of a sequence's blocks: its colour and texture. */
  fill(seqId) {
    const kind = texture(seqId);
    if (kind === "plain") return colour(seqId);
    return this.#pattern(`${colour(seqId)} ${kind}`, 6, (context) => {
      context.fillStyle = colour(seqId);
      context.fillRect(0, 0, 6, 6);
      context.fillStyle = textColour(seqId) === "#ffffff" ? "rgb(255 255 255 / 0.3)" : "rgb(0 0 0 / 0.24)";
      if (kind === "stripes") {
        context.fillRect(0, 0, 2, 6);
      } else {
        for (const [x, y] of [[1.5, 1.5], [4.5, 4.5]]) {
          context.beginPath();
          context.arc(x, y, 1.05, 0, 2 * Math.PI);
          context.fill();
        }
      }
    });
  }

  /** The fill of empty slots in a held block: hatched, as in the notebooks. */
  hatch(ink) {
    return this.#pattern(`hatch ${ink}`, 5, (context) => {
      context.strokeStyle = ink;
      context.lineWidth = 0.9;
      context.beginPath();
      for (const offset of [-5, 0, 5]) {
        context.moveTo(offset - 1, 6);
        context.lineTo(offset + 6, -1);
      }
      context.stroke();
    });
  }

  #pattern(key, size, draw) {
    if (!this.fills.has(key)) {
      const tile = document.createElement("canvas");
      tile.width = tile.height = Math.round(size * this.ratio);
      const context = tile.getContext("2d");
      context.scale(tile.width / size, tile.width / size);
      draw(context);
      const pattern = this.context.createPattern(tile, "repeat");
      pattern.setTransform(new DOMMatrix().scale(size / tile.width));
      this.fills.set(key, pattern);
    }
    return this.fills.get(key);
  }
}

/** Begin a path that is a rounded box. */
export function rounded(context, { x, y, w, h }, radius) {
  context.beginPath();
  context.roundRect(x, y, w, h, radius);
}

/** Draw a box's frame, `inset` pixels inside it (outside if negative). */
export function outline(context, { x, y, w, h }, radius, style, thick, inset, dash = []) {
  context.beginPath();
  context.roundRect(x + inset, y + inset, Math.max(1, w - 2 * inset), Math.max(1, h - 2 * inset), radius);
  context.strokeStyle = style;
  context.lineWidth = thick;
  context.setLineDash(dash);
  context.stroke();
  context.setLineDash([]);
}

/** Call `change(width, height)`, in whole CSS pixels, when an element's size changes. */
export function onResize(element, change) {
  new ResizeObserver(() => change(Math.floor(element.clientWidth), Math.floor(element.clientHeight))).observe(element);
}

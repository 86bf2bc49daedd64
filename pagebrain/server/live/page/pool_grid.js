// The layout of the pool's map: number and place of its cells, and the blocks that each stands for. Draws nothing.

const SMALLEST = 9; // CSS pixels; a cell that stands for one block is at least this wide and high
const WIDEST = 120;
const HIGHEST = 76;

/**
 * The largest almost square cells that fit. A cell stands for one block if all fit, else for 2, 4, 8 ... blocks.
 *
 * Returns {perCell, cells, columns, rows, width, height}; the last two are a cell's, gap included.
 */
export function layOut(numBlocks, width, height) {
  const room = Math.max(1, Math.floor(width / SMALLEST) * Math.floor(height / SMALLEST));
  let perCell = 1;
  while (Math.ceil(numBlocks / perCell) > room) perCell *= 2;
  const cells = Math.max(1, Math.ceil(numBlocks / perCell));
  let best = null;
  for (let columns = 1; columns <= Math.max(1, Math.floor(width / SMALLEST)); columns += 1) {
    if (columns > 8 && columns % 4) continue; // numbers are easier to find in rows of 12, 16, 20 ...
    const rows = Math.ceil(cells / columns);
    const cellWidth = Math.min(width / columns, WIDEST);
    const cellHeight = Math.min(height / rows, 1.15 * cellWidth, HIGHEST);
    if (cellHeight < SMALLEST - 2 && best) continue;
    const score = Math.min(cellWidth / 1.25, cellHeight) + (cells % columns === 0 ? 1.5 : 0);
    if (!best || score > best.score) best = { score, columns, rows, width: cellWidth, height: cellHeight };
  }
  return { perCell, cells, columns: best.columns, rows: best.rows, width: best.width, height: best.height };
}

/** The box {x, y, w, h} of a cell without the gap. */
export function boxOf({ columns, width, height }, cell) {
  const gap = Math.min(width, height) >= 24 ? 3 : Math.min(width, height) >= 13 ? 2 : 1;
  return {
    x: (cell % columns) * width + gap / 2,
    y: Math.floor(cell / columns) * height + gap / 2,
    w: width - gap,
    h: height - gap,
  };
}

/** The blocks that a cell stands for: [first, last]. */
export function blocksOf({ perCell }, cell, numBlocks) {
  return [cell * perCell, Math.min((cell + 1) * perCell, numBlocks) - 1];
}

/** The cell under a point of the map, or null. */
export function cellAt(grid, x, y) {
  const column = Math.floor(x / grid.width);
  const row = Math.floor(y / grid.height);
  const cell = row * grid.columns + column;
  return x < 0 || y < 0 || column >= grid.columns || row >= grid.rows || cell >= grid.cells ? null : cell;
}

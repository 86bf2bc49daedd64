// The look of a sequence. Colours and letters are those of the notebooks' pictures (pagebrain/viz). More than eight colours
// would be hard to tell apart, so the next eight sequences have stripes, and the eight after them dots.

export const COLOURS = ["#0072B2", "#E69F00", "#00795A", "#F0E442", "#B34700", "#56B4E9", "#7B3F6E", "#F2C4DE"];
const DARK_TEXT = [false, true, false, true, false, true, false, true];
const TEXTURES = ["plain", "stripes", "dots"];

/** The colour of a sequence. */
export function colour(seqId) {
  return COLOURS[seqId % COLOURS.length];
}

/** Black or white: the one with more contrast on the sequence's colour. */
export function textColour(seqId) {
  return DARK_TEXT[seqId % COLOURS.length] ? "#000000" : "#ffffff";
}

/** The texture, which differs for sequences of one colour: "plain", "stripes" or "dots". */
export function texture(seqId) {
  return TEXTURES[Math.floor(seqId / COLOURS.length) % TEXTURES.length];
}

/** A to Z, then AA, AB and so on. */
export function letter(seqId) {
  let name = "";
  for (let number = seqId + 1; number > 0; number = Math.floor((number - 1) / 26)) {
    name = String.fromCharCode(65 + ((number - 1) % 26)) + name;
  }
  return name;
}

/** Set a sequence's look on an element; live.css uses it. */
export function dress(element, seqId) {
  const id = seqId === null || seqId === undefined ? "" : String(seqId);
  if (element.dataset.seq === id) return;
  element.dataset.seq = id;
  if (id === "") {
    delete element.dataset.texture;
    element.style.removeProperty("--seq");
    element.style.removeProperty("--on-seq");
    return;
  }
  element.dataset.texture = texture(seqId);
  element.style.setProperty("--seq", colour(seqId));
  element.style.setProperty("--on-seq", textColour(seqId));
}

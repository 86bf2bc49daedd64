// What a sequence looks like: its colour and letter are those of the notebooks' pictures (pagebrain/viz). Eight colours are as
// many as can be told apart; the next eight sequences have stripes, the eight after those dots. The letter says it in words.

export const COLOURS = ["#0072B2", "#E69F00", "#00795A", "#F0E442", "#B34700", "#56B4E9", "#7B3F6E", "#F2C4DE"];
const DARK_TEXT = [false, true, false, true, false, true, false, true];
const TEXTURES = ["plain", "stripes", "dots"];

/** The colour of a sequence. */
export function colour(seqId) {
  return COLOURS[seqId % COLOURS.length];
}

/** Black or white, whichever reads better on the sequence's colour. */
export function textColour(seqId) {
  return DARK_TEXT[seqId % COLOURS.length] ? "#000000" : "#ffffff";
}

/** What tells apart sequences of one colour: "plain", "stripes" or "dots". */
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

/** Give an element the look of a sequence; live.css does the rest. */
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

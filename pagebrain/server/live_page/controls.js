// Pause, resume, single steps, and slow motion: a single step every so often, asked for by this page.

export class Controls {
  constructor(root, session, model, say) {
    this.session = session;
    this.model = model;
    this.say = say;
    this.buttons = root.querySelector(".control-buttons");
    this.hint = root.querySelector(".control-hint");
    this.pause = root.querySelector("#pause");
    this.step = root.querySelector("#step");
    this.pace = root.querySelector("#pace");
    this.timer = null;
    this.isBusy = false;
    this.pause.addEventListener("click", () => this.toggle());
    this.step.addEventListener("click", () => this.stepOnce());
    this.pace.addEventListener("change", () => this.setPace(Number(this.pace.value)));
    document.addEventListener("keydown", (event) => this.#key(event));
    document.addEventListener("visibilitychange", () => document.hidden && this.#stopSlowMotion());
  }

  get isAllowed() {
    return Boolean(this.model.hello?.control);
  }

  draw() {
    const { hello, paused } = this.model;
    this.buttons.hidden = !this.isAllowed;
    this.hint.hidden = !hello || this.isAllowed;
    const runs = !paused || this.timer !== null;
    setText(this.pause.querySelector(".word"), runs ? "Pause" : "Resume");
    this.pause.setAttribute("aria-pressed", String(!runs));
    document.documentElement.classList.toggle("is-paused", paused && this.timer === null);
  }

  async toggle() {
    const runs = !this.model.paused || this.timer !== null;
    this.#stopSlowMotion();
    if (await this.#send(runs ? "pause" : "resume")) this.say(runs ? "Paused." : "Running.");
  }

  async stepOnce() {
    this.#stopSlowMotion();
    if (await this.#send("step")) this.say("One step.");
  }

  /** So many steps a second; 0 is full speed. */
  async setPace(perSecond) {
    this.#stopSlowMotion();
    if (perSecond === 0) return this.#send("resume");
    this.pace.value = String(perSecond);
    this.timer = setInterval(() => this.#send("step"), 1000 / perSecond);
    this.draw();
    return this.#send("step");
  }

  #stopSlowMotion() {
    if (this.timer === null) return;
    clearInterval(this.timer);
    this.timer = null;
    this.pace.value = "0";
    this.draw();
  }

  async #send(action) {
    if (this.isBusy || !this.isAllowed) return false;
    this.isBusy = true;
    try {
      const response = await this.session.request("live/control", { body: { action } });
      this.model.paused = (await response.json()).paused;
      this.draw();
      return true;
    } catch (error) {
      this.#stopSlowMotion();
      this.say(error.message, true);
      return false;
    } finally {
      this.isBusy = false;
    }
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || !this.isAllowed) return;
    if (event.target.closest?.("input, textarea, select")) return;
    const key = event.key.toLowerCase();
    if (key === "p") this.toggle();
    else if (key === "s") this.stepOnce();
    else return;
    event.preventDefault();
  }
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// Pause, resume, single steps, and slow motion: the page requests a single step at fixed intervals.

const SETTLED_MS = 1000;

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
    this.perSecond = 0; // the selected pace in steps per second; 0 is full speed
    this.timer = null; // requests the steps of slow motion
    this.inFlight = null;
    this.askedAt = 0;
    this.pause.addEventListener("click", () => this.toggle());
    this.step.addEventListener("click", () => this.stepOnce());
    this.pace.addEventListener("change", () => this.setPace(Number(this.pace.value)));
    document.addEventListener("keydown", (event) => this.#key(event));
    document.addEventListener("visibilitychange", () => document.hidden && this.#stopTimer());
  }

  get isAllowed() {
    return Boolean(this.model.hello?.control);
  }

  get runs() {
    return !this.model.paused || this.timer !== null;
  }

  draw() {
    const { runs } = this;
    this.buttons.hidden = !this.isAllowed;
    this.hint.hidden = !this.model.hello || this.isAllowed;
    if (!this.model.paused && this.timer === null && this.#isAtRest) this.perSecond = 0; // another page resumed it
    if (this.pace.value !== String(this.perSecond)) this.pace.value = String(this.perSecond); // an open list would close
    setText(this.pause.querySelector(".word"), runs ? "Pause" : "Resume");
    this.pause.setAttribute("aria-pressed", String(!runs));
    document.documentElement.classList.toggle("is-paused", !runs);
  }

  /** Whether the feed's state is newer than the last request of this page. */
  get #isAtRest() {
    return this.inFlight === null && performance.now() - this.askedAt > SETTLED_MS;
  }

  /** Pause, or run at the selected pace. */
  async toggle() {
    if (this.runs) {
      this.#stopTimer();
      if (await this.#send("pause")) this.say("Paused.");
    } else if (await this.#run()) {
      this.say("Running.");
    }
  }

  async stepOnce() {
    this.#stopTimer();
    if (await this.#send("step")) this.say("One step.");
  }

  /** Set the pace in steps per second; 0 is full speed. A paused engine stays paused. */
  async setPace(perSecond) {
    this.perSecond = perSecond;
    if (!this.runs) return this.say("Resume goes on at this pace.");
    this.#stopTimer();
    await this.#run();
  }

  #run() {
    if (this.perSecond === 0) return this.#send("resume");
    this.timer = setInterval(() => this.inFlight ?? this.#send("step"), 1000 / this.perSecond);
    this.draw();
    return this.#send("step");
  }

  #stopTimer() {
    clearInterval(this.timer);
    this.timer = null;
  }

  /** Send a request after the one in flight. Returns whether it succeeded. */
  async #send(action) {
    while (this.inFlight) await this.inFlight;
    if (!this.isAllowed) return false;
    this.inFlight = this.#post(action);
    const isDone = await this.inFlight;
    this.draw();
    return isDone;
  }

  async #post(action) {
    try {
      const response = await this.session.request("live/control", { body: { action } });
      this.model.paused = (await response.json()).paused;
      return true;
    } catch (error) {
      this.#stopTimer();
      this.say(error.message, true);
      return false;
    } finally {
      this.inFlight = null;
      this.askedAt = performance.now();
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

// What the method saw in a logged step of a run: an anywidget. Everything that is shown is in the
// model, so that every view and a reloaded page show the same.

const STYLE = `
.scaledreamer-step { color: inherit; font: 14px/1.4 var(--jp-ui-font-family, system-ui);
  max-width: 1200px }
.scaledreamer-step .controls { display: flex; flex-wrap: wrap; gap: 4px 12px;
  align-items: center; margin: 4px 0 }
.scaledreamer-step label { display: flex; gap: 8px; align-items: center }
.scaledreamer-step label.slide { flex: 1 1 16em }
.scaledreamer-step input[type="range"] { flex: 1; min-width: 8em }
.scaledreamer-step output { min-width: 4em; font-variant-numeric: tabular-nums }
.scaledreamer-step select, .scaledreamer-step button { font: inherit; color: inherit;
  background: var(--jp-layout-color1, Canvas); border: 1px solid #888; border-radius: 3px }
.scaledreamer-step select { max-width: 20em }
.scaledreamer-step .pictures { display: grid; gap: 8px; transition: opacity 0.2s;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 100px), 1fr)) }
.scaledreamer-step .pictures.old { opacity: 0.4 }
.scaledreamer-step figure { margin: 0; min-width: 0; max-width: 260px }
.scaledreamer-step img { display: block; width: 100%; image-rendering: pixelated;
  border-radius: 3px }
.scaledreamer-step figcaption { padding: 2px 0; font-size: 12px }
.scaledreamer-step dl { display: grid; grid-template-columns: auto 1fr; gap: 2px 12px;
  margin: 8px 0 }
.scaledreamer-step dt { opacity: 0.75; white-space: nowrap; font-weight: inherit }
.scaledreamer-step dd { margin: 0; overflow-wrap: anywhere }
.scaledreamer-step .message { min-height: 1.4em; opacity: 0.75 }
.scaledreamer-step .message.failed { color: var(--jp-error-color1, #b3261e); opacity: 1 }`;
const SHOWN = ["steps", "step", "image", "prompts", "shown", "labels", "pictures", "details",
  "message", "failed"];
const REFRESH = 3000; // milliseconds between two looks for new steps of a run that trains

function set(model, name, value) {
  model.set(name, value);
  model.save_changes();
}

class StepView {
  constructor(model, element) {
    Object.assign(this, { model, urls: [], drawn: null, frame: 0 });
    this.root = make("div", { className: "scaledreamer-step" }, make("style", {}, STYLE));
    this.pictures = make("div", { className: "pictures" });
    this.details = make("dl");
    this.message = make("div", { className: "message" });
    this.message.setAttribute("role", "status");
    this.root.append(this.controls(), this.pictures, this.message, this.details);
    element.append(this.root);
    this.soon = this.soon.bind(this);
    SHOWN.forEach((name) => model.on(`change:${name}`, this.soon));
    this.answered = this.answered.bind(this);
    model.on("msg:custom", this.answered);
    this.ask();
    this.draw();
  }

  ask() { // whether there are new steps, while the log may grow
    this.model.send({ refresh: true });
  }

  answered(message) { // a busy kernel answers late, and gets no second question before
    clearTimeout(this.timer);
    if (message.more) this.timer = setTimeout(() => this.ask(), REFRESH);
  }

  controls() {
    this.slider = make("input", { type: "range", min: 0, step: 1 });
    this.slider.setAttribute("aria-label", "logged step");
    this.slider.addEventListener("input", () => this.choose(Number(this.slider.value)));
    this.number = make("output");
    this.choice = make("select");
    this.choice.setAttribute("aria-label", "image of the batch");
    this.choice.addEventListener("change", () => {
      set(this.model, "image", this.choice.selectedIndex);
    });
    this.back = make("button", { type: "button", textContent: "◀", title: "previous step" });
    this.next = make("button", { type: "button", textContent: "▶", title: "next step" });
    for (const [button, change] of [[this.back, -1], [this.next, 1]]) {
      button.setAttribute("aria-label", button.title);
      button.addEventListener("click", () => this.choose(this.index() + change));
    }
    const slide = make("label", { className: "slide" }, "step", this.slider, this.number);
    const image = make("label", {}, "image", this.choice);
    return make("div", { className: "controls" }, this.back, slide, this.next, image);
  }

  index() {
    return this.model.get("steps").indexOf(this.model.get("step"));
  }

  choose(index) {
    const steps = this.model.get("steps");
    if (index < 0 || index >= steps.length) return;
    set(this.model, "step", steps[index]);
  }

  soon() { // several changes at once are one drawing
    cancelAnimationFrame(this.frame);
    this.frame = requestAnimationFrame(() => this.draw());
  }

  draw() {
    const { model } = this, steps = model.get("steps"), index = this.index();
    this.slider.max = Math.max(steps.length - 1, 0);
    this.slider.value = Math.max(index, 0);
    this.number.textContent = index < 0 ? "" : steps[index];
    this.slider.setAttribute("aria-valuetext", `step ${this.number.textContent}`);
    this.slider.disabled = steps.length < 2;
    this.back.disabled = index <= 0;
    this.next.disabled = index < 0 || index >= steps.length - 1;
    this.drawChoice();
    const [step, image] = model.get("shown"), failed = model.get("failed");
    const old = step !== model.get("step") || image !== model.get("image") || failed;
    this.pictures.classList.toggle("old", old);
    this.message.textContent = model.get("message");
    this.message.classList.toggle("failed", failed);
    if (this.drawn !== model.get("pictures")) this.drawPictures();
    const rows = model.get("details").flatMap(([name, value]) => [
      make("dt", { textContent: name }), make("dd", { textContent: value }),
    ]);
    this.details.replaceChildren(...rows);
  }

  drawChoice() {
    const prompts = this.model.get("prompts");
    const names = prompts.map((prompt, i) => `${i + 1}: ${prompt}`);
    if (names.join("\n") !== [...this.choice.options].map((one) => one.text).join("\n")) {
      this.choice.replaceChildren(...names.map((text) => make("option", { text })));
    }
    this.choice.selectedIndex = this.model.get("image");
    this.choice.disabled = prompts.length < 2;
  }

  drawPictures() {
    this.urls.forEach((url) => URL.revokeObjectURL(url));
    this.drawn = this.model.get("pictures");
    const labels = this.model.get("labels"), [step, image] = this.model.get("shown");
    this.urls = this.drawn.map((data) => URL.createObjectURL(
      new Blob([data], { type: "image/png" }),
    ));
    const of = `step ${step}, ${this.model.get("prompts")[image] ?? ""}`;
    this.pictures.replaceChildren(...this.urls.map((src, i) => make(
      "figure", {}, make("img", { src, alt: `${labels[i]} (${of})` }),
      make("figcaption", { textContent: labels[i] }),
    )));
  }

  close() {
    clearTimeout(this.timer);
    this.model.off("msg:custom", this.answered);
    cancelAnimationFrame(this.frame);
    SHOWN.forEach((name) => this.model.off(`change:${name}`, this.soon));
    this.urls.forEach((url) => URL.revokeObjectURL(url));
  }
}

export default {
  render({ model, el }) {
    const view = new StepView(model, el);
    return () => view.close();
  },
};

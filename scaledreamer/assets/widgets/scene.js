// Pictures that the kernel renders, turned by pointer and keys: an anywidget. One request at a
// time, always of the newest camera. All state is in the model; what is shown follows the model.

const STYLE = `
.scaledreamer-scene { color: inherit; font: 14px/1.4 var(--jp-ui-font-family, system-ui) }
.scaledreamer-scene .pictures { display: grid; gap: 8px; width: fit-content; border-radius: 4px;
  grid-template-columns: repeat(var(--count, 1), minmax(0, 300px)) }
.scaledreamer-scene .pictures:focus-visible { outline: 2px solid #0072b2; outline-offset: -2px }
.scaledreamer-scene figure { margin: 0; min-width: 0 }
.scaledreamer-scene canvas { display: block; width: 100%; aspect-ratio: 1; cursor: grab;
  touch-action: pan-y; border-radius: 4px }
.scaledreamer-scene figcaption { text-align: center; padding: 2px;
  overflow-wrap: anywhere }
.scaledreamer-scene .controls { display: flex; flex-wrap: wrap; gap: 4px 16px;
  align-items: center; margin: 4px 0; max-width: 960px }
.scaledreamer-scene select, .scaledreamer-scene button, .scaledreamer-scene input { font: inherit;
  color: inherit; background: var(--jp-layout-color1, Canvas); border: 1px solid #888;
  border-radius: 3px }
.scaledreamer-scene .text { width: 18em }
.scaledreamer-scene label.part { display: flex; flex: 1 1 100%; gap: 8px; align-items: center }
.scaledreamer-scene input[type="range"] { flex: 1; min-width: 8em }
.scaledreamer-scene .state { opacity: 0.75; font-variant-numeric: tabular-nums }
.scaledreamer-scene .hint { opacity: 0.75 }
.scaledreamer-scene .refused { opacity: 0.5 }
.scaledreamer-scene .message { max-width: 960px; overflow-wrap: anywhere }
.scaledreamer-scene .message:not(:empty) { border-left: 3px solid #d55e00; padding-left: 8px }`;
const CHOICES = {
  mode: ["show", { color: "colour", normal: "normal", depth: "depth", opacity: "opacity" }],
  background: ["background", { scene: "as trained", white: "white", grey: "grey",
    black: "black" }],
};
const TEXTS = { text: "prompt", one: "from", other: "to" }; // fields, where the model has them
const STATE = ["azimuth", "elevation", "distance", "step", "message", "part", "prompts",
  ...Object.keys(TEXTS), ...Object.keys(CHOICES)];
const PATIENCE = 5000; // milliseconds after which an answer is no longer waited for

class Requests { // at most one unanswered
  constructor(model) {
    Object.assign(this, { model, sent: -Infinity, waiting: false, unsent: {} });
  }

  // What is set meanwhile is in the model only when it is sent: an answer would overwrite it.
  get(name) { return this.unsent[name] ?? this.model.get(name); }

  send() { // now, or when the last one is answered
    const late = performance.now() - this.sent > PATIENCE;
    this.waiting = this.model.get("answered") !== this.model.get("request") && !late;
    if (this.waiting) return;
    this.sent = performance.now();
    const values = this.unsent;
    this.unsent = {};
    Object.entries(values).forEach(([name, value]) => this.model.set(name, value));
    this.model.set("request", this.model.get("request") + 1);
    this.model.save_changes();
  }

  answered() { if (this.waiting) this.send(); }
}

class SceneView extends OrbitView {
  constructor(model, element) {
    super();
    Object.assign(this, { model, drawn: 0, times: [], requests: new Requests(model) });
    this.root = make("div", { className: "scaledreamer-scene" }, make("style", {}, STYLE),
      make("style", {}, `.${model.get("twin")} { display: none }`)); // for pages without a kernel
    this.root.view = this;
    this.stage = make("div", { className: "pictures", tabIndex: 0, title: HINT });
    this.stage.setAttribute("role", "group");
    this.controls = make("div", { className: "controls" });
    this.state = make("span", { className: "state" });
    this.message = make("div", { className: "message" });
    this.message.setAttribute("role", "status");
    element.append(this.root);
    this.root.append(this.stage, this.controls, make("div", { className: "hint" }, HINT),
      this.message);
    this.layout();
    this.steer();
    this.listen();
    this.refresh();
    this.draw();
  }

  listen() {
    this.calls = STATE.map((name) => [`change:${name}`, () => this.refresh()]);
    this.calls.push(["change:frame", () => this.draw()]);
    this.calls.push(["change:answered", () => this.requests.answered()]);
    this.calls.forEach(([event, call]) => this.model.on(event, call));
    this.sight = new IntersectionObserver((seen) => { this.seen = seen.at(-1).isIntersecting; });
    this.sight.observe(this.root);
    this.timer = setInterval(() => { // a run that trains is followed while it is in sight
      if (this.model.get("live") && this.seen && !document.hidden) this.requests.send();
      if (this.times.length) this.refresh();
    }, 1000);
  }

  layout() {
    this.texts = Object.entries(TEXTS).filter(([name]) => this.has(name)).map((text) =>
      this.textField(...text));
    if (this.has("part")) {
      this.part = make("input", { type: "range", min: 0, max: 1, step: 0.01,
        oninput: () => this.set({ part: Number(this.part.value) }) });
      this.part.setAttribute("aria-label", "part of the second prompt");
      this.between = make("output", {});
      this.controls.append(make("label", { className: "part" }, this.part, this.between));
    }
    this.selects = Object.entries(CHOICES).map(([name, [title, options]]) => {
      const select = make("select", { name, onchange: () => this.set({ [name]: select.value }) });
      Object.entries(options).forEach(([value, text]) =>
        select.append(make("option", { value }, text)));
      this.controls.append(make("label", {}, `${title} `, select));
      return select;
    });
    this.controls.append(make("button", { type: "button", onclick: () => this.reset() },
      "reset view"), this.state);
  }

  get(name) { return this.requests.get(name); }

  has(name) { return this.model.get(name) !== undefined; }

  textField(name, title) {
    const list = make("datalist", { id: `scaledreamer-${Math.random().toString(36).slice(2)}` });
    const field = make("input", { name, className: "text", autocomplete: "off" });
    field.setAttribute("list", list.id);
    const show = () => { [field.value, field.placeholder] = [this.get(name), ""]; };
    field.onfocus = () => { [field.placeholder, field.value] = [field.value, ""]; }; // offers all
    field.onblur = show;
    field.onchange = () => this.set({ [name]: field.value.trim() }); // none: the last good one
    field.onkeydown = ({ key }) => { if (key === "Enter") field.onchange(); };
    const label = this.controls.appendChild(make("label", {}, `${title} `, field, list));
    return { name, field, list, label, show };
  }

  set(values) {
    Object.assign(this.requests.unsent, values);
    this.requests.send();
    this.refresh();
  }

  refresh() {
    const { model } = this, prompts = model.get("prompts");
    this.selects.forEach((select) => { select.value = this.get(select.name); });
    for (const { field, list, label, show } of this.texts) {
      label.hidden = !prompts.length;
      if (list.childElementCount !== prompts.length) {
        list.replaceChildren(...prompts.map((value) => make("option", { value })));
      }
      if (document.activeElement !== field) show();
      else if (!field.value) field.placeholder = this.get(name);
    }
    if (this.part) {
      this.part.value = this.get("part");
      this.between.textContent = `${Math.round(100 * this.get("part"))} %`;
    }
    this.message.textContent = model.get("message");
    this.stage.classList.toggle("refused", Boolean(model.get("message")));
    this.state.textContent = this.describe();
  }

  describe() {
    const [a, e] = ["azimuth", "elevation"].map((name) => Math.round(this.get(name)));
    const { pixels } = this.model.get("frame"), step = this.model.get("step");
    this.times = this.times.filter((time) => performance.now() - time < 1000);
    return [`azimuth ${a}°, elevation ${e}°, distance ${this.get("distance").toFixed(2)}`,
      step < 0 ? "" : `step ${step}`, pixels ? `${pixels} x ${pixels} pixels` : "",
      this.times.length > 2 ? `${this.times.length} frames/s` : ""].filter(Boolean).join("; ");
  }

  async draw() {
    const { pictures = [], titles = [] } = this.model.get("frame"), ours = (this.newest = {});
    const maps = await Promise.all(pictures.map((png) =>
      createImageBitmap(new Blob([png], { type: "image/png" }))));
    if (this.newest !== ours) return; // a newer one has come meanwhile
    this.panels(titles);
    maps.forEach((map, i) => {
      const canvas = this.canvases[i];
      [canvas.width, canvas.height] = [map.width, map.height];
      canvas.getContext("2d").drawImage(map, 0, 0);
    });
    this.drawn += 1;
    this.times.push(performance.now());
    this.refresh();
  }

  panels(titles) { // one per picture
    if (this.canvases && titles.join("\n") === this.titles) return;
    this.titles = titles.join("\n");
    this.canvases = titles.map((title) => {
      const canvas = make("canvas");
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", title);
      return canvas;
    });
    this.stage.replaceChildren(...titles.map((title, i) =>
      make("figure", {}, this.canvases[i], make("figcaption", {}, title))));
    this.stage.style.setProperty("--count", titles.length);
    this.stage.setAttribute("aria-label", `${titles.join(", ")}: ${HINT}`);
  }

  remove() {
    this.calls.forEach(([event, call]) => this.model.off(event, call));
    this.sight.disconnect();
    clearInterval(this.timer);
  }
}

function render({ model, el }) {
  const view = new SceneView(model, el);
  return () => view.remove();
}

export default { render };

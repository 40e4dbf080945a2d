// The dashboard of a training run: status, controls, curves, pictures of the prompts beside the
// truth. All state is in the model, so that every view of it shows the same.

const NAMES = ["step", "gradient_norm", "gradient_norm_low", "gradient_norm_high", "error_t",
  "error_t_shifted", "opacity"];
const KINDS = { starting: "active", training: "active", stopping: "active", finished: "done",
  failed: "wrong", gone: "wrong", "no run": "wrong" };

const setText = (element, text) => { // what is unchanged is not touched
  if (element.textContent !== text) element.textContent = text;
};

const CHARTS = () => [
  new Chart("", [{ name: "gradient_norm", label: "gradient norm", color: "var(--one)",
    low: "gradient_norm_low", high: "gradient_norm_high" }], true),
  new Chart("", [
    { name: "error_t", label: "noise error at t", color: "var(--one)", width: 2.6 },
    { name: "error_t_shifted", label: "at t + dt", color: "var(--two)", width: 1 }], true,
  "Noise at a lower t is harder to predict, so both rise as the timesteps anneal: only the " +
  "difference of t and t + dt matters."),
  new Chart("", [{ name: "opacity", label: "opacity", color: "var(--one)" }], false),
];

class DashboardView {
  constructor(model, element) {
    Object.assign(this, { model, urls: [], shown: [] });
    this.root = make("div", { className: "scaledreamer-dashboard" });
    this.root.setAttribute("data-lm-suppress-shortcuts", "true"); // JupyterLab's own arrow keys
    // the fixed picture of the same output is for pages without a kernel
    this.root.append(make("style", {}, `.${model.get("twin")} { display: none }`));
    this.root.append(...this.top(), ...this.middle(), ...this.bottom());
    element.append(this.root);
    const calls = { head: this.head, curves: this.curves, selected: this.select,
      captions: this.gallery, learnt: this.gallery, truths: this.gallery };
    this.calls = Object.entries(calls).map(([name, call]) => [`change:${name}`, call.bind(this)]);
    this.calls.forEach(([event, call]) => model.on(event, call));
    this.head();
    this.gallery();
    this.curves();
    this.sizes = new ResizeObserver(() => this.charts.forEach((chart) => chart.paint()));
    this.sizes.observe(this.area);
    model.send({ action: "shown" });
  }

  button(action, text, properties = {}) {
    const onclick = () => this.model.send({ action: this.actions?.[action] ?? action });
    return make("button", { type: "button", onclick, ...properties }, text);
  }

  top() {
    this.status = make("span", { className: "status" });
    this.name = make("span", { className: "name" });
    this.about = make("span", { className: "about" });
    this.buttons = { pause: this.button("pause", "Pause"), stop: this.button("stop", "Stop"),
      snapshot: this.button("snapshot", "Snapshot",
        { title: "save a checkpoint and a validation picture" }) };
    const buttons = make("span", { className: "buttons" }, ...Object.values(this.buttons));
    this.done = make("div");
    this.bar = make("div", { className: "bar" }, this.done);
    this.bar.setAttribute("role", "progressbar");
    this.bar.setAttribute("aria-label", "part of the steps done");
    this.facts = make("dl");
    this.message = make("p", { className: "message" });
    this.message.setAttribute("role", "status");
    const header = make("header", {}, this.status, this.name, this.about, buttons);
    return [header, this.bar, this.facts, this.message];
  }

  middle() {
    this.charts = CHARTS();
    this.area = make("div", { className: "charts", tabIndex: 0 },
      ...this.charts.map((chart) => chart.figure));
    this.area.setAttribute("role", "group");
    this.area.setAttribute("aria-label",
      "curves over the steps; left and right choose a step, Enter shows what guidance saw");
    this.charts.forEach((chart) => {
      chart.svg.onpointermove = (event) => this.point(this.nearest(chart, event));
      chart.svg.onclick = (event) => this.pick(this.nearest(chart, event));
    });
    this.area.onpointerleave = () => this.point(undefined);
    this.area.onkeydown = (event) => this.press(event);
    this.note = make("p", { className: "note" });
    return [this.area, this.note];
  }

  bottom() {
    const turn = (by) => () => {
      this.model.set("page", this.model.get("page") + by);
      this.model.save_changes();
    };
    this.turns = [-1, 1].map((by) => make("button", { type: "button", onclick: turn(by),
      ariaLabel: by < 0 ? "previous prompts" : "next prompts" }, by < 0 ? "‹" : "›"));
    this.pages = make("span");
    this.paging = make("div", { className: "pages" }, this.pages, ...this.turns);
    this.tiles = make("div", { className: "tiles" });
    this.results = make("dl", { className: "results" });
    return [this.paging, this.tiles, this.results];
  }

  head() {
    const head = this.model.get("head");
    if (!head.status) return;
    setText(this.status, head.status);
    this.status.dataset.kind = this.message.dataset.kind = KINDS[head.status] ?? "still";
    setText(this.name, head.name);
    setText(this.about, head.about);
    setText(this.message, head.message);
    this.actions = { pause: head.status === "paused" ? "resume" : "pause" };
    setText(this.buttons.pause, this.actions.pause === "resume" ? "Resume" : "Pause");
    Object.entries(this.buttons).forEach(([name, button]) => {
      button.disabled = !head.actions.includes(this.actions[name] ?? name);
      if (name !== "snapshot") button.title = head.locked;
    });
    const part = head.steps ? head.step / head.steps : 0;
    this.done.style.width = `${100 * part}%`;
    this.bar.setAttribute("aria-valuenow", Math.round(100 * part));
    this.list(this.facts, head.facts);
    this.list(this.results, head.results);
    this.results.hidden = !Object.keys(head.results).length;
    setText(this.note, head.note);
    setText(this.pages, head.pages.text);
    this.paging.hidden = !head.pages.text;
    this.turns[0].disabled = head.pages.page <= 0;
    this.turns[1].disabled = head.pages.page >= head.pages.last;
    this.turns.forEach((button) => { button.hidden = !head.pages.last; });
    if (this.steps !== head.steps) this.curves();
  }

  list(element, values) { // name: value
    const names = Object.keys(values);
    if (names.join() !== element.dataset.names) {
      element.dataset.names = names.join();
      element.replaceChildren(...names.map((name) =>
        make("div", {}, make("dt", {}, name), make("dd"))));
    }
    names.forEach((name, i) => setText(element.children[i].lastChild, values[name]));
  }

  curves() {
    const bytes = this.model.get("curves");
    this.steps = this.model.get("head").steps ?? 0;
    const copy = bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength);
    const all = new Float32Array(copy), count = all.length / NAMES.length;
    const column = (i) => all.subarray(i * count, (i + 1) * count);
    this.data = Object.fromEntries(NAMES.map((name, i) => [name, column(i)]));
    this.charts.forEach((chart) => chart.update(this.data, this.steps));
    this.select();
  }

  select() {
    this.charts.forEach((chart) => chart.mark(0, this.model.get("selected")));
  }

  nearest(chart, event) { // the number of the point below the pointer
    const { left } = chart.svg.getBoundingClientRect(), steps = this.data.step;
    const far = (i) => Math.abs(chart.x(steps[i]) - (event.clientX - left));
    let best = steps.length ? 0 : undefined;
    for (let i = 1; i < steps.length; i++) if (far(i) < far(best)) best = i;
    return best;
  }

  point(index) {
    this.index = index;
    this.charts.forEach((chart) => chart.point(index));
  }

  pick(index) {
    if (index === undefined || !this.model.get("head").can_inspect) return;
    this.model.send({ action: "step", step: this.data.step[index] });
  }

  press(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key], last = this.data.step.length - 1;
    if (event.key === "Enter") this.pick(this.index);
    else if (by && last >= 0) this.point(Math.min(Math.max((this.index ?? last) + by, 0), last));
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  gallery() {
    const captions = this.model.get("captions");
    const [learnt, truths] = [this.model.get("learnt"), this.model.get("truths")];
    while (this.tiles.childElementCount > captions.length) this.tiles.lastChild.remove();
    captions.forEach((caption, i) => {
      const old = this.tiles.children[i];
      const keys = [learnt[i], truths[i]].map((png) => png?.byteLength ?? 0);
      const key = JSON.stringify([caption, ...keys]);
      if (old?.dataset.key === key) return;
      const tile = this.tile(caption, learnt[i], truths[i]);
      tile.dataset.key = key;
      if (!old) return this.tiles.append(tile);
      old.querySelectorAll("img").forEach((image) => URL.revokeObjectURL(image.src));
      old.replaceWith(tile);
    });
  }

  tile({ text, step, truth }, learnt, true_) {
    const url = (png) => URL.createObjectURL(new Blob([png], { type: "image/png" }));
    const image = (png, alt) => (png?.byteLength ? make("img", { alt, title: alt, src: url(png) }) :
      make("i"));
    const className = truth ? "pair" : "pair one";
    const pair = make("div", { className }, image(learnt, `${text}, as learnt`));
    if (truth) pair.append(image(true_, `${text}, the truth`));
    const when = step < 0 ? "no picture yet" : `step ${step.toLocaleString("en")}`;
    return make("figure", { className: "tile" }, pair, make("figcaption", {},
      make("span", { title: text }, text), make("small", {}, when)));
  }

  remove() {
    this.calls.forEach(([event, call]) => this.model.off(event, call));
    this.root.querySelectorAll("img").forEach((image) => URL.revokeObjectURL(image.src));
    this.sizes.disconnect();
  }
}

function render({ model, el }) {
  const view = new DashboardView(model, el);
  return () => view.remove();
}

export default { render };

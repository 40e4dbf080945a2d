// Coloured meshes that can be turned, side by side under one camera: an anywidget, and the same
// in an HTML page. All state is in the model; what is shown follows the model.

const STYLE = `
.scaledreamer-meshes { color: inherit; font: 14px/1.4 var(--jp-ui-font-family, system-ui) }
.scaledreamer-meshes .panels { display: grid; gap: 8px; border-radius: 4px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 200px), 1fr)) }
.scaledreamer-meshes .panels:focus-visible { outline: 2px solid #0072b2; outline-offset: -2px }
.scaledreamer-meshes figure { margin: 0; min-width: 0 }
.scaledreamer-meshes canvas { display: block; width: 100%; aspect-ratio: 1; cursor: grab;
  touch-action: pan-y; border-radius: 4px; background: color-mix(in srgb, currentColor 15%,
  transparent) }
.scaledreamer-meshes figcaption { text-align: center; padding: 2px }
.scaledreamer-meshes .controls { display: flex; flex-wrap: wrap; gap: 4px 16px;
  align-items: center; margin: 4px 0 }
.scaledreamer-meshes select, .scaledreamer-meshes button { font: inherit; color: inherit;
  background: var(--jp-layout-color1, Canvas); border: 1px solid #888; border-radius: 3px }
.scaledreamer-meshes .hint { opacity: 0.75 }
.scaledreamer-meshes input { vertical-align: -2px }`;
const STATE = ["azimuth", "elevation", "distance", "mode", "shown"];

class MeshView extends OrbitView {
  constructor(model, element) {
    super();
    Object.assign(this, { model, unsent: {}, drawn: 0, meshes: new Map(), panels: new Map() });
    this.root = make("div", { className: "scaledreamer-meshes" }, make("style", {}, STYLE));
    if (model.get("twin")) { // the picture for pages without a kernel
      this.root.append(make("style", {}, `.${model.get("twin")} { display: none }`));
    }
    this.root.view = this;
    element.append(this.root);
    if (!painter().gl) return void this.root.append(make("p", {}, NO_WEBGL));
    painter().viewers.add(this);
    this.stage = make("div", { className: "panels", tabIndex: 0, title: HINT });
    this.stage.setAttribute("role", "group");
    this.controls = make("div", { className: "controls" });
    this.root.append(this.stage, this.controls);
    this.steer();
    this.follow = () => this.refresh();
    this.renew = () => this.load();
    STATE.forEach((name) => model.on(`change:${name}`, this.follow));
    model.on("change:meshes", this.renew);
    this.sizes = new ResizeObserver(() => this.redraw());
    this.sizes.observe(this.stage);
    this.layout();
    this.waits = new IntersectionObserver((seen) => {
      if (seen.some((entry) => entry.isIntersecting)) this.load();
    }, { rootMargin: "300px" });
    this.waits.observe(this.root); // a page with many meshes unpacks those that come into sight
  }

  async load() {
    this.waits.disconnect();
    const packed = this.model.get("meshes");
    this.packed = packed;
    this.layout();
    try {
      const meshes = await Promise.all(packed.map(unpackMesh));
      if (this.packed !== packed) return; // others have come meanwhile
      this.meshes.forEach((mesh) => painter().forget(mesh));
      this.meshes = new Map(packed.map(({ name }, i) => [name, meshes[i]]));
    } catch (error) {
      this.controls.replaceChildren(`The meshes cannot be read: ${error}`);
    }
    this.redraw();
  }

  layout() {
    this.stage.replaceChildren();
    this.controls.replaceChildren();
    this.panels.clear();
    const names = this.model.get("meshes").map((mesh) => mesh.name);
    for (const name of names) {
      const canvas = make("canvas");
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", `${name}, a mesh in 3D`);
      const panel = make("figure", {}, canvas, make("figcaption", {}, name));
      this.panels.set(name, { canvas, panel });
      this.stage.append(panel);
    }
    this.stage.setAttribute("aria-label", `${names.join(", ")}: ${HINT}`);
    this.select = make("select", { onchange: () => this.set({ mode: this.select.value }) });
    for (const [value, text] of Object.entries(MODES)) {
      this.select.append(make("option", { value }, text));
    }
    this.controls.append(make("label", {}, "show ", this.select));
    this.boxes = names.map((name) => make("input", { type: "checkbox", value: name,
      onchange: () => this.choose() }));
    if (names.length > 1) {
      this.boxes.forEach((box) => this.controls.append(make("label", {}, box, ` ${box.value}`)));
    }
    this.controls.append(make("button", { type: "button", onclick: () => this.reset() },
      "reset view"));
    this.refresh();
  }

  choose() {
    const shown = this.boxes.filter((box) => box.checked).map((box) => box.value);
    if (shown.length) this.set({ shown });
    this.refresh(); // at least one stays
  }

  // What is set is in the model only when it is sent: the kernel's answer to an earlier value would
  // overwrite it there.
  get(name) { return this.unsent[name] ?? this.model.get(name); }

  set(values) {
    Object.assign(this.unsent, values);
    this.saving ??= setTimeout(() => this.save(), 100); // ten cameras per second are enough
    this.refresh();
  }

  save() {
    Object.entries(this.unsent).forEach(([name, value]) => this.model.set(name, value));
    [this.saving, this.unsent] = [null, {}];
    this.model.save_changes();
  }

  refresh() {
    const shown = this.get("shown");
    this.select.value = this.get("mode");
    this.boxes.forEach((box) => { box.checked = shown.includes(box.value); });
    this.panels.forEach(({ panel }, name) => { panel.hidden = !shown.includes(name); });
    this.stage.style.maxWidth = `${428 * shown.length - 8}px`;
    const state = JSON.stringify(STATE.map((name) => this.get(name)));
    if (state !== this.state) this.redraw();
    this.state = state;
  }

  redraw() { // at once, and with smooth edges when nothing moves any more
    this.next(1);
    clearTimeout(this.rest);
    this.rest = setTimeout(() => this.next(devicePixelRatio < 2 ? 2 : 1), 150);
  }

  next(scale) { // one drawing per frame of the browser
    this.scale = scale;
    this.frame ??= requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.frame = null;
    const { model, scale } = this, [azimuth, elevation, distance, mode, shown] = STATE.map((name) =>
      this.get(name));
    for (const name of shown) {
      const { canvas } = this.panels.get(name) ?? {}, mesh = this.meshes.get(name);
      if (!mesh || !canvas?.clientWidth) continue;
      const size = Math.min(Math.round(canvas.clientWidth * devicePixelRatio), 2048);
      if (canvas.width !== size || canvas.height !== size) canvas.width = canvas.height = size;
      const camera = { azimuth, elevation, distance, radius: model.get("radius") };
      painter().paint(mesh, camera, mode, canvas, scale);
    }
    if (this.meshes.size) this.drawn += 1;
  }

  remove() {
    STATE.forEach((name) => this.model.off(`change:${name}`, this.follow));
    this.model.off("change:meshes", this.renew);
    this.meshes.forEach((mesh) => painter().forget(mesh));
    painter().viewers.delete(this);
    clearTimeout(this.rest);
    cancelAnimationFrame(this.frame);
    [this.sizes, this.waits].forEach((observer) => observer.disconnect());
  }
}

function render({ model, el }) {
  const view = new MeshView(model, el);
  if (view.stage) view.root.append(make("div", { className: "hint" }, HINT)); // a page has its own
  return () => view.stage && view.remove();
}

class PageModel {
  constructor(values) { Object.assign(this, { values, calls: {} }); }
  get(name) { return this.values[name]; }
  on(event, call) { (this.calls[event] ??= []).push(call); }
  set(name, value) {
    this.values[name] = value;
    (this.calls[`change:${name}`] ?? []).forEach((call) => call());
  }
  save_changes() {}
}

function showPage() { // of an HTML page: every viewer is a script of data, in its place
  for (const data of document.querySelectorAll("script.scaledreamer-meshes-data")) {
    new MeshView(new PageModel(JSON.parse(data.textContent)), data.parentElement);
  }
}

export default { render };

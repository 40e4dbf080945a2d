// A plotly figure that is always the model's: data and layout are traits, drawn whole when they
// change. The kernel sends plotly itself once per page, so that no saved notebook contains it.

const page = (globalThis.scaledreamerPlotly ??= { requested: 0 });
const WAITING = "This figure is drawn by its kernel: run the cell again.";

async function unpack(zipped) {
  const stream = new Blob([zipped]).stream().pipeThrough(new DecompressionStream("gzip"));
  const code = await new Response(stream).text();
  const parts = ["const module = { exports: {} };\n", code, "\nexport default module.exports;"];
  const url = URL.createObjectURL(new Blob(parts, { type: "text/javascript" }));
  return (await import(url)).default;
}

function receive(message, buffers) {
  if (message.plotly && !page.loaded) page.loaded = unpack(buffers[0]);
}

async function load(model, waiting) {
  while (!page.loaded && waiting()) {
    if (Date.now() - page.requested > 5000) {
      page.requested = Date.now();
      model.send({ plotly: true });
    }
    await new Promise((done) => setTimeout(done, 30));
  }
  return page.loaded;
}

const ARRAYS = {
  int8: Int8Array, int16: Int16Array, int32: Int32Array, uint8: Uint8Array, uint16: Uint16Array,
  uint32: Uint32Array, float32: Float32Array, float64: Float64Array,
};

// a copy for plotly: numbers from their bytes, dark ink in the colour of the text
function copy(value, ink, text) {
  if (typeof value === "string") return ink.includes(value.toLowerCase()) ? text : value;
  if (Array.isArray(value)) return value.map((part) => copy(part, ink, text));
  if (value === null || typeof value !== "object") return value;
  if (ArrayBuffer.isView(value)) return value;
  if ("dtype" in value && "buffer" in value) {
    const { buffer, byteOffset, byteLength } = value.buffer;
    return new ARRAYS[value.dtype](buffer.slice(byteOffset, byteOffset + byteLength));
  }
  const parts = Object.entries(value);
  return Object.fromEntries(parts.map(([name, part]) => [name, copy(part, ink, text)]));
}

// transparent paper; text and lines that read on white and on dark
function themed(template, text) {
  const clear = "rgba(0,0,0,0)", line = "rgba(128,128,128,0.7)", grid = "rgba(128,128,128,0.25)";
  const own = template?.layout ?? {};
  const axis = { gridcolor: grid, linecolor: line, tickcolor: line, zerolinecolor: grid };
  return {
    ...template,
    layout: {
      ...own,
      paper_bgcolor: clear,
      plot_bgcolor: clear,
      font: { ...own.font, color: text },
      xaxis: { ...own.xaxis, ...axis },
      yaxis: { ...own.yaxis, ...axis },
      legend: { ...own.legend, bgcolor: clear },
      modebar: { ...own.modebar, bgcolor: clear, color: line, activecolor: text },
    },
  };
}

function drawing(model, element) {
  const text = getComputedStyle(element).color, ink = model.get("_ink");
  const layout = copy(model.get("_widget_layout"), ink, text);
  layout.template = themed(layout.template, text);
  layout.width ??= element.clientWidth;
  layout.height ??= 360;
  layout.uirevision ??= "zoom and hidden lines stay";
  return [copy(model.get("_widget_data"), ink, text), layout, model.get("_config")];
}

function report(model, event) {
  const points = event.points.filter((point) => "pointIndex" in point || "pointNumber" in point);
  const of = (name) => points.map((point) => point[name]);
  model.set("_js2py_pointsCallback", {
    event_type: "plotly_click",
    points: {
      trace_indexes: of("curveNumber"), point_indexes: of("pointNumber"), xs: of("x"), ys: of("y"),
    },
    device_state: null,
    selector: null,
  });
  model.save_changes();
}

class FigureView {
  constructor(model, el) {
    Object.assign(this, { model, frame: 0, alive: true });
    this.plot = document.createElement("div");
    this.plot.className = "scaledreamer-figure";
    this.plot.setAttribute("role", "figure");
    this.plot.style.minHeight = `${model.get("_widget_layout").height ?? 360}px`;
    el.style.width = "100%";
    el.append(this.plot);
    this.soon = this.soon.bind(this);
    this.resized = new ResizeObserver(this.soon);
    this.resized.observe(this.plot);
    this.restyled = new MutationObserver(() => [0, 500].forEach((t) => setTimeout(this.soon, t)));
    this.restyled.observe(document.body, { attributes: true });
    this.events("on");
    this.start();
  }

  events(change) {
    const names = ["_widget_data", "_widget_layout", "_config", "alt"];
    names.forEach((name) => this.model[change](`change:${name}`, this.soon));
  }

  async start() {
    const late = setTimeout(() => { this.plot.textContent = WAITING; }, 8000);
    this.plotly = await load(this.model, () => this.alive);
    clearTimeout(late);
    this.plot.textContent = "";
    this.soon();
  }

  soon() { // one drawing at a time: plotly's are asynchronous
    this.stale = true;
    if (!this.frame && this.alive) this.frame = requestAnimationFrame(() => this.draw());
  }

  async draw() {
    this.stale = false;
    try {
      await this.paint();
    } finally {
      this.frame = 0;
    }
    if (this.stale) this.soon();
  }

  async paint() {
    if (!this.plotly || !this.alive || !this.plot.clientWidth) return;
    this.plot.setAttribute("aria-label", this.model.get("alt"));
    await this.plotly.react(this.plot, ...drawing(this.model, this.plot));
    if (this.listens || !this.alive) return;
    this.listens = true;
    this.plot.on("plotly_click", (event) => report(this.model, event));
  }

  remove() {
    this.alive = false;
    this.events("off");
    this.resized.disconnect();
    this.restyled.disconnect();
    if (this.listens) this.plotly.purge(this.plot);
  }
}

export default {
  initialize({ model }) {
    model.on("msg:custom", receive);
  },
  render({ model, el }) {
    const view = new FigureView(model, el);
    return () => view.remove();
  },
};

// Lines over the steps of a run, with a band, a cursor and a selected step, as SVG.

const SVG = "http://www.w3.org/2000/svg";
const EDGE = { left: 46, right: 6, top: 8, bottom: 20 }; // pixels
const HEIGHT = 150;

const draw = (name, attributes, text) => {
  const element = document.createElementNS(SVG, name);
  Object.entries(attributes).forEach(([key, value]) => element.setAttribute(key, value));
  if (text !== undefined) element.textContent = text;
  return element;
};

const short = (value) => {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  return size && (size < 0.001 || size >= 1e5) ? value.toExponential(1) :
    String(Number(value.toPrecision(size < 0.1 ? 2 : 3)));
};

function niceStep(span, count) { // 1, 2 or 5 times a power of ten
  const raw = span / count, power = 10 ** Math.floor(Math.log10(raw));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= raw * (1 - 1e-9));
}

function linearTicks(low, high, count) {
  const step = niceStep(high - low || Math.abs(high) || 1, count);
  const first = Math.floor(low / step + 1e-9), last = Math.ceil(high / step - 1e-9);
  return Array.from({ length: Math.max(last - first, 1) + 1 }, (_, i) => (first + i) * step);
}

function logLimits(lines, bands) { // of columns and pairs of columns: a single outlier of a band
  const positive = (columns) => columns.flatMap((column) => Array.from(column)) // is left outside
    .filter((value) => value > 0 && value < Infinity).sort((a, b) => a - b);
  const middle = positive(lines);
  if (!middle.length) return [0.1, 1];
  let [low, high] = [middle[0], middle.at(-1)];
  const [lows, highs] = [0, 1].map((end) => positive(bands.map((band) => band[end])));
  if (lows.length && highs.length) {
    low = Math.min(low, Math.max(low / 100, lows[Math.floor(lows.length / 50)]));
    high = Math.max(high, Math.min(high * 100, highs.at(-1 - Math.floor(highs.length / 50))));
  }
  return [low, high];
}

function logTicks(low, high) { // 1, 2, 5 times powers of ten that enclose the data, or the powers
  const all = [];
  for (let power = Math.floor(Math.log10(low)) - 1; power < Math.log10(high) + 2; power++) {
    [1, 2, 5].forEach((factor) => all.push(Number(`${factor}e${power}`)));
  }
  const first = all.findLastIndex((tick) => tick <= low * 1.0001);
  const last = all.findIndex((tick) => tick >= high * 0.9999);
  const ticks = all.slice(first, Math.max(last, first + 1) + 1);
  const ends = [ticks[0], ticks.at(-1)];
  if (ticks.length <= 6) return { ends, ticks };
  const tens = all.filter((tick, i) => i % 3 === 0 && tick >= ends[0] && tick <= ends[1]);
  return { ends, ticks: tens.filter((_, i) => i % Math.ceil(tens.length / 6) === 0) };
}

class Chart { // `lines`: [{ name, label, color, low, high }], names of columns of the data
  constructor(title, lines, log, hint = "") {
    Object.assign(this, { title, lines, log, data: { step: [] }, steps: 1 });
    this.figure = document.createElement("figure");
    this.figure.className = "chart";
    this.figure.title = hint;
    this.caption = this.figure.appendChild(document.createElement("figcaption"));
    this.svg = this.figure.appendChild(draw("svg", { role: "img" }));
  }

  update(data, steps) { // columns by name, of which `step`, and the number of steps of the run
    const last = Math.max(data.step.at(-1) ?? 0, 10), power = 10 ** Math.floor(Math.log10(last));
    const end = [1, 2, 5, 10].map((factor) => factor * power).find((value) => value >= last);
    Object.assign(this, { data, steps: Math.max(Math.min(steps || end, end), 1) });
    this.scale();
    this.paint();
  }

  columns(line) {
    return [line.name, line.low, line.high].filter(Boolean).map((name) => this.data[name] ?? []);
  }

  scale() {
    if (this.log) {
      const columns = this.lines.map((line) => this.columns(line));
      const limits = logLimits(columns.map(([line]) => line),
        columns.filter((three) => three.length > 1).map(([, ...band]) => band));
      ({ ends: [this.low, this.high], ticks: this.ticks } = logTicks(...limits));
      return;
    }
    let [low, high] = [Infinity, -Infinity];
    for (const column of this.lines.flatMap((line) => this.columns(line))) {
      for (const value of column) {
        if (!Number.isFinite(value)) continue;
        [low, high] = [Math.min(low, value), Math.max(high, value)];
      }
    }
    if (low > high) [low, high] = [0, 1];
    this.ticks = linearTicks(Math.min(low, 0), high, 4);
    [this.low, this.high] = [this.ticks[0], this.ticks.at(-1)];
  }

  x(step) {
    return EDGE.left + (this.width - EDGE.left - EDGE.right) * (step / this.steps);
  }

  y(value) {
    const level = this.log ? Math.log : (number) => number;
    const bounded = Math.min(Math.max(value, this.low), this.high);
    const part = (level(bounded) - level(this.low)) / (level(this.high) - level(this.low));
    return HEIGHT - EDGE.bottom - (HEIGHT - EDGE.top - EDGE.bottom) * part;
  }

  paint() {
    this.width = this.svg.clientWidth || 300;
    const parts = [...this.axes(), ...this.lines.flatMap((line) => this.line(line))];
    this.marks = ["selected", "cursor"].map((name) => draw("line", { class: name,
      y1: EDGE.top, y2: HEIGHT - EDGE.bottom, stroke: "currentColor", visibility: "hidden",
      "stroke-dasharray": name === "cursor" ? "2 3" : "none", opacity: 0.75 }));
    this.svg.replaceChildren(...parts, ...this.marks);
    this.mark(0, this.selected);
    this.point(this.index);
  }

  axes() {
    const right = this.width - EDGE.right, bottom = HEIGHT - EDGE.bottom, parts = [];
    for (const tick of this.ticks) {
      const y = this.y(tick);
      parts.push(draw("line", { x1: EDGE.left, x2: right, y1: y, y2: y, stroke: "var(--line)" }));
      parts.push(draw("text", { x: EDGE.left - 6, y: y + 4, "text-anchor": "end" }, short(tick)));
    }
    for (const step of [0, this.steps / 2, this.steps].filter(Number.isInteger)) {
      parts.push(draw("text", { x: this.x(step), y: bottom + 15,
        "text-anchor": !step ? "start" : this.x(step) > right - 24 ? "end" : "middle" },
      step.toLocaleString("en")));
    }
    return parts;
  }

  path(column) {
    let pen = "M";
    return column.reduce((path, value, i) => {
      if (!Number.isFinite(value) || (this.log && value <= 0)) {
        pen = "M";
        return path;
      }
      const place = `${this.x(this.data.step[i]).toFixed(1)} ${this.y(value).toFixed(1)}`;
      const next = `${path}${pen}${place}`;
      pen = "L";
      return next;
    }, "");
  }

  line(line) {
    const [middle, low, high] = this.columns(line).map((column) => Array.from(column));
    const parts = [];
    if (low && low.some(Number.isFinite)) {
      const known = low.map((_, i) => i).filter((i) => Number.isFinite(low[i]));
      const place = (column) => (i) => `${this.x(this.data.step[i]).toFixed(1)} ` +
        this.y(column[i]).toFixed(1);
      const outline = [...known.map(place(low)), ...known.reverse().map(place(high))];
      parts.push(draw("path", { d: `M${outline.join("L")}Z`, fill: line.color, opacity: 0.2 }));
    }
    const stroke = { fill: "none", stroke: line.color, "stroke-width": line.width ?? 1.6,
      "stroke-linejoin": "round" };
    if (middle.length === 1) {
      const place = { cx: this.x(this.data.step[0]), cy: this.y(middle[0]), r: 2.5 };
      parts.push(draw("circle", { ...place, fill: line.color }));
    }
    return [...parts, draw("path", { d: this.path(middle), ...stroke })];
  }

  mark(which, step) { // 0: the selected step, 1: the cursor
    const shown = step !== undefined && step >= 0;
    if (!which) this.selected = step;
    this.marks[which].setAttribute("visibility", shown ? "visible" : "hidden");
    if (!shown) return;
    ["x1", "x2"].forEach((name) => this.marks[which].setAttribute(name, this.x(step)));
  }

  point(index) { // put the cursor on a point, and its values into the caption; undefined: the last
    this.index = index;
    this.mark(1, index === undefined ? -1 : this.data.step[index]);
    const at = index ?? this.data.step.length - 1;
    const spans = this.lines.map((line) => {
      const [value, low, high] = this.columns(line).map((column) => column[at]);
      const band = Number.isFinite(low) ? ` (${short(low)} to ${short(high)})` : "";
      const span = document.createElement("span");
      span.style.color = line.color;
      span.textContent = `${line.label} ${short(value)}${band}`;
      return span;
    });
    this.caption.replaceChildren(...(this.title ? [this.title] : []), ...spans);
    const text = [this.title, ...spans.map((span) => span.textContent)].join(" ");
    this.svg.setAttribute("aria-label", `${text} at step ${this.data.step[at] ?? 0}`);
  }
}

// A camera around the origin that pointer, wheel and keys move: the part that all viewers share.

const HINT = "drag to turn, click then wheel to zoom, arrow keys, double click to reset";
const NEAREST = 0.75, FARTHEST = 2.5; // of the first distance
const TURNS = { ArrowLeft: [-5, 0], ArrowRight: [5, 0], ArrowUp: [0, 5], ArrowDown: [0, -5] };
const ZOOMS = { "+": 0.9, "=": 0.9, "-": 1 / 0.9, _: 1 / 0.9 };

class OrbitView { // has a model, a stage in which one drags, get(name) and set(values)
  steer() {
    let last = null;
    const end = () => { last = null; };
    this.stage.onpointerdown = (event) => {
      if (event.button || !(event.target instanceof HTMLCanvasElement)) return;
      last = [event.clientX, event.clientY];
      event.target.setPointerCapture(event.pointerId);
    };
    this.stage.onpointermove = (event) => {
      if (!last) return;
      this.turn((last[0] - event.clientX) / 2, (event.clientY - last[1]) / 2);
      last = [event.clientX, event.clientY];
    };
    this.stage.onpointerup = this.stage.onpointercancel = end;
    this.stage.ondblclick = () => this.reset();
    this.stage.addEventListener("wheel", (event) => {
      if (!this.stage.matches(":focus")) return; // a page that is scrolled does not zoom
      event.preventDefault();
      this.zoom(Math.exp(Math.sign(event.deltaY) * Math.min(Math.abs(event.deltaY), 100) / 700));
    }, { passive: false });
    this.stage.onkeydown = (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key in TURNS) this.turn(...TURNS[event.key]);
      else if (event.key in ZOOMS) this.zoom(ZOOMS[event.key]);
      else return;
      event.preventDefault();
      event.stopPropagation();
    };
  }

  turn(right, up) { // degrees by which the camera moves
    const azimuth = this.get("azimuth") + right + 180;
    const elevation = Math.min(Math.max(this.get("elevation") + up, -90), 90);
    this.set({ azimuth: ((azimuth % 360) + 360) % 360 - 180, elevation });
  }

  zoom(factor) {
    const home = this.model.get("home").distance;
    const distance = this.get("distance") * factor;
    this.set({ distance: Math.min(Math.max(distance, NEAREST * home), FARTHEST * home) });
  }

  reset() { this.set({ ...this.model.get("home") }); }
}

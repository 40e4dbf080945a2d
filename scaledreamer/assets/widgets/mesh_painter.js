// Draws coloured meshes with WebGL2, for mesh.js. A browser allows about 16 WebGL contexts, so one
// per page draws every panel, and each panel is a 2D canvas that receives a copy.
// World: z up, front +x, azimuth counter-clockwise.

const FOVY = 45; // degrees, of the square panel
const MODES = { color: "colour", normal: "normal", depth: "depth", opacity: "see-through" };
const NO_WEBGL = "This browser has no WebGL2, which draws the meshes. Switch on its hardware " +
  "acceleration, or use a current Firefox, Chrome, Edge or Safari.";

const VERTEX = `#version 300 es
in vec3 position; in vec2 octahedral; in vec3 color;
uniform vec3 low, span; uniform mat3 axes; uniform vec4 lens; // distance, focal, near, far
out vec3 normal, tint, seen;
void main() {
  vec2 o = max(octahedral, -1.0);
  vec3 n = vec3(o, 1.0 - abs(o.x) - abs(o.y));
  if (n.z < 0.0) n.xy = (1.0 - abs(o.yx)) * vec2(o.x < 0.0 ? -1.0 : 1.0, o.y < 0.0 ? -1.0 : 1.0);
  normal = normalize(n);
  tint = color;
  seen = (low + span * position) * axes - vec3(0.0, 0.0, lens.x);
  float near = lens.z, far = lens.w;
  gl_Position = vec4(lens.y * seen.xy,
    ((near + far) * seen.z + 2.0 * near * far) / (near - far), -seen.z);
}`;

const FRAGMENT = `#version 300 es
precision highp float;
in vec3 normal, tint, seen;
uniform mat3 axes; uniform int mode; uniform vec2 depths; // of white and of the darkest grey
out vec4 pixel;
void main() {
  vec3 n = normalize(normal);
  float facing = abs(dot(n * axes, normalize(seen)));
  vec3 lit = tint * (0.8 + 0.2 * facing); // light from the eye: what faces it has its own colour
  float depth = clamp((length(seen) - depths.x) / (depths.y - depths.x), 0.0, 1.0);
  float matter = 0.3 / max(facing, 0.15); // a thin layer, crossed at an angle
  pixel = mode == 0 ? vec4(lit, 1.0) : mode == 1 ? vec4(0.5 + 0.5 * n, 1.0)
    : mode == 2 ? vec4(vec3(1.0 - 0.85 * depth), 1.0) : vec4(lit * matter, matter);
}`;

const WHOLE = `#version 300 es
void main() { gl_Position = vec4(gl_VertexID == 1 ? 3 : -1, gl_VertexID == 2 ? 3 : -1, 0, 1); }`;

const BLEND = `#version 300 es
precision highp float; uniform highp sampler2D layers; out vec4 pixel;
void main() { // the sum over all layers does not depend on their order
  vec4 sum = texelFetch(layers, ivec2(gl_FragCoord.xy), 0);
  pixel = vec4(sum.rgb / max(sum.a, 1e-4), 1.0) * (1.0 - exp(-sum.a));
}`;

class Painter {
  constructor() {
    this.canvas = document.createElement("canvas");
    this.viewers = new Set();
    this.gl = this.canvas.getContext("webgl2", { antialias: false });
    this.canvas.addEventListener("webglcontextlost", (event) => event.preventDefault());
    this.canvas.addEventListener("webglcontextrestored", () => {
      this.start();
      this.viewers.forEach((viewer) => viewer.redraw());
    });
    if (this.gl) this.start();
  }

  start() {
    const { gl } = this;
    [this.vaos, this.size] = [new Map(), 0];
    this.half = gl.getExtension("EXT_color_buffer_float") ||
      gl.getExtension("EXT_color_buffer_half_float");
    [this.program, this.blend] = [this.link(VERTEX, FRAGMENT), this.link(WHOLE, BLEND)];
    this.at = (name) => gl.getUniformLocation(this.program, name);
    [this.layers, this.texture] = [gl.createFramebuffer(), gl.createTexture()];
  }

  link(vertex, fragment) {
    const { gl } = this, program = gl.createProgram();
    for (const [kind, text] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, fragment]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, text);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
    }
    ["position", "octahedral", "color"].forEach(
      (name, i) => gl.bindAttribLocation(program, i, name));
    gl.linkProgram(program);
    return program;
  }

  resize(size) {
    if (size === this.size) return;
    const { gl } = this;
    this.size = this.canvas.width = this.canvas.height = size;
    gl.bindTexture(gl.TEXTURE_2D, this.texture);
    const [inside, type] = this.half ? [gl.RGBA16F, gl.HALF_FLOAT] : [gl.RGBA8, gl.UNSIGNED_BYTE];
    gl.texImage2D(gl.TEXTURE_2D, 0, inside, size, size, 0, gl.RGBA, type, null);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MIN_FILTER, gl.NEAREST);
    gl.bindFramebuffer(gl.FRAMEBUFFER, this.layers);
    gl.framebufferTexture2D(
      gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, this.texture, 0);
  }

  upload(mesh) {
    const { gl } = this, vao = gl.createVertexArray(), buffers = [];
    const put = (target, data) => {
      buffers.push(gl.createBuffer());
      gl.bindBuffer(target, buffers.at(-1));
      gl.bufferData(target, data, gl.STATIC_DRAW);
    };
    gl.bindVertexArray(vao);
    const types = [gl.UNSIGNED_SHORT, gl.BYTE, gl.UNSIGNED_BYTE];
    [mesh.positions, mesh.normals, mesh.colors].forEach((data, i) => {
      put(gl.ARRAY_BUFFER, data);
      gl.enableVertexAttribArray(i);
      gl.vertexAttribPointer(i, i === 1 ? 2 : 3, types[i], true, 0, 0);
    });
    put(gl.ELEMENT_ARRAY_BUFFER, mesh.corners);
    this.vaos.set(mesh, { vao, buffers });
  }

  forget(mesh) {
    const kept = this.vaos?.get(mesh);
    if (!kept) return;
    this.gl.deleteVertexArray(kept.vao);
    kept.buffers.forEach((buffer) => this.gl.deleteBuffer(buffer));
    this.vaos.delete(mesh);
  }

  paint(mesh, camera, mode, panel, scale) { // scale: drawn pixels per pixel of the panel
    const { gl } = this, size = panel.width * scale, through = mode === "opacity";
    if (gl.isContextLost()) return; // everything is drawn again when it is restored
    this.resize(size);
    if (!this.vaos.has(mesh)) this.upload(mesh);
    gl.bindVertexArray(this.vaos.get(mesh).vao);
    gl.viewport(0, 0, size, size);
    gl.bindFramebuffer(gl.FRAMEBUFFER, through ? this.layers : null);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    (through ? gl.disable : gl.enable).call(gl, gl.DEPTH_TEST);
    (through ? gl.enable : gl.disable).call(gl, gl.BLEND);
    const hidden = mesh.closed && !through && camera.distance > camera.radius;
    (hidden ? gl.enable : gl.disable).call(gl, gl.CULL_FACE); // back faces that cannot be seen
    gl.blendFunc(gl.ONE, gl.ONE);
    gl.useProgram(this.program);
    this.place(mesh, camera, mode);
    const type = mesh.corners instanceof Uint16Array ? gl.UNSIGNED_SHORT : gl.UNSIGNED_INT;
    gl.drawElements(gl.TRIANGLES, mesh.corners.length, type, 0);
    if (through) {
      gl.bindFramebuffer(gl.FRAMEBUFFER, null);
      gl.clear(gl.COLOR_BUFFER_BIT);
      gl.disable(gl.BLEND);
      gl.useProgram(this.blend);
      gl.drawArrays(gl.TRIANGLES, 0, 3);
    }
    const copy = panel.getContext("2d");
    copy.clearRect(0, 0, panel.width, panel.width);
    copy.drawImage(this.canvas, 0, 0, panel.width, panel.width);
  }

  place(mesh, { azimuth, elevation, distance, radius }, mode) {
    const { gl } = this, [a, e] = [azimuth, elevation].map((x) => (x * Math.PI) / 180);
    const [ca, sa, ce, se] = [Math.cos(a), Math.sin(a), Math.cos(e), Math.sin(e)];
    const axes = [-sa, ca, 0, -se * ca, -se * sa, ce, ce * ca, ce * sa, se]; // right, up, back
    const near = Math.max(distance - radius, 0.01 * distance);
    const focal = 1 / Math.tan((FOVY * Math.PI) / 360);
    gl.uniform3fv(this.at("low"), mesh.low);
    gl.uniform3fv(this.at("span"), mesh.span);
    gl.uniformMatrix3fv(this.at("axes"), false, axes);
    gl.uniform4f(this.at("lens"), distance, focal, 0.99 * near, 1.01 * (distance + radius));
    gl.uniform2f(this.at("depths"), distance - radius, distance + radius);
    gl.uniform1i(this.at("mode"), Object.keys(MODES).indexOf(mode));
  }
}

const painter = () => (globalThis[Symbol.for("scaledreamer.mesh.1")] ??= new Painter());

// The arrays of a packed mesh, from the layout that view/mesh_packing.py describes
async function unpackMesh({ vertices, triangles, closed, low, span, data }) {
  const packed = typeof data === "string"
    ? Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0))
    : new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  let at = 0;
  const column = (Type, count) => { // the low bytes of all numbers, then their next ones
    const numbers = new Type(count);
    for (let shift = 0; shift < 8 * Type.BYTES_PER_ELEMENT; shift += 8) {
      for (let i = 0; i < count; i++) numbers[i] |= bytes[at++] << shift;
    }
    return numbers;
  };
  const columns = (Type, width) => { // each as differences between neighbours
    const rows = new Type(vertices * width);
    for (let k = 0; k < width; k++) {
      const steps = column(Type, vertices);
      for (let i = 0, sum = 0; i < vertices; i++) rows[i * width + k] = sum += steps[i];
    }
    return rows;
  };
  const corners = column(vertices > 65536 ? Uint32Array : Uint16Array, 3 * triangles);
  let fresh = 0; // corners count back from the next vertex that no corner has named yet
  for (let i = 0; i < corners.length; i++) {
    corners[i] = fresh - corners[i];
    if (corners[i] === fresh) fresh += 1;
  }
  const positions = columns(Uint16Array, 3), normals = columns(Int8Array, 2);
  const colors = columns(Uint8Array, 3);
  return { closed, low, span, corners, positions, normals, colors };
}

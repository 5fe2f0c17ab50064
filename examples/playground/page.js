"use strict";

// What was recorded. Nothing below computes a weight, a norm or a gradient: it looks up, and draws.
const recorded = JSON.parse(document.getElementById("numbers").textContent);

const find = (id) => document.getElementById(id);
const shown = (value, digits = 2) => (value === null ? "–" : value.toFixed(digits).replace("-", "−"));
const pair = (values, digits = 2) => `(${values.map((value) => shown(value, digits)).join(", ")})`;

// Drawing

function draw(parent, name, attributes = {}, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  parent.append(element);
  return element;
}

/** A square part of the plane, as a drawing of 400 by 400. */
class Plane {
  constructor(id, [x, y], size, every = 1) {
    this.svg = find(id);
    this.svg.setAttribute("viewBox", "0 0 400 400");
    this.frame([x, y], size, every);
  }

  frame([x, y], size, every = 1) {
    Object.assign(this, { x, y, size, every, unit: 400 / size });
  }

  at([x, y]) {
    return [(x - this.x) * this.unit, 400 - (y - this.y) * this.unit];
  }

  begin(description) {
    this.svg.replaceChildren();
    this.svg.setAttribute("aria-label", description);
    Object.assign(this.svg.dataset, { x: this.x, y: this.y, size: this.size });
    for (let tick = Math.ceil(this.x / this.every) * this.every; tick < this.x + this.size; tick += this.every) {
      const [px] = this.at([tick, 0]);
      draw(this.svg, "line", { class: tick === 0 ? "axis" : "grid", x1: px, x2: px, y1: 0, y2: 400 });
    }
    for (let tick = Math.ceil(this.y / this.every) * this.every; tick < this.y + this.size; tick += this.every) {
      const [, py] = this.at([0, tick]);
      draw(this.svg, "line", { class: tick === 0 ? "axis" : "grid", x1: 0, x2: 400, y1: py, y2: py });
    }
  }

  circle(center, radius, kind) {
    const [cx, cy] = this.at(center);
    return draw(this.svg, "circle", { class: kind, cx, cy, r: radius * this.unit });
  }

  ring(point, kind) {
    const [cx, cy] = this.at(point);
    return draw(this.svg, "circle", { class: `ring ${kind}`, cx, cy, r: 7 });
  }

  cross(point) {
    const [x, y] = this.at(point);
    draw(this.svg, "path", { class: "axis ink", style: "stroke: currentColor; stroke-width: 3", d: `M${x - 7} ${y - 7}l14 14m0 -14l-14 14` });
  }

  curve(points, kind) {
    const path = points.map((point) => this.at(point).join(" ")).join("L");
    return draw(this.svg, "path", { class: `curve ${kind}`, d: `M${path}Z` });
  }

  /** A line through the origin, along a direction. */
  ray([x, y], kind) {
    const [x1, y1] = this.at([-9 * x, -9 * y]);
    const [x2, y2] = this.at([9 * x, 9 * y]);
    const clip = `${this.svg.id}-clip`;
    draw(draw(this.svg, "clipPath", { id: clip }), "rect", { width: 400, height: 400 });
    draw(this.svg, "line", { class: kind, x1, y1, x2, y2, "clip-path": `url(#${clip})` });
  }

  /** An arrow, which says in data-x and data-y where it points to. */
  arrow(name, from, to, kind) {
    const [x1, y1] = this.at(from);
    const [x2, y2] = this.at(to);
    const group = draw(this.svg, "g", { class: `arrow ${kind}`, "data-arrow": name, "data-x": to[0], "data-y": to[1] });
    const length = Math.hypot(x2 - x1, y2 - y1);
    if (length < 1) return;
    const head = Math.min(16, length);
    const [ux, uy] = [(x2 - x1) / length, (y2 - y1) / length];
    const [bx, by] = [x2 - head * ux, y2 - head * uy];
    const half = head * 0.44;
    draw(group, "line", { x1, y1, x2: bx + ux, y2: by + uy });
    draw(group, "path", { d: `M${x2} ${y2}L${bx - half * uy} ${by + half * ux}L${bx + half * uy} ${by - half * ux}Z` });
  }

  /** A name beside a point, a little further in some direction of the screen, and within the drawing. */
  name(text, point, [dx, dy], kind) {
    const [x, y] = this.at(point);
    const label = draw(this.svg, "text", { class: `name ${kind}`, x: x + dx, y: y + dy, "dominant-baseline": "middle" }, text);
    label.setAttribute("text-anchor", dx > 4 ? "start" : dx < -4 ? "end" : "middle");
    const box = label.getBBox();
    const right = Math.min(0, 396 - box.x - box.width) + Math.max(0, 4 - box.x);
    const down = Math.min(0, 394 - box.y - box.height) + Math.max(0, 4 - box.y);
    label.setAttribute("x", x + dx + right);
    label.setAttribute("y", y + dy + down);
  }

  /** A name beside an arrow that is long enough, on the other side than a third point. */
  nameBeside(text, from, to, other, kind) {
    const [[x1, y1], [x2, y2], [x3, y3]] = [from, to, other].map((point) => this.at(point));
    const length = Math.hypot(x2 - x1, y2 - y1);
    if (length < 24) return;
    const side = Math.sign((x2 - x1) * (y3 - y1) - (y2 - y1) * (x3 - x1)) || 1;
    const normal = [(side * (y2 - y1)) / length, (side * (x1 - x2)) / length];
    this.name(text, from.map((value, index) => (value + to[index]) / 2), normal.map((value) => value * 14), kind);
  }

  /** A name beyond the tip of an arrow. */
  nameTip(text, from, to, kind, distance = 16) {
    const [x1, y1] = this.at(from);
    const [x2, y2] = this.at(to);
    const length = Math.hypot(x2 - x1, y2 - y1) || 1;
    this.name(text, to, [((x2 - x1) / length) * distance, ((y2 - y1) / length) * distance], kind);
  }
}

/** Curves over steps, as wide as there is room. */
class Chart {
  constructor(svg, { log = false, unit = "step" } = {}) {
    Object.assign(this, { svg, log, unit, curves: [], now: null });
    new ResizeObserver(() => this.draw()).observe(svg);
  }

  /** `curves`: {name, values, kind, dashes}; `every`: steps between two values; `rule`: a value to draw a dashed line at. */
  show({ curves, every = 1, now = null, rule = null, description }) {
    Object.assign(this, { curves, every, now, rule });
    this.svg.setAttribute("aria-label", description);
    this.draw();
  }

  /** Numbers for the axis: every second or fifth of a power of ten, or, on a logarithmic one, the powers themselves. */
  ticks(low, high) {
    if (this.log) {
      const powers = [];
      for (let power = Math.ceil(Math.log10(low)); power <= Math.log10(high); power++) powers.push(10 ** power);
      return powers;
    }
    const rough = (high - low) / 5 || 1;
    const power = 10 ** Math.floor(Math.log10(rough));
    const every = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= rough);
    const found = [];
    for (let tick = Math.ceil(low / every); tick * every <= high; tick++) found.push(tick * every);
    return found;
  }

  draw() {
    const values = this.curves.flatMap((curve) => curve.values).filter((value) => value !== null && (!this.log || value > 0));
    const [width, height] = [this.svg.clientWidth, this.svg.clientHeight];
    this.svg.replaceChildren();
    if (!values.length || !width) return;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const bound = this.log ? [Math.max(Math.min(...values), 1e-4), Math.max(...values)] : [Math.min(...values), Math.max(...values, this.rule ?? -Infinity)];
    const spare = this.log ? 0 : (bound[1] - bound[0]) * 0.08 || 0.1;
    const scale = this.log ? Math.log10 : (value) => value;
    const [low, high] = [scale(bound[0]) - spare, scale(bound[1]) + spare];
    const [left, right, top, bottom] = [60, 12, 10, 44];
    const count = Math.max(...this.curves.map((curve) => curve.values.length)) - 1;
    const x = (index) => left + (index / count) * (width - left - right);
    const y = (value) => top + ((high - Math.max(low, scale(value))) / (high - low)) * (height - top - bottom);

    for (const tick of this.ticks(this.log ? bound[0] : low, this.log ? bound[1] : high)) {
      draw(this.svg, "line", { class: "grid", x1: left, x2: width - right, y1: y(tick), y2: y(tick) });
      const text = this.log || Math.abs(tick) >= 100 ? String(Number(tick.toPrecision(3))) : String(Number(tick.toFixed(3)));
      draw(this.svg, "text", { x: left - 8, y: y(tick) + 4, "text-anchor": "end" }, text.replace("-", "−"));
    }
    const parts = [4, 3, 5].find((number) => count % number === 0) ?? 1;
    for (let index = 0; index <= count; index += count / parts) {
      const anchor = index === count ? "end" : index ? "middle" : "start";
      draw(this.svg, "text", { x: x(index), y: height - 26, "text-anchor": anchor }, String(index * this.every));
    }
    draw(this.svg, "text", { x: width - right, y: height - 6, "text-anchor": "end" }, this.unit);
    if (this.rule !== null) draw(this.svg, "line", { class: "dashed", x1: left, x2: width - right, y1: y(this.rule), y2: y(this.rule) });
    for (const { values: curve, kind = "", dashes = "" } of this.curves) {
      const points = curve.map((value, index) => (value === null ? null : `${x(index).toFixed(1)} ${y(value).toFixed(1)}`)).filter(Boolean);
      draw(this.svg, "path", { class: `curve ${kind}`, d: `M${points.join("L")}`, "stroke-dasharray": dashes });
    }
    if (this.now !== null) {
      draw(this.svg, "line", { class: "now", x1: x(this.now), x2: x(this.now), y1: top, y2: height - bottom });
      for (const { values: curve, kind = "" } of this.curves.length < 6 ? this.curves : []) {
        const value = curve[this.now] ?? null;
        if (value !== null) draw(this.svg, "circle", { class: `ring ${kind}`, cx: x(this.now), cy: y(value), r: 4.5 });
      }
    }
  }
}

// Controls

function slider(id, values, start, text, changed) {
  const input = find(id);
  Object.assign(input, { min: 0, max: values.length - 1, step: 1, value: start });
  const tell = () => {
    const said = text(values[input.value], Number(input.value));
    find(`${id}-out`).value = said;
    input.setAttribute("aria-valuetext", said);
  };
  input.addEventListener("input", () => { tell(); changed(); });
  tell();
  return { get index() { return Number(input.value); }, set index(index) { input.value = index; tell(); } };
}

function choice(id, texts, start, changed) {
  const inputs = texts.map((text, index) => {
    const label = document.createElement("label");
    const input = Object.assign(document.createElement("input"), { type: "radio", name: id, value: index, checked: index === start });
    label.append(input, text);
    find(id).append(label);
    input.addEventListener("change", changed);
    return input;
  });
  return { get index() { return inputs.findIndex((input) => input.checked); } };
}

function values(id, rows) {
  find(id).replaceChildren(...rows.flatMap(([name, value, kind = ""]) => [
    Object.assign(document.createElement("dt"), { textContent: name, className: kind }),
    Object.assign(document.createElement("dd"), { textContent: value }),
  ]));
}

/** Code, line by line, with those marked that hold one of the texts. */
function code(element, text, marked, kind = "marked") {
  element.replaceChildren(...text.split("\n").map((line) => {
    const span = document.createElement("span");
    span.textContent = line || " ";
    if (marked.some((part) => line.includes(part))) span.className = kind;
    return span;
  }));
}

// 1. Take it apart

function apart({ angles, lengths, magnitudes, v, norm, unit, w }) {
  const planes = [new Plane("apart-v", [-3.8, -3.8], 7.6), new Plane("apart-w", [-3.8, -3.8], 7.6)];
  const changed = () => show();
  const angle = slider("apart-angle", angles, 6, (value) => `${value}°`, changed);
  const length = slider("apart-length", lengths, 4, (value) => shown(value), changed);
  const magnitude = slider("apart-g", magnitudes, 25, (value) => shown(value, 1), changed);
  let before = null;

  function look() {
    const row = angle.index * lengths.length + length.index;
    const cell = row * magnitudes.length + magnitude.index;
    return {
      v: [v[2 * row], v[2 * row + 1]], unit: [unit[2 * row], unit[2 * row + 1]], norm: norm[row],
      g: magnitudes[magnitude.index], w: [w[2 * cell] / 1000, w[2 * cell + 1] / 1000],
    };
  }

  function show() {
    const now = look();
    const [left, right] = planes;
    left.begin(`An arrow v to ${pair(now.v)}, of length ${shown(now.norm)}, and a circle of length 1.`);
    left.circle([0, 0], 1, "dotted");
    left.arrow("v", [0, 0], now.v, "v");
    left.ring(now.unit, "v");
    const tip = left.circle(now.v, 0.32, "handle");
    tip.addEventListener("pointerdown", grab);
    left.nameTip("v", [0, 0], now.v, "v", 34);
    right.begin(`An arrow w to ${pair(now.w)}, and a circle of length ${shown(Math.abs(now.g))}.`);
    right.circle([0, 0], Math.abs(now.g), "dotted");
    right.arrow("w", [0, 0], now.w, "w");
    right.nameTip("w", [0, 0], now.w, "w", 18);
    values("apart-values", [
      ["v", pair(now.v), "v"], ["‖v‖", shown(now.norm), "v"], ["v/‖v‖", pair(now.unit), "v"],
      ["g", shown(now.g, 1), "g"], ["w = g · v/‖v‖", pair(now.w), "w"],
    ]);
    find("apart-says").textContent = said(now);
    before = now;
  }

  function said(now) {
    if (!before) return "Drag the tip of v. Then move its length alone, and look at w.";
    const moved = String(before.w) !== String(now.w);
    if (before.norm !== now.norm && !moved) return `‖v‖ went from ${shown(before.norm)} to ${shown(now.norm)}. w did not move.`;
    if (before.g !== now.g && now.g < 0) return "A negative g turns w around. Training may do that, and it is allowed.";
    if (before.g !== now.g && now.g === 0) return "At g = 0 the weight is 0. v still knows its direction.";
    if (before.g !== now.g) return "g changed: w got another length, and kept its direction.";
    if (moved) return "v turned, and w with it.";
    return find("apart-says").textContent;
  }

  function grab(event) {
    event.preventDefault();
    const drag = (moving) => {
      const box = planes[0].svg.getBoundingClientRect();
      nearest(((moving.clientX - box.left) / box.width) * 7.6 - 3.8, 3.8 - ((moving.clientY - box.top) / box.height) * 7.6);
    };
    const drop = () => {
      window.removeEventListener("pointermove", drag);
      window.removeEventListener("pointerup", drop);
      window.removeEventListener("pointercancel", drop);
    };
    window.addEventListener("pointermove", drag);
    window.addEventListener("pointerup", drop);
    window.addEventListener("pointercancel", drop);
  }

  /** Moves v to the recorded position that is nearest to the pointer. */
  function nearest(x, y) {
    let best = 0;
    const distance = (row) => Math.hypot(v[2 * row] - x, v[2 * row + 1] - y);
    for (let row = 1; row < norm.length; row++) if (distance(row) < distance(best)) best = row;
    angle.index = Math.floor(best / lengths.length);
    length.index = best % lengths.length;
    show();
  }

  show();
}

// 2. One step of descent

function descent({ target, rates, lengths, runs }) {
  const weights = new Plane("descent-w", [-0.4, -0.4], 3.6);
  const directions = new Plane("descent-v", [0, 0], 1);
  const chart = new Chart(find("descent-chart"));
  const changed = () => show();
  const rate = slider("descent-rate", rates, 3, (value) => String(value), changed);
  const step = slider("descent-step", runs[0][0], 0, (_, index) => String(index), changed);
  const start = choice("descent-length", lengths.map(String), 1, changed);

  function show() {
    const run = runs[rate.index][start.index];
    const now = run[step.index];
    weights.begin(`The arrow w to ${pair(now.w)}; a step of a plain layer would take it to ${pair(now["w of a plain layer next"])}; g takes ` +
      `it to ${pair(now["w next, if only g moves"])}; with v it gets to ${pair(now["w next"])}. The loss is 0 at ${pair(target)}.`);
    for (const radius of [0.4, 0.8, 1.2, 1.6, 2, 2.4]) weights.circle(target, radius, "level");
    weights.cross(target);
    weights.arrow("w", [0, 0], now.w, "w");
    weights.name("w", now.w.map((value) => value / 2), [14, 12], "w");
    weights.arrow("g", now.w, now["w next, if only g moves"], "g thin");
    weights.arrow("v", now["w next, if only g moves"], now["w of a plain layer next"], "v thin");
    weights.arrow("plain", now.w, now["w of a plain layer next"], "ink broken");
    weights.ring(now["w next"], "w").setAttribute("data-ring", now["w next"].join(" "));
    const corners = [now.w, now["w next, if only g moves"], now["w of a plain layer next"]];
    weights.nameBeside("for g", corners[0], corners[1], corners[2], "g");
    weights.nameBeside("for v", corners[1], corners[2], corners[0], "v");
    weights.nameBeside("plain", corners[0], corners[2], corners[1], "ink");

    const reach = Math.max(...run.map((one) => Math.max(...one["v next"].map(Math.abs), one.norm)));
    const size = reach * 1.45;
    directions.frame([-0.15 * size, -0.15 * size], size, size > 6 ? 2 : size > 2 ? 1 : 0.5);
    directions.begin(`The arrow v to ${pair(now.v)}, of length ${shown(now.norm)}; after the step ${pair(now["v next"])}, of length ${shown(now["norm next"])}.`);
    directions.circle([0, 0], now.norm, "dotted");
    directions.arrow("v next", [0, 0], now["v next"], "quiet thin");
    directions.arrow("v", [0, 0], now.v, "ink");
    directions.arrow("step", now.v, now["v next"], "v");
    directions.nameTip("v", [0, 0], now.v, "ink", 22);
    directions.name("v next", now["v next"].map((value) => value * 0.6), [-14, -6], "");

    values("descent-values", [
      ["gradient of w", pair(now["gradient of w"])],
      ["gradient of g", shown(now["gradient of g"]), "g"],
      ["gradient of v", pair(now["gradient of v"]), "v"],
      ["‖v‖", `${shown(now.norm, 3)} → ${shown(now["norm next"], 3)}`, "v"],
      ["w", `${pair(now.w)} → ${pair(now["w next"])}`, "w"],
      ["loss", shown(now.loss, 3)],
    ]);
    chart.show({
      curves: [{ values: run.map((one) => one.norm), kind: "v" }], now: step.index,
      description: `The length of v over ${run.length - 1} steps, from ${shown(run[0].norm)} to ${shown(run.at(-1).norm)}.`,
    });
    find("descent-says").textContent = said(run, now);
  }

  function said(run, now) {
    if (now.loss < 0.01) return "There is hardly a pull any more: the weight is where the loss wants it.";
    const grew = now["norm next"] - now.norm;
    if (grew > 0.3 * now.norm) return `A large step for so short a v: it goes from ${shown(now.norm)} to ${shown(now["norm next"])}, and will turn more carefully from now on.`;
    return `The step of v stands at a right angle to it, so v can only become longer: here by ${shown(grew, 3)}.`;
  }

  show();
}

// 3. Stale

function stale({ without, with: mended, detected, second_backward: second, code: codes }) {
  const line = "self.wn.recompute(self.fc)";
  const forgotten = codes.without.replace("\n", "\n    # … nothing here …\n");
  const moments = [
    { now: without[0], heading: "The model is made", code: forgotten, text: "The layer holds the weight that g and v make. All is well." },
    { now: without[1], heading: "The optimizer takes a step", code: forgotten, text: "g and v changed. The layer still holds the weight of before: it is stale." },
    { now: without[2], heading: "The next forward", code: forgotten, text: `No line of it recomputes the weight. The model goes on with the old one, and says nothing. One step later torch fails: “${second} …”` },
    { now: without[2], heading: "detect_stale finds it", code: forgotten, text: "In a block of detect_stale() the same forward raises, at the first stale read, and names the line to add:", message: detected },
    { now: mended[2], heading: "With the line", code: codes.with, text: "The forward recomputes the weight first. The model says what it should, in every step from now on." },
  ];
  const plane = new Plane("stale-plane", [-0.2, -0.7], 2.4, 0.5);
  const moment = slider("stale-moment", moments, 0, (_, index) => `${index + 1} of ${moments.length}`, () => show());

  function show() {
    const { now, heading, code: text, message = "", ...told } = moments[moment.index];
    plane.begin(`The layer holds the weight ${pair(now.held)}; g and v make ${pair(now.true)}.`);
    const same = String(now.held) === String(now.true);
    if (!same) plane.arrow("true", [0, 0], now.true, "w");
    plane.arrow("held", [0, 0], now.held, same ? "w" : "g broken");
    if (!same) plane.name("held: stale", now.held, [0, 26], "g");
    plane.name(same ? "held, and up to date" : "what g and v make", now.true, [0, -24], "w");
    find("stale-heading").textContent = heading;
    find("stale-text").textContent = told.text;
    code(find("stale-code"), text, text.includes(line) ? [line] : ["nothing here"], text.includes(line) ? "marked" : "missing");
    values("stale-values", [
      ["the model says", now.says === null ? "not asked yet" : shown(now.says, 3), "g"],
      ["it should say", shown(now.should, 3), "w"],
    ]);
    find("stale-message").textContent = message;
    find("stale-back").disabled = moment.index === 0;
    find("stale-on").disabled = moment.index === moments.length - 1;
  }

  const go = (by) => () => { moment.index = moment.index + by; show(); };
  find("stale-back").addEventListener("click", go(-1));
  find("stale-on").addEventListener("click", go(1));
  show();
}

// 4. A training run

const LOOKS = [
  { kind: "ink", dashes: "" }, { kind: "w", dashes: "8 4" }, { kind: "v", dashes: "" }, { kind: "g", dashes: "2 4" },
];

function training({ points, arm, frame, side, reach, runs }) {
  const canvases = runs.map(({ name }) => {
    const box = document.createElement("div");
    const canvas = Object.assign(document.createElement("canvas"), { width: 400, height: 400 });
    canvas.setAttribute("role", "img");
    box.append(Object.assign(document.createElement("h3"), { textContent: name }), canvas, document.createElement("p"));
    find("training-runs").append(box);
    return canvas;
  });
  const frames = runs[0].frames;
  const loss = new Chart(find("training-loss"), { log: true });
  const step = slider("training-step", frames, 3, (_, index) => String(index * frame), () => { stop(); show(); });
  const scheme = window.matchMedia("(prefers-color-scheme: dark)");

  function paint(canvas, run, index) {
    const style = getComputedStyle(document.documentElement);
    const [blue, orange] = ["--blue", "--orange"].map((name) => style.getPropertyValue(name).split(",").map(Number));
    const paper = scheme.matches ? 25 : 255;
    const bytes = Uint8Array.from(atob(run.frames[index]), (letter) => letter.charCodeAt(0));
    const picture = new ImageData(side, side);
    bytes.forEach((byte, pixel) => {
      const sure = Math.abs(byte - 127.5) / 127.5;
      const color = byte < 127.5 ? blue : orange;
      for (let channel = 0; channel < 3; channel++) picture.data[4 * pixel + channel] = paper + (color[channel] - paper) * 0.55 * sure;
      picture.data[4 * pixel + 3] = 255;
    });
    const small = Object.assign(document.createElement("canvas"), { width: side, height: side });
    small.getContext("2d").putImageData(picture, 0, 0);
    const context = canvas.getContext("2d");
    context.drawImage(small, 0, 0, 400, 400);
    points.forEach(([x, y], index) => {
      const [px, py] = [(x + reach) * (200 / reach), (reach - y) * (200 / reach)];
      context.fillStyle = `rgb(${(arm[index] ? orange : blue).join()})`;
      if (arm[index]) context.fillRect(px - 3.2, py - 3.2, 6.4, 6.4);
      else { context.beginPath(); context.arc(px, py, 3.8, 0, 7); context.fill(); }
    });
  }

  function show() {
    const index = step.index;
    runs.forEach((run, which) => {
      const told = `loss ${shown(run.loss[index * frame], 3)}, ${Math.round(run.right[index] * 100)}% right`;
      paint(canvases[which], run, index);
      canvases[which].setAttribute("aria-label", `${run.name}, step ${index * frame}: ${told}`);
      canvases[which].nextSibling.textContent = told;
    });
    loss.show({
      curves: runs.map((run, which) => ({ values: run.loss, ...LOOKS[which] })), now: index * frame,
      description: `Losses over ${runs[0].loss.length - 1} steps. At the end: ${runs.map((run) => `${run.name} ${shown(run.loss.at(-1), 4)}`).join(", ")}.`,
    });
    showNeurons();
  }

  const legend = document.createElement("div");
  legend.className = "legend";
  runs.forEach(({ name }, which) => {
    const item = document.createElement("span");
    const sample = draw(item, "svg", { viewBox: "0 0 36 10", class: LOOKS[which].kind, "aria-hidden": "true" });
    draw(sample, "path", { class: "curve", d: "M0 5H36", "stroke-dasharray": LOOKS[which].dashes });
    item.append(name);
    legend.append(item);
  });
  find("training-loss").before(legend);

  // The neurons

  const withLayers = runs.filter(({ layers }) => layers.length);
  const [chosen, layer] = [find("training-run"), find("training-layer")];
  withLayers.forEach(({ name }, index) => chosen.add(new Option(name, index)));
  chosen.value = 1;
  withLayers[0].layers.forEach(({ name }, index, { length }) => layer.add(new Option(`${name}, ${index + 1} of ${length}`, index)));
  layer.value = 1;
  chosen.addEventListener("change", layOut);
  layer.addEventListener("change", layOut);
  let charts = [];

  function curvesOf() {
    const { name, ...curves } = withLayers[chosen.value].layers[layer.value];
    return Object.entries(curves);
  }

  function layOut() {
    charts = [];
    find("training-curves").replaceChildren(...curvesOf().map(([symbol]) => {
      const box = Object.assign(document.createElement("div"), { className: "picture" });
      const svg = draw(box, "svg", { class: "chart", role: "img" });
      svg.before(Object.assign(document.createElement("h3"), { textContent: symbol }));
      charts.push(new Chart(svg));
      return box;
    }));
    showNeurons();
  }

  function showNeurons() {
    curvesOf().forEach(([symbol, curves], index) => charts[index].show({
      curves: curves.map((one) => ({ values: one, kind: `${symbol === "g" ? "g" : symbol === "σ" ? "u" : "v"} ${curves.length > 3 ? "fine" : ""}` })),
      every: frame, now: step.index,
      description: `${symbol} of ${curves.length === 1 ? "the layer" : `${curves.length} neurons`}, over the steps.`,
    }));
  }

  // Playing

  let timer = null;
  function stop() {
    clearInterval(timer);
    timer = null;
    find("training-play").textContent = "Play";
  }
  find("training-play").addEventListener("click", () => {
    if (timer) return stop();
    if (step.index === frames.length - 1) step.index = 0;
    find("training-play").textContent = "Pause";
    timer = setInterval(() => {
      step.index = step.index + 1;
      if (step.index === frames.length - 1) stop();
      show();
    }, 180);
  });
  scheme.addEventListener("change", show);
  layOut();
  show();
}

// 5. Power iteration

function power({ ratios, runs }) {
  const [input, output] = [new Plane("power-in", [-2, -2], 4), new Plane("power-out", [-2, -2], 4)];
  const chart = new Chart(find("power-chart"), { unit: "iteration" });
  const changed = () => show();
  const ratio = choice("power-ratio", ratios.map(String), 1, changed);
  const step = slider("power-step", runs[0].moments, 0, (_, index) => String(index), changed);

  function show() {
    const run = runs[ratio.index];
    const now = run.moments[step.index];
    input.begin(`v points to ${pair(now.v)}, ${shown(now.off, 1)} degrees from the direction that is stretched most.`);
    input.curve(run.circle, "quiet");
    input.ray(run.right, "dashed");
    input.arrow("v", [0, 0], now.v, "v");
    input.nameTip("v", [0, 0], now.v, "v", 20);
    output.begin(`The circle becomes an ellipse; u points to ${pair(now.u)}. Divided by σ, ${shown(now.sigma, 3)}, it becomes a smaller one.`);
    output.circle([0, 0], 1, "dotted");
    output.ray(run.left, "dashed");
    output.curve(run.image, "quiet fine");
    output.curve(now.normed, "w thick");
    output.arrow("u", [0, 0], now.u, "u");
    output.nameTip("u", [0, 0], now.u, "u", 20);
    values("power-values", [
      ["v is off by", `${shown(now.off, 1)}°`, "v"], ["σ = uᵀ·W·v", shown(now.sigma, 4), "w"], ["exact", shown(run.sigma, 4)],
    ]);
    chart.show({
      curves: [{ values: run.moments.map((moment) => moment.sigma), kind: "w" }], rule: run.sigma, now: step.index,
      description: `σ over ${run.moments.length - 1} iterations, from ${shown(run.moments[0].sigma, 3)} to ${shown(run.moments.at(-1).sigma, 3)}; exact is ${shown(run.sigma, 3)}.`,
    });
  }

  show();
}

// 6. The same line everywhere

function everywhere({ torch, code: codes, marked }) {
  for (const [name, text] of Object.entries(codes)) code(find(`everywhere-${name}`), text, marked[name]);
  find("everywhere-torch").textContent = torch;
}

for (const section of [apart, descent, stale, training, power, everywhere]) section(recorded[section.name]);
document.documentElement.dataset.ready = "yes";

// Two charts of a run. The kernel sends every curve, decimated; what is seen of them is chosen here.

const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8A6D00", "#767676", "#9E5FBF"];
const DASHES = [[], [6, 3], [2, 2], [10, 3, 2, 3], [4, 4], [1, 3], [8, 2]];
const STROKES = ["———", "– –", "···", "—·—", "- -", "∙ ∙", "— —"]; // the same, for the legend
const PLOT_PX = 180; // the legend stands below
const MARK_ROWS = [10, 22, 34]; // where words beside marks stand, in pixels from the top

function unpack(model) {
  const view = model.get("data");
  const bytes = view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength);
  const values = new Float32Array(bytes);
  const charts = new Map();
  let at = 0;
  const next = (count) => {
    const part = Array.from(values.subarray(at, at + count), (v) => (Number.isFinite(v) ? v : null));
    at += count;
    return part;
  };
  for (const [name, labels, count] of model.get("layout_of")) {
    const steps = next(count);
    charts.set(name, { labels, columns: [steps, ...labels.map(() => next(count))] });
  }
  return charts;
}

function smoothed(values, weight) {
  let sum = 0, total = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return sum / total;
  });
}

function shown(value) {
  if (value == null) return "–";
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : String(+value.toPrecision(4));
}

function labelled(text, input) {
  const label = document.createElement("label");
  label.append(input, ` ${text}`);
  return label;
}

class Panel {
  constructor(root, first, model) {
    this.model = model;
    this.name = first;
    this.range = null;
    this.drawnAs = "";
    const panel = document.createElement("div");
    panel.className = "panel";
    const bar = document.createElement("div");
    bar.className = "bar";
    this.choice = document.createElement("select");
    this.choice.setAttribute("aria-label", "what is drawn");
    this.log = Object.assign(document.createElement("input"), { type: "checkbox" });
    this.smooth = Object.assign(document.createElement("input"), { type: "range", min: 0, max: 0.99, step: 0.01, value: 0 });
    this.smooth.setAttribute("aria-label", "smoothing");
    bar.append(this.choice, labelled("log", this.log), labelled("smooth", this.smooth));
    this.plot = document.createElement("div");
    this.plot.className = "plot";
    this.plot.tabIndex = 0;
    this.plot.setAttribute("role", "img");
    this.plot.title = "drag or + −: zoom · ← →: move · double click or 0: all";
    panel.append(bar, this.plot);
    root.append(panel);
    this.choice.addEventListener("change", () => { this.name = this.choice.value; this.range = null; this.draw(); });
    this.log.addEventListener("change", () => this.draw());
    this.smooth.addEventListener("input", () => this.draw());
    this.plot.addEventListener("keydown", (event) => this.press(event));
    this.plot.addEventListener("dblclick", () => { this.range = null; this.draw(); });
  }

  take(charts) {
    this.charts = charts;
    const names = [...charts.keys()];
    if (names.join("\n") !== this.names) {
      this.names = names.join("\n");
      this.choice.replaceChildren(...names.map((name) => new Option(name, name)));
    }
    if (!charts.has(this.name)) this.choice.prepend(new Option(this.name, this.name));
    this.choice.value = this.name;
    this.draw();
  }

  draw() {
    const chart = this.charts.get(this.name);
    if (!chart || chart.columns[0].length < 2) {
      this.wait(chart);
      return;
    }
    const labels = [...chart.labels], columns = [...chart.columns];
    const weight = Number(this.smooth.value);
    if (weight > 0) {
      labels.push(`smoothed ${weight}`);
      columns.push(smoothed(columns[1], weight));
    }
    const isLog = this.log.checked && columns.slice(1).some((c) => c.some((v) => v > 0));
    if (isLog) for (let i = 1; i < columns.length; i++) columns[i] = columns[i].map((v) => (v > 0 ? v : null));
    this.plot.setAttribute("aria-label", this.words(columns, labels));
    const how = [this.name, labels.join(), isLog, this.plot.clientWidth, this.ink()].join("|");
    if (how !== this.drawnAs) {
      this.drawnAs = how;
      this.uplot?.destroy();
      this.plot.textContent = "";
      this.plot.classList.remove("empty");
      this.uplot = new uPlot(this.options(labels, isLog, weight > 0), columns, this.plot);
    } else {
      this.uplot.setData(columns, false);
    }
    const steps = columns[0];
    const [from, to] = this.range ?? [steps[0], steps[steps.length - 1]];
    this.isOurs = true;
    this.uplot.setScale("x", { min: from, max: to });
    this.isOurs = false;
    const marks = this.model.get("marks").length;
    Object.assign(this.plot.dataset, { chart: this.name, from, to, marks, scale: isLog ? "log" : "linear" });
  }

  // There is nothing to draw, for now or for good; the picture's words for it.
  wait(chart) {
    if (this.uplot) return; // what was drawn stays
    const isKnown = chart || !this.charts.size;
    const text = isKnown ? "waiting for the first steps …" : this.name === "samples/s" ? "samples not counted" : `no ${this.name} seen`;
    this.plot.textContent = text;
    this.plot.classList.add("empty");
    this.plot.setAttribute("aria-label", text);
  }

  ink() {
    return getComputedStyle(this.plot).color;
  }

  options(labels, isLog, hasSmooth) {
    const isLoss = this.name === "loss", isRate = this.name === "samples/s";
    const ink = this.ink();
    const axis = { stroke: ink, grid: { stroke: "rgba(127,127,127,0.25)", width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
    const series = labels.map((label, i) => {
      const isExtra = hasSmooth && i === labels.length - 1;
      const colour = isLoss ? COLOURS[0] : isRate ? COLOURS[2] : COLOURS[i % COLOURS.length];
      return {
        label: labels.length > 1 && !isLoss && !isRate && !isExtra ? `${STROKES[i % STROKES.length]} ${label}` : label,
        stroke: isExtra ? COLOURS[1] : colour,
        width: isExtra || (isLoss ? i === 1 : i === 0 || labels.length > 3) ? 2 : 0.8,
        alpha: isLoss && i === 0 ? 0.6 : 1,
        dash: isLoss || isRate || isExtra ? [] : DASHES[i % DASHES.length],
        points: { show: false }, spanGaps: true, value: (_, value) => shown(value),
      };
    });
    return {
      width: this.plot.clientWidth || 360, height: PLOT_PX,
      scales: { x: { time: false }, y: isLog ? { distr: 3 } : { range: (plot, low, high) => this.bounds(plot, low, high) } },
      axes: [{ ...axis, size: 22 }, { ...axis, size: 52, values: (_, ticks) => ticks.map((t) => (t == null ? "" : shown(t))) }],
      series: [{ label: "step", value: (_, value) => (value == null ? "–" : value) }, ...series],
      bands: isRate ? [{ series: [3, 2], fill: "rgba(0,158,115,0.25)" }] : [],
      cursor: { drag: { x: true, y: false } },
      hooks: { setScale: [(plot, key) => this.zoomed(plot, key)], draw: [(plot) => this.mark(plot)] },
    };
  }

  // Where something was changed by hand: a line across, and what it was where there is room.
  mark(plot) {
    const { ctx, bbox } = plot, px = devicePixelRatio;
    const right = bbox.left + bbox.width;
    ctx.save();
    ctx.strokeStyle = ctx.fillStyle = this.ink();
    ctx.lineWidth = px;
    ctx.font = `${10 * px}px system-ui, sans-serif`;
    ctx.textAlign = "left";
    ctx.textBaseline = "alphabetic";
    ctx.setLineDash([4 * px, 2 * px]);
    const ends = MARK_ROWS.map(() => -Infinity);
    for (const [step, what] of this.model.get("marks")) {
      const x = plot.valToPos(step, "x", true);
      if (!(x >= bbox.left && x <= right)) continue;
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      const width = ctx.measureText(what).width;
      const start = x + 4 * px + width <= right ? x + 4 * px : x - 4 * px - width;
      const row = ends.findIndex((end) => start >= end);
      if (row < 0) continue;
      ends[row] = start + width + 4 * px;
      ctx.fillText(what, start, bbox.top + MARK_ROWS[row] * px);
    }
    ctx.restore();
  }

  // In words, for who does not see it; the kernel's words are of the two charts that stand there first.
  words(columns, labels) {
    if (["loss", "samples/s"].includes(this.name)) return this.model.get("alt");
    const ends = labels.map((label, i) => {
      const known = columns[i + 1].filter((v) => v !== null);
      return known.length ? `${label} from ${shown(known[0])} to ${shown(known[known.length - 1])}` : "";
    });
    return `${this.name} over ${shown(columns[0][columns[0].length - 1])} steps: ${ends.filter(Boolean).join(", ")}`;
  }

  bounds(plot, low, high) {
    if (low == null) return [0, 1];
    // A single spike, such as the first step's, must not flatten all the rest.
    const [from, to] = plot.series[0].idxs ?? [0, plot.data[0].length - 1];
    const seen = plot.data.slice(1).flatMap((c) => c.slice(from, to + 1)).filter((v) => v !== null);
    const most = seen.sort((a, b) => a - b)[Math.floor(seen.length * 0.98)];
    if (high > 3 * most && most > 0) high = 1.3 * most;
    if (low >= 0 && !this.range) return [0, (high || 1) * 1.05]; // compared with zero, but when zoomed
    const room = (high - low || 1) * 0.05;
    return [low - room, high + room];
  }

  zoomed(plot, key) {
    if (key !== "x" || this.isOurs || !plot.data[0].length) return;
    const steps = plot.data[0], { min, max } = plot.scales.x;
    this.range = min <= steps[0] && max >= steps[steps.length - 1] ? null : [min, max];
    Object.assign(this.plot.dataset, { from: min, to: max });
  }

  press(event) {
    const steps = this.charts?.get(this.name)?.columns[0];
    if (!steps) return;
    const first = steps[0], last = steps[steps.length - 1];
    const [from, to] = this.range ?? [first, last];
    const middle = (from + to) / 2, half = (to - from) / 2;
    const ranges = {
      "+": [middle - half / 2, middle + half / 2], "=": [middle - half / 2, middle + half / 2],
      "-": [middle - half * 2, middle + half * 2], "0": [first, last],
      ArrowLeft: [from - half / 2, to - half / 2], ArrowRight: [from + half / 2, to + half / 2],
    };
    const wanted = ranges[event.key];
    if (!wanted) return;
    event.preventDefault();
    const span = Math.min(wanted[1] - wanted[0], last - first);
    const start = Math.max(first, Math.min(wanted[0], last - span));
    this.range = span >= last - first ? null : [start, start + span];
    this.draw();
  }
}

function render({ model, el }) {
  const root = document.createElement("div");
  root.className = "dtkit-charts";
  el.append(root);
  const panels = [new Panel(root, "loss", model), new Panel(root, "samples/s", model)];
  const take = () => {
    const charts = unpack(model);
    for (const panel of panels) panel.take(charts);
  };
  model.on("change:data", take);
  const watch = new ResizeObserver(() => panels.forEach((panel) => panel.charts && panel.draw()));
  watch.observe(root);
  take();
  model.send("drawn");
  const giveBack = ownKeys(root);
  return () => {
    giveBack();
    watch.disconnect();
    model.off("change:data", take);
  };
}

export default { render };

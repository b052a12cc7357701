// The timeline of all ranks on a canvas: the wheel zooms, dragging moves, a double click shows all.

const ROW_PX = 34;
const FONT = "11px system-ui, sans-serif";
const MIN_LEFT_PX = 58, MAX_LEFT_PX = 160;
const AXIS_PX = 26;
const MIN_SPAN_MS = 0.01;

function ticks(from, to, width) {
  const rough = (to - from) / Math.max(2, width / 110);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const found = [];
  for (let t = Math.ceil(from / step) * step; t <= to; t += step) found.push(t);
  return { found, digits: Math.max(0, -Math.floor(Math.log10(step))) };
}

function render({ model, el }) {
  const kinds = model.get("kinds");
  const ranks = model.get("ranks");
  const data = new Float64Array(model.get("spans").buffer.slice(
    model.get("spans").byteOffset, model.get("spans").byteOffset + model.get("spans").byteLength));
  const numSpans = data.length / 5; // row, kind, start, end, step
  let end = MIN_SPAN_MS;
  for (let i = 0; i < numSpans; i++) end = Math.max(end, data[5 * i + 3]);
  const opening = model.get("opening");
  let from = opening[0], to = opening[1];

  const canvas = document.createElement("canvas");
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", model.get("alt"));
  canvas.style.cssText = "width:100%;cursor:grab;touch-action:none;background:#fff";
  const words = document.createElement("div");
  words.setAttribute("role", "status");
  words.style.cssText = "font:12px system-ui,sans-serif;min-height:1.4em";
  const legend = document.createElement("div");
  legend.style.cssText = "font:12px system-ui,sans-serif";
  for (const [name, colour] of kinds) {
    const patch = document.createElement("span");
    patch.style.cssText =
      `display:inline-block;width:10px;height:10px;margin:0 4px 0 12px;background:${colour}`;
    legend.append(patch, name);
  }
  const hint = "wheel or + −: zoom · drag or ← →: move · double click or 0: all";
  words.textContent = hint;
  el.append(canvas, legend, words);

  const labels = ranks.map((name) => name.split(" on ")); // the host below the rank
  const ruler = canvas.getContext("2d");
  ruler.font = FONT;
  const widest = Math.max(...labels.flat().map((text) => ruler.measureText(text).width));
  const leftPx = Math.min(MAX_LEFT_PX, Math.max(MIN_LEFT_PX, widest + 12));

  function draw() {
    const width = canvas.clientWidth || 700;
    const height = ROW_PX * ranks.length + AXIS_PX;
    const ratio = window.devicePixelRatio || 1;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    canvas.style.height = `${height}px`;
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.clearRect(0, 0, width, height);
    const scale = (width - leftPx) / (to - from);
    const x = (t) => leftPx + (t - from) * scale;
    pen.font = FONT;
    const { found, digits } = ticks(from, to, width - leftPx);
    for (const t of found) {
      pen.fillStyle = "#E3E3E3";
      pen.fillRect(x(t), 0, 1, height - AXIS_PX + 4);
      pen.fillStyle = "#333";
      pen.textAlign = "center";
      pen.fillText(`${t.toFixed(digits)} ms`, x(t), height - 8);
    }
    pen.save();
    pen.beginPath();
    pen.rect(leftPx, 0, width - leftPx, height);
    pen.clip();
    for (let i = 0; i < numSpans; i++) {
      const [row, kind, start, stop] = data.subarray(5 * i, 5 * i + 4);
      if (stop < from || start > to) continue;
      const isThin = kinds[kind][2];
      pen.fillStyle = kinds[kind][1];
      pen.fillRect(x(start), ROW_PX * row + (isThin ? 24 : 4),
        Math.max(0.6, (stop - start) * scale), isThin ? 5 : 18);
    }
    pen.restore();
    pen.fillStyle = "#333";
    pen.textAlign = "left";
    labels.forEach((lines, row) => lines.forEach((text, i) =>
      pen.fillText(text, 4, ROW_PX * row + 17 + 12 * i, leftPx - 8)));
    canvas.dataset.from = from;
    canvas.dataset.to = to;
  }

  function show(a, b) {
    const span = Math.min(end, Math.max(MIN_SPAN_MS, b - a));
    from = Math.max(0, Math.min(a, end - span));
    to = from + span;
    draw();
  }
  const at = (event) =>
    from + ((event.offsetX - leftPx) / (canvas.clientWidth - leftPx)) * (to - from);
  function zoom(factor, t) {
    show(t - (t - from) * factor, t + (to - t) * factor);
  }
  function name(event) {
    const t = at(event), row = Math.floor(event.offsetY / ROW_PX);
    const isLow = event.offsetY - ROW_PX * row > 22;
    let text = hint;
    for (let i = 0; i < numSpans; i++) {
      const [r, kind, start, stop, step] = data.subarray(5 * i, 5 * i + 5);
      if (r === row && start <= t && t <= stop && isLow === Boolean(kinds[kind][2])) {
        text = `${ranks[row]}, step ${step}: ${kinds[kind][0]}, ${(stop - start).toFixed(3)} ms`;
      }
    }
    words.textContent = text;
  }

  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(event.deltaY > 0 ? 1.25 : 0.8, at(event));
  }, { passive: false });
  let held = null;
  canvas.addEventListener("pointerdown", (event) => {
    held = { x: event.offsetX, from, to };
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (held === null) return name(event);
    const moved = ((held.x - event.offsetX) / (canvas.clientWidth - leftPx)) * (held.to - held.from);
    show(held.from + moved, held.to + moved);
  });
  canvas.addEventListener("pointerup", () => { held = null; });
  canvas.addEventListener("dblclick", () => show(0, end));
  canvas.addEventListener("keydown", (event) => {
    const middle = (from + to) / 2, part = (to - from) / 5;
    const act = {
      "+": () => zoom(0.8, middle), "-": () => zoom(1.25, middle), "0": () => show(0, end),
      ArrowLeft: () => show(from - part, to - part), ArrowRight: () => show(from + part, to + part),
    }[event.key];
    if (act) { event.preventDefault(); event.stopPropagation(); act(); }
  });
  const observer = new ResizeObserver(draw);
  observer.observe(el);
  draw();
  return () => observer.disconnect();
}

export default { render };

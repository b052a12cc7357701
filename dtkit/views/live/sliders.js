// Live controls of a run. A value is sent when it is final: when a slider is let go, a box left.

const PARTS = 400; // places of a slider
const PATIENCE_MS = 6000;

// Where on the slider a value is, 0 to 1, and back: by factors where a number has no two ends.
function scaleOf(row) {
  if (row.kind !== "float" && row.kind !== "int") return null;
  if (row.low !== null && row.high !== null) {
    const span = row.high - row.low || 1;
    return { place: (v) => (v - row.low) / span, value: (p) => row.low + p * span };
  }
  if (!(row.default > 0)) return null;
  return {
    place: (v) => (v > 0 ? (Math.log10(v / row.default) + 2) / 4 : 0),
    value: (p) => row.default * 10 ** (4 * p - 2),
  };
}

function rounded(row, value) {
  return row.kind === "int" ? Math.round(value) : Number(value.toPrecision(3));
}

class Row {
  constructor(root, row, send) {
    this.row = row;
    this.send = send;
    this.asked = null;
    this.askedAt = 0;
    this.isWrong = false;
    const id = `dtkit-${row.name}-${Math.random().toString(36).slice(2)}`;
    const label = Object.assign(document.createElement("label"), { textContent: row.name, htmlFor: id, title: row.takes });
    this.scale = scaleOf(row);
    this.slider = document.createElement(this.scale ? "input" : "span");
    if (this.scale) {
      Object.assign(this.slider, { type: "range", min: 0, max: PARTS, step: 1 });
      this.slider.setAttribute("aria-label", `${row.name}, slider`);
      this.slider.addEventListener("input", () => this.say(this.ofSlider()));
      this.slider.addEventListener("change", () => this.ask(this.ofSlider()));
    }
    this.box = this.makeBox(id);
    this.box.addEventListener("change", () => this.ask(this.ofBox()));
    this.said = Object.assign(document.createElement("span"), { className: "said" });
    this.said.setAttribute("role", "status");
    root.append(label, this.slider, this.box, this.said);
  }

  makeBox(id) {
    if (this.row.kind === "choice") {
      const list = Object.assign(document.createElement("select"), { id });
      list.append(...this.row.choices.map((choice, i) => new Option(String(choice), i)));
      return list;
    }
    if (this.row.kind === "bool") return Object.assign(document.createElement("input"), { id, type: "checkbox" });
    const box = Object.assign(document.createElement("input"), { id, type: "number", step: this.row.kind === "int" ? 1 : "any" });
    if (this.row.low !== null) box.min = this.row.low;
    if (this.row.high !== null) box.max = this.row.high;
    return box;
  }

  ofSlider() {
    return rounded(this.row, this.scale.value(this.slider.value / PARTS));
  }

  ofBox() {
    if (this.row.kind === "choice") return this.row.choices[Number(this.box.value)];
    if (this.row.kind === "bool") return this.box.checked;
    return this.box.value !== "" && this.box.checkValidity() ? Number(this.box.value) : null;
  }

  say(value) {
    this.said.textContent = `→ ${value}`;
  }

  ask(value) {
    this.isWrong = value === null;
    if (this.isWrong) {
      this.said.textContent = `✖ ${this.row.takes}`;
      return;
    }
    this.asked = value;
    this.askedAt = Date.now();
    this.said.textContent = `→ ${value} after the step`;
    this.send({ name: this.row.name, value });
  }

  draw(row, effect, isOn) {
    this.slider.disabled = this.box.disabled = !isOn;
    // What was asked for and has not come in a while will not: the notes say why.
    if (row.value === this.asked || Date.now() - this.askedAt > PATIENCE_MS) this.asked = null;
    if (this.asked !== null) return;
    if (!this.isWrong) this.said.textContent = effect;
    if (this.isTouched()) return; // not out of the user's hand
    this.isWrong = false;
    if (this.scale) {
      this.slider.value = Math.round(PARTS * Math.min(1, Math.max(0, this.scale.place(row.value))));
      this.slider.setAttribute("aria-valuetext", `${row.value} ${effect}`.trim());
    }
    if (row.kind === "choice") this.box.value = row.choices.indexOf(row.value);
    else if (row.kind === "bool") this.box.checked = row.value;
    else this.box.value = rounded(row, row.value);
  }

  isTouched() {
    return this.slider.matches?.(":active") || (this.box.type === "number" && this.box.matches(":focus"));
  }
}

function render({ model, el }) {
  const root = Object.assign(document.createElement("div"), { className: "dtkit-sliders" });
  root.setAttribute("role", "group");
  root.setAttribute("aria-label", "live controls");
  el.append(root);
  const rows = new Map();
  const draw = () => {
    for (const row of model.get("rows")) {
      if (!rows.has(row.name)) rows.set(row.name, new Row(root, row, (message) => model.send(message)));
      rows.get(row.name).draw(row, model.get("effects")[row.name] ?? "", model.get("is_on"));
    }
  };
  const kinds = "change:rows change:effects change:is_on";
  model.on(kinds, draw);
  draw();
  const giveBack = ownKeys(root);
  return () => {
    giveBack();
    model.off(kinds, draw);
  };
}

export default { render };

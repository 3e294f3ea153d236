"use strict";
// Shows the values of the element "data". Without it, and without this script, the tables of the page remain.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const T = data.labels.length;
  const SVG = "http://www.w3.org/2000/svg";
  const ROW = 18; // pixels per token in the lines of a head
  const MOST_PARTS = 10;
  const byId = (id) => document.getElementById(id);
  const percent = (p) => (p >= 0.0995 ? `${Math.round(p * 100)}%` : `${(p * 100).toFixed(1)}%`);
  const shown = (label) => `\u201c${label}\u201d`;
  document.documentElement.classList.add("scripted");
  byId("predictions").querySelector("details").open = false;

  // Token t of a head looks at tokens 0 to t, so its weights begin after 1 + 2 + ... + t bytes.
  const packed = Uint8Array.from(atob(data.patterns), (c) => c.charCodeAt(0));
  const perHead = (T * (T + 1)) / 2;
  const weight = (layer, head, t, s) =>
    s > t ? 0 : packed[(layer * data.heads + head) * perHead + (t * (t + 1)) / 2 + s] / 255;

  // place: the chosen token; pointed: the token under the pointer, or null.
  const state = { place: T - 1, pointed: null, layer: 0, head: 0 };
  const at = () => state.pointed ?? state.place;

  const make = (tag, attributes = {}, text = "") => {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text) made.textContent = text;
    return made;
  };
  const element = (tag, className = "", text = "") => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    made.textContent = text;
    return made;
  };

  // ---- Bars: rows of [name, text, share from -1 to 1, is marked] ----
  function bars(rows, isSigned) {
    const table = element("table", "bars");
    const body = table.appendChild(element("tbody"));
    for (const [name, text, share, isMarked] of rows) {
      const row = body.appendChild(element("tr", isMarked ? "actual" : ""));
      const head = row.appendChild(element("th", "piece", name));
      head.scope = "row";
      const cell = row.appendChild(element("td", "bar"));
      const svg = make("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" });
      const width = Math.abs(share) * (isSigned ? 50 : 100);
      const x = !isSigned ? 0 : share < 0 ? 50 - width : 50;
      svg.append(make("rect", { x, y: 0, width, height: 10, class: share < 0 ? "negative" : "positive" }));
      cell.append(svg);
      row.append(element("td", "", text));
    }
    return table;
  }

  function showNext() {
    const place = at();
    const guesses = data.next[place];
    const most = guesses[0][1] || 1;
    const following = place + 1 < T ? data.ids[place + 1] : null;
    const bits = place + 1 < T ? data.bits[place + 1] : null;
    byId("next-note").textContent =
      `After ${shown(data.labels[place])}, token ${place}` +
      (following === null ? ", the last one." : `. The text goes on with ${shown(data.labels[place + 1])}: ${bits.toFixed(1)} bits.`);
    const rows = guesses.map(([label, p, id]) => [label, percent(p), p / most, id === following]);
    byId("next-bars").replaceChildren(bars(rows, false));
  }

  function showParts() {
    const place = at();
    const named = data.partNames.map((name, i) => [name, data.parts[i][place]]);
    const total = named.reduce((sum, [, value]) => sum + value, 0);
    named.sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
    const most = Math.abs(named[0][1]) || 1;
    byId("parts-note").textContent =
      `What embeddings, heads (L1H0 is head 0 of layer 1) and MLPs add to the logit of ${shown(data.next[place][0][0])}, ` +
      `${total.toFixed(2)}: the largest ${Math.min(MOST_PARTS, named.length)} of ${named.length}.`;
    const rows = named.slice(0, MOST_PARTS).map(([name, value]) => [name, (value < 0 ? "" : "+") + value.toFixed(2), value / most]);
    byId("part-bars").replaceChildren(bars(rows, true));
  }

  // ---- Text ----
  const tokens = [...byId("tokens").children];
  function showTokens() {
    tokens.forEach((token, place) => {
      token.classList.toggle("at", place === at());
      token.classList.toggle("chosen", place === state.place);
      token.setAttribute("aria-selected", String(place === state.place));
    });
    byId("tokens").setAttribute("aria-activedescendant", `t${state.place}`);
    for (const cell of document.querySelectorAll("#lens [data-place]")) {
      cell.classList.toggle("at", Number(cell.dataset.place) === at());
    }
  }

  // ---- Heads ----
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  function paint(canvas, layer, head) {
    canvas.width = canvas.height = T;
    const [low, high] = [rgb(colour("card")), rgb(colour("accent"))];
    const context = canvas.getContext("2d");
    const image = context.createImageData(T, T);
    for (let t = 0; t < T; t++) {
      for (let s = 0; s < T; s++) {
        const w = weight(layer, head, t, s);
        const place = 4 * (t * T + s);
        for (let c = 0; c < 3; c++) image.data[place + c] = low[c] + (high[c] - low[c]) * w;
        image.data[place + 3] = 255;
      }
    }
    context.putImageData(image, 0, 0);
  }

  const grid = byId("heads");
  grid.style.gridTemplateColumns = `1.1rem repeat(${data.heads}, minmax(0, 1fr))`;
  if (data.heads < 8) grid.style.maxWidth = `${data.heads * 5 + 2}rem`;
  const buttons = [];
  for (let layer = 0; layer < data.layers; layer++) {
    grid.append(element("span", "layer", String(layer)));
    for (let head = 0; head < data.heads; head++) {
      const button = element("button");
      button.type = "button";
      const scores = Object.entries(data.scores).map(([name, rows]) => [name, rows[layer][head]]).filter(([, v]) => v !== null);
      button.title = [`layer ${layer}, head ${head}`, ...scores.map(([name, v]) => `${name} ${v.toFixed(2)}`)].join("\n");
      button.setAttribute("aria-label", `layer ${layer}, head ${head}`);
      button.dataset.head = `${layer}.${head}`;
      button.append(document.createElement("canvas"));
      button.addEventListener("click", () => chooseHead(layer, head));
      buttons.push(button);
      grid.append(button);
    }
  }
  grid.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!steps) return;
    event.preventDefault();
    const clamp = (value, n) => Math.max(0, Math.min(n - 1, value));
    chooseHead(clamp(state.layer + steps[0], data.layers), clamp(state.head + steps[1], data.heads));
    buttons[state.layer * data.heads + state.head].focus();
  });

  function chooseHead(layer, head) {
    Object.assign(state, { layer, head });
    buttons.forEach((button, i) => {
      const isChosen = i === layer * data.heads + head;
      button.setAttribute("aria-pressed", String(isChosen));
      button.tabIndex = isChosen ? 0 : -1;
    });
    byId("head-title").textContent = `Layer ${layer}, head ${head}`;
    paint(byId("matrix"), layer, head);
    showLines();
  }

  const lines = byId("lines");
  const drawn = make("g");
  const marks = make("g");
  const froms = [];
  function buildLines() {
    const width = Math.max(220, byId("lines-box").clientWidth - 2);
    const column = Math.floor((width - 70) / 2.6);
    const fitting = Math.max(4, Math.floor((column - 8) / 7.3));
    const cut = (label) => (label.length > fitting ? `${label.slice(0, fitting - 1)}\u2026` : label);
    Object.assign(lines.dataset, { left: column, right: width - column - 34 });
    lines.setAttribute("viewBox", `0 0 ${width} ${T * ROW}`);
    lines.setAttribute("height", T * ROW);
    const texts = make("g");
    froms.length = 0;
    data.labels.forEach((label, place) => {
      const y = place * ROW;
      const from = make("rect", { x: 0, y, width: column, height: ROW, rx: 3, class: "from" });
      from.addEventListener("pointerenter", () => point(place));
      from.addEventListener("click", () => choose(place));
      froms.push(from);
      texts.append(
        make("text", { x: column - 5, y: y + 13, "text-anchor": "end", "pointer-events": "none", "xml:space": "preserve" }, cut(label)),
        make("text", { x: width - column - 29, y: y + 13, "pointer-events": "none", "xml:space": "preserve" }, cut(label)),
      );
    });
    lines.replaceChildren(...froms, marks, drawn, texts);
  }

  function showLines() {
    const place = at();
    const [left, right] = [Number(lines.dataset.left), Number(lines.dataset.right)];
    const seen = [];
    for (let s = 0; s <= place; s++) seen.push([s, weight(state.layer, state.head, place, s)]);
    const visible = seen.filter(([, w]) => w >= 0.01);
    const middle = (t) => t * ROW + ROW / 2;
    drawn.replaceChildren(
      ...visible.map(([s, w]) =>
        make("line", { x1: left, y1: middle(place), x2: right, y2: middle(s), "stroke-opacity": 0.15 + 0.85 * w, "stroke-width": 0.5 + 3 * w }),
      ),
      ...visible.filter(([, w]) => w >= 0.03).map(([s, w]) =>
        make("text", { x: lines.viewBox.baseVal.width, y: middle(s) + 4, "text-anchor": "end", class: "weight" }, percent(w)),
      ),
    );
    marks.replaceChildren(
      ...visible.map(([s, w]) =>
        make("rect", { x: right, y: s * ROW, width: lines.viewBox.baseVal.width - right - 34, height: ROW, rx: 3, class: "to", "fill-opacity": 0.5 * w }),
      ),
    );
    froms.forEach((from, t) => from.classList.toggle("at", t === place));
    const best = seen.reduce((a, b) => (b[1] > a[1] ? b : a));
    byId("head-note").textContent =
      `${shown(data.labels[place])} (${place}) looks most at ${shown(data.labels[best[0]])} (${best[0]}): ${percent(best[1])}.`;
  }

  // ---- Pointer and keys ----
  function show() {
    showTokens();
    showNext();
    showParts();
    showLines();
  }
  function point(place) {
    if (state.pointed === place) return;
    state.pointed = place;
    show();
  }
  function choose(place) {
    state.place = place;
    state.pointed = null;
    show();
    showRow(place);
  }
  function showRow(place) {
    const box = byId("lines-box");
    const y = place * ROW;
    if (y < box.scrollTop || y + ROW > box.scrollTop + box.clientHeight) box.scrollTop = y - box.clientHeight / 2;
  }

  const text = byId("tokens");
  text.tabIndex = 0;
  text.setAttribute("role", "listbox");
  text.setAttribute("aria-label", "Tokens of the text");
  tokens.forEach((token, place) => {
    token.setAttribute("role", "option");
    token.addEventListener("pointerenter", (event) => event.pointerType !== "touch" && point(place));
    token.addEventListener("click", () => choose(place));
  });
  const keys = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1, Home: -T, End: T };
  text.addEventListener("keydown", (event) => {
    if (!(event.key in keys)) return;
    event.preventDefault();
    choose(Math.max(0, Math.min(T - 1, state.place + keys[event.key])));
  });
  for (const box of [text, byId("lines-box"), byId("matrix")]) box.addEventListener("pointerleave", () => point(null));
  byId("matrix").addEventListener("pointermove", (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    point(Math.max(0, Math.min(T - 1, Math.floor(((event.clientY - box.top) / box.height) * T))));
  });
  byId("matrix").addEventListener("click", () => choose(at()));
  for (const cell of document.querySelectorAll("#lens [data-place]")) {
    cell.addEventListener("pointerenter", () => point(Number(cell.dataset.place)));
    cell.addEventListener("click", () => choose(Number(cell.dataset.place)));
  }
  byId("lens").addEventListener("pointerleave", () => point(null));
  for (const cell of document.querySelectorAll(".notable")) {
    const button = element("button");
    button.type = "button";
    button.append(...cell.childNodes);
    button.addEventListener("click", () => chooseHead(Number(cell.dataset.layer), Number(cell.dataset.head)));
    cell.append(button);
  }

  function paintAll() {
    buttons.forEach((button, i) => paint(button.firstChild, Math.floor(i / data.heads), i % data.heads));
    paint(byId("matrix"), state.layer, state.head);
  }
  const first = document.querySelector(".notable");
  paintAll();
  buildLines();
  chooseHead(first ? Number(first.dataset.layer) : 0, first ? Number(first.dataset.head) : 0);
  choose(T - 1);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paintAll);
  addEventListener("resize", () => {
    buildLines();
    showLines();
  });
})();

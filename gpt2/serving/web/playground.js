"use strict";
// Asks the completions API of the server that this page comes from. All texts are set by textContent.
(() => {
  const LIMITS = document.body.dataset.limits.split(",").map(Number); // upper limits of the levels of surprisal, in bits
  const ALTERNATIVES = Number(document.body.dataset.alternatives);
  const END = "<|endoftext|>";
  const SVG = "http://www.w3.org/2000/svg";
  const byId = (id) => document.getElementById(id);
  const percent = (p) => (p >= 0.0995 ? `${Math.round(p * 100)}%` : `${(p * 100).toFixed(1)}%`);
  const element = (tag, className = "", text = "") => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    made.textContent = text;
    return made;
  };

  // ---- Tokens: a token is its name in the log-probabilities, its log-probability (or null), and the alternatives by name ----
  const BYTES = /^bytes:((?:\\x[0-9a-f]{2})+)$/i;
  const encoder = new TextEncoder();

  function bytesOf(name) {
    const found = BYTES.exec(name);
    return found ? found[1].split("\\x").slice(1).map((pair) => parseInt(pair, 16)) : [...encoder.encode(name)];
  }

  // Tokens may be parts of a character, so their bytes are joined before they are decoded.
  function textOf(tokens, options = {}) {
    const bytes = tokens.filter(({ name }) => name !== END).flatMap(({ name }) => bytesOf(name));
    return new TextDecoder("utf-8", { ignoreBOM: true, ...options }).decode(Uint8Array.from(bytes));
  }

  function isWhole(tokens) {
    try {
      textOf(tokens, { fatal: true });
      return true;
    } catch {
      return false;
    }
  }

  // Control characters get visible ones; those that reverse the order of the text around them are replaced.
  function visible(text) {
    return text
      .replace(/[\u0000-\u0008\u000b-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
      .replace(/[\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, "\ufffd");
  }

  function fill(target, name) {
    name.split("\n").forEach((line, i) => {
      if (i) target.append(element("span", "break"), "\n");
      target.append(visible(line));
    });
  }

  const bitsOf = (token) => (token.logprob === null ? null : -token.logprob / Math.LN2);
  const levelOf = (bits) => LIMITS.filter((limit) => bits > limit).length;
  const label = (name) => visible(name).replaceAll("\n", "\u21b5");

  // ---- The API ----
  async function ask(path, options = {}) {
    const headers = options.body ? { "Content-Type": "application/json" } : {};
    if (byId("key").value) headers.Authorization = `Bearer ${byId("key").value}`;
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The server does not answer. Is it still running?");
    }
    if (!response.ok) throw new Error(await messageOf(response));
    return response;
  }

  async function messageOf(response) {
    try {
      return (await response.json()).error.message;
    } catch {
      return `The server answered with status ${response.status}.`;
    }
  }

  // The objects of a stream of server-sent events, up to [DONE].
  async function* eventsOf(response) {
    const decoder = new TextDecoder();
    let rest = "";
    for await (const chunk of chunksOf(response.body)) {
      const lines = (rest + decoder.decode(chunk, { stream: true })).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        yield JSON.parse(data);
      }
    }
    throw new Error("The stream ended before the text did.");
  }

  async function* chunksOf(body) {
    const reader = body.getReader();
    for (let read = await reader.read(); !read.done; read = await reader.read()) yield read.value;
  }

  function tokensOf({ text, logprobs }) {
    if (!logprobs) return text ? [{ name: text, logprob: null, top: {} }] : [];
    return logprobs.tokens.map((name, i) => ({
      name,
      logprob: logprobs.token_logprobs[i] ?? null,
      top: logprobs.top_logprobs?.[i] ?? {},
    }));
  }

  // ---- Settings ----
  function valuesOf(form) {
    const values = { model: form.elements.model.value };
    for (const field of form.querySelectorAll("input")) {
      if (field.value !== "") values[field.name] = Number(field.value);
    }
    const stops = form.elements.stop.value.split("\n").filter(Boolean);
    if (stops.length) values.stop = stops.map((one) => one.replaceAll("\\n", "\n"));
    return values;
  }

  function copySettings(from, to) {
    for (const field of from.elements) to.elements[field.name].value = field.value;
  }

  const quoted = (text) => (/^[\w./@:-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

  // ---- One text with its settings; there may be two ----
  class Column {
    constructor(name) {
      this.section = byId("column").content.cloneNode(true).firstElementChild;
      this.section.id = this.name = name;
      for (const part of ["settings", "before", "tokens", "output", "alternatives", "status", "again", "inside", "page", "command", "error"]) {
        this[part] = this.section.querySelector(`.${part}`);
      }
      this.prompt = "";
      this.list = []; // the tokens that are shown
      this.kept = 0; // how many of them the last request had in its prompt
      this.active = 0; // the token that is chosen
      this.pointed = null; // the token under the pointer
      this.isClosed = false; // whether the alternatives stay hidden until a token is pointed at or chosen
      this.running = null;
      this.listen();
      document.querySelector("main").append(this.section);
    }

    listen() {
      this.again.addEventListener("click", () => this.regenerate());
      this.tokens.addEventListener("pointermove", (event) => event.pointerType !== "touch" && this.point(placeOf(event)));
      this.output.addEventListener("pointerleave", () => this.point(null));
      this.tokens.addEventListener("click", (event) => this.choose(placeOf(event) ?? this.active));
      this.tokens.addEventListener("keydown", (event) => this.onTextKey(event));
      this.tokens.addEventListener("focus", () => this.show());
      this.alternatives.addEventListener("keydown", (event) => this.onListKey(event));
      this.output.addEventListener("focusout", () => requestAnimationFrame(() => this.show()));
    }

    // ---- Requests ----
    start(seed) {
      this.prompt = byId("prompt").value;
      this.replace([]);
      return this.run(seed);
    }

    regenerate() {
      this.replace(this.list.slice(0, this.kept));
      this.run(randomSeed());
    }

    continueFrom(place, name) {
      const { top, ...token } = this.list[place];
      this.replace([...this.list.slice(0, place), { name, logprob: top[name] ?? token.logprob, top, taken: true }]);
      this.choose(place);
      this.close();
      if (name === END) this.finish("the end of the text was chosen");
      else this.run(randomSeed());
    }

    // Asks for what follows the prompt and the tokens that are kept.
    async run(seed) {
      this.running?.abort();
      const running = (this.running = new AbortController());
      this.kept = this.list.length;
      this.text = textOf(this.list);
      this.error.textContent = "";
      this.status.textContent = "generating \u2026";
      this.seed = this.settings.elements.seed.value || seed;
      showRunning();
      let ending;
      try {
        ending = await this.read(seed, running);
      } catch (error) {
        if (this.running !== running) return; // a later request has replaced this one
        ending = running.signal.aborted ? "stopped" : "";
        if (!ending) this.error.textContent = error.message;
      }
      if (this.running === running) this.finish(ending);
    }

    async read(seed, { signal }) {
      const values = { seed, ...valuesOf(this.settings), prompt: this.prompt + this.text };
      const body = JSON.stringify({ ...values, stream: true, logprobs: ALTERNATIVES, echo: false });
      let ending = "";
      for await (const event of eventsOf(await ask("v1/completions", { method: "POST", body, signal }))) {
        signal.throwIfAborted();
        if (event.error) throw new Error(event.error.message);
        for (const choice of event.choices ?? []) {
          this.text += choice.text;
          tokensOf(choice).forEach((token) => this.append(token));
          ending = choice.finish_reason ?? ending;
        }
      }
      if (ending === "stop") this.markCut();
      return ending === "length" ? "max_tokens reached" : ending === "stop" ? "a stop string or the end of the text" : ending;
    }

    finish(ending) {
      this.running = null;
      const bits = this.list.map(bitsOf).filter((one) => one !== null);
      const mean = bits.length ? `${(bits.reduce((sum, one) => sum + one, 0) / bits.length).toFixed(2)} bits per token` : "";
      const count = `${this.list.length} token${this.list.length === 1 ? "" : "s"}`;
      this.status.textContent = [count, mean, `seed ${this.seed}`, ending].filter(Boolean).join(" \u00b7 ");
      this.again.disabled = false;
      this.showCommand();
      showRunning();
    }

    stop() {
      this.running?.abort();
    }

    // ---- The text ----
    replace(tokens) {
      this.list = [];
      this.parts = []; // tokens since the last whole character
      this.active = 0;
      this.pointed = null;
      this.tokens.replaceChildren();
      this.before.replaceChildren();
      fill(this.before, this.prompt);
      tokens.forEach((token) => this.append(token));
      this.show();
    }

    append(token) {
      const bits = bitsOf(token);
      const made = element("span", bits === null ? "token" : `token s${levelOf(bits)}`);
      made.id = `${this.name}${this.list.length}`;
      made.dataset.place = this.list.length;
      made.setAttribute("role", "option");
      made.classList.toggle("taken", Boolean(token.taken));
      fill(made, token.name);
      this.list.push(token);
      this.markWhole(token, made);
      this.tokens.append(made);
    }

    // The last token of a character that several tokens make up shows the character.
    markWhole(token, made) {
      this.parts = BYTES.test(token.name) ? [...this.parts, token] : [];
      if (!this.parts.length || !isWhole(this.parts)) return;
      made.dataset.whole = textOf(this.parts);
      this.parts = [];
    }

    // Tokens of a stop string and of the end are not part of the text.
    markCut() {
      let end = this.list.length;
      while (end > this.kept && textOf(this.list.slice(0, end - 1)).length >= this.text.length) end--;
      [...this.tokens.children].slice(end).forEach((made) => made.classList.add("cut"));
    }

    showCommand() {
      const text = this.prompt + this.text;
      const name = this.settings.elements.model.value, model = quoted(name);
      this.inside.hidden = !text;
      if (byId("key").value) this.page.removeAttribute("href"); // a link sends no key
      else this.page.href = `inspect?${new URLSearchParams({ model: name, text })}`;
      this.command.textContent = `gpt2 inspect --from_pretrained ${model} --html page.html -- ${quoted(text)}`;
    }

    // ---- The alternatives of the token under the pointer, or of the chosen one while the text has the focus ----
    point(place) {
      if (place === this.pointed) return;
      this.pointed = place;
      this.isClosed &&= place === null;
      this.show();
    }

    choose(place) {
      this.active = place;
      this.pointed = null;
      this.isClosed = false;
      this.tokens.focus({ preventScroll: true });
      this.show();
    }

    close() {
      this.isClosed = true;
      this.show();
    }

    show() {
      const hasFocus = this.output.contains(document.activeElement);
      const at = this.pointed ?? (hasFocus && this.list.length ? this.active : null);
      [...this.tokens.children].forEach((made, place) => {
        made.classList.toggle("at", place === at);
        made.classList.toggle("chosen", place === this.active && hasFocus);
        made.setAttribute("aria-selected", String(place === this.active));
      });
      if (this.list.length) this.tokens.setAttribute("aria-activedescendant", `${this.name}${this.active}`);
      this.showAlternatives(this.isClosed ? null : at);
    }

    showAlternatives(at) {
      if (this.alternatives.contains(document.activeElement) && Number(this.alternatives.dataset.place) === at) return;
      this.alternatives.hidden = at === null;
      if (at === null) return;
      const token = this.list[at];
      const bits = bitsOf(token);
      const note = `\u201c${label(token.name)}\u201d: ${bits === null ? "no log-probability" : `${bits.toFixed(1)} bits`}`;
      const rows = rowsOf(token);
      const most = Math.exp(Math.max(...rows.map(([, logprob]) => logprob)));
      const buttons = rows.map(([name, logprob]) => this.alternative(at, name, Math.exp(logprob), most));
      this.alternatives.replaceChildren(element("p", "note", note), ...buttons);
      this.alternatives.dataset.place = at;
      this.position(this.tokens.children[at]);
    }

    alternative(at, name, probability, most) {
      const button = element("button", name === this.list[at].name ? "actual" : "");
      button.type = "button";
      button.dataset.name = name;
      button.append(element("span", "piece", label(name)), barOf(probability / most), element("span", "percent", percent(probability)));
      button.disabled = !isWhole([...this.list.slice(0, at), { name }]);
      button.title = button.disabled ? "A part of a character cannot be sent as text" : label(name);
      button.addEventListener("click", () => this.continueFrom(at, name));
      return button;
    }

    // Below the token, or above it where there is no room below.
    position(token) {
      const [box, list] = [this.output.getBoundingClientRect(), this.alternatives.getBoundingClientRect()];
      const line = [...token.getClientRects()].at(-1);
      const isBelow = line.bottom + list.height <= innerHeight || line.top < list.height;
      this.alternatives.style.left = `${Math.max(0, Math.min(line.left - box.left, box.width - list.width))}px`;
      this.alternatives.style.top = `${isBelow ? line.bottom - box.top : line.top - box.top - list.height}px`;
    }

    // ---- Keys ----
    onTextKey(event) {
      const last = this.list.length - 1;
      const goal = { ArrowLeft: this.active - 1, ArrowRight: this.active + 1, Home: 0, End: last }[event.key];
      const opens = ["ArrowDown", "Enter"].includes(event.key) && !event.ctrlKey && !event.metaKey;
      if (last < 0 || (goal === undefined && !opens)) return;
      event.preventDefault();
      if (opens) this.alternatives.querySelector("button:enabled")?.focus();
      else this.choose(Math.max(0, Math.min(last, goal)));
    }

    onListKey(event) {
      const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
      if (event.key === "Escape") {
        event.stopPropagation();
        this.choose(Number(this.alternatives.dataset.place));
      }
      if (!step) return;
      event.preventDefault();
      const buttons = [...this.alternatives.querySelectorAll("button:enabled")];
      buttons[buttons.indexOf(document.activeElement) + step]?.focus();
    }
  }

  const placeOf = (event) => {
    const token = event.target.closest(".token");
    return token ? Number(token.dataset.place) : null;
  };

  // The alternatives from the most probable on, and the token itself where it is none of them.
  function rowsOf(token) {
    const rows = Object.entries(token.top).sort((a, b) => b[1] - a[1]);
    const isMissing = token.logprob !== null && !(token.name in token.top);
    return isMissing ? [...rows, [token.name, token.logprob]] : rows;
  }

  function barOf(share) {
    const svg = document.createElementNS(SVG, "svg");
    const values = { viewBox: "0 0 100 10", preserveAspectRatio: "none", width: "100%", height: "12", "aria-hidden": "true" };
    for (const [name, value] of Object.entries(values)) svg.setAttribute(name, value);
    const bar = svg.appendChild(document.createElementNS(SVG, "rect"));
    for (const [name, value] of Object.entries({ width: share * 100, height: 10, class: "positive" })) bar.setAttribute(name, value);
    return svg;
  }

  const randomSeed = () => Math.floor(Math.random() * 2 ** 31);

  // ---- The page ----
  const columns = [new Column("a"), new Column("b")];
  const shown = () => columns.filter((column) => !column.section.hidden);
  columns[1].section.hidden = true;

  function showRunning() {
    byId("stop").disabled = !columns.some((column) => column.running);
  }

  // Both columns get the same seed, so that what differs comes from their settings.
  function generate() {
    if (!shown().every((column) => column.settings.reportValidity())) return;
    const seed = randomSeed();
    shown().forEach((column) => column.start(seed));
  }

  const stop = () => columns.forEach((column) => column.stop());

  // The first time, the other settings are the same, so that one of them can be changed.
  byId("beside").addEventListener("change", () => copySettings(columns[0].settings, columns[1].settings), { once: true });

  function toggleBeside() {
    const isBeside = byId("beside").checked;
    document.querySelector("main").classList.toggle("beside", isBeside);
    columns[1].section.hidden = !isBeside;
    columns.forEach((column, i) => (column.section.querySelector("h2").textContent = isBeside ? `Settings ${"AB"[i]}` : "Settings"));
    if (!isBeside) columns[1].stop();
  }

  async function showModels() {
    try {
      const models = (await (await ask("v1/models")).json()).data;
      for (const { settings } of columns) {
        settings.elements.model.replaceChildren(...models.map(({ id }) => new Option(id, id)));
      }
      byId("error").textContent = "";
    } catch (error) {
      byId("error").textContent = error.message;
    }
  }

  byId("generate").addEventListener("click", generate);
  byId("stop").addEventListener("click", stop);
  byId("beside").addEventListener("change", toggleBeside);
  byId("key").addEventListener("change", showModels);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      stop();
      columns.forEach((column) => column.close());
    }
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) generate();
  });
  showModels();
})();

// One run on the page: its tokens in color, figures, and the histogram of depths.

const LAST_SHADE = 7;
const STICKY = 40; // pixels from the bottom within which new text scrolls into view

/** Which of the eight shades stands for `count` recursions of at most `most`. */
export function shadeOf(count, most) {
  if (count < 1) return null;
  return most < 2 ? 0 : Math.floor((2 * (count - 1) * LAST_SHADE + most - 1) / (2 * (most - 1)));
}

export function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

/** A list of labelled bars that is built once and then only changes its lengths. */
export class Bars {
  #rows = [];

  constructor(list, keys) {
    list.replaceChildren(
      ...keys.map(({ label, shade, about }) => {
        const row = element("li");
        const key = element("span", shade === null ? "key" : `key d${shade}`, label);
        key.setAttribute("aria-label", about);
        key.setAttribute("role", "img");
        const track = element("span", shade === null ? "track" : `track d${shade}`);
        const fill = track.appendChild(element("span", "fill"));
        const value = element("span", "value");
        row.append(key, track, value);
        this.#rows.push({ fill, value });
        return row;
      }),
    );
  }

  show(lengths, texts) {
    this.#rows.forEach(({ fill, value }, i) => {
      fill.style.width = `${100 * Math.min(1, lengths[i])}%`;
      value.textContent = texts[i];
    });
  }
}

/** Fill a list of figures: pairs of a label and a value. */
export function showFigures(list, pairs) {
  if (list.children.length !== pairs.length) {
    list.replaceChildren(
      ...pairs.map(([label]) => {
        const group = element("div");
        group.append(element("dt", "", label), element("dd"));
        return group;
      }),
    );
  }
  pairs.forEach(([label, value], i) => {
    const [term, data] = list.children[i].children;
    term.textContent = label;
    data.textContent = value;
  });
}

const number = (value, digits) =>
  value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });

/** Text, figures and histogram of one run; the page is changed once a frame. */
export class Pane {
  tokens = [];

  #most;
  #counts;
  #shown = 0;
  #frame = 0;
  #at = -1;
  #began = 0;
  #first = 0;
  #latest = 0;
  #saved = null;

  constructor(title, note, most, tip) {
    this.root = document.getElementById("pane").content.firstElementChild.cloneNode(true);
    const find = (selector) => this.root.querySelector(selector);
    this.box = find(".tokens");
    this.readout = find(".readout");
    this.figures = find(".figures");
    find("h2").textContent = title;
    find(".note").textContent = note;
    this.root.setAttribute("aria-label", title);
    this.box.setAttribute("aria-label", `${title}: text; arrow keys walk over its tokens`);
    this.box.dataset.empty = "The text will appear here.";
    this.#most = most;
    this.#counts = new Array(most + 1).fill(0);
    const keys = this.#counts.map((_, count) => ({
      label: `${count}`,
      shade: shadeOf(count, most),
      about: `${count} recursion${count === 1 ? "" : "s"}`,
    }));
    this.bars = new Bars(find(".bars"), keys.slice(1));
    this.tip = tip;
    this.#listen();
    this.#showFigures();
  }

  /** The clock of this run starts. */
  start() {
    this.box.dataset.empty = "Waiting for the first token …";
    this.#began = performance.now();
  }

  add(tokens) {
    const now = performance.now();
    for (const token of tokens) {
      this.tokens.push(token);
      if (token.isPrompt) continue;
      this.#first ||= now;
      this.#latest = now;
      this.#counts[token.count] += 1;
    }
    this.#frame ||= requestAnimationFrame(() => this.flush());
  }

  /** What the server says the run cost. */
  end(usage) {
    if (usage) this.#saved = usage.flops_saved;
    this.box.dataset.empty = "There is no text.";
    this.flush();
  }

  get generated() {
    return this.#counts.reduce((sum, n) => sum + n, 0);
  }

  get mean() {
    return this.#counts.reduce((sum, n, count) => sum + n * count, 0) / (this.generated || 1);
  }

  /** Bring everything that has come to the page. */
  flush() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    const { box } = this;
    const follows = box.scrollHeight - box.scrollTop - box.clientHeight < STICKY;
    const fresh = document.createDocumentFragment();
    for (; this.#shown < this.tokens.length; this.#shown += 1) {
      fresh.append(this.#span(this.tokens[this.#shown], this.#shown));
    }
    box.append(fresh);
    if (follows) box.scrollTop = box.scrollHeight;
    this.#showFigures();
  }

  #span(token, index) {
    const shade = shadeOf(token.count, this.#most);
    const text = token.isEnd && token.text === "" ? "\u220e" : visible(token.text);
    const span = element("span", shade === null ? "t" : `t d${shade}`, text);
    span.dataset.n = token.count;
    span.dataset.i = index;
    if (text.includes("\n")) span.classList.add("newline");
    if (token.isPrompt) span.classList.add("prompt");
    if (token.isPrompt && !this.tokens[index + 1]?.isPrompt) span.classList.add("last");
    return span;
  }

  #showFigures() {
    const count = this.generated;
    const seconds = (this.#latest - this.#first) / 1000;
    const rate = count > 1 && seconds > 0 ? number((count - 1) / seconds, 1) : "–";
    const wait = this.#first ? `${number(this.#first - this.#began, 0)} ms` : "–";
    showFigures(this.figures, [
      ["tokens", `${count}`],
      ["tokens/s", rate],
      ["to the first", wait],
      ["mean recursions", count ? number(this.mean, 2) : "–"],
      ["FLOPs saved", this.#saved === null ? "–" : `${number(100 * this.#saved, 0)} %`],
    ]);
    const most = Math.max(1, ...this.#counts);
    this.bars.show(
      this.#counts.slice(1).map((n) => n / most),
      this.#counts.slice(1).map((n) => (count ? `${n} · ${number((100 * n) / count, 0)} %` : "–")),
    );
  }

  // -- looking at single tokens -------------------------------------------------------------

  #listen() {
    this.box.addEventListener("pointerover", (event) => this.#hover(event.target));
    this.box.addEventListener("pointerleave", () => this.tip.hide());
    this.box.addEventListener("scroll", () => this.tip.hide(), { passive: true });
    this.box.addEventListener("click", (event) => {
      if (event.target.dataset.i !== undefined) this.#go(Number(event.target.dataset.i));
    });
    this.box.addEventListener("blur", () => this.tip.hide());
    this.box.addEventListener("keydown", (event) => this.#key(event));
  }

  #hover(span) {
    const token = this.tokens[span.dataset.i];
    if (token) this.tip.show(span, this.#about(token, span.dataset.i));
    else this.tip.hide();
  }

  #key(event) {
    const last = this.#shown - 1;
    const to = {
      ArrowRight: Math.min(last, this.#at + 1),
      ArrowLeft: Math.max(0, this.#at - 1),
      Home: 0,
      End: last,
    }[event.key];
    if (to === undefined || last < 0) return;
    event.preventDefault();
    this.#go(to);
  }

  #go(index) {
    this.box.querySelector(".at")?.classList.remove("at");
    this.#at = index;
    const span = this.box.children[index];
    span.classList.add("at");
    span.scrollIntoView({ block: "nearest" });
    const about = this.#about(this.tokens[index], index);
    this.readout.textContent = about.replaceAll("\n", ", ");
    this.tip.show(span, about);
  }

  #about(token, index) {
    const name = token.isEnd && token.text === "" ? "end of text" : JSON.stringify(token.text);
    const lines = [
      `${token.isPrompt ? "prompt " : ""}token ${Number(index) + 1}: ${name}`,
      `${token.count} of ${this.#most} recursion${this.#most === 1 ? "" : "s"}`,
    ];
    if (token.logprob !== null) {
      const share = Number((100 * Math.exp(token.logprob)).toPrecision(2));
      lines.push(`log-probability ${number(token.logprob, 3).replace("-", "−")} (${share} %)`);
    }
    return lines.join("\n");
  }
}

/** Control characters as pictures, since a page shows nothing in their place. */
function visible(text) {
  return text.replace(/[\0-\x08\x0b-\x1f\x7f]/g, (c) =>
    c === "\x7f" ? "\u2421" : String.fromCharCode(0x2400 + c.charCodeAt(0)),
  );
}

/** The box beside the token that somebody looks at. */
export class Tip {
  #box;

  constructor(box) {
    this.#box = box;
  }

  show(anchor, text) {
    const box = this.#box;
    box.textContent = text;
    box.hidden = false;
    const at = anchor.getClientRects()[0] ?? anchor.getBoundingClientRect();
    const room = document.documentElement.clientWidth - box.offsetWidth - 8;
    const above = at.top - box.offsetHeight - 8;
    box.style.left = `${Math.max(8, Math.min(at.left, room))}px`;
    box.style.top = `${above > 8 ? above : at.bottom + 8}px`;
  }

  hide() {
    this.#box.hidden = true;
  }
}

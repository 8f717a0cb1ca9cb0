"use strict";
// Everything from files is set as text or attribute through `el`; nothing is ever parsed as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const arrows = { higher: " ↑", lower: " ↓", neither: "" };
const state = { block: 0, sort: null, down: false, filter: "", only: false, picked: new Set(), x: null, y: null };

function el(tag, attributes = {}, ...children) {
  const svg = ["svg", "g", "circle", "line", "path", "text"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}
const fill = (node, ...children) => (node.replaceChildren(...children), node);
const block = () => data.blocks[state.block];

// ---- tooltip: describe(node, [[name, text], ...]) shows on hover and on focus
function describe(node, facts) {
  const show = (event) => {
    fill($("tip"), ...facts.flatMap(([name, text]) => [el("b", {}, name ? name + ": " : ""), text + "\n"]));
    $("tip").hidden = false;
    const box = node.getBoundingClientRect(),
      tip = $("tip").getBoundingClientRect();
    const left = Math.min(event.clientX ? event.clientX + 14 : box.left, innerWidth - tip.width - 8);
    const below = (event.clientY || box.bottom) + 16;
    $("tip").style.left = Math.max(8, left) + "px";
    $("tip").style.top = (below + tip.height < innerHeight ? below : Math.max(8, box.top - tip.height - 8)) + "px";
  };
  const hide = () => ($("tip").hidden = true);
  for (const [name, handler] of [
    ["pointerenter", show],
    ["focusin", show],
    ["pointerleave", hide],
    ["focusout", hide],
  ])
    node.addEventListener(name, handler);
  return node;
}

// ---- leaderboard
function visibleRows() {
  const words = state.filter.toLowerCase().split(/\s+/).filter(Boolean);
  let rows = block().rows.filter((row) => {
    const text = `${row.name} ${row.family} ${row.latent}`.toLowerCase();
    return words.every((word) => text.includes(word)) && (!state.only || state.picked.has(row.name));
  });
  if (state.sort === null) return rows;
  const value = (row) => (state.sort < 0 ? row.name : row.cells[state.sort][4]);
  const missing = (v) => v === null || v === undefined || v === "";
  return rows.sort((a, b) => {
    const x = value(a),
      y = value(b);
    if (missing(x) || missing(y)) return missing(x) - missing(y); // always last
    const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
    return state.down ? -order : order;
  });
}

function sortBy(index) {
  const column = index < 0 ? { better: "lower" } : block().columns[index];
  const best = column.better === "higher"; // first click: best first; second: worst first; third: as ranked
  if (state.sort !== index) Object.assign(state, { sort: index, down: best });
  else if (state.down === best) state.down = !best;
  else state.sort = null;
  drawTable();
}

function heading(index, label, unit, description) {
  const sorted = state.sort === index ? (state.down ? "descending" : "ascending") : "none";
  const button = el("button", { type: "button", "data-sort": index, onclick: () => sortBy(index) }, label);
  const cell = el("th", { scope: "col", "aria-sort": sorted }, button, unit ? el("small", {}, unit) : null);
  return description ? describe(cell, [["", description]]) : cell;
}

function tableRow(row) {
  const box = el("input", { type: "checkbox", onchange: () => pick(row.name) });
  box.checked = state.picked.has(row.name);
  const name = el("td", {}, describe(el("label", {}, box, row.name), row.facts));
  const cells = row.cells.map(([text, error, rank, dagger, , note]) => {
    const cell = el(
      "td",
      { class: ["", "best", "second"][rank] },
      el("span", { class: "value" }, text),
      dagger ? "†" : "",
    );
    if (error) cell.append(" ", el("span", { class: "error" }, error));
    return note ? describe(cell, [["", note]]) : cell;
  });
  return el("tr", { class: box.checked ? "picked" : "", "data-name": row.name }, name, ...cells);
}

function drawTable() {
  const focused = document.activeElement?.dataset?.sort;
  const columns = block().columns,
    rows = visibleRows(),
    body = el("tbody");
  let group = "";
  for (const row of rows) {
    if (state.sort === null && row.group && row.group !== group)
      body.append(el("tr", { class: "group" }, el("td", { colspan: columns.length + 1 }, (group = row.group))));
    body.append(tableRow(row));
  }
  if (!rows.length) body.append(el("tr", {}, el("td", { colspan: columns.length + 1 }, "no row matches")));
  const heads = columns.map((c, i) => heading(i, c.key + arrows[c.better], c.unit, c.description));
  fill($("table"), el("thead", {}, el("tr", {}, heading(-1, "tokenizer", "", ""), ...heads)), body);
  fill($("notes"), ...block().notes.map((note) => el("p", {}, note)));
  if (focused !== undefined) $("table").querySelector(`[data-sort="${focused}"]`)?.focus();
}

function pick(name) {
  state.picked.has(name) ? state.picked.delete(name) : state.picked.add(name);
  const key = document.activeElement?.closest("tr")?.dataset.name;
  drawTable();
  drawScatter();
  if (key !== undefined)
    for (const row of $("table").rows) if (row.dataset.name === key) row.querySelector("input").focus();
}

// ---- scatter
const numeric = () =>
  block()
    .columns.map((c, i) => ({ ...c, i }))
    .filter((c) => block().rows.some((r) => typeof r.cells[c.i][4] === "number"));
const M = { left: 60, right: 20, top: 14, bottom: 44 };
let W = 860,
  H = 430; // as wide as there is room, so that text keeps its size on a phone

function scale(values, low, high) {
  let [min, max] = [Math.min(...values), Math.max(...values)];
  const log = min > 0 && max / min > 12;
  const f = log ? Math.log10 : (v) => v;
  let [a, b] = [f(min), f(max)];
  const pad = (b - a || Math.abs(a) || 1) * 0.08;
  [a, b] = [a - pad, b + pad];
  const at = (v) => low + ((f(v) - a) / (b - a)) * (high - low);
  const ticks = [];
  if (log)
    for (let e = Math.floor(a); e <= b; e++) for (const m of b - a > 3 ? [1] : [1, 2, 5]) ticks.push(m * 10 ** e);
  else {
    const step = 10 ** Math.floor(Math.log10((b - a) / 4)),
      nice = [1, 2, 5, 10].find((n) => (b - a) / (n * step) <= 7) * step;
    for (let t = Math.ceil(a / nice) * nice; t <= b; t += nice) ticks.push(+t.toPrecision(12));
  }
  return { at, ticks: ticks.filter((t) => f(t) >= a && f(t) <= b) };
}

function paretoFront(points, x, y) {
  const sx = x.better === "higher" ? -1 : 1,
    sy = y.better === "higher" ? -1 : 1,
    front = [];
  for (const p of [...points].sort((p, q) => sx * (p.x - q.x) || sy * (p.y - q.y)))
    if (!front.length || sy * p.y < sy * front[front.length - 1].y) front.push(p);
  return front;
}

function drawScatter() {
  W = Math.max(300, Math.min(1200, $("scatter").clientWidth || 860));
  H = Math.round(Math.max(280, Math.min(460, W * 0.6)));
  const columns = numeric(),
    x = columns.find((c) => c.key === state.x),
    y = columns.find((c) => c.key === state.y);
  if (!x || !y) return fill($("scatter"), el("p", { class: "notes" }, "Fewer than two numbers to plot."));
  const points = block()
    .rows.map((row) => ({ row, x: row.cells[x.i][4], y: row.cells[y.i][4] }))
    .filter((p) => typeof p.x === "number" && typeof p.y === "number");
  if (!points.length) return fill($("scatter"), el("p", { class: "notes" }, "No tokenizer has both."));
  const sx = scale(
      points.map((p) => p.x),
      M.left,
      W - M.right,
    ),
    sy = scale(
      points.map((p) => p.y),
      H - M.bottom,
      M.top,
    );
  const svg = el("svg", { viewBox: `0 0 ${W} ${H}`, role: "group", "aria-label": `${y.key} against ${x.key}` });
  for (const t of sx.ticks)
    svg.append(
      el("line", { class: "axis", x1: sx.at(t), x2: sx.at(t), y1: M.top, y2: H - M.bottom }),
      el("text", { class: "tick", x: sx.at(t), y: H - M.bottom + 16, "text-anchor": "middle" }, String(t)),
    );
  for (const t of sy.ticks)
    svg.append(
      el("line", { class: "axis", y1: sy.at(t), y2: sy.at(t), x1: M.left, x2: W - M.right }),
      el("text", { class: "tick", x: M.left - 6, y: sy.at(t) + 4, "text-anchor": "end" }, String(t)),
    );
  const label = (c) => c.key + (c.unit ? ` (${c.unit})` : "") + arrows[c.better];
  svg.append(
    el("text", { class: "title", x: W / 2, y: H - 8, "text-anchor": "middle" }, label(x)),
    el(
      "text",
      { class: "title", x: 14, y: H / 2, "text-anchor": "middle", transform: `rotate(-90 14 ${H / 2})` },
      label(y),
    ),
  );
  if (x.better !== "neither" && y.better !== "neither")
    svg.append(
      el("path", {
        class: "front",
        d: paretoFront(
          points.filter((p) => p.row.ranked),
          x,
          y,
        )
          .map((p, i) => (i ? `H${sx.at(p.x)}V${sy.at(p.y)}` : `M${sx.at(p.x)} ${sy.at(p.y)}`))
          .join(""),
      }),
    );
  svg.append(
    ...labelled(
      points.map((p) => ({ ...p, px: sx.at(p.x), py: sy.at(p.y) })),
      x,
      y,
    ),
  );
  fill($("scatter"), svg);
}

function labelled(points, x, y) {
  const families = [...new Set(block().rows.map((r) => r.family))],
    taken = points.map((p) => [p.px - 6, p.py - 6, p.px + 6, p.py + 6]);
  return points.map((p) => {
    const name = p.row.name,
      short = name.length > 28 ? name.slice(0, 15) + "…" + name.slice(-12) : name,
      wide = short.length * 6.6;
    const picked = state.picked.has(name);
    const classes = ["point", picked ? "picked" : "", state.picked.size && !picked ? "dim" : ""].join(" ");
    const pressed = () => {
      pick(name);
      [...$("scatter").querySelectorAll(".point")].find((g) => g.dataset.name === name)?.focus();
    };
    const g = el(
      "g",
      {
        class: classes,
        tabindex: 0,
        role: "button",
        "aria-pressed": String(picked),
        "aria-label": `${name}: ${p.x} ${p.y}`,
        "data-name": name,
        onclick: pressed,
        onkeydown: (e) => (e.key === "Enter" || e.key === " ") && (e.preventDefault(), pressed()),
      },
      el("circle", { cx: p.px, cy: p.py, r: picked ? 8 : 6, fill: `var(--c${families.indexOf(p.row.family) % 7})` }),
    );
    for (const [dx, dy] of [
      [10, 4],
      [-10 - wide, 4],
      [-wide / 2, -11],
      [-wide / 2, 20],
      [10, -9],
      [10, 17],
      [-10 - wide, -9],
      [-10 - wide, 17],
    ]) {
      const box = [p.px + dx, p.py + dy - 10, p.px + dx + wide, p.py + dy + 3];
      if (
        box[0] < M.left ||
        box[2] > W ||
        box[1] < 0 ||
        box[3] > H - M.bottom ||
        taken.some((t) => box[0] < t[2] && t[0] < box[2] && box[1] < t[3] && t[1] < box[3])
      )
        continue;
      taken.push(box);
      g.append(el("text", { x: p.px + dx, y: p.py + dy }, short));
      break;
    }
    return describe(g, [
      ["", name],
      [x.key, p.row.cells[x.i][0] + " " + x.unit],
      [y.key, p.row.cells[y.i][0] + " " + y.unit],
      ...p.row.facts,
    ]);
  });
}

// ---- image comparison
const view = {
  a: null,
  b: null,
  image: 0,
  metric: "",
  worst: true,
  errors: false,
  s: 1,
  x: 0,
  y: 0,
  split: 50,
  film: [],
};
const INPUT = "\u0000input";
const rowsOf = {}; // block -> {model: {metric: [per image]}}, loaded when first looked at
window.tokbenchRows = (part) => {
  rowsOf[part.block] = part.rows;
  if (part.block === state.block) refreshViewer();
};
const source = (model, image) =>
  `images/${state.block}/${model === INPUT ? "real" : block().images.models[model].folder}/${image}.png`;
const title = (model) => (model === INPUT ? "input" : model);
const score = (model, image) => rowsOf[state.block]?.[model]?.[view.metric]?.[image] ?? null;
const shown = (value) => (value === null ? "" : Number(value.toPrecision(4)).toString());

function openViewer() {
  const images = block().images,
    box = $("viewer");
  if (!images || !images.ids.length)
    return fill(
      box,
      el("p", { class: "notes" }, "No images were saved for these results; tokbench run --save-images N keeps them."),
    );
  const models = Object.keys(images.models);
  Object.assign(view, { a: INPUT, b: models[0], image: 0, s: 1, x: 0, y: 0, split: 50 });
  view.metric =
    ["lpips-alex", "psnr"].find((m) => images.metrics.some((k) => k.key === m)) ?? images.metrics[0]?.key ?? "";
  if (!(state.block in rowsOf)) document.head.append(el("script", { src: `rows/${state.block}.js` }));
  const choose = (id, value, names, change) => {
    const select = el(
      "select",
      { id, onchange: (e) => change(e.target.value) },
      ...names.map(([key, text]) => el("option", { value: key }, text)),
    );
    select.value = value;
    return select;
  };
  const sides = [[INPUT, "input"], ...models.map((m) => [m, m])];
  fill(
    box,
    el(
      "div",
      { class: "controls" },
      el(
        "label",
        {},
        "Left ",
        choose("side-a", view.a, sides, (v) => {
          view.a = v;
          refreshViewer();
        }),
      ),
      el(
        "label",
        {},
        "Right ",
        choose("side-b", view.b, sides, (v) => {
          view.b = v;
          refreshViewer();
        }),
      ),
      el("button", { type: "button", id: "swap", onclick: swap }, "⇄ swap"),
      el(
        "label",
        {},
        "Sort ",
        choose(
          "sort-metric",
          view.metric,
          images.metrics.map((m) => [m.key, m.key]),
          (v) => {
            view.metric = v;
            refreshViewer();
          },
        ),
      ),
      choose(
        "sort-order",
        "worst",
        [
          ["worst", "worst first"],
          ["best", "best first"],
        ],
        (v) => {
          view.worst = v === "worst";
          refreshViewer();
        },
      ),
      el("button", { type: "button", id: "errors", "aria-pressed": "false", onclick: toggleErrors }, "error × 4"),
      ...[1, 2, 4, 8].map((s) =>
        el("button", { type: "button", class: "zoom", "data-zoom": s, onclick: () => zoom(s) }, `${s}×`),
      ),
    ),
    el(
      "div",
      { class: "viewer" },
      el(
        "div",
        {},
        stage(),
        el("p", { id: "which", class: "notes", "aria-live": "polite" }),
        el(
          "p",
          { class: "notes" },
          "Keys on the image: ← → divider · + − zoom · n p image · e error · s swap. " +
            "Double click zooms, drag moves.",
        ),
      ),
      el("div", { class: "film", id: "film" }),
    ),
    el("div", { class: "strip", id: "strip" }),
  );
  refreshViewer();
}

function stage() {
  const handle = el("div", {
    class: "handle",
    id: "handle",
    role: "slider",
    tabindex: 0,
    "aria-label": "divider between left and right image",
    "aria-valuemin": 0,
    "aria-valuemax": 100,
    "aria-valuenow": 50,
  });
  const node = el(
    "div",
    { class: "stage", id: "stage", tabindex: 0, role: "group", "aria-label": "comparison of two images" },
    el("div", { class: "layer a" }, el("div", { class: "view", id: "view-a" })),
    el("div", { class: "layer b" }, el("div", { class: "view", id: "view-b" })),
    handle,
    el("span", { class: "tag a", id: "tag-a" }),
    el("span", { class: "tag b", id: "tag-b" }),
  );
  let drag = null;
  node.addEventListener("pointerdown", (e) => {
    drag = {
      split: e.target === handle || view.s === 1,
      x: e.clientX,
      y: e.clientY,
      from: [view.x, view.y],
      moved: false,
    };
    if (e.target === handle) handle.setPointerCapture(e.pointerId);
    else if (view.s > 1) node.setPointerCapture(e.pointerId);
  });
  node.addEventListener("pointermove", (e) => {
    if (!drag) return;
    const box = node.getBoundingClientRect();
    if (drag.split) setSplit((100 * (e.clientX - box.left)) / box.width);
    else pan(drag.from[0] + e.clientX - drag.x, drag.from[1] + e.clientY - drag.y);
  });
  for (const name of ["pointerup", "pointercancel"]) node.addEventListener(name, () => (drag = null));
  node.addEventListener("pointerleave", (e) => {
    if (drag && !node.hasPointerCapture(e.pointerId) && !handle.hasPointerCapture(e.pointerId)) drag = null;
  });
  node.addEventListener("dblclick", (e) => zoom(view.s >= 8 ? 1 : view.s * 2, e));
  node.addEventListener(
    "wheel",
    (e) => {
      if (!e.ctrlKey && document.activeElement !== node) return;
      e.preventDefault();
      zoom(view.s * (e.deltaY < 0 ? 1.25 : 0.8), e);
    },
    { passive: false },
  );
  node.addEventListener("dragstart", (e) => e.preventDefault());
  node.addEventListener("keydown", stageKey);
  return node;
}

function stageKey(e) {
  const step = e.shiftKey ? 10 : 2;
  const actions = {
    ArrowLeft: () => setSplit(view.split - step),
    ArrowRight: () => setSplit(view.split + step),
    Home: () => setSplit(0),
    End: () => setSplit(100),
    "+": () => zoom(view.s * 2),
    "=": () => zoom(view.s * 2),
    "-": () => zoom(view.s / 2),
    n: () => turn(1),
    p: () => turn(-1),
    e: toggleErrors,
    s: swap,
  };
  if (!actions[e.key] || e.ctrlKey || e.metaKey || e.altKey) return;
  e.preventDefault();
  actions[e.key]();
}

function setSplit(percent) {
  view.split = Math.max(0, Math.min(100, percent));
  $("stage").style.setProperty("--split", view.split + "%");
  $("handle").setAttribute("aria-valuenow", Math.round(view.split));
}
function pan(x, y) {
  const size = $("stage").clientWidth,
    least = size * (1 - view.s);
  [view.x, view.y] = [Math.max(least, Math.min(0, x)), Math.max(least, Math.min(0, y))];
  for (const [name, value] of [
    ["--s", view.s],
    ["--x", view.x + "px"],
    ["--y", view.y + "px"],
  ])
    $("stage").style.setProperty(name, value);
  $("stage").classList.toggle("zoomed", view.s > 1);
  for (const button of document.querySelectorAll(".zoom"))
    button.setAttribute("aria-pressed", String(+button.dataset.zoom === view.s));
}
function zoom(s, at) {
  const box = $("stage").getBoundingClientRect(),
    was = view.s;
  const [cx, cy] = at ? [at.clientX - box.left, at.clientY - box.top] : [box.width / 2, box.height / 2];
  view.s = Math.max(1, Math.min(32, s));
  pan(cx - ((cx - view.x) * view.s) / was, cy - ((cy - view.y) * view.s) / was);
}
function swap() {
  [view.a, view.b] = [view.b, view.a];
  refreshViewer();
}
function toggleErrors() {
  view.errors = !view.errors;
  refreshViewer();
}
function turn(by) {
  const at = view.film.indexOf(view.image);
  view.image = view.film[(at + by + view.film.length) % view.film.length];
  refreshViewer();
}

function refreshViewer() {
  const images = block().images;
  if (!images || !$("stage")) return;
  const has = (model, i) => model === INPUT || images.models[model].have.includes(i);
  const judged = view.b !== INPUT ? view.b : view.a;
  const better = images.metrics.find((m) => m.key === view.metric)?.better;
  const sign = (better === "higher") === view.worst ? 1 : -1;
  view.film = images.ids.map((_, i) => i).filter((i) => has(view.a, i) && has(view.b, i));
  const value = (i) => score(judged, i) ?? Infinity;
  view.film.sort((i, j) => (value(i) === value(j) ? i - j : sign * (value(i) - value(j))));
  if (!view.film.includes(view.image)) view.image = view.film[0] ?? 0;
  $("side-a").value = view.a;
  $("side-b").value = view.b;
  $("errors").setAttribute("aria-pressed", String(view.errors));
  for (const side of ["a", "b"]) {
    const model = view[side],
      errors = view.errors && model !== INPUT;
    const pictures = (errors ? [INPUT, model] : [model]).map((m) =>
      el("img", { src: source(m, view.image), alt: `${title(m)}, ${images.ids[view.image]}`, draggable: "false" }),
    );
    fill($("view-" + side), ...pictures).parentElement.classList.toggle("errors", errors);
    $("tag-" + side).textContent =
      title(model) +
      (errors ? " error × 4" : "") +
      (model === INPUT || !view.metric ? "" : ` · ${view.metric} ${shown(score(model, view.image))}`);
  }
  const place = view.film.indexOf(view.image) + 1;
  $("which").textContent =
    `${images.ids[view.image]} · image ${place} of ${view.film.length}, ` +
    `${view.worst ? "worst" : "best"} ${view.metric} of ${title(judged)} first`;
  thumbnails($("film"), view.film, (i) => [
    judged === INPUT ? INPUT : judged,
    i,
    images.ids[i],
    i === view.image,
    () => (view.image = i),
  ]);
  const models = [INPUT, ...Object.keys(images.models).filter((m) => has(m, view.image))];
  thumbnails($("strip"), models, (m) => [m, view.image, title(m), m === view.b, () => (view.b = m)]);
  pan(view.x, view.y);
}

function thumbnails(box, items, facts) {
  const left = box.scrollLeft,
    top = box.scrollTop;
  box.near?.disconnect();
  box.near = new IntersectionObserver(
    (seen) => {
      // loading="lazy" fetches thousands of pixels ahead
      for (const { target, isIntersecting } of seen)
        if (isIntersecting) {
          target.src = target.dataset.src;
          box.near.unobserve(target);
        }
    },
    { root: box, rootMargin: "200px" },
  );
  const focused = [...box.children].indexOf(document.activeElement);
  fill(
    box,
    ...items.map((item) => {
      const [model, image, text, current, choose] = facts(item);
      return el(
        "button",
        {
          type: "button",
          title: text,
          "aria-current": String(current),
          onclick: () => {
            choose();
            refreshViewer();
          },
        },
        el("img", { "data-src": source(model, image), alt: "", decoding: "async" }),
        el("span", {}, text),
        el("span", {}, model === INPUT ? "" : shown(score(model, image))),
      );
    }),
  );
  [box.scrollLeft, box.scrollTop] = [left, top];
  for (const picture of box.querySelectorAll("img")) box.near.observe(picture);
  if (focused >= 0) box.children[Math.min(focused, box.children.length - 1)]?.focus({ preventScroll: true });
}

// ---- papers and speed: plain tables, sorted by clicking
function plainTable(table) {
  const label = (c) => c.key + arrows[c.better] + (c.unit ? ` (${c.unit})` : "");
  const heads = [table.names, ...table.columns.map(label)];
  const rows = table.rows.map((row) => [row.name, ...row.cells.map((cell) => cell[0])]);
  const body = el("tbody"),
    number = (text) => (/^[+-]?[\d.,]+(e-?\d+)?/.test(text) ? parseFloat(text.replaceAll(",", "")) : NaN);
  const put = (list) =>
    fill(
      body,
      ...list.map((row) =>
        el(
          "tr",
          {},
          ...row.map((text) =>
            el(
              "td",
              {
                class: Number.isNaN(number(text)) && text !== "–" ? "text" : "",
                title: text.length > 40 ? text : null,
              },
              text,
            ),
          ),
        ),
      ),
    );
  let last = null,
    down = false;
  const sort = (index, cell) => {
    down = last === index && !down;
    last = index;
    for (const other of cell.parentElement.children) other.setAttribute("aria-sort", "none");
    cell.setAttribute("aria-sort", down ? "descending" : "ascending");
    put(
      [...rows].sort((a, b) => {
        if ((a[index] === "–") !== (b[index] === "–")) return a[index] === "–" ? 1 : -1;
        const [x, y] = [number(a[index]), number(b[index])];
        return (Number.isNaN(x) || Number.isNaN(y) ? a[index].localeCompare(b[index]) : x - y) * (down ? -1 : 1);
      }),
    );
  };
  put(rows);
  const textual = (i) => Number.isNaN(number(rows.find((row) => row[i] !== "–")?.[i] ?? "0"));
  const head = heads.map((text, i) =>
    el(
      "th",
      { scope: "col", "aria-sort": "none", class: textual(i) ? "text" : "" },
      el("button", { type: "button", onclick: (e) => sort(i, e.target.parentElement) }, text),
    ),
  );
  return el(
    "div",
    { class: "scroll tall", tabindex: 0, role: "region", "aria-label": "table" },
    el("table", {}, el("thead", {}, el("tr", {}, ...head)), body),
  );
}

function drawMore() {
  const notes = (table) => el("div", { class: "notes" }, ...table.notes.map((note) => el("p", {}, note)));
  fill($("more"), ...data.more.flatMap((table) => [el("h3", {}, table.title), plainTable(table), notes(table)]),
    ...data.figures.map((src) => el("img", { src, alt: src.replace(/^plots\/|-\d+\.svg$/g, "") })));
}

// ---- start
function openBlock(index) {
  Object.assign(state, { block: index, sort: null });
  const columns = numeric(),
    keys = columns.map((c) => c.key);
  const options = () => columns.map((c) => el("option", { value: c.key }, c.key));
  const first = (wanted, other) =>
    wanted.find((k) => keys.includes(k) && k !== other) ?? keys.find((k) => k !== other) ?? null;
  state.x = first([state.x, "decode", "params", "bpp"], null);
  const common = columns
    .filter((c) => 2 * block().rows.filter((r) => typeof r.cells[c.i][4] === "number").length > block().rows.length)
    .map((c) => c.key);
  state.y = first([state.y, ...["rfid", "lpips-alex", "psnr"].filter((k) => common.includes(k))], state.x);
  fill($("plot-x"), ...options()).value = state.x;
  fill($("plot-y"), ...options()).value = state.y;
  drawTable();
  drawScatter();
  fill($("viewer"));
  new IntersectionObserver(
    (seen, watch) => {
      // images only once one scrolls towards them
      if (!seen.some((one) => one.isIntersecting)) return;
      watch.disconnect();
      if (state.block === index) openViewer();
    },
    { rootMargin: "300px" },
  ).observe($("compare"));
}

function start() {
  const theme = $("theme");
  theme.addEventListener("click", () => {
    const dark =
      document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
    document.documentElement.dataset.theme = dark === "dark" ? "light" : "dark";
  });
  drawMore();
  if (!data.blocks.length) return fill($("leaderboard"), el("p", {}, "No results."));
  fill($("block"), ...data.blocks.map((b, i) => el("option", { value: i }, b.title)));
  $("block").addEventListener("change", (e) => openBlock(+e.target.value));
  $("filter").addEventListener("input", (e) => {
    state.filter = e.target.value;
    drawTable();
  });
  $("only").addEventListener("change", (e) => {
    state.only = e.target.checked;
    drawTable();
  });
  $("clear").addEventListener("click", () => {
    state.picked.clear();
    drawTable();
    drawScatter();
  });
  for (const axis of ["x", "y"])
    $("plot-" + axis).addEventListener("change", (e) => {
      state[axis] = e.target.value;
      drawScatter();
    });
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== width) {
      width = innerWidth;
      drawScatter();
    }
  });
  const most = data.blocks.reduce((best, b, i) => (b.rows.length > data.blocks[best].rows.length ? i : best), 0);
  $("block").value = most;
  openBlock(most);
}
start();

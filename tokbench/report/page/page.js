"use strict";
// Everything from files is set as text or attribute through `el`; nothing is ever parsed as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const arrows = { higher: " ↑", lower: " ↓", neither: "" };
const state = { block: 0, sort: null, down: false, filter: "", only: false, picked: new Set(), hidden: new Set() };
Object.assign(state, { x: null, y: null });

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
const chosenColumns = () => block().columns.map((c, i) => ({ ...c, i })).filter((c) => !state.hidden.has(c.key));

// ---- tooltip: describe(node, [[name, text], ...], picture) shows on hover and on focus
function describe(node, facts, picture) {
  const show = (event) => {
    fill($("tip"), ...facts.flatMap(([name, text]) => [el("b", {}, name ? name + ": " : ""), text + "\n"]));
    const src = picture?.(); // a function: which image is shown changes
    if (src) $("tip").prepend(el("img", { src, alt: "" }));
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
  const cells = chosenColumns().map(({ i }) => {
    const [text, error, rank, dagger, , note] = row.cells[i];
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
  const columns = chosenColumns(),
    rows = visibleRows(),
    body = el("tbody");
  let group = "";
  for (const row of rows) {
    if (state.sort === null && row.group && row.group !== group)
      body.append(el("tr", { class: "group" }, el("td", { colspan: columns.length + 1 }, (group = row.group))));
    body.append(tableRow(row));
  }
  if (!rows.length) body.append(el("tr", {}, el("td", { colspan: columns.length + 1 }, "no row matches")));
  const heads = columns.map((c) => heading(c.i, c.key + arrows[c.better], c.unit, c.description));
  fill($("table"), el("thead", {}, el("tr", {}, heading(-1, "tokenizer", "", ""), ...heads)), body);
  fill($("notes"), ...block().notes.map((note) => el("p", {}, note)));
  if (focused !== undefined) $("table").querySelector(`[data-sort="${focused}"]`)?.focus();
  keep();
}

function drawColumns() {
  const one = (c) => {
    const box = el("input", {
      type: "checkbox",
      onchange: () => {
        box.checked ? state.hidden.delete(c.key) : state.hidden.add(c.key);
        drawTable();
      },
    });
    box.checked = !state.hidden.has(c.key);
    return el("label", { class: "check" }, box, c.key);
  };
  fill($("columns"), ...block().columns.map(one));
}

// The rows and columns that are shown; numbers in full, the standard error of a mean in a column of its own.
function download() {
  const quoted = (v) => (/[",\n]/.test(String(v ?? "")) ? `"${String(v).replaceAll('"', '""')}"` : String(v ?? ""));
  const rows = visibleRows(),
    columns = chosenColumns(),
    errors = (c) => rows.some((r) => r.cells[c.i][1]);
  const lines = [
    ["tokenizer", ...columns.flatMap((c) => (errors(c) ? [c.key, c.key + ".stderr"] : [c.key]))],
    ...rows.map((r) => [
      r.name,
      ...columns.flatMap((c) => (errors(c) ? [r.cells[c.i][4], r.cells[c.i][1].replace("±", "")] : [r.cells[c.i][4]])),
    ]),
  ];
  const file = new Blob([lines.map((line) => line.map(quoted).join(",") + "\n").join("")], { type: "text/csv" });
  const link = el("a", { href: URL.createObjectURL(file), download: "tokbench.csv" });
  link.click();
  URL.revokeObjectURL(link.href);
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
  keep();
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
        "aria-label": `${short}: ${p.x} ${p.y}`,
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
    ], () => source(name, view.image ?? pictured()[0]));
  });
}

// ---- what is known image by image
const INPUT = "(input)"; // no row can be called so
const view = { sides: [], mode: "wipe", image: null, metric: "", worst: true, errors: false, film: [] };
Object.assign(view, { s: 1, x: 0, y: 0, cuts: [50, 75], phase: 0 }); // x, y in widths and heights of a panel
const title = (model) => (model === INPUT ? "input" : model);
const source = (model, image) => block().images?.pictures[model === INPUT ? "" : model]?.[image];
const score = (model, image) => block().images.rows[model]?.[view.metric]?.[image] ?? null;
const shown = (value) => (value === null ? "" : Number(value.toPrecision(4)).toString());
const pictured = () => Object.keys(block().images?.pictures[""] ?? {}).map(Number);
const models = () => Object.keys(block().images.pictures).filter((m) => m !== "");
const sides = () => view.sides.filter((m) => m !== "");

function choose(id, value, options, change) {
  const select = el(
    "select",
    { id, onchange: (e) => change(e.target.value) },
    ...options.map(([key, text]) => el("option", { value: key }, text)),
  );
  select.value = value;
  return select;
}
const button = (id, text, onclick, more = {}) => el("button", { type: "button", id, onclick, ...more }, text);

function openViewer() {
  const images = block().images;
  drawSpread();
  if (!pictured().length)
    return fill(
      $("viewer"),
      el("p", { class: "notes" }, "No images were saved for these results; tokbench run --save-images N keeps them."),
    );
  const options = [[INPUT, "input"], ...models().map((m) => [m, m])];
  const side = (i, name) =>
    el(
      "label",
      {},
      name + " ",
      choose("side-" + "abc"[i], view.sides[i], i < 2 ? options : [["", "–"], ...options], (m) => {
        view.sides[i] = m;
        refreshViewer();
      }),
    );
  const modes = ["wipe", "beside", "flicker"].map((mode) =>
    button("mode-" + mode, { wipe: "wipe", beside: "side by side", flicker: "flicker" }[mode], () => setMode(mode)),
  );
  fill(
    $("viewer"),
    el("div", { class: "controls" }, side(0, "First"), side(1, "Second"), side(2, "Third"), button("swap", "⇄ swap", swap)),
    el(
      "div",
      { class: "controls" },
      ...modes,
      button("errors", "error × 4", toggleErrors),
      ...[1, 2, 4, 8].map((s) => button(null, `${s}×`, () => zoom(s), { class: "zoom", "data-zoom": s })),
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
          "Keys on the image: ← → divider, or move when zoomed · + − zoom · n p image · e error · s swap · " +
            "m mode · f flicker · 1 2 3 show one, as a tap does. Double click zooms, drag moves.",
        ),
        images.left_out ? el("p", { class: "notes" }, `${images.left_out} saved images had no room on this page.`) : null,
      ),
      el("div", { class: "film", id: "film" }),
    ),
    el("div", { class: "strip", id: "strip" }),
  );
  refreshViewer();
}

function stage() {
  const handle = (i) =>
    el("div", {
      class: "handle",
      id: "handle" + (i || ""),
      "data-i": i,
      role: "slider",
      tabindex: 0,
      "aria-label": ["divider of the first and the second image", "divider of the second and the third image"][i],
      "aria-valuemin": 0,
      "aria-valuemax": 100,
    });
  const node = el(
    "div",
    { class: "stage", id: "stage", tabindex: 0, role: "group", "aria-label": "comparison of images" },
    ...[0, 1, 2].map((i) => el("div", { class: "layer", id: "layer-" + i }, el("div", { class: "view" }))),
    handle(0),
    handle(1),
    el("div", { class: "tags" }, ...[0, 1, 2].map((i) => el("span", { class: "tag", id: "tag-" + i }))),
  );
  let drag = null;
  node.addEventListener("pointerdown", (e) => {
    const held = e.target.dataset.i;
    const cut = held !== undefined ? +held : view.mode === "wipe" && view.s === 1 ? nearest(e) : null;
    drag = { cut, x: e.clientX, y: e.clientY, from: [view.x, view.y] };
    if (view.mode === "flicker" && view.s === 1) hold((view.phase + 1) % sides().length);
    if (held !== undefined || view.s > 1) (held !== undefined ? e.target : node).setPointerCapture(e.pointerId);
  });
  node.addEventListener("pointermove", (e) => {
    if (!drag) return;
    const panel = node.querySelector(".layer:not([hidden])").getBoundingClientRect();
    if (drag.cut !== null) setCut(drag.cut, share(e));
    else pan(drag.from[0] + (e.clientX - drag.x) / panel.width, drag.from[1] + (e.clientY - drag.y) / panel.height);
  });
  for (const name of ["pointerup", "pointercancel", "pointerleave"])
    node.addEventListener(name, (e) => {
      if (name !== "pointerleave" || !e.target.hasPointerCapture(e.pointerId)) drag = null;
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
function share(e) {
  const box = $("stage").getBoundingClientRect();
  return (100 * (e.clientX - box.left)) / box.width;
}
const nearest = (e) =>
  sides().length > 2 && Math.abs(share(e) - view.cuts[1]) < Math.abs(share(e) - view.cuts[0]) ? 1 : 0;

function stageKey(e) {
  const held = e.target.dataset.i;
  const cut = held !== undefined ? +held : view.mode === "wipe" && view.s === 1 ? 0 : null;
  const step = e.shiftKey ? 10 : 2;
  const move = (dx, dy) => () =>
    cut !== null && dx ? setCut(cut, view.cuts[cut] - dx * step) : pan(view.x + 0.1 * dx, view.y + 0.1 * dy);
  const modes = ["wipe", "beside", "flicker"];
  const actions = {
    ArrowLeft: move(1, 0),
    ArrowRight: move(-1, 0),
    ArrowUp: move(0, 1),
    ArrowDown: move(0, -1),
    Home: () => setCut(cut ?? 0, 0),
    End: () => setCut(cut ?? 0, 100),
    "+": () => zoom(view.s * 2),
    "=": () => zoom(view.s * 2),
    "-": () => zoom(view.s / 2),
    n: () => turn(1),
    p: () => turn(-1),
    e: toggleErrors,
    s: swap,
    m: () => setMode(modes[(modes.indexOf(view.mode) + 1) % 3]),
    f: () => setMode(view.mode === "flicker" ? "wipe" : "flicker"),
  };
  for (const i of sides().keys()) actions[i + 1] = () => (setMode("flicker"), hold(i));
  if (!actions[e.key] || e.ctrlKey || e.metaKey || e.altKey) return;
  e.preventDefault();
  actions[e.key]();
}

function setCut(i, percent) {
  view.cuts[i] = Math.max(0, Math.min(100, percent));
  view.cuts[1 - i] = i ? Math.min(view.cuts[0], view.cuts[1]) : Math.max(view.cuts[0], view.cuts[1]);
  layOut();
}
function setMode(mode) {
  Object.assign(view, { mode, phase: 0, held: matchMedia("(prefers-reduced-motion: reduce)").matches });
  layOut();
}
function hold(i) {
  Object.assign(view, { phase: i, held: true });
  layOut();
}
setInterval(() => {
  if (view.mode !== "flicker" || view.held || !$("stage") || document.hidden) return;
  view.phase = (view.phase + 1) % sides().length;
  layOut();
}, 700);

// Which part of the stage each image has, by the mode; and the zoom, which all of them share.
function layOut() {
  const count = sides().length,
    wipe = view.mode === "wipe",
    edges = [0, view.cuts[0], count > 2 ? view.cuts[1] : 100, 100];
  $("stage").className = `stage ${view.mode}${view.s > 1 ? " zoomed" : ""}`;
  for (const [name, value] of Object.entries({ n: view.mode === "beside" ? count : 1, s: view.s, x: 100 * view.x + "%", y: 100 * view.y + "%" }))
    $("stage").style.setProperty("--" + name, value);
  for (const i of [0, 1, 2]) {
    const hidden = i >= count || (view.mode === "flicker" && i !== view.phase % count);
    $("layer-" + i).hidden = $("tag-" + i).hidden = hidden;
    $("layer-" + i).style.clipPath = wipe ? `inset(0 ${100 - edges[i + 1]}% 0 ${edges[i]}%)` : "";
    if (i > 1) continue;
    const handle = $("handle" + (i || ""));
    handle.hidden = !wipe || i >= count - 1;
    handle.style.left = view.cuts[i] + "%";
    handle.setAttribute("aria-valuenow", Math.round(view.cuts[i]));
  }
  for (const mode of ["wipe", "beside", "flicker"]) $("mode-" + mode).setAttribute("aria-pressed", String(mode === view.mode));
  for (const one of document.querySelectorAll(".zoom")) one.setAttribute("aria-pressed", String(+one.dataset.zoom === view.s));
  keep();
}
function pan(x, y) {
  [view.x, view.y] = [x, y].map((v) => Math.max(1 - view.s, Math.min(0, v)));
  layOut();
}
function zoom(s, at) {
  const was = view.s;
  let centre = [0.5, 0.5];
  if (at) {
    const panels = [...document.querySelectorAll(".layer:not([hidden])")].map((node) => node.getBoundingClientRect());
    const box = panels.find((b) => at.clientX >= b.left && at.clientX <= b.right) ?? panels[0];
    centre = [(at.clientX - box.left) / box.width, (at.clientY - box.top) / box.height];
  }
  view.s = Math.max(1, Math.min(32, s));
  pan(centre[0] - ((centre[0] - view.x) * view.s) / was, centre[1] - ((centre[1] - view.y) * view.s) / was);
}
function swap() {
  [view.sides[0], view.sides[1]] = [view.sides[1], view.sides[0]];
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

const judged = () => (view.sides[1] !== INPUT ? view.sides[1] : view.sides[0]);
function refreshViewer() {
  const images = block().images;
  drawSpread();
  if (!$("stage")) return;
  const better = images.metrics.find((m) => m.key === view.metric)?.better;
  const sign = (better === "higher") === view.worst ? 1 : -1;
  view.film = pictured().filter((i) => sides().every((m) => source(m, i)));
  const value = (i) => score(judged(), i) ?? Infinity;
  view.film.sort((i, j) => (value(i) === value(j) ? i - j : sign * (value(i) - value(j))));
  if (!view.film.includes(view.image)) view.image = view.film[0] ?? null;
  for (const i of [0, 1, 2]) $("side-" + "abc"[i]).value = view.sides[i];
  $("errors").setAttribute("aria-pressed", String(view.errors));
  fill($("layer-2").firstChild);
  sides().forEach((model, i) => {
    const errors = view.errors && model !== INPUT;
    const pictures = view.image === null ? [] : errors ? [INPUT, model] : [model];
    const tags = pictures.map((m) =>
      el("img", { src: source(m, view.image), alt: `${title(m)}, ${images.ids[view.image]}`, draggable: "false" }),
    );
    if (tags[0]) tags[0].onload = () => $("stage").style.setProperty("--ratio", tags[0].naturalWidth / tags[0].naturalHeight);
    fill($("layer-" + i).firstChild, ...tags).parentElement.classList.toggle("errors", errors);
    $("tag-" + i).textContent =
      title(model) +
      (errors ? " error × 4" : "") +
      (model === INPUT || !view.metric || view.image === null ? "" : ` · ${view.metric} ${shown(score(model, view.image))}`);
  });
  $("which").textContent =
    view.image === null
      ? "No image was saved for all of these."
      : `${images.ids[view.image]} · image ${view.film.indexOf(view.image) + 1} of ${view.film.length} with pictures, ` +
        `${view.worst ? "worst" : "best"} ${view.metric} of ${title(judged())} first`;
  thumbnails($("film"), view.film, (i) => [judged(), i, images.ids[i], i === view.image, () => (view.image = i)]);
  const all = view.image === null ? [] : [INPUT, ...models()].filter((m) => source(m, view.image));
  thumbnails($("strip"), all, (m) => [m, view.image, title(m), m === view.sides[1], () => (view.sides[1] = m)]);
  layOut();
}

function thumbnails(box, items, facts) {
  const left = box.scrollLeft,
    top = box.scrollTop,
    focused = [...box.children].indexOf(document.activeElement);
  fill(
    box,
    ...items.map((item) => {
      const [model, image, text, current, pick] = facts(item);
      return el(
        "button",
        { type: "button", title: text, "aria-current": String(current), onclick: () => (pick(), refreshViewer()) },
        el("img", { src: source(model, image), alt: "", decoding: "async" }),
        el("span", {}, text),
        el("span", {}, (model === INPUT ? "" : shown(score(model, image))) || "\u00a0"),
      );
    }),
  );
  [box.scrollLeft, box.scrollTop] = [left, top];
  if (focused >= 0) box.children[Math.min(focused, box.children.length - 1)]?.focus({ preventScroll: true });
}

// ---- values by image: a line of dots a row, those with a picture to click; worst and best by name
function showImage(image) {
  view.image = image;
  refreshViewer();
}

function drawSpread() {
  const images = block().images;
  if (!images?.metrics.length) return fill($("spread"), el("p", { class: "notes" }, "No values by image beside these results."));
  const set = (key) => (v) => {
    view[key] = key === "worst" ? v === "worst" : v;
    refreshViewer();
  };
  const focused = document.activeElement?.id;
  const order = [["worst", "worst first"], ["best", "best first"]];
  fill(
    $("spread"),
    el(
      "div",
      { class: "controls" },
      el("label", {}, "Metric ", choose("sort-metric", view.metric, images.metrics.map((m) => [m.key, m.key]), set("metric"))),
      el("label", {}, "Images ", choose("sort-order", view.worst ? "worst" : "best", order, set("worst"))),
    ),
    dots(images),
    extremes(images),
  );
  if (focused?.startsWith("sort-")) $(focused).focus();
  keep();
}

function dots(images) {
  const wide = Math.max(300, Math.min(1200, $("spread").clientWidth || 860)),
    left = Math.min(150, wide / 3),
    rows = block().rows.filter((r) => images.rows[r.name]?.[view.metric]?.some((v) => v !== null)),
    high = 24 * rows.length + 36;
  const finite = (name) => images.rows[name][view.metric].filter((v) => v !== null);
  const x = scale(rows.flatMap((r) => finite(r.name)), left, wide - 20);
  const svg = el("svg", { viewBox: `0 0 ${wide} ${high}`, role: "group", "aria-label": `${view.metric} of each image` });
  for (const t of x.ticks)
    svg.append(
      el("line", { class: "axis", x1: x.at(t), x2: x.at(t), y1: 0, y2: high - 32 }),
      el("text", { class: "tick", x: x.at(t), y: high - 16, "text-anchor": "middle" }, String(t)),
    );
  const families = [...new Set(block().rows.map((r) => r.family))];
  rows.forEach((row, n) => {
    const y = 24 * n + 13,
      values = images.rows[row.name][view.metric],
      sorted = finite(row.name).sort((a, b) => a - b),
      middle = (sorted[(sorted.length - 1) >> 1] + sorted[sorted.length >> 1]) / 2,
      colour = `var(--c${families.indexOf(row.family) % 7})`,
      short = row.name.length > left / 7 ? row.name.slice(0, left / 7 - 1) + "…" : row.name,
      at = (i) => [x.at(values[i]), y + ((i * 7) % 9) - 4];
    const known = [...values.keys()].filter((i) => values[i] !== null);
    svg.append(
      el("text", { x: left - 10, y: y + 4, "text-anchor": "end" }, short),
      el("path", { class: "dots", stroke: colour, d: known.map((i) => `M${at(i).map((v) => v.toFixed(1))}h0`).join("") }),
      el("line", { class: "middle", x1: x.at(middle), x2: x.at(middle), y1: y - 9, y2: y + 9 }),
    );
    for (const i of known.filter((i) => source(row.name, i))) {
      const [cx, cy] = at(i);
      const circle = el("circle", { cx, cy, r: 5, fill: colour, class: i === view.image ? "current" : "", onclick: () => showImage(i) });
      svg.append(describe(circle, [["", row.name], [images.ids[i], shown(values[i])]], () => source(row.name, i)));
    }
  });
  return svg;
}

function extremes(images) {
  const row = images.extremes[judged()] ? judged() : Object.keys(images.extremes)[0];
  const named = ([sample, value]) => {
    const i = images.ids.indexOf(sample),
      text = `${sample} ${shown(value)}`;
    return source(row, i) ? button(null, text, () => showImage(i)) : el("span", {}, text);
  };
  const [worst, best] = images.extremes[row]?.[view.metric] ?? [[], []];
  const few = images.count > images.ids.length ? `, ${images.ids.length} drawn` : "";
  return el(
    "div",
    { class: "notes extremes" },
    el("p", {}, `Worst of ${images.count} by ${row}: `, ...worst.map(named)),
    el("p", {}, `Best: `, ...best.map(named)),
    el("p", {}, `A dot is an image${few}; the large ones have a picture. The line is the median.`),
  );
}

// ---- the link: what is not as at first stands behind #
let written = "",
  waiting = null,
  opening = false;
function keep() {
  if (opening) return;
  clearTimeout(waiting); // browsers refuse a hundred changes of the address at once
  waiting = setTimeout(() => {
    const link = new URLSearchParams({ set: block().title, x: state.x ?? "", y: state.y ?? "" });
    if (state.sort !== null) link.set("sort", `${state.sort < 0 ? "" : block().columns[state.sort].key} ${state.down ? "down" : "up"}`);
    if (state.filter) link.set("filter", state.filter);
    if (state.only) link.set("only", "1");
    for (const name of state.picked) link.append("pick", name);
    for (const key of state.hidden) link.append("hide", key);
    if (block().images) {
      for (const m of view.sides) link.append("side", m);
      for (const key of ["mode", "metric"]) link.set(key, view[key]);
      if (view.image !== null) link.set("image", block().images.ids[view.image]);
      link.set("view", [view.s, view.x, view.y, ...view.cuts].map((v) => +v.toFixed(4)).join(" "));
      if (!view.worst) link.set("best", "1");
      if (view.errors) link.set("errors", "1");
    }
    written = "#" + link;
    history.replaceState(null, "", written);
    $("link").href = written;
  }, 200);
}

function follow() {
  const link = new URLSearchParams(location.hash.slice(1));
  const set = data.blocks.findIndex((b) => b.title === link.get("set"));
  if (set < 0) return false;
  opening = true;
  const { columns } = data.blocks[set];
  state.picked = new Set(link.getAll("pick"));
  state.hidden = new Set(link.getAll("hide"));
  Object.assign(state, { x: link.get("x"), y: link.get("y"), filter: link.get("filter") ?? "", only: link.has("only") });
  const [key, way] = (link.get("sort") ?? "").split(" ");
  const sort = key ? columns.findIndex((c) => c.key === key) : way ? -1 : null;
  $("filter").value = state.filter;
  $("only").checked = state.only;
  openBlock(set, link);
  if (link.has("sort") && (sort >= 0 || !key)) Object.assign(state, { sort, down: way === "down" });
  drawTable();
  opening = false;
  return true;
}

// Of a link what still is there; else the input beside two rows with pictures, of one compression if possible.
function firstView(link) {
  const images = block().images;
  if (!images) return;
  const known = [INPUT, ...models()],
    asked = link?.getAll("side").filter((m, i) => known.includes(m) || (i === 2 && m === ""));
  const groups = Object.groupBy(block().rows.filter((r) => known.includes(r.name)), (r) => r.latent);
  const pair = (Object.values(groups).find((rows) => rows.length > 1) ?? Object.values(groups).flat()).map((r) => r.name);
  view.sides = asked?.length === 3 ? asked : [INPUT, pair[0] ?? INPUT, pair[1] ?? ""];
  const metrics = images.metrics.map((m) => m.key);
  view.metric = [link?.get("metric"), "lpips-alex", "psnr", ...metrics].find((m) => metrics.includes(m)) ?? "";
  view.mode = ["wipe", "beside", "flicker"].includes(link?.get("mode")) ? link.get("mode") : "wipe";
  const image = images.ids.indexOf(link?.get("image") ?? "");
  view.image = image >= 0 ? image : null;
  const numbers = (link?.get("view") ?? "").split(" ").map(Number);
  const [s, x, y, a, b] = numbers.length === 5 && numbers.every(Number.isFinite) ? numbers : [1, 0, 0, 50, 75];
  Object.assign(view, { s: Math.max(1, s), x, y, cuts: [a, b], worst: !link?.has("best"), errors: !!link?.has("errors"), phase: 0, held: false });
  if (!asked && known.length > 2) view.cuts = [33, 67];
}

// ---- papers and speed: plain tables, sorted by clicking
function plainTable(table) {
  const label = (c) => c.key + arrows[c.better] + (c.unit ? ` (${c.unit})` : "");
  const heads = [table.names, ...table.columns.map(label)];
  const rows = table.rows.map((row) => [row.name, ...row.cells.map(([text, error]) => [text, error].join(" ").trim())]);
  const groups = table.rows.map((row) => row.group);
  const body = el("tbody"),
    number = (text) => (/^[+-]?[\d.,]+(e-?\d+)?/.test(text) ? parseFloat(text.replaceAll(",", "")) : NaN);
  const cell = (text) =>
    el("td", { class: Number.isNaN(number(text)) && text !== "–" ? "text" : "", title: text.length > 40 ? text : null }, text);
  const put = (list, grouped) =>
    fill(
      body,
      ...list.flatMap((row, i) => {
        const first = grouped && groups[i] && groups[i] !== groups[i - 1];
        const head = first ? [el("tr", { class: "group" }, el("td", { colspan: heads.length }, groups[i]))] : [];
        return [...head, el("tr", {}, ...row.map(cell))];
      }),
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
      false,
    );
  };
  put(rows, true);
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
    { class: "scroll tall", tabindex: 0, role: "region", "aria-label": table.title },
    el("table", {}, el("thead", {}, el("tr", {}, ...head)), body),
  );
}

function drawMore() {
  const drawn = (table) => [
    el("h3", {}, table.title),
    plainTable(table),
    el("div", { class: "notes" }, ...table.notes.map((note) => el("p", {}, note))),
  ];
  fill($("more"), el("h2", {}, "More"), ...data.more.flatMap(drawn));
  $("more").append(
    ...data.figures.map((f) => el("figure", {}, el("img", { src: f.source, alt: f.name }), el("figcaption", {}, f.name))),
  );
  if (data.changes) $("changes").append(...drawn(data.changes));
  $("changes").hidden = $("to-changes").hidden = !data.changes;
}

// ---- start
function openBlock(index, link) {
  Object.assign(state, { block: index, sort: null });
  $("block").value = index;
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
  firstView(link);
  drawColumns();
  drawTable();
  drawScatter();
  openViewer();
}

function largest() {
  const places = [...data.blocks.keys()],
    shown = places.filter((i) => data.blocks[i].images?.pictures[""]);
  const rows = (i) => data.blocks[i].rows.length;
  return (shown.length ? shown : places).reduce((best, i) => (rows(i) > rows(best) ? i : best));
}

function start() {
  $("theme").addEventListener("click", () => {
    const dark =
      document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
    document.documentElement.dataset.theme = dark === "dark" ? "light" : "dark";
  });
  for (const anchor of document.querySelectorAll("nav a")) // what stands behind # is the state
    anchor.addEventListener("click", (e) => {
      e.preventDefault();
      document.querySelector(anchor.getAttribute("href")).scrollIntoView();
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
  $("download").addEventListener("click", download);
  for (const axis of ["x", "y"])
    $("plot-" + axis).addEventListener("change", (e) => {
      state[axis] = e.target.value;
      drawScatter();
    });
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    drawScatter();
    drawSpread();
  });
  addEventListener("hashchange", () => location.hash !== written && follow());
  if (!follow()) openBlock(largest());
}
start();

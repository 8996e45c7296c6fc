// The page: live tiles, their scores and events. Talks to /v1 with relative addresses, so any path prefix works.
// Names, labels and messages come from outside: they enter the page through textContent alone.

import { Picture, trackColour, trackNumber } from "./picture.js";

const STRIP_MS = 60_000; // length of the score strip
const LIVE_PICTURES = 4; // MJPEG connections; browsers allow about six per host, the rest is for requests
const POLL_MS = 1_000; // how often the other visible tiles fetch a picture
const SAMPLES_KEPT = 2_000; // per tile, even on a page that is hidden
const EVENTS_SHOWN = 200;
const RENDER_MS = 200;
const LABEL_COLOURS = 12; // --label-0 ... in the style sheet
const END_LOST_MS = 10_000; // an action whose label was not on top for so long is over, though its end was not seen
const SILENT_MS = 6_000; // no news of a running stream for so long is worth a word

const el = (id) => document.getElementById(id);
const sentence = (text) => (/^[a-z]+:/.test(text) ? text : text.charAt(0).toUpperCase() + text.slice(1));
const percent = (score) => `${Math.round(score * 100)} %`;
const number = new Intl.NumberFormat("en");

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function setHidden(node, hidden) {
  if (node.hidden !== hidden) node.hidden = hidden;
}

// ---------------------------------------------------------------- requests

/** What the service said was wrong (problem+json), or that it could not be reached. */
// one line about a model at work on a stream: how often it has a result, and what one takes
function describeModel(model) {
  const what = model.objects_of ? `each object of ${model.objects_of}` : model.region ? `region ${model.region}` : "";
  const often = model.mode === "window"
    ? `sees ${number.format(model.window_s)} s, a result every ${number.format(model.stride_s)} s`
    : "a result for every frame";
  const costMs = model.result_cost_ms;
  const cost = costMs === null ? "" : `, ${costMs.toFixed(costMs < 10 ? 1 : 0)} ms each`;
  const skipped = model.skipped > 0 ? `, ${number.format(model.skipped)} left out` : "";
  const without = model.without_slot > 0 ? `, ${number.format(model.without_slot)} objects without a free slot` : "";
  return `${model.name}: ${what ? `${what}, ` : ""}${often}${cost}${skipped}${without}`;
}

class Problem extends Error {
  constructor(message, reason, status) {
    super(message);
    this.reason = reason;
    this.status = status;
  }
}

async function request(path, { method = "GET", body, signal } = {}) {
  let response;
  try {
    response = await fetch(path, {
      method,
      signal,
      cache: "no-store",
      headers: body === undefined ? {} : { "Content-Type": "application/json" },
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The service cannot be reached.", "unreachable", 0);
  }
  const text = await response.text();
  let data = null;
  try {
    data = text ? JSON.parse(text) : null;
  } catch {
    // not JSON: a proxy's error page, or nothing we know
  }
  if (response.ok) return data;
  if (response.status === 401 && path !== "v1/login") askForToken();
  const detail = typeof data?.detail === "string" ? data.detail : data?.title;
  throw new Problem(detail || `The service answered ${response.status}.`, data?.reason ?? "", response.status);
}

// ---------------------------------------------------------------- login

/** Ask for a token; what waits for it begins again once it is right. */
function askForToken() {
  if (!el("login").open) el("login").showModal();
}

/** Who the service takes us for: a viewer is not shown what only an operator may do. */
async function showWho() {
  try {
    const who = await request("v1/login");
    document.body.dataset.role = who.role;
    setHidden(el("log-out"), !who.required);
    el("log-out").title = `${who.name}, ${who.role}`;
  } catch (error) {
    if (error.status === 401) askForToken();
  }
}

el("login").addEventListener("cancel", (event) => event.preventDefault()); // nothing works without
el("login-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  el("login-submit").disabled = true;
  try {
    await request("v1/login", { method: "POST", body: { token: el("login-token").value.trim() } });
    el("login").close();
    setHidden(el("login-error"), true);
    loadModels();
    connection.start();
  } catch (error) {
    setText(el("login-error-text"), sentence(error.message));
    setHidden(el("login-error"), false);
  } finally {
    el("login-token").value = "";
    el("login-submit").disabled = false;
  }
});
el("log-out").addEventListener("click", async () => {
  await request("v1/login", { method: "DELETE" }).catch(() => {});
  location.reload();
});

const streamPath = (id, rest = "") => `v1/streams/${encodeURIComponent(id)}${rest}`;

// ---------------------------------------------------------------- labels and their colours

const labelIndex = new Map(); // label → index of its colour; -1 for background labels
let colours = new Map(); // index → resolved colour, for canvases

function indexOfLabel(label) {
  if (!labelIndex.has(label)) {
    const used = [...labelIndex.values()].filter((index) => index >= 0).length;
    labelIndex.set(label, used % LABEL_COLOURS);
    filters.addLabel(label);
  }
  return labelIndex.get(label);
}

function cssColour(label) {
  const index = label ? indexOfLabel(label) : -1;
  return index < 0 ? "var(--label-none)" : `var(--label-${index})`;
}

function canvasColour(label) {
  const index = indexOfLabel(label);
  if (!colours.has(index)) {
    const name = index < 0 ? "--label-none" : `--label-${index}`;
    colours.set(index, getComputedStyle(document.documentElement).getPropertyValue(name).trim());
  }
  return colours.get(index);
}

let hatch = null; // fill of the times without a camera

function hatchPattern(context) {
  if (hatch) return hatch;
  const tile = document.createElement("canvas");
  tile.width = tile.height = 8;
  const pen = tile.getContext("2d");
  pen.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--gap").trim();
  pen.lineWidth = 2;
  for (const x of [-8, 0, 8]) {
    pen.moveTo(x, 8);
    pen.lineTo(x + 8, 0);
  }
  pen.stroke();
  hatch = context.createPattern(tile, "repeat");
  return hatch;
}

// ---------------------------------------------------------------- clock

// The service's clock against ours: the smallest difference seen is the one with the least delay in it.
let clockOffset = Infinity;

function learnClock(serverSeconds) {
  if (serverSeconds > 1e9) clockOffset = Math.min(clockOffset, Date.now() / 1000 - serverSeconds);
}

function serverNow() {
  return Date.now() / 1000 - (Number.isFinite(clockOffset) ? clockOffset : 0);
}

// ---------------------------------------------------------------- one tile

const AWAY = new Set(["RESTARTING", "PAUSED", "FAILED", "STOPPED", "STOPPING", "ENDED"]);

const VERBS = ["start", "pause", "resume", "stop", "remove"]; // a tile's buttons

/** True for scores of the whole picture or a region, not of one object. */
const aboutPicture = (record) => record.label !== undefined && record.track_id === undefined;

class Tile {
  constructor(spec) {
    this.id = spec.id;
    this.samples = []; // {at, label, score, warm}, oldest first; at is performance.now() of their arrival
    this.away = []; // {from, to} in performance.now(); to null: still away
    this.status = null;
    this.score = null;
    this.labelAt = new Map(); // label → when it was last on top; track → when it was last seen
    this.newsAt = performance.now();
    this.visible = false;
    this.mode = "none"; // where the picture comes from: none | mjpeg | poll
    this.polling = false;
    this.dirty = true;

    this.root = el("tile-template").content.firstElementChild.cloneNode(true);
    this.root.dataset.stream = this.id;
    const find = (selector) => this.root.querySelector(selector);
    this.parts = {
      notice: find(".notice"), objects: find(".objects"), noticeTitle: find(".notice-title"),
      noticeText: find(".notice-text"), noticeHint: find(".notice-hint"), badge: find(".badge"),
      badgeText: find(".badge-text"), feed: find(".feed"), name: find(".name"), idText: find(".id"),
      start: find(".start"), pause: find(".pause"), resume: find(".resume"), stop: find(".stop"), remove: find(".remove"), swatch: find(".swatch"),
      label: find(".label"), percent: find(".percent"), warmup: find(".warmup"), bar: find(".bar"),
      barFill: find(".bar span"), canvas: find("canvas"), read: find(".strip-read"),
      runners: [...this.root.querySelectorAll(".runners li")],
    };
    this.picture = new Picture(find(".live"), find(".found"));
    this.objectRows = new Map(); // track → its row in the list
    this.figures = Object.fromEntries(
      [...this.root.querySelectorAll("[data-figure]")].map((node) => [node.dataset.figure, node]),
    );
    this.setSpec(spec);

    const { canvas } = this.parts;
    for (const verb of VERBS) this.parts[verb].addEventListener("click", () => act(this, verb));
    canvas.addEventListener("pointermove", (event) => this.readStrip(event));
    canvas.addEventListener("pointerleave", () => setText(this.parts.read, ""));
  }

  get name() {
    return this.spec.name || this.id;
  }

  get state() {
    if (this.status) return this.status.state;
    return this.spec.enabled === false ? "STOPPED" : "STARTING";
  }

  setSpec(spec) {
    this.spec = spec;
    setText(this.parts.name, this.name);
    setText(this.parts.idText, spec.name && spec.name !== this.id ? this.id : "");
    this.root.setAttribute("aria-label", `Stream ${this.name}`);
    this.picture.image.alt = `Live picture of ${this.name}`;
    this.picture.setPlaces(spec.models ?? []);
    for (const verb of VERBS) {
      const text = `${verb[0].toUpperCase()}${verb.slice(1)} ${this.name}`;
      this.parts[verb].setAttribute("aria-label", text);
      this.parts[verb].title = text;
    }
    this.dirty = true;
  }

  setStatus(status) {
    if (!status) return;
    const before = this.state;
    const first = this.status === null;
    this.status = status;
    this.newsAt = performance.now();
    learnClock(status.updated_at ?? 0);
    if (first || before !== status.state) {
      const age = first ? Math.max(0, serverNow() - status.since) * 1000 : 0;
      this.noteState(performance.now() - age);
      allocatePictures();
    }
    this.dirty = true;
  }

  noteState(at) {
    const last = this.away.at(-1);
    const open = last && last.to === null;
    if (AWAY.has(this.state)) {
      if (!open) this.away.push({ from: at, to: null });
    } else if (open) {
      last.to = at;
    }
  }

  addScore(record) {
    const now = performance.now();
    this.newsAt = now;
    for (const object of record.objects ?? []) this.labelAt.set(object.track_id, now);
    if (!aboutPicture(record)) return; // objects are drawn from the picture itself
    this.labelAt.set(record.label, now);
    this.score = { label: record.label, score: record.score, warmup: record.warmup, topK: record.top_k ?? [], at: now };
    this.samples.push({ at: now, label: record.label, score: record.score, warm: !record.warmup });
    if (this.samples.length > SAMPLES_KEPT) this.forget(now); // nobody draws while the page is hidden
    this.dirty = true;
  }

  /** Fill the strip with what the service still knows, thinned to what the live feed would have sent. */
  async loadScores() {
    let data;
    try {
      data = await request(streamPath(this.id, "/scores?limit=600"));
    } catch {
      return; // the strip fills by itself
    }
    const now = performance.now();
    let last = -Infinity;
    for (const { label, score, warmup, published_s: published } of data.scores.filter(aboutPicture)) {
      const at = now - (serverNow() - published) * 1000;
      if (at - last < 190) continue;
      last = at;
      this.samples.push({ at, label, score, warm: !warmup });
    }
    this.samples.sort((a, b) => a.at - b.at);
  }

  // -------- picture

  setMode(mode) {
    if (mode === this.mode) return;
    this.mode = mode;
    if (mode === "mjpeg") this.openPicture();
    else this.picture.clear(); // ends an open MJPEG at once; the next poll brings a picture
  }

  openPicture() {
    this.picture.open(() => streamPath(this.id, `/mjpeg?n=${Tile.pictures++}`));
  }

  async pollPicture() {
    if (this.mode !== "poll" || this.polling || !this.status?.processed || this.state !== "RUNNING") return;
    this.polling = true;
    await this.picture.poll(streamPath(this.id, `/latest.jpg?n=${Tile.pictures++}`));
    this.polling = false;
  }

  reopenPicture() {
    if (this.mode === "mjpeg") this.openPicture();
  }

  // -------- drawing

  render() {
    const now = performance.now();
    const seconds = serverNow();
    const status = this.status ?? {};
    const state = this.state;
    const { parts, figures } = this;
    const { image } = this.picture;
    const pictured = this.picture.shown && this.mode !== "none";
    const [wide, high] = status.source_size ?? [image.naturalWidth, image.naturalHeight];
    this.root.classList.toggle("square", !wide || wide < 1.25 * high);
    const retry = (state === "RESTARTING" || state === "FAILED") && status.retry_at
      ? Math.max(0, Math.ceil(status.retry_at - seconds)) : null;

    parts.badge.dataset.state = state;
    const trying = retry === null ? "" : retry > 0 ? ` · next try in ${retry} s` : " · trying now";
    setText(parts.badgeText, state.toLowerCase() + trying);
    this.root.classList.toggle("away", state !== "RUNNING");
    setHidden(image, !pictured);
    setHidden(this.picture.drawing, !pictured || state !== "RUNNING");
    const silent = state === "RUNNING" && connection.open && now - this.newsAt > SILENT_MS;
    setHidden(parts.feed, !silent && !(state === "RUNNING" && this.mode === "poll"));
    setText(parts.feed, silent ? `no news for ${Math.round((now - this.newsAt) / 1000)} s` : "1 picture a second");

    this.renderNotice(state, status, pictured);
    const over = state === "ENDED" || (state === "FAILED" && !this.status?.retry_at);
    setHidden(parts.start, this.spec.enabled && !over); // starting what is over begins it anew
    setHidden(parts.stop, !this.spec.enabled);
    setHidden(parts.pause, !this.spec.enabled || over || this.spec.paused);
    setHidden(parts.resume, !this.spec.paused);

    const fresh = this.score && now - this.score.at < 3_000 && state === "RUNNING";
    const score = fresh ? this.score : null;
    this.root.classList.toggle("quiet-scores", !fresh);
    setText(parts.label, score ? score.label : "–");
    setText(parts.percent, score ? percent(score.score) : "");
    const colour = cssColour(score?.label);
    parts.swatch.style.background = colour;
    parts.barFill.style.background = colour;
    parts.barFill.style.transform = `scaleX(${score ? score.score : 0})`;
    parts.bar.setAttribute("aria-valuenow", String(score ? Math.round(score.score * 100) : 0));
    parts.bar.setAttribute("aria-valuetext", score ? `${score.label} ${percent(score.score)}` : "no score");
    parts.runners.forEach((node, i) => {
      const next = score?.topK[i + 1];
      node.style.setProperty("--runner", cssColour(next?.label));
      setText(node.firstElementChild, next?.label ?? "");
      setText(node.lastElementChild, next ? percent(next.score) : "");
    });
    setHidden(parts.warmup, !score?.warmup);
    setText(parts.warmup, score?.warmup ? `warming up ${score.warmup}` : "");

    const running = state === "RUNNING";
    this.renderObjects(running);
    setText(figures.fps, running ? `${status.fps.toFixed(1)} fps` : "–");
    const models = status.models ?? [];
    // a stream with detectors alone has no label and no strip
    this.root.classList.toggle("objects-only", models.length > 0 && !models.some(
      (model) => model.task === "recognition" && !model.objects_of,
    ));
    const strides = models.map((model) => model.stride_s);
    const windowed = models.length > 0 && strides.every((stride) => stride); // else there is a result for every frame
    const rate = windowed ? `every ${number.format(Math.min(...strides))} s` : `${(status.processed_fps ?? 0).toFixed(1)} fps`;
    setText(figures.processed, running ? rate : "–");
    setText(figures["models-tip"], models.map(describeModel).join("\n"));
    const reasons = Object.entries(status.dropped ?? {}).filter(([, count]) => count > 0);
    const dropped = reasons.reduce((sum, [, count]) => sum + count, 0);
    setText(figures.dropped, this.status ? number.format(dropped) : "–");
    setText(figures["dropped-tip"], this.status ? [
      `${number.format(status.received)} arrived`,
      `${number.format(status.processed)} recognised`,
      ...reasons.map(([reason, count]) => `${number.format(count)} dropped: ${reason.replaceAll("_", " ")}`),
    ].join("\n") : "");
    const latency = status.latency_ms;
    setText(figures.latency, latency ? `${Math.round(latency.p50)} / ${Math.round(latency.p95)} ms` : "–");
    setText(figures["latency-tip"], latency
      ? ["Arrival of a frame to its result, last minute",
        ...["p50", "p95", "p99"].map((name) => `${name} ${latency[name].toFixed(1)} ms`)].join("\n")
      : "");
    setText(figures.size, status.source_size ? status.source_size.join(" × ") : "–");
    setText(figures.reconnects, this.status ? number.format(status.reconnects) : "–");
    const saved = status.checkpoint_age_s;
    setText(figures.saved, saved === null || saved === undefined ? "–" : `${saved.toFixed(1)} s ago`);
    setText(figures.worker, status.worker ?? "–");
    figures.worker.title = status.worker ?? "";
    this.dirty = false;
  }

  /** The list of objects in view: those of the picture that is shown, in the order of their numbers. */
  renderObjects(running) {
    const { objects: list } = this.parts;
    const looking = (this.status?.models ?? []).some((model) => model.task === "detection");
    setHidden(list, !looking);
    const seen = new Map((running ? this.picture.objects : []).map((object) => [object.track_id, object]));
    for (const [track, row] of this.objectRows) {
      if (seen.has(track)) continue;
      row.remove();
      this.objectRows.delete(track);
    }
    for (const [track, object] of seen) {
      let row = this.objectRows.get(track);
      if (!row) {
        row = el("object-template").content.firstElementChild.cloneNode(true);
        row.dataset.track = track;
        row.querySelector(".swatch").style.background = trackColour(track);
        setText(row.querySelector(".object-number"), trackNumber(track));
        this.objectRows.set(track, row);
        const order = Number(track.slice(track.lastIndexOf(":") + 1));
        const after = [...list.children].find((one) => Number(one.dataset.track.split(":").at(-1)) > order);
        list.insertBefore(row, after ?? null);
      }
      setText(row.querySelector(".object-label"), object.label);
      setText(row.querySelector(".object-score"), percent(object.score));
      setText(row.querySelector(".object-note"), [
        ...object.actions.map((action) => action.label),
        ...object.zones.map((zone) => `in ${zone}${object.loitering.includes(zone) ? ", for long" : ""}`),
      ].join(" · "));
    }
  }

  renderNotice(state, status, pictured) {
    const { parts } = this;
    let title = "";
    let busy = false;
    let text = state === "RUNNING" ? "" : sentence(status.status_message ?? "");
    let hint = "";
    if (state === "RUNNING") {
      if (!pictured) [title, busy] = ["Waiting for a picture", true];
    } else if (state === "STARTING") {
      [title, busy] = ["Starting", true];
    } else if (state === "RESTARTING" || state === "FAILED") {
      title = state === "FAILED" ? "Failed" : "No picture for now";
      const cut = text.lastIndexOf("; "); // "what happened; what would help"
      if (cut > 0) [text, hint] = [text.slice(0, cut), sentence(text.slice(cut + 2))];
    } else {
      title = { PAUSED: "Paused", STOPPED: "Stopped", STOPPING: "Stopping", ENDED: "The file has ended" }[state] ?? state;
    }
    parts.notice.dataset.show = title ? "yes" : "no";
    parts.notice.classList.toggle("busy", busy);
    setText(parts.noticeTitle, title);
    setText(parts.noticeText, text === title ? "" : text);
    setText(parts.noticeHint, hint);
  }

  drawStrip(now) {
    const { canvas } = this.parts;
    const ratio = window.devicePixelRatio || 1;
    const width = Math.round(canvas.clientWidth * ratio);
    const height = Math.round(canvas.clientHeight * ratio);
    if (!width) return;
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    const context = canvas.getContext("2d");
    const x = (at) => width * (1 - (now - at) / STRIP_MS);
    this.forget(now);
    context.clearRect(0, 0, width, height);
    for (const { from, to } of this.away) {
      context.fillStyle = hatchPattern(context);
      context.fillRect(Math.max(0, x(from)), 0, x(to ?? now) - Math.max(0, x(from)), height);
    }
    this.samples.forEach(({ at, label, score, warm }, i) => {
      const next = this.samples[i + 1]?.at ?? now;
      const left = Math.floor(x(at));
      const right = Math.floor(x(Math.min(next, at + 1_000))); // no overlap: half-transparent ones would add up
      context.globalAlpha = warm ? 1 : 0.45;
      context.fillStyle = canvasColour(label);
      if (right > left) context.fillRect(left, height * (1 - score), right - left, height * score);
    });
    context.globalAlpha = 1;
  }

  forget(now) {
    const old = now - STRIP_MS - 1_000;
    const keep = this.samples.findIndex(({ at }) => at >= old);
    if (keep > 0) this.samples.splice(0, keep);
    else if (keep < 0) this.samples.length = 0;
    this.away = this.away.filter(({ to }) => to === null || to >= old);
  }

  describeStrip() {
    const seen = new Map();
    for (const { label } of this.samples) seen.set(label, (seen.get(label) ?? 0) + 1);
    const most = [...seen].sort((a, b) => b[1] - a[1]).slice(0, 3).map(([label]) => label);
    const text = most.length ? `Scores of the last 60 seconds, mostly ${most.join(", ")}`
      : "No scores in the last 60 seconds";
    this.parts.canvas.setAttribute("aria-label", text);
  }

  readStrip(event) {
    const box = this.parts.canvas.getBoundingClientRect();
    const now = performance.now();
    const at = now - STRIP_MS * (1 - (event.clientX - box.left) / box.width);
    const away = this.away.some(({ from, to }) => from <= at && at <= (to ?? now));
    const sample = this.samples.findLast((one) => one.at <= at);
    const ago = `${Math.round((now - at) / 1000)} s ago`;
    const text = sample && at - sample.at < 1_000 ? `${sample.label} ${percent(sample.score)}`
      : away ? "camera away" : "no score";
    setText(this.parts.read, `${ago}: ${text}`);
  }

  mark() {
    this.root.scrollIntoView({ block: "nearest", behavior: "smooth" });
    this.root.classList.add("marked");
    clearTimeout(this.markTimer);
    this.markTimer = setTimeout(() => this.root.classList.remove("marked"), 2_500);
  }

  close() {
    this.setMode("none");
    this.root.remove();
  }
}
Tile.pictures = 1;

// ---------------------------------------------------------------- all tiles

const tiles = new Map();

const sight = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const tile = tiles.get(entry.target.dataset.stream);
    if (tile) tile.visible = entry.isIntersecting;
  }
  allocatePictures();
}, { rootMargin: "80px" });

/** Give the first visible tiles a live picture, the other visible ones a picture a second, hidden ones none. */
function allocatePictures() {
  let left = LIVE_PICTURES;
  const wanted = new Map();
  for (const tile of tiles.values()) {
    // a camera that is away for a while keeps the connection that it has: its last picture stays
    const lively = tile.state === "RUNNING"
      || (tile.mode !== "none" && ["STARTING", "RESTARTING"].includes(tile.state));
    if (document.hidden || !tile.visible || !lively) wanted.set(tile, "none");
    else wanted.set(tile, left-- > 0 ? "mjpeg" : "poll");
  }
  // free connections before taking new ones
  for (const [tile, mode] of wanted) if (mode !== "mjpeg") tile.setMode(mode);
  for (const [tile, mode] of wanted) if (mode === "mjpeg") tile.setMode(mode);
}

function showStreams(views) {
  const known = new Set();
  let last = null;
  for (const spec of views) {
    known.add(spec.id);
    let tile = tiles.get(spec.id);
    if (!tile) {
      tile = new Tile(spec);
      tiles.set(spec.id, tile);
      tile.loadScores();
      sight.observe(tile.root);
      filters.addStream(spec.id, tile.name);
    }
    tile.setSpec(spec);
    tile.setStatus(spec.status);
    const place = last ? last.nextElementSibling : el("tiles").firstElementChild;
    if (place !== tile.root) el("tiles").insertBefore(tile.root, place);
    last = tile.root;
  }
  for (const [id, tile] of tiles) {
    if (known.has(id)) continue;
    sight.unobserve(tile.root);
    tile.close();
    tiles.delete(id);
    filters.removeStream(id);
  }
  setHidden(el("empty"), tiles.size > 0);
  allocatePictures();
}

let refreshing = null;

/** Fetch the list of streams; calls that come meanwhile share one more fetch. */
function refresh() {
  if (refreshing) {
    refreshing.again = true;
    return refreshing.promise;
  }
  refreshing = { again: false };
  refreshing.promise = (async () => {
    try {
      do {
        refreshing.again = false;
        showStreams((await request("v1/streams")).streams);
      } while (refreshing.again);
    } catch (error) {
      if (connection.open) toast(error.message);
    } finally {
      refreshing = null;
    }
  })();
  return refreshing.promise;
}

const QUESTIONS = {
  stop: (name) => [`Stop ${name}?`, "The camera is let go and nothing is recognised until you start it again.", "Stop"],
  remove: (name) => [`Remove ${name}?`, "The stream stops and is taken out of the registry.", "Remove"],
};

async function act(tile, verb) {
  const question = QUESTIONS[verb]?.(tile.name);
  if (question && !(await confirmed(...question))) return;
  try {
    if (verb === "remove") await request(streamPath(tile.id), { method: "DELETE" });
    else await request(streamPath(tile.id, `/${verb}`), { method: "POST" });
  } catch (error) {
    if (error.status !== 404) toast(error.message);
  }
  await refresh();
}

function confirmed(title, text, verb) {
  const dialog = el("confirm");
  setText(el("confirm-title"), title);
  setText(el("confirm-text"), text);
  setText(el("confirm-yes"), verb);
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

function toast(text) {
  setText(el("toast"), text);
  el("toast").hidden = false;
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => { el("toast").hidden = true; }, 6_000);
}

// ---------------------------------------------------------------- events

const rows = new Map(); // action or track id, or event id of a change of state → row
let clearedAt = 0; // by the service's clock: what was published before was cleared away

const filters = {
  stream: "",
  label: "",
  addOption(select, value, text) {
    const option = new Option(text, value);
    const after = [...select.options].slice(1).find((one) => one.text.localeCompare(text) > 0);
    select.add(option, after ?? null);
  },
  addStream(id, name) {
    this.addOption(el("filter-stream"), id, name === id ? id : `${name} (${id})`);
  },
  removeStream(id) {
    const select = el("filter-stream");
    const option = [...select.options].find((one) => one.value === id);
    option?.remove();
    this.read();
  },
  addLabel(label) {
    this.addOption(el("filter-label"), label, label);
  },
  read() {
    this.stream = el("filter-stream").value;
    this.label = el("filter-label").value;
    for (const row of rows.values()) row.show();
    countEvents();
  },
  pass(row) {
    return (!this.stream || row.stream === this.stream) && (!this.label || row.label === this.label);
  },
};

const timeOfDay = new Intl.DateTimeFormat(undefined, {
  hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23",
});

function formatTime(seconds) {
  if (seconds > 1e8) return timeOfDay.format(new Date(seconds * 1000)); // a camera: Unix time
  const whole = Math.floor(seconds); // a file: its own time
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")} in file`;
}

/** One line of the list: an action from its beginning to its end, or a change of a stream's state. */
class EventRow {
  constructor(stream, label, seenAs = label) {
    this.stream = stream;
    this.label = label;
    this.seenAs = seenAs; // what the feed tells of while it goes on: a label, or a track
    this.phase = "";
    this.sequence = 0;
    this.order = 0; // when it began, by the service's clock
    this.notes = []; // lines that an object went over
    this.zones = []; // zones that it is in
    this.root = el("event-template").content.firstElementChild.cloneNode(true);
    this.button = this.root.querySelector(".event");
    const names = ["label", "score", "stream", "phase", "time"];
    this.parts = Object.fromEntries(names.map((name) => [name, this.root.querySelector(`.event-${name}`)]));
    setText(this.parts.stream, tiles.get(stream)?.name ?? stream);
    this.button.addEventListener("click", () => tiles.get(stream)?.mark());
  }

  showAction(data, published) {
    this.phase = data.type;
    setText(this.parts.score, percent(data.top_score ?? data.score));
    const track = data.track_id;
    const colour = track ? trackColour(track) : cssColour(this.label);
    this.root.querySelector(".swatch").style.background = colour;
    setText(this.parts.label, track ? `${data.label} ${trackNumber(track)}` : this.label);
    for (const { line, direction } of data.crossings ?? []) this.notes.push(`over ${line} (${direction})`);
    this.zones = data.current_zones ?? [];
    this.setTime(data.start_time);
    this.length = (data.end_time ?? data.frame_time) - data.start_time;
    this.at = performance.now() - Math.max(0, serverNow() - published) * 1000;
    this.cut = false;
    this.tick(performance.now());
  }

  showState(data, seconds) {
    this.phase = "state";
    this.button.classList.add("state");
    setText(this.parts.label, (data.after ?? "").toLowerCase());
    setText(this.parts.phase, data.status_message ?? "");
    this.parts.phase.title = data.status_message ?? "";
    const colour = { RUNNING: "good", RESTARTING: "wait", FAILED: "bad", STARTING: "info" }[data.after] ?? "idle";
    this.root.querySelector(".swatch").style.background = `var(--${colour})`;
    this.setTime(seconds);
  }

  setTime(seconds) {
    setText(this.parts.time, formatTime(seconds));
    if (seconds > 1e8) this.parts.time.dateTime = new Date(seconds * 1000).toISOString();
  }

  tick(now) {
    if (this.phase === "state" || this.phase === "") return;
    const tile = tiles.get(this.stream);
    const quiet = now - Math.max(this.at, tile?.labelAt.get(this.seenAs) ?? 0) > END_LOST_MS;
    const live = this.phase !== "end" && !this.cut && !quiet && connection.open && tile?.state === "RUNNING";
    if (!live) this.cut = true;
    this.button.classList.toggle("live", live);
    const length = live ? `for ${Math.floor(this.length + (now - this.at) / 1000)} s`
      : this.phase === "end" ? `${this.length.toFixed(1)} s` : "end not seen";
    const where = live ? this.zones.map((zone) => `in ${zone}`) : [];
    setText(this.parts.phase, [length, ...where, ...this.notes].join(" · "));
  }

  show() {
    setHidden(this.root, !filters.pass(this));
  }
}

function addEvent(event) {
  const data = event.data ?? {};
  const action = data.label !== undefined;
  if (!action && !event.type?.endsWith("stream.state")) return;
  if (event.published_s <= clearedAt) return;
  const key = action ? event.subject : event.id;
  const known = rows.get(key);
  if (known && event.sequence <= known.sequence) return; // delivery is at least once
  const object = event.type.includes(".detection.");
  const row = known ?? new EventRow(data.stream_id, action ? data.label : null, object ? data.track_id : data.label);
  row.sequence = event.sequence;
  if (object) indexOfLabel(data.label); // the filter offers it from now on
  if (action) row.showAction(data, event.published_s);
  else row.showState(data, Date.parse(event.time) / 1000);
  if (!known) placeRow(key, row, event.published_s - (action ? row.length : 0));
  row.show();
  countEvents();
}

/** Put a row among the others, newest first; the oldest gives way. */
function placeRow(key, row, order) {
  const list = el("event-list");
  row.order = order;
  row.root.dataset.key = key;
  rows.set(key, row);
  const older = [...list.children].find((item) => rows.get(item.dataset.key).order <= order);
  list.insertBefore(row.root, older ?? null);
  if (rows.size > EVENTS_SHOWN) {
    const last = list.lastElementChild;
    rows.delete(last.dataset.key);
    last.remove();
  }
}

function countEvents() {
  const shown = [...rows.values()].filter((row) => !row.root.hidden).length;
  const text = shown === rows.size ? `${shown || ""}` : `${shown} of ${rows.size}`;
  setText(el("event-count"), text);
}

async function loadEvents() {
  try {
    for (const event of (await request("v1/events?limit=100")).events.reverse()) addEvent(event);
  } catch {
    // the live feed goes on without the past
  }
}

el("filter-stream").addEventListener("change", () => filters.read());
el("filter-label").addEventListener("change", () => filters.read());
el("clear-events").addEventListener("click", () => {
  clearedAt = serverNow();
  rows.clear();
  el("event-list").replaceChildren();
  countEvents();
});

// ---------------------------------------------------------------- live connection

const HANDLERS = {
  event: ({ event }) => {
    learnClock(event.published_s ?? 0);
    addEvent(event);
  },
  score: ({ score }) => {
    learnClock(score.published_s ?? 0);
    tiles.get(score.stream_id)?.addScore(score);
  },
  status: ({ statuses }) => {
    for (const [id, status] of Object.entries(statuses)) tiles.get(id)?.setStatus(status);
  },
  streams: ({ streams }) => showStreams(streams),
};

/** The WebSocket, opened again with doubled waits and jitter for as long as the page lives. */
const connection = {
  open: false,
  attempt: 0,
  retryAt: 0,
  start() {
    clearTimeout(this.timer);
    if (el("login").open) return; // begun again when that is done
    this.retryAt = 0;
    const address = new URL("v1/ws", document.baseURI);
    address.protocol = address.protocol.replace("http", "ws");
    const socket = new WebSocket(address);
    socket.addEventListener("open", () => this.opened());
    socket.addEventListener("message", (message) => this.receive(message.data));
    socket.addEventListener("close", () => this.closed());
  },
  opened() {
    const again = this.attempt > 0;
    this.open = true;
    this.attempt = 0;
    showWho();
    for (const tile of tiles.values()) {
      tile.newsAt = performance.now();
      if (!again) continue;
      tile.reopenPicture(); // the old multipart answer may have died with the connection
      tile.loadScores();
    }
    if (again) loadModels();
    refresh().then(loadEvents);
    readStats();
    this.show();
  },
  receive(text) {
    let message;
    try {
      message = JSON.parse(text);
    } catch {
      return; // not for us
    }
    HANDLERS[message.type]?.(message);
  },
  closed() {
    this.open = false;
    showWho(); // perhaps the login is over
    const wait = Math.min(10_000, 500 * 2 ** this.attempt) * (0.5 + Math.random() / 2);
    this.attempt += 1;
    this.retryAt = performance.now() + wait;
    this.timer = setTimeout(() => this.start(), wait);
    setHealth("bad", "unreachable");
    this.show();
  },
  show() {
    const lost = !this.open && this.attempt > 0;
    document.body.classList.toggle("lost", lost);
    setHidden(el("banner"), !lost);
    if (!lost) return;
    const wait = Math.ceil((this.retryAt - performance.now()) / 1000);
    const next = this.retryAt && wait > 0 ? `Next try in ${wait} s.` : "Trying now …";
    setText(el("banner-text"), `Connection lost. ${next}`);
  },
};

el("retry-now").addEventListener("click", () => {
  if (connection.retryAt) connection.start();
});

// ---------------------------------------------------------------- header

function setHealth(kind, text) {
  el("health").dataset.health = kind;
  setText(el("health"), text);
}

async function readStats() {
  if (!connection.open) return;
  let stats;
  try {
    stats = await request("v1/stats");
  } catch (error) {
    setHealth("bad", (error.reason || "error").replaceAll("_", " "));
    el("health").title = error.message;
    return;
  }
  setText(el("replica-count"), String(stats.replicas));
  setText(el("capacity"), `${stats.slots_used} of ${stats.slots_total}`);
  el("health").title = "";
  if (stats.replicas) setHealth("good", "healthy");
  else setHealth("wait", "no replica yet");
}

function renderCounts() {
  const running = [...tiles.values()].filter((tile) => tile.state === "RUNNING").length;
  setText(el("stream-count"), `${running} of ${tiles.size}`);
}

// ---------------------------------------------------------------- add a stream

const form = el("add-form");
const fields = form.elements;
let idTouched = false;
let probing = null;

async function loadModels() {
  let data;
  try {
    data = await request("v1/models");
  } catch {
    return; // the default stays on offer
  }
  const select = fields.namedItem("model");
  const chosen = select.value;
  select.replaceChildren(new Option("Default of the service", ""));
  for (const model of data.models ?? []) {
    select.add(new Option(model.name, model.name));
    for (const label of model.background ?? []) if (!labelIndex.has(label)) labelIndex.set(label, -1);
    // objects have the colour of their track, and a detector may know hundreds of labels
    if (model.task !== "detection") for (const label of model.labels ?? []) indexOfLabel(label);
  }
  select.value = chosen;
}

function openAdd() {
  closeAdd();
  loadModels();
  el("add").showModal();
  fields.namedItem("uri").focus();
}

/** Leave nothing of the last entry behind, the password least of all. */
function closeAdd() {
  probing?.abort();
  form.reset();
  idTouched = false;
  setHidden(el("verdict"), true);
  setHidden(el("add-error"), true);
  setHidden(el("loop-field"), true);
  el("snapshot-image").removeAttribute("src");
  for (const input of form.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
}

/** Move user:password of a pasted address into their own fields, so that the password is hidden at once. */
function splitAddress() {
  const match = /^([a-z]+:\/\/)([^/?#]*)@(.*)$/i.exec(fields.namedItem("uri").value.trim());
  if (!match) return;
  const [, scheme, userinfo, rest] = match;
  const [user, ...password] = userinfo.split(":");
  const decode = (text) => {
    try {
      return decodeURIComponent(text);
    } catch {
      return text; // a bare % in a password
    }
  };
  fields.namedItem("uri").value = scheme + rest;
  fields.namedItem("username").value = decode(user);
  if (password.length) fields.namedItem("password").value = decode(password.join(":"));
}

function suggestId() {
  const address = fields.namedItem("uri").value.trim();
  setHidden(el("loop-field"), !address.startsWith("file:"));
  if (idTouched) return;
  const path = address.replace(/^[a-z]+:\/\/[^/]*/i, "").replace(/[?#].*$/, "").replace(/\.[a-z0-9]{2,4}$/i, "");
  const last = path.split("/").filter(Boolean).at(-1) ?? "";
  const base = last.replace(/[^A-Za-z0-9_-]+/g, "-").replace(/^[^A-Za-z0-9]+/, "").slice(0, 48);
  let id = base;
  for (let n = 2; base && tiles.has(id); n += 1) id = `${base}-${n}`;
  fields.namedItem("id").value = id;
}

function sourceOfForm() {
  splitAddress();
  const source = { uri: fields.namedItem("uri").value.trim(), rtsp_transport: fields.namedItem("transport").value };
  const user = fields.namedItem("username").value.trim();
  const password = fields.namedItem("password").value;
  if (user) source.username = user;
  if (password) source.password = password;
  if (source.uri.startsWith("file:") && fields.namedItem("loop").checked) source.loop = true;
  return source;
}

function showFormError({ message, reason }) {
  const byCamera = reason.startsWith("stream_") && reason !== "stream_exists"; // the source did not pass the check
  setText(el("add-error-text"), sentence(message.replace(" (to register it anyway, send ?probe=false)", "")));
  setText(el("add-error-reason"), reason);
  setHidden(el("add-anyway"), !byCamera);
  el("add-error").hidden = false;
  el("add-error").scrollIntoView({ block: "nearest" });
}

/** True when these fields are filled well; else the first wrong one has the focus and its reason is shown. */
function checkFields(...names) {
  setHidden(el("add-error"), true);
  for (const name of names) {
    const input = fields.namedItem(name);
    const { valueMissing, valid } = input.validity;
    input.toggleAttribute("aria-invalid", false);
    if (valid) continue;
    input.setAttribute("aria-invalid", "true");
    input.focus();
    const what = name === "uri" ? "address" : "stream id";
    showFormError(new Problem(valueMissing ? `The ${what} is missing.`
      : `The ${what} ${input.value} cannot be used: letters, digits, - and _, beginning with a letter or digit.`, "", 0));
    return false;
  }
  return true;
}

const STAGES = {
  address: "Address", dns: "Host name", tcp: "Connection", rtsp: "RTSP", auth: "User and password",
  sdp: "Description", key_frame: "First key frame", decode: "Decoding",
};
const ICONS = { good: "M3 8.5l3.5 3.5L13 4.5", bad: "M4 4l8 8M12 4l-8 8", skipped: "M4 8h8" };

function stageIcon(kind) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", "0 0 16 16");
  svg.setAttribute("class", "icon");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", { good: "passed", bad: "failed", skipped: "not reached" }[kind]);
  const path = document.createElementNS(space, "path");
  path.setAttribute("d", ICONS[kind]);
  svg.append(path);
  return svg;
}

function stageLine(stage, advice) {
  const kind = stage.ok === true ? "good" : stage.ok === false ? "bad" : "skipped";
  const line = document.createElement("li");
  line.className = kind;
  const add = (tag, name, text) => {
    const node = document.createElement(tag);
    node.className = name;
    node.textContent = text;
    line.append(node);
  };
  line.append(stageIcon(kind));
  add("span", "stage", STAGES[stage.name] ?? stage.name);
  add("span", "ms", typeof stage.ms === "number" && kind !== "skipped" ? `${Math.round(stage.ms)} ms` : "");
  if (stage.detail) add("p", "detail", stage.detail);
  if (advice && kind === "bad") add("p", "hint", sentence(advice));
  return line;
}

function showVerdict(report) {
  const verdict = el("verdict");
  verdict.className = `verdict ${report.ok ? "good" : "bad"}`;
  setText(el("verdict-title"), report.ok ? "The camera works" : sentence(report.message ?? "") || "The camera cannot be used");
  el("stages").replaceChildren(...report.stages.map((stage) => stageLine(stage, report.hint)));
  setHidden(el("snapshot"), !report.snapshot);
  if (report.snapshot) el("snapshot-image").src = `data:image/jpeg;base64,${report.snapshot}`;
  const about = [
    report.width && report.height ? `${report.width} × ${report.height}` : "",
    report.codec ?? "",
    report.fps ? `${Math.round(report.fps * 10) / 10} fps` : "",
  ].filter(Boolean);
  setText(el("snapshot-text"), about.join(", "));
  verdict.hidden = false;
  verdict.scrollIntoView({ block: "nearest", behavior: "smooth" });
}

async function probe() {
  if (!checkFields("uri")) return;
  const button = el("probe");
  probing = new AbortController();
  button.disabled = true;
  setText(button, "Probing …");
  const verdict = el("verdict");
  verdict.className = "verdict";
  setText(el("verdict-title"), "Asking the camera …");
  el("stages").replaceChildren();
  setHidden(el("snapshot"), true);
  verdict.hidden = false;
  try {
    showVerdict(await request("v1/streams:probe", { method: "POST", body: { source: sourceOfForm() }, signal: probing.signal }));
  } catch (error) {
    setHidden(verdict, true);
    if (error.name !== "AbortError") showFormError(error);
  } finally {
    button.disabled = false;
    setText(button, "Probe");
  }
}

async function addStream(check) {
  if (!checkFields("uri", "id")) return;
  const model = fields.namedItem("model").value;
  const body = { id: fields.namedItem("id").value.trim(), source: sourceOfForm(), ...(model && { models: [{ name: model }] }) };
  el("add-submit").disabled = el("add-anyway").disabled = true;
  setText(el("add-submit"), "Adding …");
  try {
    await request(`v1/streams?probe=${check}`, { method: "POST", body });
    el("add").close();
    await refresh();
    tiles.get(body.id)?.mark();
  } catch (error) {
    showFormError(error);
  } finally {
    el("add-submit").disabled = el("add-anyway").disabled = false;
    setText(el("add-submit"), "Add");
  }
}

el("open-add").addEventListener("click", openAdd);
el("open-add-empty").addEventListener("click", openAdd);
el("add").addEventListener("close", closeAdd);
el("add").querySelector("[data-close]").addEventListener("click", () => el("add").close());
el("probe").addEventListener("click", probe);
form.addEventListener("submit", (event) => {
  event.preventDefault();
  addStream(true);
});
el("add-anyway").addEventListener("click", () => addStream(false));
fields.namedItem("uri").addEventListener("change", splitAddress);
fields.namedItem("uri").addEventListener("input", suggestId);
fields.namedItem("id").addEventListener("input", () => { idTouched = fields.namedItem("id").value !== ""; });

// ---------------------------------------------------------------- heartbeat of the page

function render() {
  if (document.hidden) return;
  const now = performance.now();
  for (const tile of tiles.values()) {
    if (!tile.visible && !tile.dirty) continue;
    tile.render();
    tile.drawStrip(now);
  }
  for (const row of rows.values()) if (row.phase !== "end" && row.phase !== "state") row.tick(now);
  renderCounts();
  connection.show();
}

document.addEventListener("visibilitychange", () => {
  allocatePictures();
  render();
});
window.matchMedia("(prefers-color-scheme: light)").addEventListener("change", () => {
  colours = new Map();
  hatch = null;
  render();
});

loadModels().finally(() => connection.start()); // models first: their order gives each label its colour on every visit
setInterval(render, RENDER_MS);
setInterval(() => { for (const tile of tiles.values()) tile.pollPicture(); }, POLL_MS);
setInterval(() => { for (const tile of tiles.values()) tile.describeStrip(); }, 5_000);
setInterval(() => { if (!document.hidden) readStats(); }, 5_000);

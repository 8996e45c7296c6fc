// A tile's picture with what was found on it. The boxes travel inside the JPEG (a comment segment), so what is drawn
// are always the boxes of the very frame that is shown.

const SVG = "http://www.w3.org/2000/svg";
const COLOURS = 12; // --label-0 ... in the style sheet
const RETRY_MS = 2_000;
const TEXT_PX = 13;

/** The colour of a track, the same for its whole life: by its number within the stream. */
export function trackColour(trackId) {
  const number = Number(trackId.slice(trackId.lastIndexOf(":") + 1)) || 0;
  return `var(--label-${(number * 5) % COLOURS})`; // neighbours in number look different
}

/** `#3` of `door-1:3`. */
export const trackNumber = (trackId) => `#${trackId.slice(trackId.lastIndexOf(":") + 1)}`;

/** What was found on a frame, out of its JPEG; null where nobody looked for objects. */
export function overlayOf(jpeg) {
  for (let at = 2; jpeg[at] === 0xff && at + 4 <= jpeg.length;) {
    const [kind, length] = [jpeg[at + 1], jpeg[at + 2] * 256 + jpeg[at + 3]];
    if (kind === 0xfe) {
      try {
        return JSON.parse(new TextDecoder().decode(jpeg.subarray(at + 4, at + 2 + length)));
      } catch {
        return null; // another program's comment
      }
    }
    if (kind === 0xda) return null; // the pixels begin
    at += 2 + length;
  }
  return null;
}

/** The parts of a multipart/x-mixed-replace answer, as bytes. */
async function* partsOf(body) {
  const reader = body.getReader();
  let held = new Uint8Array(0);
  let ended = false;
  const more = async () => {
    const { value, done } = await reader.read();
    ended = done;
    if (!value) return;
    const joined = new Uint8Array(held.length + value.length);
    joined.set(held);
    joined.set(value, held.length);
    held = joined;
  };
  try {
    while (!ended) {
      const head = new TextDecoder("latin1").decode(held.subarray(0, 1_000));
      const end = head.indexOf("\r\n\r\n");
      const length = Number(/content-length: *(\d+)/i.exec(head)?.[1] ?? NaN);
      if (end < 0 || held.length < end + 4 + length) {
        await more();
        continue;
      }
      if (Number.isNaN(length)) throw new Error("a part without a length");
      yield held.slice(end + 4, end + 4 + length);
      held = held.slice(end + 4 + length);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function shape(parent, kind, attributes, colour) {
  const node = document.createElementNS(SVG, kind);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (colour) node.style.setProperty("--track", colour);
  parent.append(node);
  return node;
}

export class Picture {
  /** image is replaced by each new picture; drawing is the SVG above it. */
  constructor(image, drawing) {
    this.image = image;
    this.drawing = drawing;
    this.overlay = null; // of the picture that is shown
    this.places = []; // zones and lines
    this.stopped = null; // an AbortController while pictures come
    this.next = null; // a picture that came while another was decoded
    this.decoding = false;
  }

  get shown() {
    return this.image.naturalWidth > 0;
  }

  get objects() {
    return this.overlay?.objects ?? [];
  }

  /** Show the pictures of an MJPEG address as they come, until `close`; a broken answer is asked for again. */
  open(address) {
    this.close();
    const stopped = new AbortController();
    this.stopped = stopped;
    const follow = async () => {
      try {
        const response = await fetch(address(), { signal: stopped.signal, cache: "no-store" });
        if (response.ok) for await (const jpeg of partsOf(response.body)) this.show(jpeg, stopped);
      } catch {
        // the connection broke, or `close` was called
      }
      if (!stopped.signal.aborted) setTimeout(() => stopped.signal.aborted || follow(), RETRY_MS);
    };
    follow();
  }

  /** Load one picture and show it. */
  async poll(address) {
    const stopped = this.stopped ?? new AbortController();
    this.stopped = stopped;
    try {
      const response = await fetch(address, { signal: stopped.signal, cache: "no-store" });
      if (response.ok) await this.show(new Uint8Array(await response.arrayBuffer()), stopped);
    } catch {
      // no picture yet: the next poll asks again
    }
  }

  /** No more pictures; the last one stays until `clear`. */
  close() {
    this.stopped?.abort();
    this.stopped = null;
    this.next = null;
  }

  clear() {
    this.close();
    this.image.removeAttribute("src");
    this.overlay = null;
    this.draw();
  }

  /** Decode a picture and show it with its boxes in one go; of those that come meanwhile the newest is next. */
  async show(jpeg, stopped) {
    this.next = jpeg;
    if (this.decoding) return;
    this.decoding = true;
    try {
      while (this.next && !stopped.signal.aborted) await this.decode(stopped);
    } finally {
      this.decoding = false;
    }
  }

  async decode(stopped) {
    const jpeg = this.next;
    this.next = null;
    const address = URL.createObjectURL(new Blob([jpeg], { type: "image/jpeg" }));
    const fresh = this.image.cloneNode();
    fresh.src = address;
    try {
      await fresh.decode();
      if (stopped.signal.aborted) return;
      const overlay = overlayOf(jpeg);
      fresh.dataset.frame = overlay?.number ?? "";
      this.image.replaceWith(fresh);
      this.image = fresh;
      this.overlay = overlay;
      this.draw();
    } catch {
      // a damaged picture: the next one comes
    } finally {
      URL.revokeObjectURL(address);
    }
  }

  /** Zones and lines of the stream's detectors, points as shares of the picture. */
  setPlaces(models) {
    this.places = models.flatMap((model) => [
      ...(model.zones ?? []).map(({ name, points, kind }) => ({ name, points, kind: `zone ${kind}` })),
      ...(model.lines ?? []).map(({ name, a, b }) => ({ name, points: [a, b], kind: "line" })),
    ]);
    this.draw();
  }

  draw() {
    const { drawing, overlay } = this;
    const [width, height] = overlay?.size ?? [this.image.naturalWidth, this.image.naturalHeight];
    drawing.replaceChildren();
    drawing.dataset.frame = overlay?.number ?? "";
    if (!width || !height) return;
    drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const { clientWidth, clientHeight } = this.image;
    const unit = 1 / (Math.min(clientWidth / width, clientHeight / height) || 1); // picture pixels in a page pixel
    drawing.style.setProperty("--unit", `${unit}px`);
    for (const place of this.places) this.drawPlace(place, width, height, unit);
    // the best last, so that they lie on top
    for (const object of [...this.objects].reverse()) this.drawObject(object, width, unit);
  }

  drawPlace({ name, points, kind }, width, height, unit) {
    const corners = points.map(([x, y]) => `${x * width},${y * height}`).join(" ");
    shape(this.drawing, kind === "line" ? "polyline" : "polygon", { class: kind, points: corners });
    const [x, y] = points.reduce((best, point) => (point[1] < best[1] ? point : best));
    const text = shape(this.drawing, "text", { class: "place-name", x: x * width, y: y * height + TEXT_PX * unit });
    text.textContent = name;
  }

  drawObject({ track_id: track, label, score, box, actions }, width, unit) {
    const [left, top, right, bottom] = box;
    const colour = trackColour(track);
    shape(this.drawing, "rect", {
      class: "object", "data-track": track, x: left, y: top, width: right - left, height: bottom - top,
    }, colour);
    const lines = [`${label} ${Math.round(score * 100)} % ${trackNumber(track)}`,
      ...actions.map((action) => `${action.label} ${Math.round(action.score * 100)} %`)];
    const line = 1.25 * TEXT_PX * unit;
    const above = top - (lines.length - 1) * line - 4 * unit;
    const first = above > line ? above : Math.min(bottom, top + line); // inside where there is no room above
    const x = Math.max(2 * unit, Math.min(left, width - 8 * TEXT_PX * unit));
    lines.forEach((words, i) => {
      const text = shape(this.drawing, "text", { class: "object-name", x, y: first + i * line }, colour);
      text.textContent = words;
    });
  }
}

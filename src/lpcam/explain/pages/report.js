// Draws the parts of the report that are not tables: viewer, prototypes and look-alike classes.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const baseline = data.methods[0];
  const percent = (value) => `${(100 * value).toFixed(1)} %`;
  const name = (index) => data.classes[index]?.name ?? `class ${index}`;
  const place = (method) => Math.max(0, data.methods.indexOf(method)) % 6;

  const drawing = (tag, attributes, ...children) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  };
  const isolated = (text) => make("bdi", { textContent: text });

  // -- Data ------------------------------------------------------------------------------------

  const unpacked = new WeakMap();
  const unpackOnce = (array) => {
    if (!unpacked.has(array)) unpacked.set(array, unpack(array));
    return unpacked.get(array);
  };
  const picture = async (uri) => {
    const image = new Image();
    image.src = uri;
    await image.decode();
    return image;
  };

  const heat = heatColours(data.heat);
  const colours = data.classes.map(({ color }) => {
    const value = parseInt(color.slice(1), 16);
    return [value >> 16, (value >> 8) & 255, value & 255];
  });
  const VOID = 255;
  const maskColour = (value) => (value === VOID ? [224, 224, 192] : colours[value - 1] ?? [128, 128, 128]);

  // -- Planes ----------------------------------------------------------------------------------

  // Canvases are whole multiples of the picture, so that mask edges stay sharp when enlarged.
  const zoom = (entry, side = 512) => Math.max(1, Math.floor(side / Math.max(entry.width, entry.height)));

  // Bilinear, half-pixel centres, edges repeated; 0..255 as floats.
  const enlarge = (values, offset, h, w, height, width) => {
    const result = new Float32Array(height * width);
    const left = new Int32Array(width), right = new Int32Array(width), share = new Float32Array(width);
    for (let x = 0; x < width; x++) {
      const at = Math.min(Math.max(((x + 0.5) * w) / width - 0.5, 0), w - 1);
      left[x] = Math.floor(at);
      right[x] = Math.min(left[x] + 1, w - 1);
      share[x] = at - left[x];
    }
    for (let y = 0; y < height; y++) {
      const at = Math.min(Math.max(((y + 0.5) * h) / height - 0.5, 0), h - 1);
      const above = Math.floor(at), low = at - above;
      const top = offset + above * w, bottom = offset + Math.min(above + 1, h - 1) * w;
      for (let x = 0; x < width; x++) {
        const a = values[top + left[x]] + share[x] * (values[top + right[x]] - values[top + left[x]]);
        const b = values[bottom + left[x]] + share[x] * (values[bottom + right[x]] - values[bottom + left[x]]);
        result[y * width + x] = a + low * (b - a);
      }
    }
    return result;
  };
  // The brightest of all planes at each pixel, and which one it is: the first of equal ones.
  const brightest = (planes) => {
    const best = new Float32Array(planes[0]?.length ?? 0), which = new Uint8Array(best.length);
    planes.forEach((plane, k) => {
      for (let i = 0; i < plane.length; i++) {
        if (k === 0 || plane[i] > best[i]) { best[i] = plane[i]; which[i] = k; }
      }
    });
    return { best, which };
  };
  const edges = (inside, width) => {
    const found = [];
    for (let i = 0; i < inside.length; i++) {
      if (inside[i] && (inside[i - 2] !== inside[i] || inside[i + 2] !== inside[i] ||
          inside[i - 2 * width] !== inside[i] || inside[i + 2 * width] !== inside[i])) found.push(i);
    }
    return found;
  };

  // -- Canvases --------------------------------------------------------------------------------

  const blank = (properties) => make("canvas", { ...properties, aria: { role: "img", "aria-label": "" } });
  const paintMask = (pixels, mask, width, strength) => {
    const opacity = 0.8 * strength; // the object stays visible through its mask
    for (let i = 0; i < mask.length; i++) {
      if (!mask[i]) continue;
      blend(pixels, i, maskColour(mask[i]), opacity);
    }
    // a light edge separates dark colours from dark images
    if (opacity > 0) {
      for (const i of edges(mask, width)) {
        const colour = maskColour(mask[i]);
        for (let c = 0; c < 3; c++) pixels[4 * i + c] = 0.35 * colour[c] + 165;
      }
    }
  };
  const paintOutline = (pixels, outline) => {
    for (const i of outline) for (let c = 0; c < 3; c++) pixels[4 * i + c] = 255;
  };

  const able = "DecompressionStream" in window && "OffscreenCanvas" in window;
  if (!able) {
    document.querySelectorAll(".old").forEach((one) => { one.hidden = false; });
    return;
  }
  document.querySelectorAll(".drawn").forEach((one) => { one.hidden = false; });
  addEventListener("beforeprint", () => {
    document.querySelectorAll("details").forEach((one) => { one.open = true; });
  });

  // -- The viewer ------------------------------------------------------------------------------

  const viewer = () => {
    const root = byId("viewer");
    if (!root) return;
    const filter = byId("filter"), chooser = byId("image"), classes = byId("class");
    const threshold = byId("threshold"), own = byId("own"), opacity = byId("opacity");
    const outline = byId("outline");
    const byName = new Map(data.images.map((entry) => [entry.id, entry]));
    const shownMethods = data.methods.filter((one) => data.images.some((entry) => entry.planes[one]));
    let list = [], at = 0, state = null, turn = 0, frame = 0;

    const last = shownMethods[shownMethods.length - 1];
    threshold.value = data.fixed[last] ?? 0.3;
    own.hidden = !shownMethods.every((one) => one in data.fixed);
    own.setAttribute("aria-pressed", String(!own.hidden));
    const isOwn = () => own.getAttribute("aria-pressed") === "true";
    // The IoU is known in steps of 0.01, so the masks are drawn in the same steps.
    const step = (value) => Math.min(Math.max(Math.round(100 * value), 0), 99);
    const limit = (method) => step(isOwn() ? data.fixed[method] : Number(threshold.value)) / 100;
    const rounded = shownMethods.filter((method) =>
      method in data.fixed && Math.abs(data.fixed[method] - step(data.fixed[method]) / 100) > 1e-6);

    // what can be listed
    const lists = [["All images", data.images]];
    for (const [title, ids] of Object.entries(data.highlights)) {
      const found = ids.map((id) => byName.get(id)).filter(Boolean);
      lists.push([title[0].toUpperCase() + title.slice(1), found]);
    }
    const order = ["Most improved", "Most worsened", "Best", "Worst"];
    const rank = ([title]) => (order.indexOf(title) + order.length + 1) % (order.length + 1);
    lists.splice(1, lists.length - 1, ...lists.slice(1).sort((a, b) => rank(a) - rank(b)));
    const general = lists.length;
    data.classes.forEach((one, index) => {
      const found = data.images.filter((entry) => entry.labels.includes(index));
      if (found.length) lists.push([one.name, found]);
    });
    const entries = lists.map(([title, found], index) =>
      make("option", { value: String(index), textContent: `${title} (${found.length})`, disabled: !found.length }));
    filter.append(...entries.slice(0, general));
    if (entries.length > general) {
      filter.append(make("optgroup", { label: "With the class" }, ...entries.slice(general)));
    }

    const listed = (entry) => {
      const pair = shownMethods.filter((one) => one in entry.score);
      const scores = pair.map((one) => `${one} ${(100 * entry.score[one]).toFixed(1)}`);
      return [entry.id, ...scores].join("  ·  ");
    };
    const relist = () => {
      list = lists[Number(filter.value)][1];
      chooser.replaceChildren(...list.map((entry, index) =>
        make("option", { value: String(index), textContent: listed(entry) })));
      go(0);
    };

    // panels: one canvas each, made once
    const panels = new Map();
    const panel = (key, title, kind) => {
      if (!panels.has(key)) {
        const canvas = blank({ dataset: { panel: key } });
        const value = make("data", { dataset: { of: key } });
        const caption = make("figcaption", {}, make("span", { textContent: title }), value);
        const missing = make("p", { hidden: true });
        const figure = make("figure", { className: `panel ${kind}` }, caption,
          make("div", { className: "frame" }, canvas, missing));
        panels.set(key, { canvas, value, figure, missing });
      }
      return panels.get(key);
    };
    const row = (kind, text) => shownMethods.map((one) => panel(`${kind} ${one}`, text(one), kind));
    byId("panels").append(
      panel("image", "Image", "image").figure,
      ...row("map", (one) => one).map(({ figure }) => figure),
      panel("truth", "Truth", "truth").figure,
      ...row("seed", (one) => `Seed of ${one}`).map(({ figure }) => figure),
    );
    byId("panels").style.setProperty("--columns", 1 + shownMethods.length);

    const load = async (entry) => {
      const factor = zoom(entry);
      const width = entry.width * factor, height = entry.height * factor;
      const base = background(await picture(entry.picture), width, height);
      const planes = {}, tops = {}, iou = {}, masks = {}, extra = {};
      for (const method of shownMethods) {
        if (!entry.planes[method]) continue;
        const { shape: [k, h, w], values } = await unpackOnce(entry.planes[method]);
        planes[method] = Array.from({ length: k }, (_, n) => enlarge(values, n * h * w, h, w, height, width));
        tops[method] = brightest(planes[method]);
        if (entry.iou[method]) iou[method] = (await unpackOnce(entry.iou[method])).values;
      }
      for (const [title, array] of Object.entries(entry.masks)) {
        const { shape: [h, w], values } = await unpackOnce(array);
        masks[title] = Uint8Array.from({ length: height * width }, (_, i) =>
          values[Math.floor((Math.floor(i / width) * h) / height) * w + Math.floor(((i % width) * w) / width)]);
      }
      for (const [title, array] of Object.entries(entry.extra ?? {})) {
        const { shape: [h, w], values } = await unpackOnce(array);
        extra[title] = enlarge(values, 0, h, w, height, width);
      }
      return { entry, width, height, base, planes, tops, iou, masks, extra };
    };

    const go = async (index) => {
      if (!list.length) return;
      at = Math.min(Math.max(index, 0), list.length - 1);
      chooser.value = String(at);
      byId("position").textContent = `${at + 1} of ${list.length}`;
      byId("previous").disabled = at === 0;
      byId("next").disabled = at === list.length - 1;
      const entry = list[at], mine = ++turn;
      root.setAttribute("aria-busy", "true");
      const loaded = await load(entry);
      if (mine !== turn) return;
      state = loaded;
      const kept = classes.value;
      classes.replaceChildren(
        make("option", { value: "all", textContent: "All labels of the image" }),
        ...entry.labels.map((label, k) => make("option", { value: String(label), textContent: name(label), dataset: { k } })));
      classes.value = entry.labels.some((label) => String(label) === kept) ? kept : "all";
      const key = (fill, text) => make("li", {},
        drawing("svg", { class: "swatch", viewBox: "0 0 10 10", "aria-hidden": "true" },
          drawing("rect", { width: 10, height: 10, rx: 2, fill })),
        isolated(text));
      byId("colours").replaceChildren(
        ...entry.labels.map((label) => key(data.classes[label]?.color ?? "#808080", name(label))),
        ...(Object.values(state.masks).some((mask) => mask.includes(VOID))
          ? [key(`rgb(${maskColour(VOID).join(",")})`, "not counted")] : []));
      draw();
      root.setAttribute("aria-busy", "false");
    };

    // -- IoU of the picked class, or the mean over the labels that have one ----------------------
    const picked = () => (classes.value === "all" ? null : state.entry.labels.indexOf(Number(classes.value)));
    const score = (method, step) => {
      const table = state.iou[method];
      if (!table) return null;
      const rows = picked() === null ? state.entry.labels.map((_, k) => k) : [picked()];
      const values = rows.map((k) => table[100 * k + step]).filter((value) => value !== 65535);
      return values.length ? values.reduce((a, b) => a + b, 0) / values.length / 10000 : null;
    };

    const spark = () => {
      const box = byId("spark");
      const scored = shownMethods.filter((method) => state.iou[method]);
      box.hidden = !scored.length;
      if (!scored.length) return;
      // the thumb's centre runs from 8 to the width less 8 pixels
      const width = Math.max(box.clientWidth, 40), x = (t) => 8 + (t / 99) * (width - 16);
      const lines = scored.map((method) => {
        const points = [];
        for (let t = 0; t < 100; t++) {
          const value = score(method, t);
          if (value !== null) points.push(`${x(t).toFixed(1)},${(39 - 36 * value).toFixed(1)}`);
        }
        return drawing("polyline", { class: `line m${place(method)}`, points: points.join(" ") });
      });
      const now = [...new Set(scored.map((method) => step(limit(method))))];
      box.replaceChildren(drawing("svg", { viewBox: `0 0 ${width} 42`, "aria-hidden": "true" },
        drawing("line", { class: "grid", x1: 8, x2: width - 8, y1: 39, y2: 39 }), ...lines,
        ...now.map((t) => drawing("line", { class: "now", x1: x(t), x2: x(t), y1: 0, y2: 42 })),
        ...scored.filter((method) => score(method, step(limit(method))) !== null).map((method) => {
          const t = step(limit(method));
          return drawing("circle", { class: `best m${place(method)}`, cx: x(t), cy: 39 - 36 * score(method, t), r: 3.5 });
        })));
    };

    const only = (mask) => {
      const k = picked();
      if (k === null) return mask;
      const wanted = state.entry.labels[k] + 1;
      return mask.map((value) => (value === wanted || value === VOID ? value : 0));
    };
    const draw = () => {
      const { entry, base, width } = state;
      const strength = Number(opacity.value), k = picked();
      const who = k === null ? entry.labels.map(name).join(", ") || "no label" : name(entry.labels[k]);
      const truth = state.masks.truth && only(state.masks.truth);
      byId("outline-label").hidden = !truth;
      const line = truth && outline.checked ? edges(truth.map((value) => (value === VOID ? 0 : value)), width) : [];
      const said = [];

      const plain = panel("image");
      paint(plain.canvas, base);
      plain.canvas.setAttribute("aria-label", `Image ${entry.id}, labels: ${entry.labels.map(name).join(", ") || "none"}`);

      const values = {};
      for (const method of shownMethods) {
        const t = limit(method), { best, which } = state.tops[method] ?? { best: [], which: [] };
        const map = panel(`map ${method}`), seed = panel(`seed ${method}`);
        const plane = k === null ? best : state.planes[method]?.[k] ?? [];
        paint(map.canvas, base, (pixels) => { paintHeat(pixels, plane, heat, strength); paintOutline(pixels, line); });
        map.canvas.setAttribute("aria-label", `Heat map of ${method} for ${who}`);
        const mask = new Uint8Array(width * state.height);
        for (let i = 0; i < best.length; i++) {
          if (best[i] > 255 * t && (k === null || which[i] === k)) mask[i] = entry.labels[which[i]] + 1;
        }
        paint(seed.canvas, base, (pixels) => { paintMask(pixels, mask, width, strength); paintOutline(pixels, line); });
        const value = score(method, step(t));
        values[method] = value;
        let text = `threshold ${t.toFixed(2)}`;
        if (state.iou[method]) text = `IoU ${value === null ? "undefined" : percent(value)} at ${t.toFixed(2)}`;
        if (state.iou[method]) said.push(`${method} ${value === null ? "undefined" : percent(value)}`);
        seed.value.textContent = text;
        if (value === null) seed.value.removeAttribute("value");
        else seed.value.value = value.toFixed(6);
        seed.canvas.setAttribute("aria-label", `Seed of ${method} for ${who}, ${text}`);
      }
      const highest = Math.max(...Object.values(values).map((value) => value ?? -1));
      for (const [method, value] of Object.entries(values)) {
        panel(`seed ${method}`).value.classList.toggle("better", shownMethods.length > 1 && value === highest && highest > 0);
      }

      const real = panel("truth");
      real.canvas.hidden = !truth;
      real.missing.hidden = Boolean(truth);
      real.missing.textContent = "This image has no true mask";
      if (truth) {
        paint(real.canvas, base, (pixels) => paintMask(pixels, truth, width, strength));
        real.canvas.setAttribute("aria-label", `True mask for ${who}`);
      }
      // masks and planes of later stages
      for (const [key, { figure }] of panels) if (key.startsWith("more ")) figure.hidden = true;
      const further = (title, change) => {
        const more = panel(`more ${title}`, title[0].toUpperCase() + title.slice(1), "more");
        if (!more.figure.isConnected) byId("panels").append(more.figure);
        more.figure.hidden = false;
        paint(more.canvas, base, change);
        more.canvas.setAttribute("aria-label", `${title} for ${who}`);
      };
      for (const [title, mask] of Object.entries(state.masks)) {
        if (title !== "truth") further(title, (pixels) => {
          paintMask(pixels, only(mask), width, strength);
          paintOutline(pixels, line);
        });
      }
      for (const [title, plane] of Object.entries(state.extra)) {
        further(title, (pixels) => paintHeat(pixels, plane, heat, strength));
      }

      byId("threshold-value").textContent = isOwn()
        ? shownMethods.map((method) => `${method} ${limit(method).toFixed(2)}`).join(", ")
        : Number(threshold.value).toFixed(2);
      byId("shown").replaceChildren(make("strong", {}, isolated(entry.id)),
        ` with ${entry.labels.length ? "" : "no label"}`,
        ...entry.labels.flatMap((label, n) => (n ? [", ", isolated(name(label))] : [isolated(name(label))])),
        said.length ? `. IoU ${k === null && entry.labels.length > 1 ? "(mean over labels) " : ""}${said.join(", ")}` : "",
        isOwn() && rounded.length ? `. Shown at the nearest step of 0.01: ${rounded.map((method) =>
          `${method} at ${limit(method).toFixed(2)}, fixed is ${data.fixed[method]}`).join("; ")}` : "");
      spark();
    };
    const soon = () => {
      cancelAnimationFrame(frame);
      frame = requestAnimationFrame(() => { if (state) draw(); });
    };

    filter.addEventListener("change", relist);
    chooser.addEventListener("change", () => go(Number(chooser.value)));
    classes.addEventListener("change", draw);
    opacity.addEventListener("input", soon);
    outline.addEventListener("change", soon);
    threshold.addEventListener("input", () => { own.setAttribute("aria-pressed", "false"); soon(); });
    own.addEventListener("click", () => {
      own.setAttribute("aria-pressed", String(!isOwn()));
      soon();
    });
    byId("previous").addEventListener("click", () => go(at - 1));
    byId("next").addEventListener("click", () => go(at + 1));
    root.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const tag = event.target.tagName, arrows = tag !== "INPUT" && tag !== "SELECT";
      const forward = (event.key === "ArrowRight" && arrows) || (event.key === "j" && tag !== "SELECT");
      const back = (event.key === "ArrowLeft" && arrows) || (event.key === "k" && tag !== "SELECT");
      if (!forward && !back) return;
      event.preventDefault();
      go(at + (forward ? 1 : -1));
    });
    new ResizeObserver(soon).observe(byId("spark"));

    drawRamp(byId("ramp"), heat);
    const first = lists.findIndex(([title, found]) => title === "Most improved" && found.length);
    filter.value = String(Math.max(first, 0));
    relist();
  };

  // -- Prototypes ------------------------------------------------------------------------------

  const prototypes = () => {
    const root = byId("prototype-viewer");
    if (!root) return;
    const { rule, classes: all } = data.prototypes;
    const chooser = byId("prototype-class"), sides = byId("sides"), example = byId("example");
    const choices = choicesOf(data.prototypes.digest, data.prototypes.choices ?? [], () => preview());
    const own = (index, side, one) => ({ class: name(index), side, index: one.number });
    byId("save-choices").addEventListener("click", () => {
      choices.save();
      byId("choices-note").textContent = "Saved prototypes.yaml. Next: lpcam run RUN/recipe.yaml --run.folder RUN --lpcam.choices prototypes.yaml";
    });
    let turn = 0;
    chooser.append(...all.map((one, index) => make("option", { value: String(index), textContent: name(one.class) })));

    const titles = { foreground: "Foreground prototypes", context: "Context prototypes",
      "early foreground": "Early layers: foreground", "early context": "Early layers: context" };
    const limits = {
      foreground: [rule.mu_f],
      context: [rule.mu_b_lower, rule.mu_b],
    };
    const bar = (side, one) => drawing("svg",
      { class: `score${one.kept ? " kept-fill" : ""}`, viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" },
      drawing("rect", { class: "fill", width: 100 * Math.min(Math.max(one.score, 0), 1), height: 8 }),
      ...(limits[side] ?? []).filter((value) => typeof value === "number").map((value) =>
        drawing("line", { class: "limit", x1: 100 * value, x2: 100 * value, y1: 0, y2: 8 })));

    // μ_f and μ_b as the rules above the cards have them
    const symbols = (text) => text.split(/(μ_[fb])/).map((part, n) =>
      (n % 2 ? make("span", {}, "μ", make("sub", { textContent: part[2] })) : part));
    const card = (side, one, choose) => {
      const scored = one.score !== null; // those of early layers have no score
      const patches = make("span", { className: "patches" }, ...one.patches.slice(0, 4).map((patch) =>
        make("img", { src: patch.picture, alt: "", width: 64, height: 64, title: `${patch.image}, cosine ${patch.cosine.toFixed(2)}` })));
      const button = make("button", { type: "button", className: `prototype${one.kept ? "" : " rejected"}`, aria: { "aria-pressed": "false" } },
        patches,
        make("span", { className: "verdict" },
          make("span", { textContent: `No. ${one.number}` }),
          ...(scored ? [make("span", { className: one.kept ? "kept" : "gone", textContent: one.kept ? "✓ kept" : "✕ rejected" })] : [])),
        ...(scored ? [bar(side, one)] : []),
        make("span", { className: "why" }, ...symbols(one.rule),
          ...(scored ? [make("br"), `${one.size.toLocaleString("en")} region${one.size === 1 ? "" : "s"} in the group`] : [])));
      button.addEventListener("click", () => choose(side, one, button));
      return make("li", {}, button, ...(scored ? [choices.controls(own(all[Number(chooser.value)].class, side, one))] : []));
    };

    // The side on which a prototype counts: 0 foreground, 1 context, -1 none; as the run had it, and as chosen.
    const before = (side, one) => (one.moved ? 1 : !one.kept ? -1 : side === "foreground" ? 0 : 1);
    const after = (index, side, one) => {
      const action = choices.actionOf(own(index, side, one));
      return { keep: side === "foreground" ? 0 : 1, drop: -1, context: 1 }[action] ?? before(side, one);
    };
    // Maps of some images of the class at scale 1: the mean cosine to each side, with what was chosen here.
    let previewed = 0;
    const preview = async () => {
      const one = all[Number(chooser.value)], mine = ++previewed;
      const cards = ["foreground", "context"].flatMap((side) => one.sides[side].prototypes.map((card) => [side, card]));
      const moves = cards.map(([side, card]) => [before(side, card), after(one.class, side, card)]);
      const counts = [...(one.counts ?? [0, 0])];
      moves.forEach(([from, to]) => {
        if (from >= 0) counts[from] -= 1;
        if (to >= 0) counts[to] += 1;
      });
      byId("choices-note").textContent = counts[0] ? `LPCAM of ${name(one.class)} at scale 1, from ${counts[0]} foreground and ${counts[1]} context prototypes:`
        : `No foreground prototype of ${name(one.class)} is left, so there is no map. Keep one of them.`;
      const figures = await Promise.all((one.previews ?? []).map(async (entry) => {
        const { shape: [, h, w], values: means } = await unpackOnce(entry.means);
        const { values: cosines } = await unpackOnce(entry.cosines);
        const map = new Float32Array(h * w);
        const sums = [new Float32Array(h * w), new Float32Array(h * w)];
        for (let side = 0; side < 2; side++) {
          for (let i = 0; i < h * w; i++) sums[side][i] = ((2 * means[side * h * w + i]) / 65535 - 1) * (one.counts[side]);
        }
        moves.forEach(([from, to], k) => {
          if (from === to) return;
          for (let i = 0; i < h * w; i++) {
            const cosine = (2 * cosines[k * h * w + i]) / 255 - 1;
            if (from >= 0) sums[from][i] -= cosine;
            if (to >= 0) sums[to][i] += cosine;
          }
        });
        let top = 0;
        for (let i = 0; i < h * w; i++) {
          map[i] = counts[0] ? Math.max(0, sums[0][i] / counts[0] - (counts[1] ? sums[1][i] / counts[1] : 0)) : 0;
          top = Math.max(top, map[i]);
        }
        const plane = map.map((value) => (top ? (255 * value) / top : 0));
        const canvas = blank({ dataset: { preview: entry.id } });
        const base = background(await picture(entry.picture), entry.width, entry.height);
        paint(canvas, base, (pixels) => paintHeat(pixels, enlarge(plane, 0, h, w, entry.height, entry.width), heat, 0.75));
        canvas.setAttribute("aria-label", `LPCAM of ${name(one.class)} on ${entry.id} with these choices`);
        return make("figure", {}, canvas);
      }));
      if (mine === previewed) byId("previews").replaceChildren(...figures);
    };

    const show = async () => {
      const one = all[Number(chooser.value)], mine = ++turn;
      const canvas = blank({ dataset: { panel: "prototype" } });
      const caption = make("figcaption", {}, "");
      const image = one.example && picture(one.example.picture);
      let chosen = 0;
      const choose = async (side, prototype, button) => {
        const wanted = ++chosen;
        sides.querySelectorAll("button").forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
        if (!one.example) return;
        const factor = zoom(one.example);
        const width = one.example.width * factor, height = one.example.height * factor;
        const base = background(await image, width, height);
        const array = prototype.map && await unpackOnce(prototype.map);
        if (mine !== turn || wanted !== chosen) return;
        paint(canvas, base, array && ((pixels) =>
          paintHeat(pixels, enlarge(array.values, 0, array.shape[0], array.shape[1], height, width), heat, 0.75)));
        const what = `${side} prototype no. ${prototype.number}`;
        canvas.setAttribute("aria-label", `Image ${one.example.id}${array ? ` and its similarity to ${what} of ${name(one.class)}` : ""}`);
        const [low, high] = (prototype.range ?? []).map((value) => value.toFixed(2).replace("-", "−"));
        const range = high ? `: cosine from ${low} (dark) to ${high} (bright)` : "";
        caption.replaceChildren(array ? `Similarity of this image to ${what}${range}. ` : `There is no map of ${what}. `, isolated(one.example.id));
      };
      example.replaceChildren(make("figure", {},
        make("div", { className: "frame" }, one.example ? canvas : make("p", { textContent: "No example image of this class" })), caption));
      let first = null;
      sides.replaceChildren(...Object.keys(titles).filter((side) => one.sides[side]).map((side) => {
        const { total, kept, prototypes: shown } = one.sides[side];
        const cards = shown.map((prototype) => {
          const made = card(side, prototype, choose);
          if (prototype.kept) first ??= [side, prototype, made.firstChild];
          return made;
        });
        const counted = `${kept === null ? total : `${kept} of ${total} kept`}${shown.length < total ? `, ${shown.length} shown` : ""}`;
        return make("div", {},
          make("h3", {}, titles[side], make("small", { textContent: counted })),
          cards.length ? make("ul", { className: "cards" }, ...cards)
            : make("p", { className: "empty", textContent: total ? "None of them is shown." : "This class has no prototypes of this kind." }));
      }));
      if (first) choose(...first);
      else if (one.example) {
        paint(canvas, background(await image, one.example.width, one.example.height));
        canvas.setAttribute("aria-label", `Image ${one.example.id}`);
        caption.replaceChildren(isolated(one.example.id));
      }
    };
    chooser.addEventListener("change", () => { show(); preview(); });
    show();
    preview();
  };

  // -- Classes that look alike -----------------------------------------------------------------

  const confusions = async () => {
    const root = byId("confusion-list");
    if (!root) return;
    for (const entry of data.confusions) {
      const pair = [entry.present, entry.lookalike];
      const factor = zoom(entry, 256), width = entry.width * factor, height = entry.height * factor;
      const base = background(await picture(entry.picture), width, height);
      const whole = blank({});
      paint(whole, base);
      whole.setAttribute("aria-label", `Image ${entry.id}, labelled ${name(entry.present)}`);
      const head = make("div", { className: "head" },
        make("h3", {}, isolated(name(entry.present)), " or ", isolated(name(entry.lookalike)), "?"),
        make("small", {}, isolated(entry.id)));
      const scores = make("div", { className: "scores" }, ...pair.map((index, n) => make("p", {},
        make("strong", {}, isolated(name(index))), n ? "not a label of the image, " : "a label of the image, ",
        `score ${percent(entry.scores[n])}`)));
      const maps = [];
      for (const method of data.methods.filter((one) => entry.maps[one])) {
        const { shape: [, h, w], values } = await unpackOnce(entry.maps[method]);
        pair.forEach((index, n) => {
          const canvas = blank({});
          paint(canvas, base, (pixels) =>
            paintHeat(pixels, enlarge(values, n * h * w, h, w, height, width), heat, 0.75));
          canvas.setAttribute("aria-label", `Heat map of ${method} for ${name(index)}, ${n ? "not " : ""}a label of the image`);
          maps.push(make("figure", {}, make("figcaption", {}, `${method}, `, isolated(name(index))),
            make("div", { className: "frame" }, canvas)));
        });
      }
      const figure = make("figure", {}, make("figcaption", { textContent: "Image" }), make("div", { className: "frame" }, whole));
      // image and scores in the first column, the maps of a method in a row beside them
      root.append(make("article", { className: "card confusion" }, head, figure, ...maps.slice(0, 2), scores, ...maps.slice(2)));
    }
  };

  viewer();
  prototypes();
  confusions();
})();

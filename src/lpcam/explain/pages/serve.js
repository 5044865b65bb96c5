(() => {
  const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;
  let about = null; // the classifier and the limits of the server
  let shown = null; // the shown photograph, its maps and classes
  let heat = null; // colours of the maps
  let turn = 0; // answers of an earlier photograph are dropped

  // -- Messages -------------------------------------------------------------------------------------

  const say = (text) => { byId("status").textContent = text; };
  const complain = (text) => {
    byId("error").textContent = text;
    byId("error").hidden = !text;
  };
  const list = (names) => (names.length > 12 ? `${names.slice(0, 10).join(", ")} and ${names.length - 10} more` : names.join(", "));

  const ask = async (path, options) => {
    let answer;
    try {
      answer = await fetch(path, options);
    } catch {
      throw new Error("The server does not answer. Check that 'lpcam serve' is still running.");
    }
    if (!answer.ok) {
      const refusal = await answer.json().catch(() => ({}));
      throw new Error(`Refused: ${refusal.error ?? answer.statusText}.`);
    }
    return answer;
  };
  const upload = (path, photograph) => ask(path, {
    method: "POST",
    body: photograph,
    headers: { "Content-Type": /^image\//.test(photograph.type) ? photograph.type : "application/octet-stream" },
  });

  // Asks once for the classes and limits, and fills in what depends on them.
  const learn = async () => {
    if (about) return;
    about = await (await ask("about")).json();
    heat = heatColours(about.heat);
    drawRamp(byId("ramp"), heat);
    document.title = `LPCAM of ${about.name}`;
    byId("run").textContent = `of ${about.name}`;
    byId("lede").textContent = `Drop a photograph to see where a classifier of ${about.classes.length} classes `
      + `(${list(about.classes)}) finds them. The photograph stays on this machine and is not stored.`;
    byId("quality-row").hidden = about.scales.join() === "1" && !about.flip; // both qualities are the same
  };

  // Prototypes with pictures, if the run has a report; a choice about one makes the maps again.
  let prototypes = { cards: [] };
  let choices = null;
  const learnPrototypes = async () => {
    if (choices) return;
    prototypes = await (await ask("prototypes")).json();
    choices = choicesOf(prototypes.digest, prototypes.choices, () => take(shown.photograph));
    byId("prototypes").hidden = !prototypes.cards.length;
  };
  const chosenText = () => JSON.stringify(choices?.list() ?? []);
  const drawCards = (name) => byId("cards").replaceChildren(...prototypes.cards.filter((one) => one.class === name).map((one) =>
    make("li", { className: "card" },
      make("img", { src: one.picture, alt: "", width: 64, height: 64 }),
      make("p", { textContent: `${one.side} no. ${one.index}, score ${one.score.toFixed(2)}${one.kept ? "" : ", rejected"}` }),
      choices.controls({ class: one.class, side: one.side, index: one.index }))));

  // -- Maps and masks ------------------------------------------------------------------------------------

  // Class maps, one array of values from 0 to 255 each.
  const planesOf = async (array) => {
    const { shape: [count, height, width], values } = await unpack(array);
    const size = height * width;
    return Array.from({ length: count }, (_, k) => values.subarray(k * size, (k + 1) * size));
  };

  const drawHeat = (canvas, plane, opacity) =>
    paint(canvas, shown.base, (pixels) => paintHeat(pixels, plane, heat, opacity));

  // 0 for background, k + 1 for the k-th class of the table, as lpcam.masks.seeds.
  const seed = (planes, inside, threshold) => {
    const best = new Float32Array(planes[0].length).fill(255 * threshold);
    const values = new Uint8Array(planes[0].length);
    inside.forEach((k) => {
      const plane = planes[k];
      for (let place = 0; place < plane.length; place += 1) {
        if (plane[place] > best[place]) {
          best[place] = plane[place];
          values[place] = k + 1;
        }
      }
    });
    return values;
  };

  const drawMask = (canvas, values, opacity) => paint(canvas, shown.base, (pixels) => {
    const { base: { width, height }, classes } = shown;
    for (let y = 0; y < height; y += 1) {
      for (let x = 0; x < width; x += 1) {
        const place = y * width + x;
        const value = values[place];
        if (value) blend(pixels, place, classes[value - 1].color, opacity);
        const border = (x + 1 < width && values[place + 1] !== value) || (y + 1 < height && values[place + width] !== value);
        if (border) blend(pixels, place, [255, 255, 255], 0.85); // separates dark colours from dark photographs
      }
    }
  });

  // -- The viewer --------------------------------------------------------------------------------

  const inside = () => shown.classes.flatMap((one, k) => (one.box.checked ? [k] : []));
  const chosen = () => Math.max(0, shown.classes.findIndex((one) => one.radio.checked));

  let cardsOf = null; // the class whose prototypes are shown
  const drawMaps = () => {
    const k = chosen();
    const { name } = shown.classes[k];
    const opacity = Number(byId("opacity").value);
    byId("opacity-value").textContent = percent(opacity);
    document.querySelectorAll(".of").forEach((one) => { one.textContent = `of ${name}`; });
    if (cardsOf !== name) drawCards(cardsOf = name);
    for (const method of ["CAM", "LPCAM"]) {
      const canvas = byId(method.toLowerCase());
      drawHeat(canvas, shown.planes[method][k], opacity);
      canvas.setAttribute("aria-label", `${method} of ${name} over the photograph`);
    }
  };

  const draw = () => {
    if (!shown) return;
    const threshold = Number(byId("threshold").value);
    const method = byId("method").value;
    byId("threshold-value").textContent = threshold.toFixed(2);
    const selected = inside();
    const values = seed(shown.planes[method], selected, threshold);
    drawMask(byId("mask"), values, Number(byId("opacity").value));
    const counts = new Array(shown.classes.length + 1).fill(0);
    values.forEach((value) => { counts[value] += 1; });
    shown.classes.forEach((one, k) => {
      one.share.textContent = one.box.checked ? percent(counts[k + 1] / values.length) : "–";
    });
    const covered = percent(1 - counts[0] / values.length);
    const names = selected.map((k) => shown.classes[k].name);
    byId("mask-of").textContent = names.length ? `of ${list(names)}` : "(no class selected)";
    byId("mask").setAttribute("aria-label", names.length
      ? `Mask of ${list(names)} over the photograph, ${covered} of it`
      : "The photograph without a mask: no class is selected");
    byId("save").disabled = !names.length;
  };

  const row = (one, k, first) => {
    const input = (type, does, checked) => {
      const made = make("input", { type, name: type, checked, aria: { "aria-label": `${does} ${one.name}` } });
      made.addEventListener("change", type === "radio" ? drawMaps : draw);
      return made;
    };
    const swatch = make("canvas", { width: 8, height: 8, className: "swatch round", aria: { "aria-hidden": "true" } });
    const pen = swatch.getContext("2d");
    pen.fillStyle = `rgb(${one.color.map(Number).join(" ")})`;
    pen.fillRect(0, 0, 8, 8);
    one.radio = input("radio", "Show the maps of", first);
    one.radio.id = `show-${k}`;
    one.box = input("checkbox", "Mask of", one.predicted);
    one.share = make("td", { className: "number" });
    const parts = Object.entries(one.parts).sort((a, b) => b[1] - a[1]).map(([part, share]) => `${percent(share)} ${part}`);
    const label = make("label", { htmlFor: one.radio.id }, swatch, make("bdi", { textContent: one.name }),
      ...(parts.length ? [make("small", { className: "parts", textContent: ` ${parts.join(", ")}` })] : []));
    const meter = make("meter", { value: one.score, aria: { "aria-label": `Score of ${one.name}` } });
    return make("tr", { className: one.predicted ? "predicted" : "" },
      make("th", { scope: "row" }, label),
      make("td", { className: "middle" }, one.radio),
      make("td", { className: "middle" }, one.box),
      make("td", {}, make("div", { className: "meter" }, make("span", { textContent: one.score.toFixed(2) }), meter)),
      one.share);
  };

  // Of the photograph that is shown already, the chosen classes and the threshold stay.
  const show = async (answer, photograph, name, quality) => {
    const before = shown?.photograph === photograph ? shown.classes : [];
    const picture = byId("picture");
    picture.src = answer.picture;
    picture.alt = `The photograph ${name}`;
    await picture.decode();
    const [, height, width] = answer.planes.CAM.shape;
    shown = {
      photograph,
      name,
      quality,
      base: background(picture, width, height),
      planes: { CAM: await planesOf(answer.planes.CAM), LPCAM: await planesOf(answer.planes.LPCAM) },
      classes: answer.classes,
      thresholds: answer.threshold,
    };
    byId("classes").replaceChildren(...answer.classes.map((one, k) => row(one, k, k === 0)));
    before.forEach(({ index, radio, box }) => {
      const one = answer.classes.find((other) => other.index === index);
      if (one) [one.radio.checked, one.box.checked] = [radio.checked, box.checked];
    });
    const predicted = answer.classes.filter((one) => one.predicted).map((one) => one.name);
    byId("classes-note").textContent = [
      predicted.length
        ? `Classes with a score above ${about.minimum_score} are selected: ${list(predicted)}.`
        : `No class scores above ${about.minimum_score}, so none is selected; select one to put it into the mask.`,
      ...(answer.classes.length < about.classes.length
        ? [`The ${answer.classes.length} classes with the highest scores of ${about.classes.length} are listed.`] : []),
      ...answer.notes.map((note) => `${note}.`),
    ].join(" ");
    if (!before.length) byId("threshold").value = answer.threshold[byId("method").value];
    const full = quality === "full";
    byId("quality").setAttribute("aria-pressed", String(full));
    byId("quality-note").textContent = full
      ? `Maps of ${about.scales.length > 1 ? "scales" : "scale"} ${about.scales.join(", ")}${about.flip ? " and the mirror image" : ""}.`
      : "Fast maps: scale 1, no mirror image.";
    byId("viewer").hidden = false;
    byId("viewer").classList.remove("stale");
    byId("drop").classList.add("small");
    byId("choose").textContent = "Choose another";
    drawMaps();
    draw();
    say(`${name}, ${answer.width} × ${answer.height} pixels: ${predicted.length ? list(predicted) : "no class predicted"}.`
      + (full ? " Full quality." : ""));
  };

  const take = async (photograph, quality = shown?.quality ?? "fast") => {
    turn += 1;
    const mine = turn;
    complain("");
    const name = photograph.name || "pasted photograph";
    if (about && photograph.size > about.maximum_bytes) {
      say("");
      complain(`${name} is larger than ${Math.round(about.maximum_bytes / 2 ** 20)} MB; choose a smaller file.`);
      return;
    }
    say(`Processing ${name}${quality === "full" ? " in full quality" : ""} …`);
    byId("viewer").classList.add("stale");
    try {
      await learn();
      await learnPrototypes();
      const query = new URLSearchParams({ quality, choices: chosenText() });
      const answer = await (await upload(`maps?${query}`, photograph)).json();
      if (mine !== turn) return;
      await show(answer, photograph, name, quality);
    } catch (error) {
      if (mine !== turn) return;
      say("");
      complain(error.message);
      byId("viewer").classList.remove("stale");
    }
  };

  const save = async () => {
    const button = byId("save");
    const { photograph } = shown;
    const query = new URLSearchParams({
      threshold: byId("threshold").value,
      method: byId("method").value,
      quality: shown.quality,
      choices: chosenText(),
      classes: inside().map((k) => shown.classes[k].index).join(","),
    });
    const name = `${shown.name.replace(/\.[^.]*$/, "").replace(/[^\p{L}\p{N} ._-]/gu, "_") || "photograph"}.mask.png`;
    button.disabled = true;
    complain("");
    say("Computing the mask at full size …");
    try {
      const blob = await (await upload(`mask?${query}`, photograph)).blob();
      download(blob, name);
      say(`Saved as ${name}.`);
    } catch (error) {
      say("");
      complain(error.message);
    }
    draw();
  };

  // -- Input -----------------------------------------------------------------------------------

  byId("file").addEventListener("change", (event) => {
    if (event.target.files[0]) take(event.target.files[0]);
    event.target.value = ""; // the same file may be chosen again
  });
  const drag = (over) => (event) => {
    event.preventDefault();
    document.body.classList.toggle("over", over);
  };
  addEventListener("dragover", drag(true));
  addEventListener("dragleave", (event) => { if (!event.relatedTarget) drag(false)(event); });
  addEventListener("drop", (event) => {
    drag(false)(event);
    const dropped = event.dataTransfer?.files[0];
    if (dropped) take(dropped);
    else complain("This is not a file. Save the photograph first, then drop the file.");
  });
  addEventListener("paste", (event) => {
    const pasted = event.clipboardData?.files[0];
    if (pasted) take(pasted);
  });
  byId("threshold").addEventListener("input", draw);
  byId("opacity").addEventListener("input", () => { if (shown) { drawMaps(); draw(); } });
  byId("method").addEventListener("change", () => {
    if (shown) byId("threshold").value = shown.thresholds[byId("method").value];
    draw();
  });
  byId("quality").addEventListener("click", () => take(shown.photograph, shown.quality === "full" ? "fast" : "full"));
  byId("save").addEventListener("click", save);
  byId("save-choices").addEventListener("click", () => choices.save());

  learn().catch((error) => complain(error.message));
})();

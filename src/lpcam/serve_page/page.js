"use strict";
(() => {
  const at = (id) => document.getElementById(id);
  const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;
  let about = null; // of the run
  let file = null; // the photograph that is shown
  let shown = null; // its maps
  let turn = 0; // answers of an earlier photograph are dropped

  // -- Words -------------------------------------------------------------------------------------

  const say = (text) => { at("status").textContent = text; };
  const complain = (text) => {
    at("error").textContent = text;
    at("error").hidden = !text;
  };
  const list = (names) => (names.length > 12 ? `${names.slice(0, 10).join(", ")} and ${names.length - 10} more` : names.join(", "));

  const ask = async (path, options) => {
    let answer;
    try {
      answer = await fetch(path, options);
    } catch {
      throw new Error("The program behind this page does not answer. Is 'lpcam serve' still running?");
    }
    if (!answer.ok) {
      const told = await answer.json().catch(() => ({}));
      throw new Error(`Refused: ${told.error ?? answer.statusText}.`);
    }
    return answer;
  };
  const upload = (path, photograph) => ask(path, {
    method: "POST",
    body: photograph,
    headers: { "Content-Type": /^image\//.test(photograph.type) ? photograph.type : "application/octet-stream" },
  });

  // -- Planes ------------------------------------------------------------------------------------

  const unpack = async ({ shape: [count, height, width], data }) => {
    const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    const values = new Uint8Array(await new Response(stream).arrayBuffer());
    const size = height * width;
    return { height, width, planes: Array.from({ length: count }, (_, k) => values.subarray(k * size, (k + 1) * size)) };
  };

  // The colours at equal steps between the control points that the Python side draws with.
  const heatColours = (points) => {
    const colours = new Uint8Array(256 * 3);
    for (let value = 0; value < 256; value += 1) {
      const place = (value / 255) * (points.length - 1);
      const low = Math.min(Math.floor(place), points.length - 2);
      for (let channel = 0; channel < 3; channel += 1) {
        const [a, b] = [points[low][channel], points[low + 1][channel]];
        colours[3 * value + channel] = Math.round(a + (b - a) * (place - low));
      }
    }
    return colours;
  };

  const paint = (canvas, { width, height, base }, colour) => {
    canvas.width = width;
    canvas.height = height;
    const pixels = new ImageData(new Uint8ClampedArray(base), width, height);
    colour(pixels.data);
    canvas.getContext("2d").putImageData(pixels, 0, 0);
  };
  const blend = (pixels, place, colour, offset, weight) => {
    for (let channel = 0; channel < 3; channel += 1) {
      pixels[4 * place + channel] += weight * (colour[offset + channel] - pixels[4 * place + channel]);
    }
  };

  const drawHeat = (canvas, plane, opacity) => paint(canvas, shown, (pixels) => {
    for (let place = 0; place < plane.length; place += 1) {
      blend(pixels, place, shown.heat, 3 * plane[place], (opacity * (1 + (2 * plane[place]) / 255)) / 3);
    }
  });

  // 0 for background, k + 1 for the k-th class of the table: as lpcam.masks.seeds.
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

  const drawMask = (canvas, values, opacity) => paint(canvas, shown, (pixels) => {
    const { width, height, classes } = shown;
    for (let y = 0; y < height; y += 1) {
      for (let x = 0; x < width; x += 1) {
        const place = y * width + x;
        const value = values[place];
        if (value) blend(pixels, place, classes[value - 1].color, 0, opacity);
        const border = (x + 1 < width && values[place + 1] !== value) || (y + 1 < height && values[place + width] !== value);
        if (border) blend(pixels, place, [255, 255, 255], 0, 0.85); // dark colours on dark photographs
      }
    }
  });

  // -- The viewer --------------------------------------------------------------------------------

  const inside = () => shown.classes.flatMap((one, k) => (one.box.checked ? [k] : []));
  const chosen = () => Math.max(0, shown.classes.findIndex((one) => one.radio.checked));

  const drawMaps = () => {
    const k = chosen();
    const { name } = shown.classes[k];
    const opacity = Number(at("opacity").value);
    at("opacity-value").textContent = percent(opacity);
    document.querySelectorAll(".of").forEach((one) => { one.textContent = `of ${name}`; });
    for (const method of ["CAM", "LPCAM"]) {
      const canvas = at(method.toLowerCase());
      drawHeat(canvas, shown.planes[method][k], opacity);
      canvas.setAttribute("aria-label", `${method} of ${name} over the photograph`);
    }
  };

  const draw = () => {
    if (!shown) return;
    const threshold = Number(at("threshold").value);
    const method = at("method").value;
    at("threshold-value").textContent = threshold.toFixed(2);
    const ticked = inside();
    const values = seed(shown.planes[method], ticked, threshold);
    drawMask(at("mask"), values, Number(at("opacity").value));
    const counts = new Array(shown.classes.length + 1).fill(0);
    values.forEach((value) => { counts[value] += 1; });
    shown.classes.forEach((one, k) => {
      one.share.textContent = one.box.checked ? percent(counts[k + 1] / values.length) : "–";
    });
    const covered = percent(1 - counts[0] / values.length);
    const names = ticked.map((k) => shown.classes[k].name);
    at("mask-of").textContent = names.length ? `of ${list(names)}` : "(no class ticked)";
    at("mask").setAttribute("aria-label", names.length
      ? `Mask of ${list(names)} over the photograph, ${covered} of it`
      : "The photograph without a mask, for no class is ticked");
    at("save").disabled = !names.length;
  };

  const row = (one, k, first) => {
    const line = document.createElement("tr");
    line.classList.toggle("predicted", one.predicted);
    const cell = (kind, ...children) => {
      const made = document.createElement(kind);
      made.append(...children);
      line.append(made);
      return made;
    };
    const input = (type, does, checked) => {
      const made = document.createElement("input");
      made.type = type;
      made.name = type;
      made.checked = checked;
      made.setAttribute("aria-label", `${does} ${one.name}`);
      made.addEventListener("change", type === "radio" ? drawMaps : draw);
      return made;
    };
    const swatch = document.createElement("canvas");
    swatch.width = 8;
    swatch.height = 8;
    swatch.className = "swatch";
    swatch.setAttribute("aria-hidden", "true");
    const pen = swatch.getContext("2d");
    pen.fillStyle = `rgb(${one.color.map(Number).join(" ")})`;
    pen.fillRect(0, 0, 8, 8);
    const name = document.createElement("bdi");
    name.textContent = one.name;
    one.radio = input("radio", "Show the maps of", first);
    one.radio.id = `show-${k}`;
    const label = document.createElement("label");
    label.htmlFor = one.radio.id;
    label.append(swatch, name);
    cell("th", label).scope = "row";
    one.box = input("checkbox", "Mask of", one.predicted);
    cell("td", one.radio).className = "middle";
    cell("td", one.box).className = "middle";
    const meter = document.createElement("meter");
    meter.value = one.score;
    meter.setAttribute("aria-label", `Score of ${one.name}`);
    const figure = document.createElement("span");
    figure.textContent = one.score.toFixed(2);
    const score = document.createElement("div");
    score.className = "score";
    score.append(figure, meter);
    cell("td", score);
    one.share = cell("td");
    one.share.className = "number";
    return line;
  };

  const show = async (answer, name) => {
    const [cam, lpcam] = await Promise.all([unpack(answer.planes.CAM), unpack(answer.planes.LPCAM)]);
    const picture = at("picture");
    picture.src = answer.picture;
    picture.alt = `The photograph ${name}`;
    await picture.decode();
    const { width, height } = cam;
    const canvas = document.createElement("canvas");
    canvas.width = width;
    canvas.height = height;
    const pen = canvas.getContext("2d", { willReadFrequently: true });
    pen.imageSmoothingQuality = "high";
    pen.drawImage(picture, 0, 0, width, height);
    shown = {
      width, height, name,
      base: pen.getImageData(0, 0, width, height).data,
      planes: { CAM: cam.planes, LPCAM: lpcam.planes },
      classes: answer.classes,
      thresholds: answer.threshold,
      heat: heatColours(about.heat),
    };
    at("classes").replaceChildren(...answer.classes.map((one, k) => row(one, k, k === 0)));
    const predicted = answer.classes.filter((one) => one.predicted).map((one) => one.name);
    at("classes-note").textContent = [
      predicted.length
        ? `A score of the classifier above ${about.minimum_score} counts as seen: ${list(predicted)}.`
        : `No class scores above ${about.minimum_score}, so none is ticked; tick one to put it into the mask.`,
      ...(answer.classes.length < about.classes.length
        ? [`The ${answer.classes.length} highest of ${about.classes.length} classes are listed.`] : []),
      ...answer.notes.map((note) => `${note}.`),
    ].join(" ");
    at("threshold").value = answer.threshold[at("method").value];
    const ramp = at("ramp").getContext("2d");
    for (let x = 0; x < 96; x += 1) {
      const value = 3 * Math.round((x / 95) * 255);
      ramp.fillStyle = `rgb(${shown.heat[value]} ${shown.heat[value + 1]} ${shown.heat[value + 2]})`;
      ramp.fillRect(x, 0, 1, 8);
    }
    at("viewer").hidden = false;
    at("viewer").classList.remove("stale");
    at("drop").classList.add("small");
    at("choose").textContent = "Choose another";
    drawMaps();
    draw();
    say(`${name}, ${answer.width} × ${answer.height} pixels: ${predicted.length ? list(predicted) : "no class is seen"}.`);
  };

  const take = async (photograph) => {
    turn += 1;
    const mine = turn;
    complain("");
    const name = photograph.name || "pasted photograph";
    if (about && photograph.size > about.maximum_bytes) {
      say("");
      complain(`${name} is larger than ${Math.round(about.maximum_bytes / 2 ** 20)} MB; choose a smaller file.`);
      return;
    }
    say(`Looking at ${name} …`);
    at("viewer").classList.add("stale");
    try {
      about ??= await (await ask("about")).json(); // dropped before it was there
      const answer = await (await upload("maps", photograph)).json();
      if (mine !== turn) return;
      file = photograph;
      await show(answer, name);
    } catch (error) {
      if (mine !== turn) return;
      say("");
      complain(error.message);
      at("viewer").classList.remove("stale");
    }
  };

  const save = async () => {
    const button = at("save");
    const photograph = file;
    const query = new URLSearchParams({
      threshold: at("threshold").value,
      method: at("method").value,
      classes: inside().map((k) => shown.classes[k].index).join(","),
    });
    const name = `${shown.name.replace(/\.[^.]*$/, "").replace(/[^\p{L}\p{N} ._-]/gu, "_") || "photograph"}.mask.png`;
    button.disabled = true;
    complain("");
    say("Making the mask at full size …");
    try {
      const blob = await (await upload(`mask?${query}`, photograph)).blob();
      const link = document.createElement("a");
      link.href = URL.createObjectURL(blob);
      link.download = name;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10000);
      say(`Saved as ${name}.`);
    } catch (error) {
      say("");
      complain(error.message);
    }
    draw();
  };

  // -- Ways in -----------------------------------------------------------------------------------

  at("file").addEventListener("change", (event) => {
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
    else complain("That is no file. Save the photograph first, then drop the file.");
  });
  addEventListener("paste", (event) => {
    const pasted = event.clipboardData?.files[0];
    if (pasted) take(pasted);
  });
  at("threshold").addEventListener("input", draw);
  at("opacity").addEventListener("input", () => { if (shown) { drawMaps(); draw(); } });
  at("method").addEventListener("change", () => {
    if (shown) at("threshold").value = shown.thresholds[at("method").value];
    draw();
  });
  at("save").addEventListener("click", save);

  (async () => {
    try {
      about ??= await (await ask("about")).json();
    } catch (error) {
      complain(error.message);
      return;
    }
    document.title = `LPCAM of ${about.name}`;
    at("run").textContent = `of ${about.name}`;
    at("lede").textContent = `Drop a photograph, and see where a classifier of ${about.classes.length} classes `
      + `(${list(about.classes)}) finds what it names. The photograph stays on this machine, and nothing of it is kept.`;
  })();
})();

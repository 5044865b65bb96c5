"use strict";
// Helpers of the report and of the served page. Text is always inserted as text, never as HTML.
const { byId, make, unpack, background, heatColours, paint, blend, paintHeat, drawRamp, download, choicesOf } = (() => {
  const byId = (id) => document.getElementById(id);

  const make = (tag, properties = {}, ...children) => {
    const { dataset, aria, ...plain } = properties;
    const made = Object.assign(document.createElement(tag), plain);
    Object.assign(made.dataset, dataset);
    for (const [key, value] of Object.entries(aria ?? {})) made.setAttribute(key, value);
    made.append(...children);
    return made;
  };

  // An array of lpcam.explain.web.encode_array: its shape and values.
  const unpack = async ({ shape, type, data }) => {
    const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    const buffer = await new Response(stream).arrayBuffer();
    return { shape, values: type === "uint16" ? new Uint16Array(buffer) : new Uint8Array(buffer) };
  };

  // The pixels of an image at a size.
  const background = (image, width, height) => {
    const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
    context.imageSmoothingQuality = "high";
    context.drawImage(image, 0, 0, width, height);
    return context.getImageData(0, 0, width, height);
  };

  // 256 colours between the control points that lpcam.masks.overlay uses.
  const heatColours = (points) => Array.from({ length: 256 }, (_, value) => {
    const at = (value / 255) * (points.length - 1);
    const low = Math.min(Math.floor(at), points.length - 2);
    return points[low].map((from, c) => from + (at - low) * (points[low + 1][c] - from));
  });

  // Draws pixels on a canvas, after a function has changed a copy of them.
  const paint = (canvas, base, change) => {
    if (canvas.width !== base.width || canvas.height !== base.height) {
      canvas.width = base.width;
      canvas.height = base.height;
    }
    const result = new ImageData(new Uint8ClampedArray(base.data), base.width, base.height);
    change?.(result.data);
    canvas.getContext("2d").putImageData(result, 0, 0);
  };
  const blend = (pixels, i, colour, weight) => {
    for (let c = 0; c < 3; c++) pixels[4 * i + c] += weight * (colour[c] - pixels[4 * i + c]);
  };
  // plane: values from 0 to 255.
  const paintHeat = (pixels, plane, colours, opacity) => {
    for (let i = 0; i < plane.length; i++) {
      blend(pixels, i, colours[Math.round(plane[i])], (opacity * (1 + (2 * plane[i]) / 255)) / 3);
    }
  };
  const drawRamp = (canvas, colours) => {
    const context = canvas.getContext("2d");
    colours.forEach((colour, value) => {
      context.fillStyle = `rgb(${colour.map(Math.round).join(" ")})`;
      context.fillRect(value / 2, 0, 1, 10);
    });
  };
  const download = (blob, name) => {
    const link = make("a", { href: URL.createObjectURL(blob), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };

  // Choices about prototypes, as lpcam.method.choices: those there are, and controls that change them.
  const choicesOf = (digest, given, changed) => {
    const all = new Map();
    const key = (one) => [one.class, one.side, one.index].join("\n");
    given.forEach((one) => all.set(key(one), { ...one }));
    const actionOf = (one) => all.get(key(one))?.action ?? "";
    const set = (one, field, value) => {
      const next = { reason: "", ...one, ...all.get(key(one)), by: "person" };
      if (value) next[field] = value;
      else delete next[field];
      if (next.action || next.name || next.weight) all.set(key(one), next);
      else all.delete(key(one));
      changed(field);
    };
    // one: class, side and index of a prototype
    const controls = (one) => {
      const what = `${one.side} prototype no. ${one.index} of ${one.class}`;
      const words = [["", "as fitted"], ["keep", "keep"], ["drop", "drop"], ["context", "it is context"]];
      const action = make("select", { className: "action", aria: { "aria-label": `Choice about ${what}` } },
        ...words.filter(([value]) => value !== "context" || one.side === "foreground")
          .map(([value, textContent]) => make("option", { value, textContent })));
      action.value = actionOf(one);
      action.addEventListener("change", () => set(one, "action", action.value));
      const part = make("input", { type: "text", maxLength: 60, placeholder: "name", value: all.get(key(one))?.name ?? "",
        aria: { "aria-label": `Name of ${what}` } });
      part.addEventListener("change", () => set(one, "name", part.value.trim()));
      return make("div", { className: "choice" }, action, ...(one.side === "foreground" ? [part] : []));
    };
    const list = () => [...all.values()];
    const save = () => {
      // JSON is YAML, but for the control characters
      const row = (one) => `- ${JSON.stringify(one).replace(/[\u007f-\u009f]/g, (c) => `\\u00${c.charCodeAt(0).toString(16)}`)}\n`;
      const text = `format: 1\nprototypes: ${digest}\nchoices:${all.size ? "" : " []"}\n${list().map(row).join("")}`;
      download(new Blob([text], { type: "application/yaml" }), "prototypes.yaml");
    };
    return { actionOf, controls, list, save };
  };
  return { byId, make, unpack, background, heatColours, paint, blend, paintHeat, drawRamp, download, choicesOf };
})();

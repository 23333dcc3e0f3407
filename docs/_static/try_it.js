// The page "Try it": a picture in, class scores, time and layer outputs out. The network itself is msunet.js.
"use strict";

(() => {
  const MEMORY = 15; // runs that the median time is of
  const MOST_MAPS = 64; // shown of one layer
  const SPECIMENS = { sea: drawSea, road: drawRoad, apple: drawApple, sunflower: drawSunflower };

  const find = (id) => document.getElementById(`tryit-${id}`);
  let network, names, namedImages, camera;
  const times = [];
  const outputs = new Map(); // of the last picture: step name -> {step, values}

  function say(text) {
    find("status").textContent = text;
  }

  // --- the network -------------------------------------------------------------------------------

  function start(bytes, source) {
    network = MSUNet.decode(bytes);
    const { network: config, accuracy } = network.info;
    const images = accuracy?.fingerprint ?? "unknown";
    namedImages ??= images;
    // Another network that was tested on the same images has the same classes.
    const known = images === namedImages && config.num_classes === MSUNET_FILE.names.length;
    names = known ? MSUNET_FILE.names : Array.from({ length: config.num_classes }, (_, i) => `class ${i}`);
    times.length = 0;
    find("network").textContent =
      `${source}: MSUNet-${config.variant}, width ${config.width}, ${config.num_classes} classes, ` +
      `${(bytes.length / 1000).toFixed(0)} kB. ` +
      (accuracy
        ? `Of ${accuracy.images.toLocaleString("en")} test pictures it names ${accuracy.top1.toFixed(2)} % ` +
          `right, and ${accuracy.top5.toFixed(2)} % among its first five.`
        : "The file does not say how often it is right.");
  }

  // --- a picture in ------------------------------------------------------------------------------

  // The middle square of anything that a canvas draws, as rgba of side x side pixels.
  function middleSquare(source, width, height) {
    const square = Math.min(width, height);
    const side = Math.min(square, 2048); // a canvas much larger fails on phones
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = side;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.fillStyle = "white"; // behind what is transparent
    context.fillRect(0, 0, side, side);
    context.drawImage(source, (width - square) / 2, (height - square) / 2, square, square, 0, 0, side, side);
    return { rgba: context.getImageData(0, 0, side, side).data, side };
  }

  async function openPicture(file) {
    stopCamera();
    let bitmap;
    try {
      bitmap = await createImageBitmap(file);
    } catch {
      say(`${file.name} is no picture that this browser can read; try a PNG or JPEG.`);
      return;
    }
    const { width, height } = bitmap;
    const { rgba, side } = middleSquare(bitmap, width, height);
    look(rgba, side, `${file.name}, ${width} × ${height} pixels`);
  }

  function look(rgba, side, what) {
    const pixels = MSUNet.shrink(rgba, side);
    showPicture(pixels, what);
    const began = performance.now();
    outputs.clear();
    const scores = MSUNet.run(network, MSUNet.normalise(pixels, network.info), (step, values) => {
      outputs.set(step.name, { step, values });
    });
    times.push(performance.now() - began);
    if (times.length > MEMORY) times.shift();
    showAnswer(scores, what);
    showLayer();
  }

  // --- the answer --------------------------------------------------------------------------------

  function showPicture(pixels, what) {
    const canvas = find("picture");
    canvas.setAttribute("aria-label", `What the network sees of ${what}: its middle, 32 by 32 pixels`);
    const image = new ImageData(MSUNet.SIZE, MSUNet.SIZE);
    for (let p = 0; p < MSUNet.SIZE ** 2; p++) {
      image.data.set([...pixels.subarray(3 * p, 3 * p + 3), 255], 4 * p);
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
  }

  function showAnswer(scores, what) {
    const largest = Math.max(...scores);
    const parts = Array.from(scores, (score) => Math.exp(score - largest));
    const total = parts.reduce((sum, part) => sum + part, 0);
    const order = Array.from(scores.keys()).sort((a, b) => scores[b] - scores[a]);
    find("answer").replaceChildren(
      ...order.slice(0, 5).map((i) => {
        const percent = (100 * parts[i]) / total;
        const row = document.createElement("tr");
        const cell = (tag, text) => {
          const made = row.appendChild(document.createElement(tag));
          made.textContent = text;
          return made;
        };
        cell("th", names[i]).scope = "row";
        const bar = cell("td", "").appendChild(document.createElement("div"));
        bar.className = "msunet-bar";
        bar.style.width = `${percent}%`;
        cell("td", `${percent.toFixed(1)} %`);
        cell("td", scores[i].toFixed(3));
        return row;
      }),
    );
    const sorted = [...times].sort((a, b) => a - b);
    const [last, median] = [times.at(-1), sorted[sorted.length >> 1]];
    find("time").textContent =
      `${last.toFixed(0)} ms for this picture` +
      (times.length > 1 ? `, ${median.toFixed(0)} ms the median of the last ${times.length}` : "") +
      ", on one core, in plain JavaScript; the first ones while the browser still compiles it.";
    if (!camera) say(`${what}: ${names[order[0]]}, with ${((100 * parts[order[0]]) / total).toFixed(0)} %.`);
  }

  // --- the layers --------------------------------------------------------------------------------

  const KINDS = {
    conv: "convolution",
    norm: "batch norm",
    relu: "ReLU",
    swish: "Swish",
    se: "squeeze-excitation",
    skip: "skip addition",
    pool: "average pool",
    linear: "linear",
  };

  function listLayers() {
    const shown = find("layer").value;
    const options = network.steps
      .filter((step) => step.kind !== "keep")
      .map((step) => {
        const size = step.size > 1 ? ` × ${step.size} × ${step.size}` : "";
        return new Option(`${step.name} (${KINDS[step.kind]}, ${step.channels}${size})`, step.name);
      });
    find("layer").replaceChildren(...options);
    find("layer").value = options.some((option) => option.value === shown) ? shown : "act1";
  }

  // The maps of one layer side by side, black the layer's least value and white its largest.
  function showLayer() {
    const found = outputs.get(find("layer").value);
    if (!found) return;
    const { step, values } = found;
    const [pixels, maps] = [step.size ** 2, Math.min(step.channels, step.size > 1 ? MOST_MAPS : Infinity)];
    const [across, tile] = [Math.min(maps, step.size > 1 ? 8 : 32), step.size + (step.size > 1 ? 1 : 0)];
    const [low, high] = values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
    const canvas = find("maps");
    [canvas.width, canvas.height] = [across * tile, Math.ceil(maps / across) * tile];
    const context = canvas.getContext("2d");
    const image = context.createImageData(canvas.width, canvas.height);
    for (let i = 0; i < maps * pixels; i++) {
      const [map, y, x] = [Math.floor(i / pixels), Math.floor((i % pixels) / step.size), i % step.size];
      const at = (Math.floor(map / across) * tile + y) * canvas.width + (map % across) * tile + x;
      const grey = high > low ? 255 * Math.sqrt((values[i] - low) / (high - low)) : 0; // so that dark maps show
      image.data.set([grey, grey, grey, 255], 4 * at);
    }
    context.putImageData(image, 0, 0);
    const zeros = values.reduce((sum, v) => sum + (v === 0), 0) / values.length;
    const words =
      `${maps < step.channels ? `The first ${maps} of ${step.channels}` : `All ${maps}`} ` +
      `${step.size > 1 ? `maps of ${step.size} × ${step.size}` : "values"}: black is ${low.toFixed(2)}, ` +
      `white ${high.toFixed(2)}. ${(100 * zeros).toFixed(0)} % of all values are exactly 0.` +
      weightsOf(step);
    canvas.setAttribute("aria-label", `Output of ${step.name}. ${words}`);
    find("caption").textContent = words;
  }

  function weightsOf(step) {
    if (!step.parts) return "";
    const kinds = { T: "ternary", B: "binary", S: "sparse", D: "dense" };
    const parts = step.parts.map(
      (part) =>
        `${kinds[part.letter]} (${part.kernel} × ${part.kernel}), ${(100 * part.zeros).toFixed(0)} % zeros`,
    );
    return ` Weights: ${[...new Set(parts)].join("; ")}.`;
  }

  // --- the camera --------------------------------------------------------------------------------

  async function startCamera() {
    if (!navigator.mediaDevices) {
      say(
        "This browser gives the camera to no page of this address; open the page from a file or over https.",
      );
      return;
    }
    try {
      camera = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    } catch (error) {
      say(`No camera: ${error.message}.`);
      return;
    }
    const video = document.createElement("video");
    video.muted = video.playsInline = true;
    video.srcObject = camera;
    await video.play();
    find("camera").textContent = "Stop the camera";
    say("The camera runs; its pictures stay in this page.");
    const frame = () => {
      if (!camera) return;
      const { rgba, side } = middleSquare(video, video.videoWidth, video.videoHeight);
      look(rgba, side, "the camera");
      setTimeout(frame, 50); // leaves the page time to answer
    };
    frame();
  }

  function stopCamera() {
    camera?.getTracks().forEach((track) => track.stop());
    camera = null;
    find("camera").textContent = "Use the camera";
  }

  // --- pictures for a start, drawn here, 128 x 128 -----------------------------------------------

  function drawSpecimen(name) {
    stopCamera();
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = 128;
    SPECIMENS[name](canvas.getContext("2d"));
    const { rgba, side } = middleSquare(canvas, 128, 128);
    look(rgba, side, `our drawing "${name}"`);
  }

  function shade(context, y, height, ...colours) {
    const gradient = context.createLinearGradient(0, y, 0, y + height);
    colours.forEach((colour, i) => gradient.addColorStop(i / (colours.length - 1), colour));
    context.fillStyle = gradient;
    context.fillRect(0, y, 128, height);
  }

  function disc(context, x, y, radius, ...colours) {
    const gradient = context.createRadialGradient(x - radius / 3, y - radius / 3, radius / 8, x, y, radius);
    colours.forEach((colour, i) => gradient.addColorStop(i / Math.max(1, colours.length - 1), colour));
    context.fillStyle = gradient;
    context.beginPath();
    context.arc(x, y, radius, 0, 7);
    context.fill();
  }

  function drawSea(context) {
    shade(context, 0, 60, "#7fb2e0", "#dfeaf2");
    shade(context, 60, 68, "#3d7396", "#0f3550");
    for (let y = 64; y < 128; y += 7) {
      context.fillStyle = "rgba(210, 230, 240, .25)";
      context.fillRect((y * 37) % 60, y, 30 + (y % 40), 1 + (y - 60) / 30);
    }
  }

  function drawRoad(context) {
    shade(context, 0, 56, "#8db9e6", "#e6eef5");
    shade(context, 56, 72, "#7d8a4a", "#5d7032");
    const band = (colour, left, right, tip) => {
      context.fillStyle = colour;
      context.beginPath();
      context.moveTo(64 - tip, 56);
      context.lineTo(64 + tip, 56);
      context.lineTo(right, 128);
      context.lineTo(left, 128);
      context.fill();
    };
    band("#5f6064", 8, 120, 3);
    band("#e8e4d0", 62, 66, 0.5);
  }

  function drawApple(context) {
    shade(context, 0, 128, "#ffffff", "#f0f0f0");
    disc(context, 64, 70, 46, "#ff8a70", "#c81e1e", "#7d0c0c");
    context.fillStyle = "#5a3a1a";
    context.fillRect(62, 12, 5, 22);
    context.fillStyle = "#4c8c2b";
    context.beginPath();
    context.ellipse(82, 20, 16, 7, -0.4, 0, 7);
    context.fill();
  }

  function drawSunflower(context) {
    shade(context, 0, 128, "#5c7f3a", "#2f4f1f");
    for (let i = 0; i < 36; i++) {
      const [angle, length] = [(i * Math.PI) / 18, i % 2 ? 50 : 58];
      context.fillStyle = i % 2 ? "#f0b400" : "#ffd21f";
      context.beginPath();
      context.ellipse(
        64 + (Math.cos(angle) * length) / 1.7,
        64 + (Math.sin(angle) * length) / 1.7,
        26,
        8,
        angle,
        0,
        7,
      );
      context.fill();
    }
    disc(context, 64, 64, 25, "#7a4a1c", "#3a1f0b");
  }

  // --- the controls ------------------------------------------------------------------------------

  function listen() {
    const zone = find("zone");
    for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
      zone.addEventListener(kind, (event) => {
        event.preventDefault(); // else the browser leaves the page for the picture
        zone.classList.toggle("msunet-over", kind === "dragenter" || kind === "dragover");
      });
    }
    zone.addEventListener(
      "drop",
      ({ dataTransfer }) => dataTransfer.files[0] && openPicture(dataTransfer.files[0]),
    );
    find("file").addEventListener("change", ({ target }) => target.files[0] && openPicture(target.files[0]));
    find("camera").addEventListener("click", () => (camera ? stopCamera() : startCamera()));
    find("layer").addEventListener("change", showLayer);
    for (const button of document.querySelectorAll("[data-specimen]")) {
      button.addEventListener("click", () => drawSpecimen(button.dataset.specimen));
    }
    find("own").addEventListener("change", async ({ target }) => {
      const file = target.files[0];
      if (!file) return;
      try {
        start(new Uint8Array(await file.arrayBuffer()), file.name);
      } catch (error) {
        say(`${file.name}: ${error.message}.`);
        return;
      }
      listLayers();
      drawSpecimen("sea");
    });
  }

  if (!globalThis.MSUNET_FILE) {
    say("The network is missing beside this page (_static/msunet_v3.js); build the site again.");
    return;
  }
  start(MSUNet.fromBase64(MSUNET_FILE.packed), "The network of this study");
  listLayers();
  listen();
  drawSpecimen("sea");
})();

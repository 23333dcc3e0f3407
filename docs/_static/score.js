// The score: what storing an MSUNet and running one picture through it costs, by the rules of the
// specification (§9), and the page that moves its parts. MSUNetScore.count is a pure function.
"use strict";

globalThis.MSUNetScore = (() => {
  // WideResNet-28-10 on CIFAR-100, the challenge's unit (its scoring page).
  const REFERENCE = { params: 36.5e6, flops: 10.49e9 };
  const FULL_BITS = 32;
  const SPARSE_FROM = 0.4; // the published counter takes a bitmask from this share of zeros on
  const PUBLISHED = {
    v1: { params: 0.2119e6, flops: 118.6e6, score: 0.01711 },
    v2: { params: 0.1204e6, flops: 97.01e6, score: 0.01255 },
    v3: { params: 0.09853e6, flops: 85.27e6, score: 0.01083 },
  };

  // A setting:
  //   variant  "v1", "v2" or "v3"; width and classes as of build_msunet
  //   weights  of the 1x1 convolutions: "ternary", "binary" or "float"
  //   bits     {weights, activations, sums}; O0 is 32, 32, 32 and O3 is 16, 16, 32
  //   zeros    shares {ternary, se, dw, classifier}; known shares of single layers, by name, go before
  //   official count as the challenge's own counter does where that is known to differ
  // -> {params, mults, adds, flops, value, layers: [{name, kind, params, mults, adds}]}
  function count(setting) {
    const { variant, weights, bits, zeros, width = 1, classes = 100, known = {}, official = false } = setting;
    // What one value or operation counts: stored, multiplied, another operation on activations, summed.
    const stored = bits.weights / FULL_BITS;
    const product = Math.max(bits.weights, bits.activations) / FULL_BITS;
    const value = bits.activations / FULL_BITS;
    const sum = bits.sums / FULL_BITS;
    const poolSum = official ? sum : value;
    const layers = [];
    const add = (name, kind, params, mults, adds) => layers.push({ name, kind, params, mults, adds });

    function zerosOf({ name, role }, size) {
      if (name in known) return known[name];
      if (role === "1x1") return weights === "ternary" ? zeros.ternary : 0;
      // A pruner zeroes whole weights.
      return Math.floor((zeros[role] ?? 0) * size) / size;
    }
    function conv(part, pixels) {
      const fanIn = part.inputs * part.kernel ** 2;
      const [size, out] = [part.out * fanIn, part.out * pixels];
      const signed = part.role === "1x1" && weights !== "float" ? weights : null;
      const share = zerosOf(part, size);
      const masked = signed === "ternary" || (!signed && (official ? share > 0 : share >= SPARSE_FROM));
      const left = masked ? 1 - share : 1;
      const mask = masked ? size / FULL_BITS : 0;
      const adds = Math.max(fanIn * left - 1, 0) * out * sum;
      if (signed) {
        const params = mask + (size * left) / FULL_BITS + stored;
        add(part.name, `${signed} conv`, params, (fanIn * left * out) / FULL_BITS + out * product, adds);
        return;
      }
      const bias = part.bias ? 1 : 0;
      const params = mask + size * left * stored + bias * part.out * stored;
      add(
        part.name,
        masked ? "sparse conv" : "dense conv",
        params,
        fanIn * left * out * product,
        adds + bias * out * sum,
      );
    }
    function linear(part) {
      const size = part.inputs * part.out;
      const share = official ? zerosOf(part, size) : 0;
      const left = 1 - share;
      const bias = official ? part.out : 0; // the published counter keeps it out
      const params = (share ? size / FULL_BITS : 0) + (size * left + bias) * stored;
      const adds = Math.max(part.inputs * left - 1, 0) * part.out * sum + bias * sum;
      add(part.name, "linear", params, size * left * product, adds);
    }

    let [size, channels] = [MSUNet.SIZE, 3];
    for (const step of MSUNet.outline({ variant, width, num_classes: classes })) {
      const { kind, name, parts } = step;
      const pixels = step.size ** 2;
      const out = step.channels * pixels;
      if (kind === "conv") parts.forEach((part) => conv(part, pixels));
      if (kind === "norm") add(name, "batch norm, merged", step.channels * stored, 0, out * value);
      if (kind === "relu") add(name, "ReLU", 0, out * value, 0);
      if (kind === "swish") add(name, "Swish", 0, 3 * out * value, out * value);
      if (kind === "skip") add(name, "skip addition", 0, 0, out * value);
      if (kind === "pool") add(name, "average pool", 0, out * value, (size ** 2 - 1) * out * poolSum);
      if (kind === "linear") linear(parts[0]);
      if (kind === "se") {
        const [reduce, expand] = parts;
        conv(reduce, 1);
        add(`${name}.act`, "Swish", 0, 3 * reduce.out * value, reduce.out * value);
        conv(expand, 1);
        add(`${name}.gate`, "sigmoid", 0, 2 * expand.out * value, expand.out * value);
        add(name, "SE pool and gate", 0, 2 * out * value, (pixels - 1) * channels * poolSum);
      }
      [size, channels] = [step.size, step.channels];
    }
    const total = (measure) => layers.reduce((whole, layer) => whole + layer[measure], 0);
    const [params, mults, adds] = ["params", "mults", "adds"].map(total);
    const flops = mults + adds;
    return { params, mults, adds, flops, value: params / REFERENCE.params + flops / REFERENCE.flops, layers };
  }

  // The amount between from and to at which measure, which runs one way, gives what is wanted; or null.
  function solve(measure, wanted, from, to) {
    if ((measure(from) - wanted) * (measure(to) - wanted) > 0) return null;
    const falls = measure(from) > measure(to);
    for (let i = 0; i < 60; i++) {
      const middle = (from + to) / 2;
      if (measure(middle) > wanted === falls) from = middle;
      else to = middle;
    }
    return (from + to) / 2;
  }

  // How v1, v2 and v3 were published; the share of ternary zeros, which was not, is that of their operations.
  function published(name) {
    const half = name !== "v1";
    const setting = {
      variant: name,
      weights: "ternary",
      width: 1,
      classes: 100,
      official: false,
      bits: half ? { weights: 16, activations: 16, sums: 32 } : { weights: 32, activations: 32, sums: 32 },
      zeros: { ternary: 0, se: 0.9, dw: half ? 0.5 : 0, classifier: 0 },
    };
    const flops = (ternary) => count({ ...setting, zeros: { ...setting.zeros, ternary } }).flops;
    setting.zeros.ternary = solve(flops, PUBLISHED[name].flops, 0, 1);
    return setting;
  }

  return { REFERENCE, PUBLISHED, SPARSE_FROM, count, solve, published };
})();

// --- the page ------------------------------------------------------------------------------------

(() => {
  const find = (id) => document.getElementById(`score-${id}`);
  if (typeof document === "undefined" || !find("controls")) return;
  const { PUBLISHED, REFERENCE, SPARSE_FROM, count, solve, published } = MSUNetScore;

  const CHALLENGE_BEST = [0.0054, 0.004169];
  // Slider -> its place in a setting. The name is that of its element.
  const SLIDERS = {
    weights: ["bits", "weights"],
    activations: ["bits", "activations"],
    sums: ["bits", "sums"],
    ternary: ["zeros", "ternary"],
    se: ["zeros", "se"],
    dw: ["zeros", "dw"],
    classifier: ["zeros", "classifier"],
    width: ["width"],
  };
  const WORDS = {
    bits: (amount) => `${Math.floor(amount)}\u00a0bit${amount < 2 ? "" : "s"}`,
    zeros: (amount) => `${(100 * amount).toFixed(1)}\u00a0%`,
    width: (amount) => `× ${amount.toFixed(2)}`,
  };
  const CONVOLUTIONS = ["ternary conv", "binary conv", "sparse conv", "dense conv"];
  // w: bits stored, m: the larger of weights' and activations', a: activations', c: sums', each / 32.
  const RULES = {
    "ternary conv":
      "storage N/32 + N(1−s)/32 + w; products K(1−s)·out/32 + m·out; additions c·(K(1−s)−1)·out",
    "binary conv": "storage N/32 + w; products K·out/32 + m·out; additions c·(K−1)·out",
    "sparse conv":
      "storage N/32 + w·N(1−s); products m·K(1−s)·out; additions c·(K(1−s)−1)·out; a bias: w, c·out",
    "dense conv": "storage w·N; products m·K·out; additions c·(K−1)·out; a bias: w, c·out",
    linear: "storage w·N; products m·N; additions c·(in−1)·out",
    "batch norm, merged": "storage w·C (the shift); additions a·in",
    ReLU: "products a·in",
    sigmoid: "products 2a·in; additions a·in",
    Swish: "products 3a·in; additions a·in",
    "SE pool and gate": "products 2a·out; additions a·(H·W−1)·C",
    "skip addition": "additions a·out",
    "average pool": "products a·out; additions a·(H·W−1)·out",
  };

  // Where the challenge's own counter is known to differ.
  const OFFICIAL_RULES = {
    linear: "storage w·(N + out), with zeros N/32 + w·(N(1−s) + out); products m·N(1−s); additions c·N(1−s)",
    "SE pool and gate": "products 2a·out; additions c·(H·W−1)·C",
    "average pool": "products a·out; additions c·(H·W−1)·out",
  };

  let setting;
  const million = (amount, digits = 2) => (amount === 0 ? "0" : `${(amount / 1e6).toFixed(digits)} M`);
  const percent = (part) => `${(100 * part).toFixed(0)} %`;
  const changed = (base, [group, name], amount) =>
    name ? { ...base, [group]: { ...base[group], [name]: amount } } : { ...base, [group]: amount };

  // A cell is a text or an element; a text that is a number goes to the right.
  function row(...cells) {
    const made = document.createElement("tr");
    cells.forEach((cell, i) => {
      const element = made.appendChild(document.createElement(i ? "td" : "th"));
      if (i && /^[\d.]+( [M%])?$/.test(cell)) element.className = "msunet-number";
      if (!i) element.scope = "row";
      element.append(cell);
    });
    return made;
  }

  // --- what applies beside each control ----------------------------------------------------------

  function notes({ bits, zeros, weights, official }) {
    const free =
      Math.min(bits.weights, bits.activations) < 16
        ? " Below 16 bits an entry counts as quantized: it gives up the half price that the challenge grants " +
          "to the storage and products of any FP32 network."
        : "";
    const pruned = (share) =>
      share >= SPARSE_FROM || (official && share > 0)
        ? "Sparse: one bit of mask for each weight, then only those that are not 0 count."
        : `Dense: ${official ? "without zeros there is no mask" : `below ${SPARSE_FROM} the zeros save nothing`}.`;
    const zerosOf1x1 = {
      ternary: "Each zero saves the bit of its sign, a product by ±1 (which counts 1/32) and one addition.",
      binary: "Binary weights have no zeros: this moves nothing.",
      float: "Float 1 × 1 weights are counted dense: this moves nothing.",
    };
    return {
      weights: `A stored value of k bits counts k/32. Ternary ones keep mask and sign.${free}`,
      activations:
        `A product counts the bits of its larger operand, here ${Math.max(bits.weights, bits.activations)}; ` +
        `all else on maps counts those of activations.${free}`,
      sums:
        bits.sums < 32
          ? `An addition inside a convolution counts ${bits.sums}/32: only if sums are really rounded so.`
          : "An addition inside a convolution counts in full. O3 does not change that: its sums are FP32.",
      ternary: zerosOf1x1[weights],
      se: pruned(zeros.se),
      dw: `${pruned(zeros.dw)} The first two blocks' depthwise weights are never pruned.`,
      classifier: official
        ? "The challenge's counter takes a linear layer as sparse, and its bias with it."
        : "A linear layer is counted dense however many zeros it has: this moves nothing.",
      width: "All channels times this, in multiples of 4. Products and additions go nearly with its square.",
    };
  }

  // --- what it comes to --------------------------------------------------------------------------

  function show() {
    const result = count(setting);
    const beside = notes(setting);
    for (const [name, [group, inner]] of Object.entries(SLIDERS)) {
      const amount = inner ? setting[group][inner] : setting[group];
      const words = WORDS[group](amount);
      find(name).value = amount;
      find(name).setAttribute("aria-valuetext", words);
      find(`${name}-value`).textContent = words;
      find(`${name}-note`).textContent = beside[name];
    }
    find("network").value = setting.variant === "v3" ? "v3" : "v1";
    find("kind").value = setting.weights;
    find("official").checked = setting.official;
    showTotals(result);
    showScale(result);
    showKinds(result);
  }

  function showTotals(result) {
    const part = (amount, of) => (amount / of).toFixed(5);
    find("totals").replaceChildren(
      row("parameters", million(result.params, 4), part(result.params, REFERENCE.params), "/ 36.5 M"),
      row("multiplications", million(result.mults), part(result.mults, REFERENCE.flops), "/ 10.49 G"),
      row("additions", million(result.adds), part(result.adds, REFERENCE.flops), "/ 10.49 G"),
      row("score", "", result.value.toFixed(5), "their sum"),
    );
    const inside = result.layers
      .filter(({ kind }) => CONVOLUTIONS.includes(kind))
      .reduce((sum, layer) => sum + layer.adds, 0);
    const compared = result.value / PUBLISHED.v3.score;
    find("words").textContent =
      `Score ${result.value.toFixed(5)}: ${percent(compared)} of v3's ${PUBLISHED.v3.score}.`;
    find("inside").textContent =
      `Of ${million(result.flops, 1)} operations ${million(inside, 1)} (${percent(inside / result.flops)}) are ` +
      `additions inside convolutions.`;
  }

  // Everything on one axis from 0: this setting's bar in its three parts, the others as marks.
  function showScale(result) {
    const marks = Object.entries(PUBLISHED).map(([name, { score }]) => [name, score]);
    marks.push(...CHALLENGE_BEST.map((score) => ["challenge", score]));
    const end = Math.max(0.02, 1.05 * result.value);
    const track = () => {
      const made = document.createElement("div");
      made.className = "msunet-track";
      return made;
    };
    const own = track();
    const parts = [
      result.params / REFERENCE.params,
      result.mults / REFERENCE.flops,
      result.adds / REFERENCE.flops,
    ];
    ["msunet-params", "msunet-mults", "msunet-adds"].forEach((name, i) => {
      const segment = own.appendChild(document.createElement("div"));
      segment.className = name;
      segment.style.width = `${(100 * parts[i]) / end}%`;
    });
    const rows = marks.map(([name, score]) => {
      const made = track();
      const mark = made.appendChild(document.createElement("div"));
      mark.className = "msunet-mark";
      mark.style.left = `${(100 * score) / end}%`;
      return { score, made: row(name, made, String(score)) };
    });
    const mine = row("this setting", own, result.value.toFixed(5));
    mine.className = "msunet-own-score";
    rows.push({ score: result.value, made: mine });
    find("scale").replaceChildren(...rows.sort((a, b) => b.score - a.score).map(({ made }) => made));
  }

  function showKinds({ layers, flops }) {
    const kinds = new Map();
    for (const { kind, params, mults, adds } of layers) {
      const sum = kinds.get(kind) ?? [0, 0, 0];
      kinds.set(kind, [sum[0] + params, sum[1] + mults, sum[2] + adds]);
    }
    const ordered = [...kinds].sort(([, a], [, b]) => b[1] + b[2] - a[1] - a[2]);
    const ruleOf = (kind) => {
      const made = document.createElement("tr");
      const cell = made.appendChild(document.createElement("td"));
      cell.colSpan = 5;
      cell.textContent = (setting.official && OFFICIAL_RULES[kind]) || RULES[kind];
      return made;
    };
    find("kinds").replaceChildren(
      ...ordered.flatMap(([kind, [params, mults, adds]]) => [
        row(kind, million(params, 3), million(mults), million(adds), percent((mults + adds) / flops)),
        ruleOf(kind),
      ]),
    );
  }

  // --- what it would take ------------------------------------------------------------------------

  // Words, slider, and how far it could go.
  const LEVERS = [
    ["bits of weights", "weights", 1],
    ["bits of activations", "activations", 1],
    ["bits of sums", "sums", 1],
    ["zeros, ternary", "ternary", 1],
    ["zeros, SE", "se", 1],
    ["zeros, depthwise", "dw", 1],
    ["width", "width", 0.1],
  ];

  function showLevers() {
    const base = published("v3");
    const target = PUBLISHED.v3.score / 2;
    const needed = (from, [, name, end]) => {
      const place = SLIDERS[name];
      const measure = (amount) => count(changed(from, place, amount)).value;
      const start = place[1] ? from[place[0]][place[1]] : from[place[0]];
      const found = solve(measure, target, start, end);
      const words = WORDS[place[0]];
      return found === null ? `not enough: ${measure(end).toFixed(5)} at ${words(end)}` : words(found);
    };
    const halfSums = changed(base, SLIDERS.sums, 16);
    find("levers").replaceChildren(
      ...LEVERS.map((lever) => {
        const [words, name] = lever;
        const [group, inner] = SLIDERS[name];
        const now = inner ? base[group][inner] : base[group];
        return row(
          words,
          WORDS[group](now),
          needed(base, lever),
          name === "sums" ? "" : needed(halfSums, lever),
        );
      }),
    );
    find("target").textContent =
      `Half of ${PUBLISHED.v3.score} is ${target.toFixed(6)}. With sums in 16 bits and nothing else ` +
      `the score is ${count(halfSums).value.toFixed(5)}.`;
  }

  // --- the controls ------------------------------------------------------------------------------

  for (const [name, place] of Object.entries(SLIDERS)) {
    find(name).addEventListener("input", ({ target }) => {
      setting = changed(setting, place, Number(target.value));
      show();
    });
  }
  const choose = (id, group, read) =>
    find(id).addEventListener("change", ({ target }) => {
      setting = { ...setting, [group]: read(target) };
      show();
    });
  choose("network", "variant", (select) => select.value);
  choose("kind", "weights", (select) => select.value);
  choose("official", "official", (box) => box.checked);
  for (const button of document.querySelectorAll("[data-published]")) {
    button.addEventListener("click", () => {
      setting = published(button.dataset.published);
      show();
    });
  }
  setting = published("v3");
  show();
  showLevers();
})();

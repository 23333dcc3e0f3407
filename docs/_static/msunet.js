// MSUNet in the page: reads a packed network and computes its class scores, one picture at a time.
//
// A plain script, no module: browsers refuse modules to a page opened from the file system. It leaves one
// name, MSUNet, and touches neither the page nor the network. The file format is told in packed_format.py, the
// network in network.py and in the specification (§2). It computes in FP32, as O0 does.
"use strict";

globalThis.MSUNet = (() => {
  const SIZE = 32; // pixels of an image's side
  const STEM_CHANNELS = 64;
  const HEAD_CHANNELS = 256;
  // blocks.1.0, 2.0, 2.1, 3.0, 3.1; split: into how many 1x1 convolutions expand and project fall.
  const V3_BLOCKS = [
    [{ out: 64, expand: 6, kernels: [3], split: [2, 2], act: "relu" }],
    [
      { out: 128, expand: 5, kernels: [3, 5, 7], se: 1 / 2, stride: 2 },
      { out: 128, expand: 6, kernels: [3, 5], se: 1 / 2, split: [2, 2] },
    ],
    [
      { out: 256, expand: 5, kernels: [3, 5, 7], se: 1 / 4, stride: 2, split: [1, 2] },
      { out: 256, expand: 4, kernels: [3, 5], se: 1 / 4, split: [1, 2] },
    ],
  ];
  const V1_BLOCKS = V3_BLOCKS.map((stage) => stage.map((block) => ({ ...block, expand: 6 })));
  const VARIANTS = { v1: V1_BLOCKS, v2: V1_BLOCKS, v3: V3_BLOCKS };

  // --- the network's outline ---------------------------------------------------------------------

  // Near-equal consecutive parts, the first taking the remainder: 320, 3 -> [108, 106, 106].
  function splitChannels(channels, groups) {
    const part = Math.floor(channels / groups);
    return [channels - part * (groups - 1), ...Array(groups - 1).fill(part)];
  }

  // As Python rounds: a half to the even neighbour.
  function roundHalfEven(x) {
    const below = Math.floor(x);
    return x - below === 0.5 ? below + (below % 2) : Math.round(x);
  }

  // All steps in the order of computing, which is that of the file. A step has
  //   kind      conv, norm, relu, swish, se, keep (remembers its input), skip (adds it), pool or linear
  //   name      as in the state dict
  //   channels  of its output, and size, the side of each
  //   parts     of what has weights: convolutions {name, role, from, inputs, out, kernel, stride, bias};
  //             from is the first input channel, inputs counts those that one output sees, and where that is
  //             "own", each output sees the one input of its own place
  function outline({ variant = "v3", num_classes = 100, width = 1 } = {}) {
    if (!(variant in VARIANTS)) throw new Error(`variant "${variant}" is unknown; there are v1, v2 and v3`);
    const steps = [];
    let channels = 3;
    let size = SIZE;
    const scaled = (count) => Math.max(4, 4 * roundHalfEven((count * width) / 4));
    const add = (kind, name, more) => steps.push({ kind, name, channels, size, ...more });

    function conv(name, role, out, { kernels = [1], stride = 1, split = 1, own = false }) {
      const count = Math.max(kernels.length, split);
      const [ins, outs] = [splitChannels(channels, count), splitChannels(out, count)];
      let from = 0;
      const parts = outs.map((part, i) => {
        const made = {
          name: count > 1 ? `${name}.${i}` : name,
          role,
          from,
          inputs: own ? 1 : ins[i],
          own,
          out: part,
          kernel: kernels[i] ?? kernels[0],
          stride,
          bias: false,
        };
        from += ins[i];
        return made;
      });
      [channels, size] = [out, size / stride];
      add("conv", name, { parts });
    }
    function squeezeExcite(name, reduced) {
      const one = { role: "se", from: 0, own: false, kernel: 1, stride: 1, bias: true };
      const reduce = { ...one, name: `${name}.conv_reduce`, inputs: channels, out: reduced };
      add("se", name, {
        parts: [reduce, { ...one, name: `${name}.conv_expand`, inputs: reduced, out: channels }],
      });
    }

    conv("conv_stem", "stem", scaled(STEM_CHANNELS), { kernels: [3] });
    add("norm", "bn1");
    add("relu", "act1");
    add("keep", "blocks.0.0");
    conv("blocks.0.0.conv_dw", "first dw", channels, { kernels: [3], own: true });
    add("norm", "blocks.0.0.bn1");
    add("relu", "blocks.0.0.act");
    conv("blocks.0.0.conv_pw", "1x1", channels, {});
    add("norm", "blocks.0.0.bn2");
    add("skip", "blocks.0.0 + skip");
    VARIANTS[variant].forEach((stage, s) =>
      stage.forEach((block, b) => {
        const name = `blocks.${s + 1}.${b}`;
        const { stride = 1, split = [1, 1], act = "swish", kernels } = block;
        const [before, out] = [channels, scaled(block.out)];
        const hasSkip = stride === 1 && before === out;
        if (hasSkip) add("keep", name);
        conv(`${name}.conv_pw`, "1x1", before * block.expand, { split: split[0] });
        add("norm", `${name}.bn1`);
        add(act, `${name}.act1`);
        conv(`${name}.conv_dw`, block.se ? "dw" : "first dw", channels, { kernels, stride, own: true });
        add("norm", `${name}.bn2`);
        add(act, `${name}.act2`);
        if (block.se) squeezeExcite(`${name}.se`, Math.floor(before * block.se));
        conv(`${name}.conv_pwl`, "1x1", out, { split: split[1] });
        add("norm", `${name}.bn3`);
        if (hasSkip) add("skip", `${name} + skip`);
      }),
    );
    conv("conv_head", "1x1", scaled(HEAD_CHANNELS), {});
    add("norm", "bn2");
    add("relu", "act2");
    const inputs = channels;
    size = 1;
    add("pool", "global_pool");
    channels = num_classes;
    const classifier = { name: "classifier", role: "classifier", from: 0, inputs, own: false };
    add("linear", "classifier", {
      parts: [{ ...classifier, out: num_classes, kernel: 1, stride: 1, bias: true }],
    });
    return steps;
  }

  // --- the packed file ---------------------------------------------------------------------------

  function float16(bits) {
    const [exponent, fraction] = [(bits >> 10) & 31, bits & 1023];
    const size = exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24;
    return bits >> 15 ? -size : size; // never Inf or NaN: those are not packed
  }

  // bytes (Uint8Array of a packed file) -> {info, steps}: the file's metadata, and the steps with their
  // weights. Throws an Error of one line where the bytes are no packed network.
  function decode(bytes) {
    const { info, streams } = readHeader(bytes);
    const used = { half: 0, mask: 0, sign: 0 };
    const take = (name, count, length) => {
      const start = used[name];
      used[name] += count;
      if (used[name] > length) throw new Error(`the packed network's stream "${name}" ends too early`);
      return start;
    };
    const halves = (count) => {
      const start = take("half", count, streams.half.length >> 1);
      const at = (i) => streams.half[2 * i] | (streams.half[2 * i + 1] << 8);
      return Float32Array.from({ length: count }, (_, i) => float16(at(start + i)));
    };
    const bits = (name, count) => {
      const start = take(name, count, 8 * streams[name].length);
      const at = (i) => (streams[name][i >> 3] >> (i & 7)) & 1;
      return Uint8Array.from({ length: count }, (_, i) => at(start + i));
    };
    const steps = outline(info.network);
    let letter = "";
    let next = 0;
    for (const step of steps) {
      for (const part of step.parts ?? []) fill(part, (letter = info.layers[next++]), halves, bits);
      if (step.kind === "norm") Object.assign(step, norm(step.channels, letter, info, halves));
    }
    const rest = streams.half.length !== 2 * used.half || next !== info.layers.length;
    if (rest || ["mask", "sign"].some((n) => streams[n].length !== Math.ceil(used[n] / 8))) {
      throw new Error("the packed network is longer than the network that it tells of");
    }
    return { info, steps };
  }

  function readHeader(bytes) {
    let header, info, start;
    try {
      start = 8 + new DataView(bytes.buffer, bytes.byteOffset).getUint32(0, true);
      header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, start)));
      info = JSON.parse(header.__metadata__.packed);
    } catch {
      throw new Error("this file is not a packed network; python -m msunet_core pack makes one");
    }
    if (info.format !== "msunet-packed-1") {
      throw new Error(`format "${info.format}" is unknown; this page reads msunet-packed-1`);
    }
    const stream = (name) => bytes.subarray(...header[name].data_offsets.map((offset) => start + offset));
    return { info, streams: { half: stream("half"), mask: stream("mask"), sign: stream("sign") } };
  }

  // Weights as rows of non-zero taps: output o sums values[i] * tap taps[i], starts[o] <= i < starts[o + 1];
  // then comes the factor. A tap is a place in the kernel (in, row, column).
  function fill(part, letter, halves, bits) {
    const kernel = part.inputs * part.kernel ** 2;
    const count = part.out * kernel;
    const signed = "TB".includes(letter);
    if (signed) halves(1); // the scale as O3 has it; O0 computes it again, below
    const mask = "TS".includes(letter) ? bits("mask", count) : new Uint8Array(count).fill(1);
    const nonzeros = mask.reduce((sum, bit) => sum + bit, 0);
    const values = signed
      ? Float32Array.from(bits("sign", nonzeros), (bit) => 1 - 2 * bit)
      : halves(nonzeros);
    const [starts, taps] = [new Uint32Array(part.out + 1), new Uint32Array(nonzeros)];
    for (let o = 0, i = 0; o < part.out; o++) {
      for (let tap = 0; tap < kernel; tap++) if (mask[o * kernel + tap]) taps[i++] = tap;
      starts[o + 1] = i;
    }
    const factor = signed ? Math.sqrt(((2 / kernel) * count) / Math.max(nonzeros, 1)) : 1;
    const zeros = 1 - nonzeros / count;
    Object.assign(part, {
      letter,
      starts,
      taps,
      values,
      factor,
      zeros,
      biases: part.bias ? halves(part.out) : null,
    });
  }

  // A batch norm is x * scale + shift.
  function norm(channels, letter, info, halves) {
    if (info.merged && !"TB".includes(letter)) {
      return { scale: new Float32Array(channels).fill(1), shift: halves(channels) };
    }
    const [weight, bias] = [halves(channels), halves(channels)];
    if (info.merged) return { scale: weight, shift: bias };
    const [mean, variance] = [halves(channels), halves(channels)];
    const scale = weight.map((w, c) => w / Math.sqrt(variance[c] + info.eps));
    return { scale, shift: bias.map((b, c) => b - mean[c] * scale[c]) };
  }

  // --- computing ---------------------------------------------------------------------------------

  // Every convolution but the 1x1 ones; x is flat (channel, row, column). Each tap runs over a whole map.
  function spread(x, size, part, out, offset) {
    const { kernel, stride, from, own, starts, taps, values } = part;
    const [padding, side] = [(kernel - 1) / 2, size / stride];
    for (let o = 0; o < part.out; o++) {
      const to = (offset + o) * side * side;
      for (let i = starts[o]; i < starts[o + 1]; i++) {
        const value = values[i];
        const plane = from + (own ? o : Math.floor(taps[i] / (kernel * kernel)));
        const [dy, dx] = [(Math.floor(taps[i] / kernel) % kernel) - padding, (taps[i] % kernel) - padding];
        const first = Math.max(0, Math.ceil(-dx / stride));
        const last = Math.min(side, Math.floor((size - 1 - dx) / stride) + 1);
        for (let row = 0; row < side; row++) {
          const y = row * stride + dy;
          if (y < 0 || y >= size) continue;
          const source = (plane * size + y) * size + dx;
          const target = to + row * side;
          for (let column = first; column < last; column++) {
            out[target + column] += value * x[source + column * stride];
          }
        }
      }
    }
  }

  // 1x1: whole maps are added, four at a time.
  function mix(x, pixels, part, out, offset) {
    const { from, starts, taps, values, factor } = part;
    for (let o = 0; o < part.out; o++) {
      const sum = out.subarray((offset + o) * pixels, (offset + o + 1) * pixels);
      const end = starts[o + 1];
      let i = starts[o];
      for (; i + 3 < end; i += 4) {
        const [a, b] = [(from + taps[i]) * pixels, (from + taps[i + 1]) * pixels];
        const [c, d] = [(from + taps[i + 2]) * pixels, (from + taps[i + 3]) * pixels];
        const [va, vb, vc, vd] = [values[i], values[i + 1], values[i + 2], values[i + 3]];
        for (let p = 0; p < pixels; p++) {
          sum[p] += va * x[a + p] + vb * x[b + p] + vc * x[c + p] + vd * x[d + p];
        }
      }
      for (; i < end; i++) {
        const [a, value] = [(from + taps[i]) * pixels, values[i]];
        for (let p = 0; p < pixels; p++) sum[p] += value * x[a + p];
      }
      if (factor !== 1) for (let p = 0; p < pixels; p++) sum[p] *= factor;
      if (part.biases) for (let p = 0; p < pixels; p++) sum[p] += part.biases[o];
    }
  }

  function convolve(x, size, parts) {
    const side = size / parts[0].stride;
    const out = new Float32Array(parts.reduce((sum, part) => sum + part.out, 0) * side * side);
    let offset = 0;
    for (const part of parts) {
      if (part.kernel === 1) mix(x, size * size, part, out, offset);
      else spread(x, size, part, out, offset);
      offset += part.out;
    }
    return out;
  }

  // The mean of each map.
  function average(x, pixels) {
    return Float32Array.from({ length: x.length / pixels }, (_, c) => {
      let sum = 0;
      for (let p = c * pixels; p < (c + 1) * pixels; p++) sum += x[p];
      return sum / pixels;
    });
  }

  // Loops over each map, not map(): a call for each of a million values would double the time.
  function affine(x, pixels, scale, shift) {
    const out = new Float32Array(x.length);
    for (let c = 0, i = 0; c < scale.length; c++) {
      const [factor, summand] = [scale[c], shift ? shift[c] : 0];
      for (const end = i + pixels; i < end; i++) out[i] = x[i] * factor + summand;
    }
    return out;
  }
  function add(x, y) {
    const out = new Float32Array(x.length);
    for (let i = 0; i < x.length; i++) out[i] = x[i] + y[i];
    return out;
  }
  function relu(x) {
    const out = new Float32Array(x.length);
    for (let i = 0; i < x.length; i++) out[i] = x[i] > 0 ? x[i] : 0;
    return out;
  }
  function swish(x) {
    const out = new Float32Array(x.length);
    for (let i = 0; i < x.length; i++) out[i] = x[i] / (1 + Math.exp(-x[i]));
    return out;
  }
  function excite(x, size, [reduce, expand]) {
    const squeezed = swish(convolve(average(x, size * size), 1, [reduce]));
    const gate = convolve(squeezed, 1, [expand]).map((v) => 1 / (1 + Math.exp(-v)));
    return affine(x, size * size, gate, null);
  }

  const COMPUTE = {
    conv: (x, step, size) => convolve(x, size, step.parts),
    norm: (x, step, size) => affine(x, size * size, step.scale, step.shift),
    relu,
    swish,
    se: (x, step, size) => excite(x, size, step.parts),
    skip: (x, step, size, kept) => add(x, kept),
    pool: (x, step, size) => average(x, size * size),
    linear: (x, step) => convolve(x, 1, step.parts),
  };

  // input: Float32Array of 3 x 32 x 32 normalised values -> class scores, one for each class.
  // watch(step, values), if given, is called after each step that computes.
  function run(network, input, watch = () => {}) {
    let x = input;
    let size = SIZE;
    let kept = null;
    for (const step of network.steps) {
      if (step.kind === "keep") {
        kept = x;
        continue;
      }
      x = COMPUTE[step.kind](x, step, size, kept);
      size = step.size;
      watch(step, x);
    }
    return x;
  }

  // --- pictures ----------------------------------------------------------------------------------

  // rgba (flat, of side x side pixels) -> 32 x 32 x 3 bytes: each the mean over its part of the picture.
  function shrink(rgba, side) {
    const step = side / SIZE;
    // Which pixels lie under output pixel i, and with how much of their width.
    const under = Array.from({ length: SIZE }, (_, i) => {
      const cover = [];
      for (let p = Math.floor(i * step); p < (i + 1) * step; p++) {
        cover.push([p, Math.min(p + 1, (i + 1) * step) - Math.max(p, i * step)]);
      }
      return cover;
    });
    const pixels = new Uint8ClampedArray(SIZE * SIZE * 3);
    for (let i = 0; i < pixels.length; i++) {
      const [row, column, colour] = [Math.floor(i / 3 / SIZE), Math.floor(i / 3) % SIZE, i % 3];
      let sum = 0;
      for (const [y, height] of under[row]) {
        for (const [x, breadth] of under[column]) sum += rgba[(y * side + x) * 4 + colour] * height * breadth;
      }
      pixels[i] = Math.floor(sum / (step * step) + 0.5);
    }
    return pixels;
  }

  // 32 x 32 x 3 bytes -> 3 x 32 x 32 normalised values, as the network was trained on.
  function normalise(pixels, { mean, std }) {
    const plane = SIZE * SIZE;
    return Float32Array.from({ length: 3 * plane }, (_, i) => {
      const colour = Math.floor(i / plane);
      return (pixels[(i % plane) * 3 + colour] / 255 - mean[colour]) / std[colour];
    });
  }

  const fromBase64 = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

  return { SIZE, outline, decode, run, shrink, normalise, fromBase64 };
})();

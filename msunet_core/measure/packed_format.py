"""The packed network: an MSUNet as bytes on disk, as small as the score says, that anyone can load.

One safetensors file. Integers and floats are little-endian.

    8 bytes    H, the length of the header
    H bytes    the header, JSON, filled up with spaces: ``{"__metadata__": {"digest": ..., "packed": ...},
               "half": ..., "mask": ..., "sign": ...}`` without other spaces, in this order
    the rest   ``half`` (F16, one dimension), ``mask`` (U8), ``sign`` (U8), one directly after the other

``digest``, the 32 hexadecimal digits from byte 34 on, is the BLAKE2b of 16 bytes of the whole file with these
digits taken as 0: a file of which one bit changed is refused. ``packed`` is a text, a JSON object of its own:

    format      "msunet-packed-1"
    network     the arguments of build_msunet: variant, weights, alpha, num_classes, width
    layers      a letter for each convolution and for the classifier, in order: T ternary, B binary, S sparse
                (a convolution of which at least 40 % of the weights are 0), D dense
    merged      whether the scale of each batch norm went into the convolution before it
    eps         what batch norms add to a variance; 0 where they are merged
    mean, std   of each colour, in units of 0 .. 1, by which the images were normalised
    accuracy    what was measured with the packed network, at O3; or null
    provenance  how it was trained; or null

Bit i of ``mask`` and ``sign`` is the bit of value 2^(i mod 8) in byte floor(i / 8); the last byte is filled
up with zeros. No layer starts on a byte of its own. The layers follow each other in the order of the modules
(that of the state dict, so that a batch norm comes after its convolution), and each takes the next values of
each stream. N is the number of weights, which are in the order of (out, in, row, column):

    T           mask: N bits, 1 where the weight is not 0; sign: a bit for each 1 of them, 1 for -1; half: the
                scale sqrt(M), by which the output is multiplied
    B           sign: N bits; half: the scale sqrt(M)
    S           mask: N bits; half: the weights that are not 0
    D           half: N weights
    bias        half: a value for each output, directly after the weights (squeeze-excitation, classifier)
    batch norm  merged, after T or B: half: C scales, C shifts; x * scale + shift
                merged, after S or D: half: C shifts; x + shift
                else: half: weight, bias, running mean, running variance, C values each

That is what the score counts (specification §9; T, B, S and D are its own kinds of layers), but for two
things: the scale of a batch norm behind a ternary layer, C numbers that the score merges into the one of the
layer, and the bias of the classifier. :func:`.account.account` puts the difference down byte by byte.

All values are those that O3 computes with, T that of the weights rounded to FP16. So the unmerged network
gives the class scores of its source at O3 bit for bit. Merging multiplies before it rounds, not after, so a
merged one gives them to :data:`.pack.MERGE_TOLERANCE`. Every variant is packed in FP16, v1 too, whose
published accuracy is that of O0.
"""

from __future__ import annotations

import hashlib

FORMAT = "msunet-packed-1"
# From this share of zeros on, a convolution is stored, and counted, as a bitmask with its other values.
SPARSE_FROM = 0.4

PARTS = ("mask", "sign", "values", "scale", "shift", "statistics", "header")
STREAMS = {"half": "F16", "mask": "U8", "sign": "U8"}
NETWORK_KEYS = {"variant", "weights", "alpha", "num_classes", "width"}
HEAD = b'{"__metadata__":{"digest":"'
DIGEST_AT = slice(8 + len(HEAD), 8 + len(HEAD) + 32)
KINDS = {"T": "ternary", "B": "binary", "S": "sparse", "D": "dense"}  # by the letter of a layer
MAX_HEADER = 2**20  # ours have about 1,500 bytes


def digest_of(content: bytes) -> bytes:
    digest = hashlib.blake2b(content[: DIGEST_AT.start], digest_size=16)
    digest.update(b"0" * 32)
    digest.update(memoryview(content)[DIGEST_AT.stop :])
    return digest.hexdigest().encode()


def float_letter(zeros: float, is_linear: bool) -> str:
    """S or D of a layer of float weights with that share of zeros; the score counts a linear one as dense."""
    return "S" if zeros >= SPARSE_FROM and not is_linear else "D"


def norm_parts(merged: bool, kind: str) -> tuple[str, ...]:
    """The vectors that a batch norm behind a layer of this kind keeps."""
    if not merged:
        return ("weight", "bias", "running_mean", "running_var")
    return ("weight", "bias") if kind in "TB" else ("bias",)

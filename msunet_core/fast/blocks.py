"""Blocks of the network whole, on the CPU's kernels.

PyTorch computes a block layer by layer, and each layer of the many channels between its two 1x1 convolutions
passes over tensors that fit no cache. ``kernels.cpp`` goes image by image: expanded channels are made,
convolved, gated and projected while they lie in a core's caches, and the ternary 1x1 convolutions only add.
In training batch norm needs the whole batch, so a block keeps its depthwise output and makes the rest again
in the backward pass: no slower than to write it and read it back, and a quarter of the traffic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..model.network import DepthwiseSeparable, InvertedResidual, MSUNet
from ..model.ternary import ternary_scale
from .layers import (
    ACTS,
    OUTPUTS,
    SUMS,
    TernaryKernel,
    Weights,
    are_depthwise,
    as_affine,
    as_pixels,
    combine,
    convolve,
    convolve_back,
    depthwise_conv,
    empty_output,
    empty_sums,
    excitation_arguments,
    excitation_of,
    excite_back,
    in_pixels,
    is_excitation,
    is_half,
    is_ternary,
    kernel_of,
    norm_act,
    norm_fits,
    one_thread,
    parts_of,
    serves,
)
from .library import call

# A variance so much smaller than what it is the difference of has lost two of the seven digits of FP32 sums.
CANCELLED = 1e-2


class FastDepthwiseSeparable(DepthwiseSeparable):
    """:class:`DepthwiseSeparable` on the kernels."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        block = _Block(
            conv=self.conv_dw,
            norm2=self.bn1,
            act2=self.act,
            project=self.conv_pw,
            norm3=self.bn2,
            has_skip=self.has_skip,
        )
        if serves_block(block, x):
            return block_output(block, x)
        y = self.conv_pw(norm_act(self.bn1, self.act, depthwise_conv(self.conv_dw, x)))
        return norm_act(self.bn2, None, y, skip=x if self.has_skip else None)


class FastInvertedResidual(InvertedResidual):
    """:class:`InvertedResidual` on the kernels."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        block = _Block(
            expand=self.conv_pw,
            norm1=self.bn1,
            act1=self.act1,
            conv=self.conv_dw,
            norm2=self.bn2,
            act2=self.act2,
            se=self.se,
            project=self.conv_pwl,
            norm3=self.bn3,
            has_skip=self.has_skip,
        )
        if serves_block(block, x):
            return block_output(block, x)
        y = depthwise_conv(self.conv_dw, norm_act(self.bn1, self.act1, self.conv_pw(x)))
        y = self.conv_pwl(self.se(norm_act(self.bn2, self.act2, y)))
        return norm_act(self.bn3, None, y, skip=x if self.has_skip else None)


class FastMSUNet(MSUNet):
    """:class:`MSUNet` with its stem and head on the kernels."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        x = norm_act(self.bn1, self.act1, self.conv_stem(x))
        x = self.blocks(x)
        x = norm_act(self.bn2, self.act2, self.conv_head(x))
        return self.classifier(self.global_pool(x).flatten(1))


# --- a whole block ---------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Block:
    """``norm3(project(se(act2(norm2(conv(act1(norm1(expand(x)))))))))``, plus ``x`` where ``has_skip``.

    expand, norm1, act1 : None where a block has none of them
    conv : depthwise, or several over consecutive channel groups
    se : squeeze-excitation with ``conv_reduce`` and ``conv_expand`` (Swish between, then a sigmoid gate),
        ``nn.Identity`` or None
    """

    expand: nn.Module | None = None
    norm1: nn.BatchNorm2d | None = None
    act1: nn.Module | None = None
    conv: nn.Module
    norm2: nn.BatchNorm2d
    act2: nn.Module
    se: nn.Module | None = None
    project: nn.Module
    norm3: nn.BatchNorm2d
    has_skip: bool

    def __post_init__(self):
        self.convs = list(self.conv.children()) or [self.conv]
        self.stride = self.convs[0].stride[0]
        self.act = ACTS.get(type(self.act2))  # None where the kernels do not know it

    def modules(self) -> Iterator[nn.Module]:
        for part in (getattr(self, field.name) for field in fields(self)):
            if isinstance(part, nn.Module):
                yield from part.modules()


def serves_block(block: _Block, x: Tensor) -> bool:
    """Whether the kernels compute a block whole for ``x`` (B, C, H, W); else it is computed layer by layer.

    They do for ternary 1x1 convolutions, which only add: three inputs have 27 possible sums, computed once
    for all outputs.
    """
    training = block.norm3.training
    pixels = x.shape[0] * -(-x.shape[2] // block.stride) * -(-x.shape[3] // block.stride)
    norms = [(block.norm2, block.act2, pixels), (block.norm3, None, pixels)]
    conv1x1s, chain = [(block.project, block.norm2.num_features)], [(block.project, block.norm3)]
    if block.expand is not None:
        norms.append((block.norm1, block.act1, x.numel() // x.shape[1]))
        conv1x1s.append((block.expand, x.shape[1]))
        chain += [(block.expand, block.norm1), (block.expand, block.norm2)]
    return (
        all(norm.training == training and norm_fits(norm, act, values) for norm, act, values in norms)
        and (block.expand is None or type(block.act1) is type(block.act2))
        and all(is_ternary(conv1x1, channels, x.dtype) for conv1x1, channels in conv1x1s)
        and all(sum(layer.out_channels for layer in parts_of(c)) == norm.num_features for c, norm in chain)
        and (not block.has_skip or (block.stride == 1 and block.norm3.num_features == x.shape[1]))
        # In training gradients go through them the other way round.
        and (not training or all(channels // len(parts_of(c)) % OUTPUTS == 0 for c, channels in conv1x1s))
        and are_depthwise(block.convs, x.dtype, block.norm2.num_features)
        and is_excitation(block.se)
        and serves(x, *block.modules())
    )


def block_output(block: _Block, x: Tensor) -> Tensor:
    """What a block makes of ``x``, which the kernels serve."""
    return _output_in_training(block, x) if block.norm3.training else _output_in_eval(block, x)


def _output_in_training(block: _Block, x: Tensor) -> Tensor:
    kernels = [None if c is None else kernel_of(c) for c in (block.expand, block.project)]
    norms = block.norm1, block.norm2, block.norm3
    affine = [p for norm in norms for p in (norm and norm.weight, norm and norm.bias)]
    weights = [layer.weight for layer in block.convs]
    return _Residual.apply(x, block, *kernels, *affine, *weights, *excitation_of(block.se))


class _Residual(Function):
    @staticmethod
    def forward(ctx, x, block, expand, project, *rest):
        weights, excitation = rest[6 : 6 + len(block.convs)], rest[6 + len(block.convs) :]
        norm2, norm3 = block.norm2, block.norm3
        expansion = None
        if expand is not None:
            expansion = _Expansion(expand, len(parts_of(block.expand)), block.norm1, x)
        expanding, before = (None, None) if expansion is None else (expansion.ternary, expansion.affine)
        y = empty_output(x, block.stride, norm2.num_features)
        moments = torch.empty(2, norm2.num_features, dtype=torch.float64)
        convolve(x, y, block.stride, weights, block.act, expanding, before, moments)
        after = as_affine(norm2, moments, y.numel() // y.shape[1])
        projecting = TernaryKernel.folded(project, len(parts_of(block.project)))
        z = empty_output(y, 1, norm3.num_features)
        moments = torch.empty(2, norm3.num_features, dtype=torch.float64)
        pooled, gate = torch.empty(2, *y.shape[:2]).unbind() if excitation else (None, None)
        call(
            *("project", is_half(y), block.act, y, z, *as_pixels(y)[:2], projecting, after),
            *(*excitation_arguments(excitation), pooled, gate, moments),
        )
        last = as_affine(norm3, moments, z.numel() // z.shape[1])
        result, skip = torch.empty_like(z), x if block.has_skip else None
        call("apply", is_half(z), 0, z, skip, result, *as_pixels(z), last)
        ctx.save_for_backward(x, y, z, after, last, pooled, gate, *weights, *excitation)
        ctx.block, ctx.expansion, ctx.projecting = block, expansion, projecting
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, y, z, after, last, pooled, gate, *rest = ctx.saved_tensors
        block, needed = ctx.block, ctx.needs_input_grad
        weights, excitation = rest[: len(block.convs)], rest[len(block.convs) :]
        dy, last_sums = in_pixels(dy), empty_sums(z)
        call("sums", is_half(z), 0, dy, z, *as_pixels(z), last, last_sums)
        dweight3, dbias3 = combine(last_sums, None, None, z.shape, last)
        back, sums, dpooled = ctx.projecting.transposed(), empty_sums(y), None
        dproject = torch.empty_like(ctx.projecting.signs) if needed[3] else None
        call(
            *("project_backward", is_half(y), block.act, dy, z, y, *as_pixels(y)[:2], back, last, after),
            *(gate, sums, dproject),
        )
        dexcitation = []
        if gate is not None:
            dpooled, *dexcitation = excite_back(pooled, excitation, sums[:, 0, : y.shape[1]])
            dpooled = (dpooled / (y.shape[2] * y.shape[3])).contiguous()
        dweight2, dbias2 = combine(sums, gate, dpooled, y.shape, after)
        dx = expanding = dexpand = dweight1 = dbias1 = None
        if ctx.expansion is None:
            dx = torch.empty_like(x)  # else it comes from the expansion
        else:
            expanding = ctx.expansion.arguments(x, needed[2])
        trained = needed[10 : 10 + len(block.convs)]
        behind = z, y, back, last, after, gate, dpooled
        dweights = convolve_back(dy, x, dx, block.stride, weights, trained, block.act, behind, expanding)
        skip = dy if block.has_skip else None
        if ctx.expansion is not None:
            dx, dexpand, dweight1, dbias1 = ctx.expansion.gradients(x, expanding, skip)
        elif skip is not None:
            dx += skip
        if dproject is not None:
            dproject = dproject.view(-1, dproject.shape[2], 1, 1).to(x.dtype)
        affine = dweight1, dbias1, dweight2, dbias2, dweight3, dbias3
        return dx, None, dexpand, dproject, *affine, *dweights, *dexcitation


def _products(u: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Sums over pixels: products (groups, inputs, inputs) and of u (groups, inputs) less the first pixel."""
    inputs = u.shape[1] // groups
    products = torch.empty(groups, inputs, inputs, dtype=torch.float64)
    sums = torch.empty(groups, inputs, dtype=torch.float64)
    call("products", is_half(u), u, *as_pixels(u)[:2], groups, inputs, products, sums)
    return products.triu() + products.triu(1).transpose(1, 2), sums  # the kernel leaves one half out


def _double_products(u: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """As :func:`_products`, in FP64 throughout."""
    pixels = u.permute(0, 2, 3, 1).flatten(0, 2).double().unflatten(1, (groups, -1)).transpose(0, 1)
    pixels = pixels - pixels[:, :1]
    return pixels.transpose(1, 2) @ pixels, pixels.sum(1)


def _centred(products: Tensor, sums: Tensor, values: int) -> Tensor:
    """Sums of products (groups, inputs, inputs) of what is left of u without its mean."""
    return products - sums[:, :, None] * sums[:, None] / values


class _Expansion:
    """A block's first 1x1 convolution E and the norm behind it: both are linear in the block's input u.

    The moments of Eu are those of u, which has few channels, seen through E (and so, for halves, those before
    Eu is rounded). With g the gradient of the norm's output, that of Eu is scale * g + slope * (Eu - mean) +
    constant; slope and constant are known after the whole batch. The kernel gives E^T(scale * g) and the sum
    of u (scale * g)^T. The rest is linear in u.
    """

    def __init__(self, kernel: Tensor, groups: int, norm: nn.BatchNorm2d, u: Tensor):
        self.ternary = TernaryKernel.folded(kernel, groups)
        groups = len(self.ternary.signs)
        products, sums = _products(u, groups)
        with one_thread():
            self._take_moments(products, sums, norm, u)

    def _take_moments(self, products: Tensor, sums: Tensor, norm: nn.BatchNorm2d, u: Tensor) -> None:
        groups, _, inputs = self.ternary.signs.shape
        values = u.numel() // u.shape[1]
        weights = self.ternary.weights().double()
        largest = (weights.square() * products.diagonal(dim1=1, dim2=2)[:, None]).sum(2)
        covariances = weights @ _centred(products, sums, values)  # of Eu and u, times values
        squares = (covariances * weights).sum(2)
        if (squares < CANCELLED * largest).any():  # differences of nearly equal channels, or a far pivot
            products, sums = _double_products(u, groups)
            covariances = weights @ _centred(products, sums, values)
            squares = (covariances * weights).sum(2)
        self.mean = u[0, :, 0, 0].view(groups, inputs) + sums / values
        moments = torch.stack([(weights @ self.mean[:, :, None]).flatten(), squares.clamp(min=0).flatten()])
        self.covariances = covariances.float()
        self.affine = as_affine(norm, moments, values)

    def arguments(self, u: Tensor, is_trained: bool) -> tuple:
        """As the kernel takes them: E, its transposed, norm; and gives them: parts of gradients, sums."""
        groups, outputs, inputs = self.ternary.signs.shape
        du = torch.empty(len(u), *u.shape[2:], u.shape[1])
        sums = torch.zeros(len(u), SUMS, self.affine.shape[1])
        outer = torch.empty(groups, inputs, outputs) if is_trained else None
        return self.ternary, self.ternary.transposed(), self.affine, du, sums, outer

    def gradients(
        self, u: Tensor, arguments: tuple, skip: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Of u (plus ``skip``), of E (outputs, inputs, 1, 1), and of the norm's weight and bias."""
        *_, du, sums, outer = arguments
        groups, outputs, inputs = self.ternary.signs.shape
        shape = len(u), groups * outputs, *u.shape[2:]
        dweight, dbias = combine(sums, None, None, shape, self.affine)
        _, _, mean, _, slope, constant = (
            row[: groups * outputs].view(groups, outputs, 1) for row in self.affine
        )
        with one_thread():
            weights = self.ternary.weights()
            transposed = weights.transpose(1, 2)
            through_mean, offset = transposed @ (slope * weights), transposed @ (constant - slope * mean)
        dx = torch.empty_like(u)
        call(
            *("complete", is_half(u), u, du, skip, dx, du.numel() // du.shape[3], groups, inputs),
            *(through_mean.contiguous(), offset.flatten()),
        )
        dexpand = None
        if outer is not None:
            totals = self.mean[:, None].float() * (u.numel() // u.shape[1])
            with one_thread():
                dexpand = torch.baddbmm(outer.transpose(1, 2), constant, totals)
                dexpand = dexpand.addcmul_(slope, self.covariances).reshape(-1, inputs, 1, 1).to(u.dtype)
        return dx, dexpand, dweight, dbias


# --- a whole block in eval mode --------------------------------------------------------------


def _output_in_eval(block: _Block, x: Tensor) -> Tensor:
    y = empty_output(x, block.stride, block.norm3.num_features)
    packed = Weights([conv.weight for conv in block.convs])
    expanding = before = None
    if block.expand is not None:
        expanding, before = _in_eval(block.expand, x.dtype), as_affine(block.norm1, None, 0)
    sizes = len(x), *x.shape[2:], *y.shape[2:], block.norm2.num_features
    call(
        *("residual", is_half(x), block.act, block.stride, *packed.arguments, x, y, *sizes),
        *(expanding, before, as_affine(block.norm2, None, 0)),
        *excitation_arguments(excitation_of(block.se)),
        *(_in_eval(block.project, x.dtype), as_affine(block.norm3, None, 0), block.has_skip),
    )
    return y


def _in_eval(conv1x1: nn.Module, dtype: torch.dtype) -> TernaryKernel:
    """The signs, and apart from them the scale, by which eval mode multiplies the output."""
    signs = [conv.signs() for conv in parts_of(conv1x1)]
    scale = torch.stack([ternary_scale(s) for s in signs]).to(dtype)
    return TernaryKernel(torch.stack(signs).flatten(2), scale)

"""A Vision Transformer short enough to read in class, in the two architectures the course attacks.

Architecture A (``block="april"``) is the one the closed form of APRIL (Lu et al., CVPR 2022, arXiv
2112.14087) was made for: the first attention acts directly on patch + position embedding.
Architecture B (``block="prenorm"``) is the ViT in everyday use (Dosovitskiy et al., ICLR 2021,
arXiv 2010.11929).

Tokens are rows here: an activation has shape (B, tokens, width). The course's text writes them as
columns.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

Block = Literal["april", "prenorm"]
Position = Literal["learned", "frozen", "sinusoidal", "none"]


def patchify(images: Tensor, patch_size: int | tuple[int, int]) -> Tensor:
    """Cut images into non-overlapping patches, row by row, each flattened as (channel, y, x).

    This is the order in which a convolution with ``kernel_size = stride = patch_size`` reads them,
    so ``patchify(images, P) @ conv.weight.flatten(1).T + conv.bias`` is the patch embedding.

    Parameters
    ----------
    images : Tensor of shape (B, C, H, W), with H and W multiples of ``patch_size``
    patch_size : int or (height, width), in pixels

    Returns
    -------
    Tensor of shape (B, n, p), with n = (H / P)(W / P) patches of p = C·P² numbers

    Raises
    ------
    ValueError
        If the patches do not tile the image.

    Examples
    --------
    >>> import torch, aprillab as al
    >>> image = torch.arange(16.0).reshape(1, 1, 4, 4)
    >>> al.patchify(image, 2)[0, 1]
    tensor([2., 3., 6., 7.])
    """
    b, c, h, w = images.shape
    ph, pw = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    if h % ph or w % pw:
        raise ValueError(f"patch_size={patch_size} does not tile an image of {h}×{w} pixels")
    x = images.reshape(b, c, h // ph, ph, w // pw, pw)  # (B, C, gy, P, gx, P)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * ph * pw)  # (B, n, p)


def unpatchify(patches: Tensor, patch_size: int | tuple[int, int], image_size: tuple[int, int]) -> Tensor:
    """Put patches back into images: the inverse of :func:`patchify`.

    Parameters
    ----------
    patches : Tensor of shape (B, n, p)
    patch_size : int or (height, width), in pixels
    image_size : (H, W), in pixels

    Returns
    -------
    Tensor of shape (B, C, H, W)

    Raises
    ------
    ValueError
        If these patches do not tile such an image.

    Examples
    --------
    >>> import torch, aprillab as al
    >>> al.unpatchify(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), 1, (1, 2))[0, :, 0, 1]
    tensor([3., 4.])
    """
    b, n, p = patches.shape
    h, w = image_size
    ph, pw = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    gy, gx = h // ph, w // pw
    if h % ph or w % pw or gy * gx != n or p % (ph * pw):
        raise ValueError(f"{n} patches of {p} numbers do not make an image of {h}×{w} at patch_size={patch_size}")
    x = patches.reshape(b, gy, gx, -1, ph, pw)  # (B, gy, gx, C, P, P)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(b, -1, h, w)


def sinusoidal_1d(tokens: int, width: int, base: float = 10_000.0) -> Tensor:
    """Fixed position embedding of "Attention Is All You Need" (Vaswani et al., 2017).

    Parameters
    ----------
    tokens : int, the class token included
    width : int, even
    base : float, the longest wavelength is 2π·base

    Returns
    -------
    Tensor of shape (tokens, width), float64: sines in the even columns, cosines in the odd ones

    Examples
    --------
    >>> import aprillab as al
    >>> al.sinusoidal_1d(3, 4)[1]
    tensor([0.8415, 0.5403, 0.0100, 1.0000], dtype=torch.float64)
    """
    if width % 2:
        raise ValueError(f"a sinusoidal embedding needs an even width, not {width}")
    position = torch.arange(tokens, dtype=torch.float64)[:, None]
    frequency = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    table = torch.empty(tokens, width, dtype=torch.float64)
    table[:, 0::2] = torch.sin(position * frequency)
    table[:, 1::2] = torch.cos(position * frequency)
    return table


def sinusoidal_2d(grid: tuple[int, int], width: int, base: float = 10_000.0, prefix: int = 1) -> Tensor:
    """Fixed 2-D position embedding: half the width codes the row, half the column of a patch.

    Parameters
    ----------
    grid : (rows, columns) of patches
    width : int, a multiple of 4
    base : float
    prefix : int, tokens before the patches (class token); their rows are zero

    Returns
    -------
    Tensor of shape (prefix + rows·columns, width), float64

    Examples
    --------
    Rows and columns apart leave a table of low rank: 17 rows here, and 7 that are independent.

    >>> import torch, aprillab as al
    >>> table = al.sinusoidal_2d((4, 4), 64)
    >>> table.shape, int(torch.linalg.matrix_rank(table))
    (torch.Size([17, 64]), 7)
    """
    if width % 4:
        raise ValueError(f"a 2-D sinusoidal embedding needs a width that is a multiple of 4, not {width}")
    rows, columns = grid
    y = sinusoidal_1d(rows, width // 2, base)[:, None, :].expand(rows, columns, -1)
    x = sinusoidal_1d(columns, width // 2, base)[None, :, :].expand(rows, columns, -1)
    table = torch.cat([y, x], dim=-1).reshape(rows * columns, width)
    return torch.cat([table.new_zeros(prefix, width), table])


class Attention(nn.Module):
    """Multi-head self-attention, spelled out: fused kernels have no second derivative on a CPU."""

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, width, bias=bias)
        self.value = nn.Linear(width, width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    def forward(self, z: Tensor) -> Tensor:
        b, t, d = z.shape
        split = (b, t, self.heads, d // self.heads)
        q = self.query(z).reshape(split).transpose(1, 2)  # (B, heads, tokens, d_k)
        k = self.key(z).reshape(split).transpose(1, 2)  # (B, heads, tokens, d_k)
        v = self.value(z).reshape(split).transpose(1, 2)  # (B, heads, tokens, d_k)
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(d // self.heads), dim=-1)  # (B, heads, t, t)
        return self.out((weights @ v).transpose(1, 2).reshape(b, t, d))


class MLP(nn.Sequential):
    """Two linear layers with a GELU between them, applied to each token."""

    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__(nn.Linear(width, hidden, bias=bias), nn.GELU(), nn.Linear(hidden, width, bias=bias))


class PreNormBlock(nn.Module):
    """Architecture B: ``z + MSA(LN(z))``, then ``z + MLP(LN(z))``."""

    def __init__(self, width: int, heads: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads, bias)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, hidden, bias)

    def forward(self, z: Tensor) -> Tensor:
        z = z + self.attention(self.attention_norm(z))
        return z + self.mlp(self.mlp_norm(z))


class AprilBlock(nn.Module):
    """Architecture A: ``MLP(MSA(z))``, no LayerNorm before the attention and no residual around it."""

    def __init__(self, width: int, heads: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.attention = Attention(width, heads, bias)
        self.mlp = MLP(width, hidden, bias)

    def forward(self, z: Tensor) -> Tensor:
        return self.mlp(self.attention(z))


class VisionTransformer(nn.Module):
    """A Vision Transformer for image classification.

    Parameters
    ----------
    image_size, patch_size : int, in pixels; the patches must tile the image
    channels : int, 1 for grey, 3 for RGB
    width : int, d, the length of a token
    depth : int, blocks
    heads : int, a divisor of ``width``
    classes : int
    mlp_ratio : float, hidden units of the MLP over ``width``
    block : {"prenorm", "april"}, architecture B or A
    position : {"learned", "frozen", "sinusoidal", "none"}
        ``"learned"`` is a parameter; ``"frozen"`` a parameter with ``requires_grad=False``, so no
        client shares its gradient; ``"sinusoidal"`` a buffer, fixed for ever
        (:func:`sinusoidal_1d`).
    position_values : Tensor of shape (tokens, width), optional
        Values to use instead of the default ones for that ``position``, :func:`sinusoidal_2d`, say.
    class_token : bool; without it the head reads the mean of the patch tokens
    bias : bool, biases in the patch embedding, attention, MLP and head
    seed : int, for the initial weights; the global generator is left alone

    Notes
    -----
    Initial weights are chosen so that a gradient at initialization is informative (a zero
    head, say, would share zeros for everything below it). Every linear map: normal with
    standard deviation 1/√fan_in, queries and keys √2 times that, so that attention differs from
    token to token from the start. Biases, position embedding and class token: normal with standard
    deviation 0.02. LayerNorm: weight 1, bias 0.

    Examples
    --------
    >>> import aprillab as al
    >>> model = al.VisionTransformer(image_size=32, patch_size=8, width=64, depth=2, heads=4, classes=10)
    >>> sum(p.numel() for p in model.parameters())
    114250
    """

    def __init__(
        self,
        *,
        image_size: int = 224,
        patch_size: int = 16,
        channels: int = 3,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        classes: int = 1000,
        mlp_ratio: float = 4.0,
        block: Block = "prenorm",
        position: Position = "learned",
        position_values: Tensor | None = None,
        class_token: bool = True,
        bias: bool = True,
        seed: int = 0,
    ) -> None:
        if image_size % patch_size:
            raise ValueError(f"patch_size={patch_size} does not tile image_size={image_size}")
        if width % heads:
            raise ValueError(f"width={width} is not a multiple of heads={heads}")
        if block not in get_args(Block):
            raise ValueError(f"block={block!r} is none of {get_args(Block)}")
        if position not in get_args(Position):
            raise ValueError(f"position={position!r} is none of {get_args(Position)}")
        super().__init__()
        self.image_size, self.patch_size, self.channels = image_size, patch_size, channels
        self.width, self.heads, self.classes = width, heads, classes
        self.block, self.position = block, position
        grid = image_size // patch_size
        tokens = grid**2 + class_token
        hidden = int(width * mlp_ratio)
        block_type = AprilBlock if block == "april" else PreNormBlock
        # PyTorch's layers draw their first weights from the global generator: fork it, ours come
        # from `seed`.
        with torch.random.fork_rng(devices=[]):
            self.patch_embedding = nn.Conv2d(channels, width, patch_size, stride=patch_size, bias=bias)
            self.class_token = nn.Parameter(torch.empty(1, 1, width)) if class_token else None
            self.blocks = nn.Sequential(*[block_type(width, heads, hidden, bias) for _ in range(depth)])
            self.norm = nn.LayerNorm(width, eps=1e-6)
            self.head = nn.Linear(width, classes, bias=bias)
        self._set_position(position, position_values, tokens)
        self._initialize(torch.Generator().manual_seed(seed), random_position=position_values is None)

    def _set_position(self, position: Position, values: Tensor | None, tokens: int) -> None:
        """Register the position embedding as parameter, frozen parameter or buffer of shape (1,
        tokens, width).
        """
        if position == "none":
            if values is not None:
                raise ValueError('position="none" takes no position_values')
            self.position_embedding = None
            return
        if values is None and position == "sinusoidal":
            values = sinusoidal_1d(tokens, self.width)
        like = self.patch_embedding.weight  # its dtype and device are the model's
        table = like.new_empty(tokens, self.width) if values is None else values.detach().to(like)
        if table.shape != (tokens, self.width):
            raise ValueError(
                f"position_values must be (tokens, width) = {(tokens, self.width)}, not {tuple(table.shape)}"
            )
        if position == "sinusoidal":
            self.register_buffer("position_embedding", table[None].clone())
        else:
            self.position_embedding = nn.Parameter(table[None].clone(), requires_grad=position == "learned")

    @torch.no_grad()
    def _initialize(self, generator: torch.Generator, random_position: bool) -> None:
        """Fill all weights from ``generator``; the distributions are in the class's notes."""

        def normal_(tensor: Tensor, std: float) -> None:
            # Drawn on the CPU, so that a seed means the same weights on every device.
            tensor.copy_(std * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype, device="cpu"))

        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                gain = math.sqrt(2) if name.endswith(("query", "key")) else 1.0
                fan_in = module.weight[0].numel()
                normal_(module.weight, gain / math.sqrt(fan_in))
                if module.bias is not None:
                    normal_(module.bias, 0.02)
        if self.class_token is not None:
            normal_(self.class_token, 0.02)
        if isinstance(self.position_embedding, nn.Parameter) and random_position:
            normal_(self.position_embedding, 0.02)

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to the tokens z that enter the first block, (B, tokens, width).

        Examples
        --------
        >>> import torch, aprillab as al
        >>> model = al.VisionTransformer(image_size=32, patch_size=8, width=64, depth=2, heads=4)
        >>> model.embed(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 17, 64])
        """
        z = self.patch_embedding(images).flatten(2).transpose(1, 2)  # (B, n, d)
        if self.class_token is not None:
            z = torch.cat([self.class_token.expand(len(z), -1, -1), z], dim=1)  # (B, 1 + n, d)
        return z if self.position_embedding is None else z + self.position_embedding

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in model-input space to logits (B, classes)."""
        size = (self.channels, self.image_size, self.image_size)
        if images.ndim != 4 or images.shape[1:] != size:
            raise ValueError(f"images must be (B, {size[0]}, {size[1]}, {size[2]}), not {tuple(images.shape)}")
        z = self.norm(self.blocks(self.embed(images)))
        return self.head(z.mean(1) if self.class_token is None else z[:, 0])

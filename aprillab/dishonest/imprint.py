"""An imprint: pictures sorted into bins by their brightness, in a ViT as it is.

A linear layer whose rows are all alike but for their thresholds tells its inputs apart: row k gets
the gradient of all that lie above threshold k, and two neighbours' difference is that of what lies
between. One row holds no more numbers than its input, d of them; a picture of n patches has n p. So
a picture takes n rows here, one for each patch, and h hidden units make h/n bins. What is written
into the first block:

- patch embedding: an orthonormal basis of a patch, its lowest frequencies if d is too small for all;
- position embedding: two constants, and a point of a circle for each place;
- attention: no queries and keys, so that each token is given the mean brightness of all, in one number;
- MLP: unit (i, k) is s [M (place is i) + brightness − c_k], far below zero at every place but i.

All of it is a function of z without the LayerNorms' mean and scale, which two constants undo again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy, dissect
from ..preprocessing import Preprocessing
from ..update import ClientUpdate
from .first_block import FirstBlock, first_block
from .sent import CannotCheat, sent_state

_PLUS, _MINUS, _COS, _SIN, _BRIGHT, _SPECIAL = 0, 1, 2, 3, 4, 5  # coordinates of a token; pixels follow
_SIZE = 20.0  # of the constants and the circle; pixels in model-input space are some √p
_SHARP = 2e4  # s: a unit is on or off but for 4e-4 of brightness
_PASSED = 1e-7  # what each unit adds to its token: s times that stays small
_RANGE = 4.0  # times what thresholds span: so far apart are places
_EMPTY = 1e-4  # of the fullest bin: rounding leaves less in one without a picture
_BELOW_ALL = 6.0  # standard deviations below the mean: no picture is darker than the first bin
_ALONE = 1e-3  # how far the length of a LayerNorm's output may be from √d


def imprint(
    model: nn.Module, *, brightness: tuple[float, float] | Tensor = (0.0, 0.4), anatomy: Anatomy | None = None
) -> dict[str, Tensor]:
    """The model with a first block that sorts pictures by their mean brightness; the
    rest stays as it is.

    *What it changes*: patch and position embedding, class token, and all of the first block.

    *What it does*: of a batch, or a sum over clients, each picture that is alone in its bin comes
    back (:func:`read_imprint`), whatever its class. With h hidden units and n patches there are
    ⌊h/n⌋ bins: 48 of pictures of 32×32 at patch 8 and width 192, 15 of ViT-B/16's at 224. Where
    d < p + 5 the highest frequencies of each patch are lost.

    *What it costs the federation*: the model. Nothing of the first block is left.

    *How it can be seen*: the first block's matrices have lost nearly all their directions
    (:func:`~aprillab.dishonest.inspect_model`, "layer directions"); the embeddings are huge and
    the loss is chance's.

    *Whose idea*: Fowl et al. ("Robbing the Fed", ICLR 2022): bins by brightness and differences of
    neighbouring rows, in a layer that the server adds. In a transformer's own MLP, with position
    written into the embedding: Fowl et al. ("Decepticons", ICLR 2023), on text. Written into
    adapters of a ViT: PEFTLeak (Sami et al., CVPR 2025). Here nothing is added, and each place has
    its units, so that patches need not be put together afterwards.

    Parameters
    ----------
    model : nn.Module
        A pre-norm ViT with learned or fixed positions, such as this package's, torchvision's or
        timm's; left unchanged. Its second block or its mean over tokens must read the patch tokens:
        with one block and a class token nothing comes back.
    brightness : (mean, standard deviation), or Tensor of shape (N,)
        The mean over all pixels and channels in model-input space, of pictures like the client's:
        the law of it, taken for normal, or N public pictures' own. Bins are its quantiles.
    anatomy : Anatomy, optional
        Default is ``dissect(model)``.

    Returns
    -------
    dict of str to Tensor
        A copy: the same names, shapes, dtypes and devices as ``model.state_dict()``.

    Raises
    ------
    CannotCheat
        If the model has another first block, or too few hidden units for two bins.

    Examples
    --------
    >>> import torch, aprillab as al
    >>> shape = {"image_size": 16, "patch_size": 8, "width": 208, "depth": 2, "heads": 2, "classes": 10}
    >>> model = al.VisionTransformer(**shape).eval()
    >>> model.load_state_dict(imprint(model))
    <All keys matched successfully>
    >>> pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) / 2
    >>> pixels[1] += 0.4
    >>> update = al.client_update(model, al.HALF.to_input(pixels), torch.tensor([1, 3]))
    >>> found = [one.pixels for one in read_imprint(model, update, preprocessing=al.HALF) if one.alone]
    >>> [al.psnr(one, p) > 50 for one, p in zip(found, pixels.flip(0))]
    [True, True]
    """
    anatomy = anatomy or dissect(model)
    block, state = first_block(model, anatomy), model.state_dict()
    plan = _plan(anatomy, state[block.first])
    thresholds = _thresholds(brightness, plan.bins)
    new = {
        name: torch.zeros_like(state[name], dtype=torch.float64, device="cpu") for name in _written(anatomy, block)
    }
    for weight, _ in block.norms:
        new[weight].fill_(1.0)
    _write_embedding(new, anatomy, plan)
    _write_attention(new, block, plan)
    # Tokens before the patches have no brightness, and are in the mean.
    _write_units(new, block, plan, thresholds * plan.places / (plan.places + anatomy.position_prefix))
    return sent_state(model, new)


def _thresholds(brightness: tuple[float, float] | Tensor, bins: int) -> Tensor:
    """Lower ends of the bins, (bins,) float64, each as probable as the others; the
    first is open below.
    """
    quantiles = torch.arange(bins, dtype=torch.float64) / bins
    if isinstance(brightness, Tensor):
        values = brightness.detach().double().flatten().cpu()
        if len(values) < 2 or not bool(torch.isfinite(values).all()) or not values.std() > 0:
            raise CannotCheat("brightness must be finite numbers that are not all alike, of two pictures or more")
        mean, std = float(values.mean()), float(values.std())
        ends = values.quantile(quantiles)
    else:
        mean, std = brightness
        if not 0 < std < math.inf or not math.isfinite(mean):
            raise CannotCheat(f"brightness={brightness} must be a mean and a positive standard deviation")
        ends = mean + std * math.sqrt(2) * torch.erfinv(2 * quantiles - 1)
    ends[0] = mean - _BELOW_ALL * std
    return ends


@dataclass(frozen=True)
class Imprinted:
    """What one bin holds.

    Attributes
    ----------
    bin : int
        From the brightest, 0.
    pixels : Tensor of shape (C, H, W), in [0, 1] where one picture was alone
    alone : bool
        Whether each patch has the length √d that a LayerNorm gives one token, and no mixture.
    miss : float
        How far the worst patch is from that length, relative to it.
    """

    bin: int
    pixels: Tensor
    alone: bool
    miss: float


def read_imprint(
    model: nn.Module,
    update: ClientUpdate,
    *,
    preprocessing: Preprocessing | None = None,
    anatomy: Anatomy | None = None,
) -> list[Imprinted]:
    """The pictures in an imprinted model's update, one for each bin that is not empty.

    Parameters
    ----------
    model : nn.Module
        Which :func:`imprint` was made of, with any weights.
    update : ClientUpdate
        Of one client, or a sum.
    preprocessing : Preprocessing, optional
        Default is the model family's own.
    anatomy : Anatomy, optional
        Default is ``dissect(model)``.

    Returns
    -------
    list of Imprinted
        From the brightest bin down.

    Raises
    ------
    CannotCheat
        If the model has no such first block, or the update no gradient of its MLP's first layer.

    Examples
    --------
    >>> import torch, aprillab as al
    >>> shape = {"image_size": 16, "patch_size": 8, "width": 208, "depth": 2, "heads": 2, "classes": 10}
    >>> model = al.VisionTransformer(**shape).eval()
    >>> model.load_state_dict(imprint(model))
    <All keys matched successfully>
    >>> images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> found = read_imprint(model, al.client_update(model, images, torch.tensor([1])), preprocessing=al.UNIT)
    >>> len(found), found[0].alone, al.psnr(found[0].pixels, images[0]) > 50
    (1, True, True)
    """
    anatomy = anatomy or dissect(model)
    preprocessing = preprocessing or anatomy.preprocessing
    block = first_block(model, anatomy)
    weight, bias = update.gradients.get(block.first), update.gradients.get(block.first_bias or "")
    if weight is None or bias is None:
        raise CannotCheat(f"the update has no gradient of {block.first} and its bias: nothing was imprinted")
    plan = _plan(anatomy, model.state_dict()[block.first])
    shape = plan.bins, plan.places
    rows = weight.double()[: plan.bins * plan.places].reshape(*shape, -1)  # (bins, n, d)
    sums = bias.double()[: plan.bins * plan.places].reshape(shape)
    rows, sums = _differences(rows).flip(0), _differences(sums).flip(0)
    found, size = [], float(sums.abs().max())
    for k in range(plan.bins):
        if float(sums[k].abs().max()) < _EMPTY * size or not size:
            continue
        miss = float((rows[k].norm(dim=1) / (sums[k].abs() * plan.width**0.5) - 1).abs().max())
        spread = rows[k][:, _PLUS] - rows[k][:, _MINUS]  # 2 · _SIZE, times what the LayerNorm and the loss did
        tokens = _SIZE + (rows[k] - rows[k][:, _PLUS, None]) * (2 * _SIZE / spread)[:, None]
        patches = tokens[:, _SPECIAL : _SPECIAL + len(plan.basis)] @ plan.basis.to(tokens)
        images = anatomy.tiling.images(patches[None])
        found.append(Imprinted(k, preprocessing.to_pixels(images)[0], miss < _ALONE, miss))
    return found


def _differences(values: Tensor) -> Tensor:
    """Of each row and the next, the last as it is."""
    return torch.cat([values[:-1] - values[1:], values[-1:]])


# --- What is written ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """n places, d, bins of n units each, and the orthonormal rows (q, p) that read a patch."""

    places: int
    width: int
    bins: int
    basis: Tensor
    angles: Tensor

    @property
    def scale(self) -> float:
        """About the standard deviation of a token's entries, which LayerNorm divides by."""
        return math.sqrt((3 * _SIZE**2 + len(self.basis) / 4) / self.width)


def _plan(anatomy: Anatomy, first: Tensor) -> _Plan:
    places, (hidden, width) = math.prod(anatomy.tiling.grid), first.shape
    size, channels = anatomy.tiling.patch_size, anatomy.channels or 3
    bins, kept = hidden // places, min(width - _SPECIAL, channels * math.prod(size))
    if bins < 2 or kept < 1:
        raise CannotCheat(
            f"{hidden} hidden units of width {width} are too few for two bins of {places} patches each: an imprint "
            "takes one unit for each patch and bin"
        )
    angles = 2 * math.pi * torch.arange(places, dtype=torch.float64) / places
    return _Plan(places, width, bins, frequencies(channels, size)[:kept], angles)


def frequencies(channels: int, size: tuple[int, int]) -> Tensor:
    """The cosine transform of a patch, (p, p) with orthonormal rows, low frequencies first.

    >>> basis = frequencies(3, (4, 4))
    >>> bool((basis @ basis.T - torch.eye(48, dtype=torch.float64)).abs().max() < 1e-12)
    True
    """
    mixes, heights, widths = (_cosines(count) for count in (channels, *size))
    basis = torch.einsum("ac,bh,dw->abdchw", mixes, heights, widths).reshape(channels * math.prod(size), -1)
    a, b, d = torch.meshgrid(*(torch.arange(count) for count in (channels, *size)), indexing="ij")
    # A difference of channels counts as a higher frequency: pictures have less of it.
    order = ((b / size[0]) ** 2 + (d / size[1]) ** 2 + 0.3 * (a > 0)).flatten().argsort(stable=True)
    return basis[order]


def _cosines(count: int) -> Tensor:
    """The orthonormal cosine transform, (count, count)."""
    k, x = torch.arange(count, dtype=torch.float64)[:, None], torch.arange(count, dtype=torch.float64)
    table = torch.cos(math.pi * k * (2 * x + 1) / (2 * count)) * math.sqrt(2 / count)
    table[0] /= math.sqrt(2)
    return table


def _written(anatomy: Anatomy, block: FirstBlock) -> set[str]:
    """Names of all tensors that an imprint sets."""
    names: set[str | None] = {anatomy.patch_weight, anatomy.patch_bias, anatomy.position, *anatomy.prefix}
    names |= block.names()
    return {name for name in names if name is not None}


def _write_embedding(new: dict[str, Tensor], anatomy: Anatomy, plan: _Plan) -> None:
    """The patch in the coordinates behind the special ones; constants and place in those."""
    new[anatomy.patch_weight].flatten(1)[_SPECIAL : _SPECIAL + len(plan.basis)] = plan.basis
    table = new[anatomy.position or ""].reshape(-1, plan.width)
    table[:, _PLUS], table[:, _MINUS] = _SIZE, -_SIZE
    table[anatomy.position_prefix :, _COS] = _SIZE * plan.angles.cos()
    table[anatomy.position_prefix :, _SIN] = _SIZE * plan.angles.sin()


def _write_attention(new: dict[str, Tensor], block: FirstBlock, plan: _Plan) -> None:
    """Every token is given the mean brightness of all, about as it is in model-input space."""
    values = block.value.of(new)
    assert values is not None
    reads = plan.basis.mean(1)  # what the mean of a patch is made of
    values[0, _SPECIAL : _SPECIAL + len(reads)] = reads
    values[0, [_PLUS, _MINUS]] = -reads.sum() / 2  # the LayerNorm's mean cancels
    new[block.out][_BRIGHT, 0] = plan.scale


def _write_units(new: dict[str, Tensor], block: FirstBlock, plan: _Plan, thresholds: Tensor) -> None:
    """Unit (k, i): s [M (cos(φ − φ_i) − 1) + brightness − c_k], in numbers that the LayerNorm's
    mean cancels from.
    """
    apart = 1 - math.cos(2 * math.pi / plan.places)
    far = _RANGE * float(thresholds.max() - thresholds.min()) / apart
    shape = plan.bins, plan.places
    rows = torch.zeros(*shape, plan.width, dtype=torch.float64)
    rows[..., _COS], rows[..., _SIN] = far * plan.angles.cos() / _SIZE, far * plan.angles.sin() / _SIZE
    rows[..., _BRIGHT] = 1.0
    constant = (-far - thresholds[:, None].expand(shape)) / (2 * _SIZE)
    balance = (rows[..., _COS] + rows[..., _SIN] + rows[..., _BRIGHT]) / 2
    rows[..., _PLUS], rows[..., _MINUS] = constant - balance, -constant - balance
    new[block.first][: plan.bins * plan.places] = _SHARP * plan.scale * rows.reshape(-1, plan.width)
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(plan.width, generator=generator, dtype=torch.float64)
    new[block.second][:, : plan.bins * plan.places] = _PASSED * (direction / direction.norm())[:, None]

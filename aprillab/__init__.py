"""aprillab: what shared gradients give away of a Vision Transformer user's images, and what helps.

    import aprillab as al

    shape = {"image_size": 32, "patch_size": 4, "width": 384, "depth": 4, "heads": 6}
    model = al.VisionTransformer(**shape, classes=10)
    pixels = al.load_victim("astronaut", 32)[None]
    images = al.dissect(model).preprocessing.to_input(pixels)
    update = al.client_update(model, images, torch.tensor([3]))
    picture = al.invert(model, update).pixels

Everything in the course is reached from here; each module is short and meant to be read. PyTorch is
imported with the first name that is asked for, so that ``aprillab --help`` need not wait for it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .version import __version__

# dissect, invert and told_errors by their modules, whose names they share: mypy would take them
# for the modules.
if TYPE_CHECKING:
    from . import defenses, dishonest, privacy, training
    from .anatomy import Anatomy, Rows, UnknownModelError, tensors_of
    from .anatomy.dissect import dissect
    from .attacks import (
        LBFGS,
        RECIPES,
        Adam,
        AttackNotApplicable,
        Labels,
        PositionTerm,
        Priors,
        Recipe,
        Reconstruction,
        april_closed_form,
        attention_product,
        embedding_closed_form,
        gradient_residual,
        is_batch,
        match_gradients,
        recover_labels,
        span_closed_form,
        span_then_match,
        span_then_round,
    )
    from .attacks.invert import invert
    from .attacks.told_errors import told_errors
    from .data import load_victim, load_victims, mnist5k, read_picture, torchvision_dataset, victim_info, victims
    from .dishonest import Inspection, inspect_model
    from .metrics import EXACT_TO_8_BITS_DB, match_batch, mse, psnr, score, ssim
    from .models import VisionTransformer, patchify, sinusoidal_1d, sinusoidal_2d, unpatchify
    from .preprocessing import HALF, IMAGENET, UNIT, Preprocessing
    from .sharing import Count, LeakMap, LeakRow, leak_map
    from .update import (
        ClientUpdate,
        Round,
        UpdateError,
        check_update,
        client_update,
        load_state,
        load_update,
        save_update,
        update_from_states,
    )

__all__ = [
    "EXACT_TO_8_BITS_DB",
    "HALF",
    "IMAGENET",
    "LBFGS",
    "RECIPES",
    "UNIT",
    "Adam",
    "Anatomy",
    "AttackNotApplicable",
    "ClientUpdate",
    "Count",
    "Inspection",
    "Labels",
    "LeakMap",
    "LeakRow",
    "PositionTerm",
    "Preprocessing",
    "Priors",
    "Recipe",
    "Reconstruction",
    "Round",
    "Rows",
    "UnknownModelError",
    "UpdateError",
    "VisionTransformer",
    "__version__",
    "april_closed_form",
    "attention_product",
    "check_update",
    "client_update",
    "defenses",
    "dishonest",
    "dissect",
    "embedding_closed_form",
    "gradient_residual",
    "inspect_model",
    "invert",
    "is_batch",
    "leak_map",
    "load_state",
    "load_update",
    "load_victim",
    "load_victims",
    "match_batch",
    "match_gradients",
    "mnist5k",
    "mse",
    "patchify",
    "privacy",
    "psnr",
    "read_picture",
    "recover_labels",
    "save_update",
    "score",
    "sinusoidal_1d",
    "sinusoidal_2d",
    "span_closed_form",
    "span_then_match",
    "span_then_round",
    "ssim",
    "tensors_of",
    "told_errors",
    "torchvision_dataset",
    "training",
    "unpatchify",
    "update_from_states",
    "victim_info",
    "victims",
]

#: The modules that are part of the face, and those whose names are, in the order they are
#: looked through.
_MODULES = (
    "anatomy", "attacks", "data", "defenses", "dishonest", "metrics", "models", "preprocessing", "privacy", "sharing",
    "training", "update",
)  # fmt: skip
_HOMES = ("preprocessing", "metrics", "models", "update", "data", "anatomy", "attacks", "dishonest", "sharing")

# A type checker that saw this function would take every name for one of the package's.
if not TYPE_CHECKING:

    def __getattr__(name):
        """Import what is asked for, when it is first asked for (PEP 562)."""
        if name in _MODULES:
            return import_module(f".{name}", __name__)
        for home in _HOMES if name in __all__ else ():
            names = vars(import_module(f".{home}", __name__))
            if name in names:
                globals()[name] = names[name]
                return names[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

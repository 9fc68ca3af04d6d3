"""The attacks: plain functions of (model, update) that return a :class:`Reconstruction`."""

from .catalogue import ATTACKS, CLOSED_FORMS, Attack
from .closed_forms.april import april_closed_form
from .closed_forms.attention_identity import attention_product
from .closed_forms.patch_embedding import embedding_closed_form
from .closed_forms.span import span_closed_form
from .evidence import is_batch, one_image, one_image_residual
from .grey_levels.span_then_round import span_then_round
from .invert import invert
from .labels import Labels, recover_labels
from .replay import gradient_residual
from .result import AttackNotApplicable, Condition, Reconstruction, decibels, predicted_psnr, report, verdict
from .searches.coordinates import Coordinates
from .searches.match import match_gradients
from .searches.recipes import LBFGS, RECIPES, Adam, PositionTerm, Priors, Recipe
from .searches.span_then_match import span_then_match
from .told_errors import told_errors

__all__ = [
    "ATTACKS",
    "CLOSED_FORMS",
    "LBFGS",
    "RECIPES",
    "Adam",
    "Attack",
    "AttackNotApplicable",
    "Condition",
    "Coordinates",
    "Labels",
    "PositionTerm",
    "Priors",
    "Recipe",
    "Reconstruction",
    "april_closed_form",
    "attention_product",
    "decibels",
    "embedding_closed_form",
    "gradient_residual",
    "invert",
    "is_batch",
    "match_gradients",
    "one_image",
    "one_image_residual",
    "predicted_psnr",
    "recover_labels",
    "report",
    "span_closed_form",
    "span_then_match",
    "span_then_round",
    "told_errors",
    "verdict",
]

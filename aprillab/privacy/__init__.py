"""Noise with a proof: what ε it buys, what that ε forbids every attacker, and training under it.

    al.privacy.epsilon(1.0, rounds=100)               # ε of a noise multiplier
    al.privacy.noise_multiplier(3.0, rounds=100)      # and back
    al.privacy.success_bound(1 / 256, 1.0)            # what no attacker can do better
    al.privacy.identification_rate(distances, noise)  # what the best one does
    al.privacy.train_privately(model, images, labels, epsilon=3.0, epochs=10)

Counting under sampling, and training, are Opacus': ``pip install 'aprillab[privacy]'``. The
rest does without.
"""

from .accounting import Guarantee, OpacusMissing, epsilon, guarantee, noise_multiplier
from .bounds import (
    chosen_model_mse,
    chosen_model_success,
    fano_bound,
    success_bound,
    success_bound_dp,
    success_bound_rdp,
    unbiased_mse_bound,
)
from .dp_sgd import ModelRefused, train_privately
from .identification import clipped_gradients, gradient_distances, identification_rate, identification_rates
from .information import cramer_rao_mse, mean_pixel_information, pixel_information

__all__ = [
    "Guarantee",
    "ModelRefused",
    "OpacusMissing",
    "chosen_model_mse",
    "chosen_model_success",
    "clipped_gradients",
    "cramer_rao_mse",
    "epsilon",
    "fano_bound",
    "gradient_distances",
    "guarantee",
    "identification_rate",
    "identification_rates",
    "mean_pixel_information",
    "noise_multiplier",
    "pixel_information",
    "success_bound",
    "success_bound_dp",
    "success_bound_rdp",
    "train_privately",
    "unbiased_mse_bound",
]

"""Names that the command line must know before the modules that have them, and PyTorch, are imported.

``tests/commands/test_arguments.py`` holds them to the originals.
"""

from __future__ import annotations

CLOSED_FORMS = ("embedding", "april", "span")
RECIPES = ("dlg", "idlg", "inverting_gradients", "tag", "gradinversion", "april")
#: The keys of ``aprillab.attacks.ATTACKS``.
ATTACKS = (*CLOSED_FORMS, "span_then_match", "span_then_round", *(f"match:{name}" for name in RECIPES))
MODELS = "april, prenorm, vit_b_16, vit_b_32, vit_l_16, vit_l_32, vit_h_14, timm:NAME, transformers:vit"
POSITIONS = ("learned", "frozen", "sinusoidal", "sinusoidal-2d", "none")
DTYPES = ("float32", "float64")
#: What an audit can find, the worst first.
LEAKS = ("exact", "close", "likely", "coarse", "unclear", "none")

"""Flower's own protections, tried. Needs Flower, by the extra "federation"."""

from aprillab.federation import need_flower

need_flower()

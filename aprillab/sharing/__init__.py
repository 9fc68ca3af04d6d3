"""If these tensors and only these are shared, what do they give away? :func:`leak_map`
answers by counting.
"""

from .build import leak_map
from .counts import Count
from .table import LeakMap, LeakRow

__all__ = ["Count", "LeakMap", "LeakRow", "leak_map"]

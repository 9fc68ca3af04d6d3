"""What an update gives away: :func:`audit` and the files that :func:`write_audit` makes of its
findings.
"""

from .findings import Audit, Finding, Part
from .page import Source
from .report import write_audit
from .run import audit
from .words import TRUST_WORDS

__all__ = ["TRUST_WORDS", "Audit", "Finding", "Part", "Source", "audit", "write_audit"]

"""What an update gives away: :func:`audit` and the files that :func:`write_audit` makes of its findings."""

from .report import write_audit
from .run import TRUST_WORDS, Audit, Finding, Part, audit

__all__ = ["TRUST_WORDS", "Audit", "Finding", "Part", "audit", "write_audit"]

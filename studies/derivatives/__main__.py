"""`python -m studies.derivatives`."""

from .measure import main

main()

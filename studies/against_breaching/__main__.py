"""`python -m studies.against_breaching`."""

from .measure import main

main()

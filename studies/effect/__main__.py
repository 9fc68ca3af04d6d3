"""`python -m studies.effect`."""

from .measure import main

main()

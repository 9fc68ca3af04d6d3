"""`python -m studies.conditioning`."""

from .measure import main

main()

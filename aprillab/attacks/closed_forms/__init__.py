"""Linear systems that fix the private picture: no search, a verdict from ranks and residuals."""

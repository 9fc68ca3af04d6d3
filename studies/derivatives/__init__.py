"""Ways to one evaluation of gradient matching, measured."""

"""The quickstart is an app of its own: nothing in it is collected."""

collect_ignore = ["quickstart"]

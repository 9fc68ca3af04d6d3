"""x"""


def describe(folder, options):
    return {}, []


def draw(folder, options):
    return {}

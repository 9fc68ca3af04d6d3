def describe(folder, options):
    raise NotImplementedError

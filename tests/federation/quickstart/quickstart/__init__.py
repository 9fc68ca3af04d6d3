"""A Flower app as one writes it after Flower's PyTorch quickstart; nothing in it knows of aprillab."""

"""What Colab ships, and what an installation of aprillab adds."""

# Two Colab runtimes that must stay as they are, the oldest and the newest that the course is meant
# for. Where the newest says nothing, a package has at least the oldest's version.
COLAB = {
    "oldest": {
        "python": "3.11.11", "torch": "2.6.0+cu124", "torchvision": "0.21.0+cu124", "numpy": "2.0.2",
        "ipywidgets": "7.7.1", "ipython": "7.34.0", "scipy": "1.14.1", "matplotlib": "3.10.0", "pillow": "11.1.0",
        "safetensors": "0.5.3", "scikit-image": "0.25.2", "tqdm": "4.67.1", "mlxtend": "0.23.4", "timm": "1.0.15",
        "transformers": "4.50.0",
    },
    "newest": {"python": "3.13.0", "torch": "2.11.0", "torchvision": "0.26.0", "numpy": "2.1.0"},
}  # fmt: skip
COLAB["newest"] = COLAB["oldest"] | COLAB["newest"]

# What an installation adds to a Colab runtime: small, and nothing that is there depends on it.
# Runtimes may have peft already; it is listed because not every one was seen to.
ADDED_ON_COLAB = {"peft", "python-flint"}

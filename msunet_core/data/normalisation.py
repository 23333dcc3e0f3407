"""How large the images are and how they are normalised (specification §4), as numbers."""

IMAGE_SIZE = 32
# The published normalisation, specification §4: CIFAR-10's statistics as widely copied, not CIFAR-100's own
# (mean 0.507, 0.487, 0.441); kept because the published networks were trained with them.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)

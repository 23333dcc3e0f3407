"""The images: sources, augmentation, CutMix."""

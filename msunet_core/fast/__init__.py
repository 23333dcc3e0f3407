"""Speed behind one door: :func:`accelerate`."""

from .accelerate import accelerate, accelerated

__all__ = ["accelerate", "accelerated"]

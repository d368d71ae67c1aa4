"""flash_attn.ops.triton.cross_entropy: the same function under its other path."""

from fastattn.flash_attn.losses.cross_entropy import cross_entropy_loss

__all__ = ["cross_entropy_loss"]

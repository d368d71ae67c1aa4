"""flash_attn.ops.triton: norms and cross-entropy, the same code as above it."""

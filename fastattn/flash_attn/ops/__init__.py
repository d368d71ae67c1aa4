"""flash_attn.ops: norms."""

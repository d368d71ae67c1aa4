"""Other people's libraries, each made to run on fastattn by one module's `register()`. Nothing here is imported by `import fastattn`."""

from .flash_attn_alias import as_flash_attn

__all__ = ["as_flash_attn"]

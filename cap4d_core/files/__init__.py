"""Every on-disk format that stages exchange: reading with checks, atomic writing."""

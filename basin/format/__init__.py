"""Pure bytes: every codec of the on-disk format, and nothing that touches a disk, a clock or a thread."""

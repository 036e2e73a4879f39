"""How bytes move between memory and an open object: memory (reference), posix; later gds and nixl."""

"""Doors into LMCache: an L2 adapter for its server, and a storage plugin for LMCache inside an engine."""

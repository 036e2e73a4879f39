"""The stored unit: geometry of paged memory, the chunk format and its checksums. Pure; see ``FORMAT.md``."""

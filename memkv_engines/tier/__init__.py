"""Where chunks live: memory (reference) and directory (NVMe or a shared mount)."""

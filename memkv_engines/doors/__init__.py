"""What several doors share and the core may not: code that needs torch."""

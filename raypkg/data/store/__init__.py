"""Memory-mapped Arrow stores, and how samples get into them."""

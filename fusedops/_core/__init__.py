"""Private plumbing that knows no operator."""

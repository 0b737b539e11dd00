"""What writes a baked model: one exporter a file."""

"""One technique a file, each a function of (model, mesh, config)."""

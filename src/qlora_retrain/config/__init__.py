"""A line's YAML: the models of its sections (`sections`), and reading one with all its errors at once (`line`)."""

"""A line's YAML and a cluster's profile: pydantic models, and a reader that reports every error of a file at once."""

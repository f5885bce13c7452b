"""A step as a container on the local engine."""

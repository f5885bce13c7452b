"""A step as a container on the local engine: Docker, or Podman through its Docker API."""

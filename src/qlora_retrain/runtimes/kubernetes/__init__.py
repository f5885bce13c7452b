"""A step as a pod: its specification, its status, its retries, and the API that creates and deletes it."""

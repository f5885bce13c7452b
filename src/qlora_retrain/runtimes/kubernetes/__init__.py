"""A step as a pod: its specification, its status, its retries."""

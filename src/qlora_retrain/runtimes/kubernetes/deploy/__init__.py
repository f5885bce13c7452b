"""The check of a deployment before it is applied: manifests and profile, without a cluster."""

"""The check of a cluster from inside: would store, roles, quota, nodes and images let a run through?"""

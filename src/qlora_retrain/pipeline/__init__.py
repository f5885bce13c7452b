"""A run from its plan to its last step: keys, execution, status and reports.

Not hashed: nothing here may change an artifact's bytes.
"""

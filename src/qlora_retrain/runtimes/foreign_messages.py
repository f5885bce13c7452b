"""Texts of the kubelet, the Kubernetes API and container engines that say what no field of their answers says.

Only this module of the runtimes matches sentences, and only sentences of other programs. How a step ended is read from
its ending (`core.endings`). `tests/test_structure.py` checks both.
"""

from __future__ import annotations

import re

# The kubelet's wording for a pod's own limits; for a full disk of the node it says "low on resource".
WORK_VOLUME_FULL = re.compile(
    'EmptyDir volume "work" exceeds|local ephemeral storage limit|ephemeral local storage usage'
)
OTHER_VOLUME_FULL = re.compile("EmptyDir volume .* exceeds")
MISSING_SECRET = re.compile('(secret|configmap) "[^"]*" not found')

# The API server answers 403 to all of these: the quota, the account's permissions, and everything else that refuses.
QUOTA_EXCEEDED = re.compile("exceeded quota")
NOT_PERMITTED = re.compile('User ".* cannot ')

# Podman answers 500 instead of 404 while a container is being removed.
CONTAINER_GONE = re.compile("no such container")

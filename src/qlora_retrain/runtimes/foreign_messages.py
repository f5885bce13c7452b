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
# It knows no "status" of a quota that has just been created.
QUOTA_EXCEEDED = re.compile("exceeded quota|status unknown for quota")
NOT_PERMITTED = re.compile('User ".* cannot ')
POD_SECURITY = re.compile("violates PodSecurity ")
NO_DRY_RUN = re.compile("does not support dry run")  # of an admission webhook with side effects

# What the kubelet says in the place of a step's output: as its log (with HTTP status 200), or as its last message.
LOG_IS_GONE = re.compile(r"unable to retrieve container logs for \S+|failed to try resolving symlinks in path ")
NOT_OF_THE_STEP = re.compile(f"(?:{LOG_IS_GONE.pattern}|The container could not be located when the pod was )")

# Podman answers 500 instead of 404 while a container is being removed.
CONTAINER_GONE = re.compile("no such container")

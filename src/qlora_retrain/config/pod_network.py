"""What pods may connect to, and the pods that do it most: those that tell people and servers how a run ended."""

from __future__ import annotations

import ipaddress
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from qlora_retrain.config.fields import Section, operational
from qlora_retrain.config.kubernetes_names import LabelKey, LabelValue, Name, Namespace

Port = Annotated[int, Field(ge=1, le=65_535)]

# Of addresses: the widest block that a destination may be, and where nodes keep what is theirs.
_SHORTEST_PREFIX = {4: 8, 6: 24}
_METADATA = {
    4: [ipaddress.ip_network("169.254.0.0/16")],
    6: [ipaddress.ip_network("fe80::/10"), ipaddress.ip_network("fd00:ec2::/32")],
}


class Destination(Section):
    """What the steps' pods may connect to: blocks of addresses, or pods of the cluster."""

    name: Name = operational(..., "what is there, e.g. store, sts, kms")
    blocks: tuple[str, ...] = operational((), "address blocks, e.g. 10.0.3.17/32; Kubernetes' policies know no names")
    namespace: Namespace | None = operational(None, "instead of blocks: a namespace, e.g. that of MinIO or of a proxy")
    pods: dict[LabelKey, LabelValue] = operational({}, "with namespace: labels of the pods in it")
    # A policy with no port would open all of them.
    ports: Annotated[tuple[Port, ...], Field(min_length=1)] = operational((443,), "TCP ports")

    @field_validator("blocks")
    @classmethod
    def _narrow(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            block = ipaddress.ip_network(text)
            # There a node gives its own credentials to whoever asks.
            if block.prefixlen < _SHORTEST_PREFIX[block.version] or any(
                block.overlaps(own) for own in _METADATA[block.version]
            ):
                raise ValueError(
                    f"{text}: is open to too much; expected blocks of /8 (IPv6: /24) at most, without node metadata"
                )
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> Destination:
        if bool(self.blocks) == bool(self.namespace) or (self.pods and not self.namespace):
            raise ValueError(f"{self.name}: expected either blocks, or a namespace and the labels of pods in it")
        return self


class MessagePods(Section):
    """The pods of the tasks of `notify` and `hooks`, in the namespace of Airflow, by its KubernetesExecutor."""

    service_account: Name = operational(..., "their service account, for nothing else: it reads the store")
    namespace: Namespace = operational("airflow", "where Airflow starts them")
    egress: Annotated[tuple[Destination, ...], Field(min_length=1)] = operational(
        ...,
        "all that they may connect to besides DNS: Airflow's API server, the store, who gets the messages; "
        "`qlora-retrain egress` renders it",
    )

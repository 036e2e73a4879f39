"""Whatever a worker gives its jobs to."""

from __future__ import annotations

from typing import Union

from memkv_engines.offload.client import IoClient
from memkv_engines.offload.device_client import DeviceIoClient
from memkv_engines.offload.direct_client import DirectIoClient

JobClient = Union[IoClient, DeviceIoClient, DirectIoClient]  # noqa: UP007 - an alias is evaluated, also on Python 3.10

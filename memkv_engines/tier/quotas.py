"""Which tenant's quota a namespace counts against.

The tenant is read from the namespace's manifest, whose digest is the folder's name. A process looks for changed quotas
every ``POLICY_REFRESH_S``, when it stores; where there are none a store pays for one comparison of times.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from dataclasses import dataclass

from memkv_engines.errors import ChunkForeign, TierError
from memkv_engines.limits import POLICY_REFRESH_S
from memkv_engines.tier.folders import Folder
from memkv_engines.tier.policy import quotas_of, signature
from memkv_engines.tier.records import read_manifest
from memkv_engines.tier.usage import NAME, UsageFile


@dataclass(frozen=True)
class Account:
    """What one tenant holds, and may hold."""

    tenant: str
    quota_bytes: int
    usage: UsageFile


def usage_name(tenant: str) -> str:
    """Name of the file that counts what a tenant holds."""
    return f"{NAME}-{hashlib.sha256(tenant.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def tenant_of(root_fd: int, folder: str) -> str | None:
    """The tenant of a namespace, None where no manifest tells."""
    try:
        namespace = Folder(folder, root_fd)  # In a name: it closes with its last user.
        body = read_manifest(namespace.fd, folder)
    except (OSError, ChunkForeign):
        return None
    tenant = body.get("tenant") if body is not None else None
    return tenant if isinstance(tenant, str) else None


class TenantAccounts:
    """The accounts of all tenants with a quota below one root; thread-safe.

    Args:
        root_fd: descriptor of the directory; must stay open until ``close``.
    """

    def __init__(self, root_fd: int) -> None:
        self._root_fd = root_fd
        self._lock = threading.Lock()
        self._refresh_at = 0.0
        self._signature: tuple[int, int, int] | None = None
        self._accounts: dict[str, Account] = {}
        self._by_folder: dict[str, Account | None] = {}

    def all(self) -> list[Account]:
        """Every account, as the quotas are now."""
        with self._lock:
            self._refresh()
            return list(self._accounts.values())

    def of(self, folder: str) -> Account | None:
        """The account that chunks of a namespace count against, if its tenant has a quota."""
        if not self._accounts and time.monotonic() < self._refresh_at:
            return None
        with self._lock:
            if time.monotonic() >= self._refresh_at:
                self._refresh()
            if not self._accounts:
                return None
            if folder not in self._by_folder:
                tenant = tenant_of(self._root_fd, folder)
                self._by_folder[folder] = self._accounts.get(tenant) if tenant is not None else None
            return self._by_folder[folder]

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            for account in self._accounts.values():
                account.usage.close()
            self._accounts.clear()
            self._by_folder.clear()
            self._root_fd, self._refresh_at = -1, float("inf")

    def _refresh(self) -> None:
        if self._root_fd < 0:
            return
        self._refresh_at = time.monotonic() + POLICY_REFRESH_S
        self._by_folder.clear()  # A manifest may have come.
        now = signature(self._root_fd)
        if now == self._signature:
            return
        self._signature = now
        wanted = quotas_of(self._root_fd).tenants
        kept = {}
        for tenant, quota_bytes in wanted.items():
            known = self._accounts.pop(tenant, None)
            try:
                usage = known.usage if known is not None else UsageFile(self._root_fd, usage_name(tenant))
            except TierError:
                continue  # It cannot be counted, so it cannot be bounded; the keeper says so.
            kept[tenant] = Account(tenant, quota_bytes, usage)
        for account in self._accounts.values():
            account.usage.close()
            _remove(self._root_fd, usage_name(account.tenant))
        self._accounts = kept


def _remove(root_fd: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=root_fd)
    except OSError:
        pass

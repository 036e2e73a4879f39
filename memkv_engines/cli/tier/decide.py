"""``tier policy``: show and set pins, priorities, times to live and quotas."""

from __future__ import annotations

import argparse
import json
from typing import Any

import msgspec

from memkv_engines.cli.tier.place import Root, check_named, chosen, open_roots
from memkv_engines.cli.tier.printing import human_size, plain
from memkv_engines.cli.tier.summary import policy_text
from memkv_engines.errors import ConfigError
from memkv_engines.tier.policy import NamespacePolicy, Quotas, load_policy, load_quotas, save_policy, save_quotas


def policy(arguments: argparse.Namespace) -> int:
    """Set what is asked for, then show; 1 if a policy is damaged."""
    decided = {"pinned": arguments.pin, "priority": arguments.priority, "ttl_s": arguments.ttl}
    decided = {key: value for key, value in decided.items() if value is not None}
    if decided and not arguments.namespace:
        raise ConfigError("--pin, --unpin, --priority and --ttl are of a namespace: give --namespace")
    if (arguments.quota is None) != (arguments.tenant is None):
        raise ConfigError("--quota and --tenant belong together")
    wanted = [arguments.namespace] if arguments.namespace else []
    with open_roots(arguments.path) as roots:
        check_named(roots, wanted)
        for root in roots:
            for folder in chosen(root, wanted) if decided else ():
                _decide(root, folder, decided)
            if arguments.tenant is not None:
                _set_quota(root, arguments.tenant, arguments.quota // len(roots))
        warnings: list[str] = []
        bodies = [_shown(root, wanted, warnings) for root in roots]
    if arguments.json:
        print(json.dumps({"directories": bodies, "warnings": warnings}, indent=2))
    else:
        _print(bodies, warnings)
    return 1 if warnings else 0


def _decide(root: Root, folder: str, decided: dict[str, Any]) -> None:
    try:
        before = load_policy(root.fd, folder)
    except ConfigError:
        before = NamespacePolicy()  # A damaged one is written anew.
    save_policy(root.fd, folder, msgspec.structs.replace(before, **decided))


def _set_quota(root: Root, tenant: str, quota_bytes: int) -> None:
    try:
        tenants = dict(load_quotas(root.fd).tenants)
    except ConfigError:
        tenants = {}
    if quota_bytes:
        tenants[tenant] = quota_bytes
    else:
        tenants.pop(tenant, None)
    try:
        quotas = Quotas(tenants)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    save_quotas(root.fd, quotas)


def _shown(root: Root, wanted: list[str], warnings: list[str]) -> dict[str, Any]:
    body: dict[str, Any] = {"directory": root.path, "namespaces": {}, "quotas": {}}
    for folder in chosen(root, wanted):
        try:
            found = load_policy(root.fd, folder)
        except ConfigError as error:
            warnings.append(f"{root.path}: {error}")
            continue
        if found != NamespacePolicy() or wanted:
            body["namespaces"][folder] = {"pinned": found.pinned, "priority": found.priority, "ttl_s": found.ttl_s}
    try:
        body["quotas"] = load_quotas(root.fd).tenants
    except ConfigError as error:
        warnings.append(f"{root.path}: {error}")
    return body


def _print(bodies: list[dict[str, Any]], warnings: list[str]) -> None:
    for body in bodies:
        print(plain(body["directory"]))
        for folder, values in body["namespaces"].items():
            print(f"  {folder}  {policy_text(NamespacePolicy(**values))}")
        for tenant, quota_bytes in body["quotas"].items():
            print(f"  tenant {plain(tenant)!r}  at most {human_size(quota_bytes)}")
        if not body["namespaces"] and not body["quotas"]:
            print("  no policies")
    for warning in warnings:
        print(plain(f"warning: {warning}"))

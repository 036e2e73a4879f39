"""What protects chunks, from our configuration; and what a namespace says about it."""

from __future__ import annotations

from memkv_engines.chunk.protection import Protection
from memkv_engines.config import Config
from memkv_engines.keys import JsonValue
from memkv_engines.offload.messages import ProtectionSpec


def protection_of(config: Config) -> Protection | None:
    """The key and what is done with it; None where nothing protects chunks.

    Raises:
        ConfigError: ``cryptography`` is missing.
    """
    if config.secret_key is None:
        return None
    return Protection(config.secret_key.reveal(), encrypt=config.protection.protection == "encrypt")


def protection_spec(config: Config) -> ProtectionSpec | None:
    """The same for an I/O process; refuses what that process would refuse.

    Raises:
        ConfigError: ``cryptography`` is missing.
    """
    protection = protection_of(config)
    if protection is None or config.secret_key is None:
        return None
    return ProtectionSpec(protection.encrypt, config.secret_key.reveal())


def protection_identity(config: Config) -> dict[str, JsonValue]:
    """Fields of a namespace: chunks of another key, and chunks without one, never lie in the same folder.

    Raises:
        ConfigError: ``cryptography`` is missing.
    """
    protection = protection_of(config)
    return {} if protection is None else {"protection": protection.identity()}

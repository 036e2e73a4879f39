"""Authenticated and encrypted chunks: keys, tags and the header's MAC, fixed by ``FORMAT.md`` (Protection).

The only module that imports ``cryptography``, and only where a key is given. A core with wide AES instructions
authenticates some 15 GB/s and encrypts some 9 GB/s, as much as XXH3 digests; each block costs 13 us beside that, each
chunk 0.1 ms for its keys and its header's MAC. No call holds the GIL for more than a piece.
"""

from __future__ import annotations

import hmac
import os
import struct
from typing import TYPE_CHECKING, Any

from memkv_engines.errors import ConfigError
from memkv_engines.keys import JsonValue
from memkv_engines.limits import KIB, PROTECTION_KEY_BYTES

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers import AEADDecryptionContext, AEADEncryptionContext

MAC_ID_NONE, MAC_ID_AES_GCM = 0, 1
CIPHER_ID_NONE, CIPHER_ID_AES_GCM = 0, 1
KEY_ID_BYTES = 16
SALT_BYTES = 32
TAG_BYTES = 16
HEADER_MAC_BYTES = 32

_CONTEXT = struct.Struct("<32sIQ")
_NONCE = struct.Struct("<IQ")
_NONCE_PURPOSE_BLOCK = 1
# A call holds the GIL: so long (35 us at 9 GB/s), and not for a whole block.
_PIECE_BYTES = 256 * KIB


class Protection:
    """The user's key and what is done with it. Immutable, so any thread may use it.

    The key is in this process's memory as plain bytes; ``repr`` and pickles of this object do not show it.

    Args:
        key: 32 random bytes.
        encrypt: blocks are encrypted as well as authenticated.

    Attributes:
        encrypt: as given.
        key_id: 16 bytes that name the key and do not tell it.

    Raises:
        ConfigError: ``cryptography`` is missing or cannot do what is needed; the message has the remedy.
    """

    def __init__(self, key: bytes, *, encrypt: bool) -> None:
        assert len(key) == PROTECTION_KEY_BYTES, "whoever reads keys checks their length"
        _prove_library()
        self._key, self.encrypt = key, encrypt
        self.key_id = _derive(key, b"memkv-engines 1 key id", KEY_ID_BYTES)

    @property
    def cipher_id(self) -> int:
        """``cipher_id`` of the chunks that are written, and the only one that is read."""
        return CIPHER_ID_AES_GCM if self.encrypt else CIPHER_ID_NONE

    def identity(self) -> dict[str, JsonValue]:
        """What a namespace says about it; holds nothing secret."""
        cipher = "aes-256-gcm" if self.encrypt else "none"
        return {"mac": "aes-256-gcm", "cipher": cipher, "key_id": self.key_id.hex()}

    def guard(self, identity: bytes, namespace_digest: bytes, salt: bytes, cipher_id: int) -> ChunkGuard:
        """The keys of one chunk.

        Args:
            identity: bytes [0, 200) of its header.
            namespace_digest: as in there.
            salt: as in the header.
            cipher_id: as in the header.
        """
        namespace_key = _derive(self._key, b"memkv-engines 1 namespace" + namespace_digest, 32)
        return ChunkGuard(
            _derive(namespace_key, b"memkv-engines 1 chunk" + identity, 64, salt),
            encrypt=cipher_id == CIPHER_ID_AES_GCM,
        )

    def __repr__(self) -> str:
        return f"Protection(key_id={self.key_id.hex()}, encrypt={self.encrypt})"

    def __reduce__(self) -> Any:
        raise TypeError("a key is not pickled")


def new_salt() -> bytes:
    """A salt for one write of one chunk."""
    return os.urandom(SALT_BYTES)


def block_nonce(index: int) -> bytes:
    """Nonce of a block; unique in its chunk, whose key no other write has."""
    return _NONCE.pack(index, _NONCE_PURPOSE_BLOCK)


class ChunkGuard:
    """Keys of one write of one chunk: block key and header key, joined."""

    def __init__(self, keys: bytes, *, encrypt: bool) -> None:
        self._block_key, self._header_key, self._encrypt = keys[:32], keys[32:], encrypt

    def __repr__(self) -> str:
        return f"ChunkGuard(encrypt={self._encrypt})"

    def header_mac(self, parts: list[bytes]) -> bytes:
        """MAC over the pieces of a header, 32 bytes."""
        return hmac.digest(self._header_key, b"".join(parts), "sha256")

    def authenticates(self, parts: list[bytes], mac: bytes) -> bool:
        """Whether a header's MAC is right; takes as long for any wrong one."""
        return hmac.compare_digest(self.header_mac(parts), mac)

    def seal_block(self, block: memoryview, chain_hash: bytes, index: int) -> bytes:
        """Authenticate a block, and with a cipher encrypt it in place. Call it once per block and guard.

        Args:
            block: the block's payload without padding; contiguous bytes, writable where there is a cipher.
            chain_hash: of the block.
            index: its place in the chunk.

        Returns:
            The tag, 16 bytes.
        """
        context = _encryptor(self._block_key, block_nonce(index))
        context.authenticate_additional_data(_CONTEXT.pack(chain_hash, index, block.nbytes))
        self._pass_through(context, block)
        context.finalize()
        return context.tag

    def open_block(self, block: memoryview, chain_hash: bytes, index: int, tag: bytes) -> bool:
        """Verify a block, and with a cipher decrypt it in place.

        Returns:
            Whether it is right. If not, an encrypted block now holds nonsense; ``unopen_block`` takes that back.
        """
        context = _decryptor(self._block_key, block_nonce(index), tag)
        context.authenticate_additional_data(_CONTEXT.pack(chain_hash, index, block.nbytes))
        self._pass_through(context, block)
        return _is_right(context)

    def unopen_block(self, block: memoryview, index: int) -> None:
        """Give a block that was opened the bytes that are stored."""
        if self._encrypt:
            self._pass_through(_encryptor(self._block_key, block_nonce(index)), block)

    def check_of(self, block_bytes: int, chain_hash: bytes, index: int, tag: bytes) -> BlockCheck:
        """Verify a block that comes in pieces and is not wanted decrypted."""
        context = _decryptor(self._block_key, block_nonce(index), tag)
        context.authenticate_additional_data(_CONTEXT.pack(chain_hash, index, block_bytes))
        return BlockCheck(context, encrypted=self._encrypt)

    def _pass_through(self, context: AEADEncryptionContext | AEADDecryptionContext, block: memoryview) -> None:
        for start in range(0, block.nbytes, _PIECE_BYTES):
            piece = block[start : start + _PIECE_BYTES]
            if self._encrypt:
                context.update_into(piece, piece)
            else:
                context.authenticate_additional_data(piece)


class BlockCheck:
    """Verifies a block piece by piece: ``update`` in order, then ``is_right`` once."""

    def __init__(self, context: AEADDecryptionContext, *, encrypted: bool) -> None:
        self._context, self._encrypted = context, encrypted

    def update(self, piece: bytes) -> None:
        """The next bytes as stored."""
        if self._encrypted:
            self._context.update(piece)
        else:
            self._context.authenticate_additional_data(piece)

    def is_right(self) -> bool:
        """Whether the tag is right for all bytes that came."""
        return _is_right(self._context)


# ------------------------------------------------------------------------------------------------------ cryptography


def _derive(key: bytes, info: bytes, length: int, salt: bytes | None = None) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA256(), length, salt, info).derive(key)


def _encryptor(key: bytes, nonce: bytes) -> AEADEncryptionContext:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    return Cipher(algorithms.AES(key), modes.GCM(nonce)).encryptor()


def _decryptor(key: bytes, nonce: bytes, tag: bytes) -> AEADDecryptionContext:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    return Cipher(algorithms.AES(key), modes.GCM(nonce, tag)).decryptor()


def _is_right(context: AEADDecryptionContext) -> bool:
    from cryptography.exceptions import InvalidTag

    try:
        context.finalize()
    except InvalidTag:
        return False
    return True


def _prove_library() -> None:
    """Encrypt and decrypt a block in place, whose tag is known: not every release or build of the library can.

    Raises:
        ConfigError: it cannot.
    """
    remedy = "pip install 'memkv-engines[crypto]', or set protection=off"
    guard = ChunkGuard(bytes(64), encrypt=True)
    block = memoryview(bytearray(_PIECE_BYTES + 1))
    try:
        tag = guard.seal_block(block, bytes(32), 0)
        proved = tag.hex() == _KNOWN_TAG and guard.open_block(block, bytes(32), 0, tag) and block == bytes(block.nbytes)
    except ImportError as error:
        raise ConfigError(
            f"protection needs the package cryptography, which cannot be imported: {error}; {remedy}"
        ) from error
    except ValueError as error:  # Releases before 44 want a longer buffer.
        raise ConfigError(f"protection needs cryptography 44 or later: {error}; {remedy}") from error
    if not proved:
        raise ConfigError(f"the package cryptography encrypts wrongly on this machine; {remedy}")


_KNOWN_TAG = "afbfe7331a033595454b63b75b388e70"

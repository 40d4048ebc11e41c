"""Settings as a file that tells by its first line whether the rest of it is whole.

A TOML file that was cut short is often valid: whatever is missing would silently be the default.
"""

import re
from hashlib import blake2b
from typing import Any

from raypkg.core.config import Settings, parse_toml, to_toml
from raypkg.core.errors import UserError

from .storage import Storage

CONFIG = "config.toml"
SEAL = "# The settings of a run; the digest of what follows is "
SEALED = re.compile(re.escape(SEAL).encode() + rb"([0-9a-f]{32})\n")


def write_settings(storage: Storage, settings: Settings) -> None:
    """Store settings as TOML below a line with their digest, 16 bytes of BLAKE2b as hexadecimal."""
    content = to_toml(settings).encode()
    seal = f"{SEAL}{_digest(content)}\n".encode()
    storage.write(CONFIG, seal + content)


def read_settings(storage: Storage) -> dict[str, Any]:
    """Return the settings in a folder, not yet validated; a file without the first line is taken as it is.

    Raises:
        UserError: they are missing, empty, no TOML, or not what was written.
    """
    where = f"{storage.root}/{CONFIG}"
    content = storage.read(CONFIG)
    if not (content and content.strip()):
        raise UserError(f"{where!r} is missing or empty: what was asked for is lost, so start anew")
    if seal := SEALED.match(content):
        rest = content[seal.end() :]
        if _digest(rest) != seal[1].decode():
            raise UserError(f"{where!r} has been changed or cut short: --config takes other settings to a new run")
    return parse_toml(content, where)


def _digest(content: bytes) -> str:
    return blake2b(content, digest_size=16).hexdigest()

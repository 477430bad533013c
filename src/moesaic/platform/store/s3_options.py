"""Options of an S3 bucket, read from environment variables, never from a config. botocore finds the credentials."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from moesaic.core.errors import ConfigError

SCHEME = "s3://"
_TRUE, _FALSE = ("1", "true", "yes"), ("0", "false", "no")


@dataclass(frozen=True)
class S3Options:
    """Connection, encryption and transfer. Credentials come from botocore's chain (AWS_*, profile, pod identity)."""

    endpoint_url: str | None = None
    """A server other than AWS's; None lets botocore look into its own settings too."""
    region: str | None = None
    path_style: bool | None = None
    """Put the bucket into the path (True) or the host name; None: the host name at AWS, the path on other servers."""
    kms_key: str | None = None
    """Id or ARN of the KMS key that the server encrypts new objects with; None takes the bucket's default."""
    part_bytes: int = 64 * 2**20
    """Size of a part. Writers that share a store should agree on it, as equal parts are stored once."""
    connections: int = 8
    """Parts under way at once, of all files together. A transfer holds no more than that in memory."""
    attempts: int = 5
    """How often a request, and a part whose download breaks off or is damaged, is tried before giving up."""
    retry_delay_s: float = 1.0
    """Before the second attempt at a download that broke off; it doubles every time, up to 20 s."""
    timeout_s: float = 60.0
    """The longest that a server may take to answer."""

    @classmethod
    def from_environment(cls, variables: Mapping[str, str] = os.environ) -> "S3Options":
        """Read ``AWS_ENDPOINT_URL_S3``, ``AWS_ENDPOINT_URL``, ``AWS_REGION`` and ``MOESAIC_S3_*`` (docs/store.md)."""
        read = variables.get
        return cls(
            endpoint_url=read("AWS_ENDPOINT_URL_S3") or read("AWS_ENDPOINT_URL") or None,
            region=read("AWS_REGION") or read("AWS_DEFAULT_REGION") or None,
            path_style=_flag(variables, "MOESAIC_S3_PATH_STYLE"),
            kms_key=read("MOESAIC_S3_KMS_KEY") or None,
            part_bytes=_positive(variables, "MOESAIC_S3_PART_MIB", 64) * 2**20,
            connections=_positive(variables, "MOESAIC_S3_CONNECTIONS", 8),
        )

    @property
    def encryption(self) -> dict[str, str]:
        """The arguments of requests that make objects."""
        return {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": self.kms_key} if self.kms_key else {}


def split_address(address: str) -> tuple[str, str]:
    """Bucket and prefix (without slashes around it) of ``s3://bucket/prefix``.

    Raises:
        ConfigError: if it is anything else.
    """
    parts = urlsplit(address)
    prefix = parts.path.strip("/")
    plain = not (parts.query or parts.fragment or "@" in parts.netloc or "//" in prefix)
    if parts.scheme != "s3" or not parts.netloc or not plain:
        raise ConfigError(f"the store's address {address!r} is not of the form s3://bucket/prefix")
    return parts.netloc, prefix


def _flag(variables: Mapping[str, str], name: str) -> bool | None:
    value = variables.get(name, "").lower()
    if not value:
        return None
    if value not in _TRUE + _FALSE:
        raise ConfigError(f"{name} = {value!r} is neither {' nor '.join((_TRUE[0], _FALSE[0]))}")
    return value in _TRUE


def _positive(variables: Mapping[str, str], name: str, default: int) -> int:
    value = variables.get(name, str(default))
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"{name} = {value!r} is not a whole number of at least 1")
    return int(value)

"""What an S3 server or botocore complains of, in words that say what to do. No secret is ever part of a message."""

from collections.abc import Iterator
from contextlib import contextmanager

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    NoRegionError,
    PartialCredentialsError,
    ProfileNotFound,
    TokenRetrievalError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.parsers import ResponseParserError

from moesaic.core.errors import ConfigError, MoesaicError, StageError

_REFUSED = (
    "AccessDenied",
    "AuthorizationHeaderMalformed",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
)
_CORRUPTED = ("BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch")
"""The server got other bytes than were sent."""
_FULL = ("InsufficientStorage", "QuotaExceeded", "StorageFull", "XMinioStorageFull")
_LACKING = ("MethodNotAllowed", "NotImplemented", "NotSupported", "UnsupportedOperation", "XNotImplemented")
_SHOWN = 400
_NO_CREDENTIALS = (
    CredentialRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    TokenRetrievalError,
)


@contextmanager
def explained_failures(address: str, encrypted: bool = False) -> Iterator[None]:
    """Turn botocore's exceptions into Moesaic's, for the store at ``address``; ``encrypted``: with a KMS key."""
    try:
        yield
    except ClientError as failure:
        raise _explain(address, failure, encrypted) from failure
    except _NO_CREDENTIALS as failure:
        raise ConfigError(
            f"no usable credentials for {address} ({type(failure).__name__}); "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or give the pod an identity"
        ) from failure
    except NoRegionError as failure:
        raise ConfigError(f"no region is set for {address}; set AWS_REGION") from failure
    except (HTTPClientError, BotoConnectionError, IncompleteReadError) as failure:
        raise StageError(
            f"the server of {address} cannot be reached or broke off again and again ({type(failure).__name__}); "
            "check the network and AWS_ENDPOINT_URL_S3, then run again: finished parts are kept"
        ) from failure
    except RecursionError:  # botocore asks a server that redirects for the bucket's region, which redirects, and so on
        raise ConfigError(
            f"the server of {address} redirects, maybe to log in, instead of answering; is AWS_ENDPOINT_URL_S3 right?"
        ) from None
    except ResponseParserError as failure:
        raise odd_answer(address, " ".join(str(failure).split())[:_SHOWN]) from failure
    except BotoCoreError as failure:
        raise StageError(f"{address} cannot be used ({type(failure).__name__}): {failure}") from failure


def error_code(failure: ClientError) -> str:
    """The code S3 gives, such as ``NoSuchKey``; an answer to HEAD has only the HTTP status."""
    return str(failure.response.get("Error", {}).get("Code", ""))


def status_of(failure: ClientError) -> int:
    """The HTTP status of the answer."""
    return int(failure.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def lacks_feature(failure: ClientError) -> bool:
    """Whether the server says that it has no such operation, header or parameter."""
    return error_code(failure) in _LACKING or status_of(failure) in (405, 501)


def odd_answer(address: str, what: str) -> ConfigError:
    """The error for an answer of status 200 that S3 does not give, such as a page to log in."""
    return ConfigError(
        f"the server of {address} answers otherwise than S3, maybe with a page to log in ({what}); is "
        "AWS_ENDPOINT_URL_S3 right?"
    )


def _explain(address: str, failure: ClientError, encrypted: bool) -> MoesaicError:
    code, status = error_code(failure), status_of(failure)
    said = f"{code or status}: {failure.response.get('Error', {}).get('Message', '')}"
    if lacks_feature(failure) and failure.operation_name == "PutObject" and encrypted:
        return ConfigError(
            f"the server of {address} cannot encrypt with a KMS key ({said}); running again will not help: unset "
            "MOESAIC_S3_KMS_KEY, or use a server that has it"
        )
    if code == "NoSuchBucket" or (status == 404 and failure.operation_name.startswith("List")):
        return ConfigError(f"there is no bucket for {address}; create it, or correct MOESAIC_STORE or --store")
    if code in _FULL or status == 507:
        return StageError(f"the server of {address} has no space left ({said}); free space there and run again")
    if code == "RequestTimeTooSkewed":
        return ConfigError(
            f"the clock here and that of the server of {address} differ ({said}); set this machine's clock"
        )
    if code in _REFUSED or status in (401, 403):
        return ConfigError(
            f"{address} refused the credentials for {failure.operation_name} ({said}); "
            "they need the rights to list the bucket and to get, put and delete objects"
        )
    if lacks_feature(failure):
        return ConfigError(
            f"the server of {address} cannot do {failure.operation_name} ({said}); running again will not help: use a "
            "server that can list the bucket and get, put and delete objects"
        )
    if code in _CORRUPTED:
        return StageError(
            f"the server of {address} received other bytes than were sent ({said}); check the network, then run again: "
            "finished parts are kept"
        )
    if status >= 500:
        return StageError(f"the server of {address} keeps failing ({said}); run again later: finished parts are kept")
    return StageError(
        f"{address} answered {failure.operation_name} with {status} ({said}); running again will not help unless "
        "that is mended"
    )

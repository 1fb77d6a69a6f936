"""One request to an object store, `s3://` or `http(s)://`, and what came of it.

It gives an answer whose bytes are still to come, a Fault that a repetition may cure, or a failure
that names the object and the reason. Nothing is tried again here, by boto3 or by urllib3.
"""

import http.client
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from time import monotonic
from typing import Any, NamedTuple
from urllib.parse import urljoin

import botocore.exceptions
import botocore.parsers
import urllib3

CONNECT_TIMEOUT_S = 10.0
# No byte at all for so long, or fewer than MIN_BYTES_PER_S on average, ends an attempt.
READ_TIMEOUT_S = 20.0
MIN_BYTES_PER_S = 16 * 2**10
MAX_REDIRECTS = 5
CHUNK_BYTES = 2**20

_RETRIED_STATUSES = {408, 425, 429}
# S3 sends some of these with a status that otherwise blames the client.
_RETRIED_CODES = {"SlowDown", "RequestTimeout", "Throttling", "ThrottlingException"}
_CREDENTIAL_ERRORS = (
    botocore.exceptions.NoCredentialsError,
    botocore.exceptions.PartialCredentialsError,
    botocore.exceptions.CredentialRetrievalError,
    botocore.exceptions.TokenRetrievalError,
    botocore.exceptions.NoAuthTokenError,
)
_TRANSPORT_ERRORS = (
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.ConnectionError,
    botocore.parsers.ResponseParserError,
    urllib3.exceptions.HTTPError,
    http.client.HTTPException,
    OSError,
)
_TIMEOUTS = (
    botocore.exceptions.ConnectTimeoutError,
    urllib3.exceptions.TimeoutError,
    TimeoutError,
)
_CREDENTIALS = (
    "for s3:// the standard AWS chain (environment, profile, role) must give credentials that may "
    "list, read and, for results, write it; a signed http URL may have expired"
)


class ObjectChanged(OSError):
    """An object is not the one that was indexed, or not the one its first bytes came from."""


class Fault(Exception):
    """What may be over when the request is repeated; the reason is a word or two to count by."""

    def __init__(self, reason: str, detail: object = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


class PastTheEnd(Exception):
    """The store says that the object has no such bytes."""


class Answer(NamedTuple):
    """What a store says before the bytes come; the names of the headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    response: urllib3.BaseHTTPResponse


def get(uri: str, byte_range: str, version: str | None) -> Answer:
    """Ask for a range of an object; what the answer holds is for the caller to check.

    Args:
        byte_range: value of the header Range.
        version: the ETag or the date that the object must have; S3 then refuses another one, an
            HTTP server sends the whole of it.

    Raises:
        Fault: this attempt failed, another one may not.
        PastTheEnd, ObjectChanged, FileNotFoundError, PermissionError, OSError: as they say.
    """
    return (_get_s3 if uri.startswith("s3://") else _get_http)(uri, byte_range, version)


def put(uri: str, data: bytes, *, only_new: bool) -> bool:
    """Send one request that writes a whole object of S3; it appears when it is complete.

    Args:
        only_new: leave an object of that name as it is.

    Returns:
        whether it was written.

    Raises:
        Fault: this attempt failed, another one may not.
        FileNotFoundError, PermissionError, OSError: as they say.
    """
    bucket, key = _bucket_and_key(uri)
    condition = {"IfNoneMatch": "*"} if only_new else {}
    with _named_failures(uri):
        try:
            _s3_client(*_client_key()).put_object(Bucket=bucket, Key=key, Body=data, **condition)
        except botocore.exceptions.ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            if code == "ConditionalRequestConflict":  # another one is being written just now
                raise Fault("conflict", code) from error
            if only_new and code == "PreconditionFailed":
                return False
            raise
    return True


def delete(uri: str) -> None:
    """Send one request that deletes an object of S3, if it is there; errors as those of put."""
    bucket, key = _bucket_and_key(uri)
    with _named_failures(uri):
        _s3_client(*_client_key()).delete_object(Bucket=bucket, Key=key)


def list_page(uri: str, token: str | None, *, recursive: bool) -> tuple[list[str], str | None]:
    """Return some of the objects whose URIs begin with this one, and the token of the next page.

    Args:
        recursive: with those that have a slash behind the prefix.

    Raises:
        Fault, FileNotFoundError, PermissionError, OSError: as for get.
    """
    bucket, prefix = _bucket_and_key(uri)
    request = {"Bucket": bucket, "Prefix": prefix}
    if not recursive:
        request["Delimiter"] = "/"
    if token is not None:
        request["ContinuationToken"] = token
    with _named_failures(uri):
        page = _s3_client(*_client_key()).list_objects_v2(**request)
    found = [f"s3://{bucket}/{entry['Key']}" for entry in page.get("Contents", [])]
    return found, page["NextContinuationToken"] if page["IsTruncated"] else None


class Body:
    """The bytes of one answer, counted, and timed while they are waited for.

    Args:
        num_skipped: bytes in front of those that are handed out.
        num_bytes: how many are handed out.
    """

    def __init__(
        self, response: urllib3.BaseHTTPResponse | None, num_skipped: int, num_bytes: int
    ) -> None:
        self._response = response
        self._num_skipped = num_skipped
        self._num_missing = num_bytes
        self._waited_s = 0.0
        self._waited_bytes = 0

    def readinto(self, buffer: Any) -> int:
        while self._num_skipped > 0:
            self._num_skipped -= len(self._read(min(self._num_skipped, CHUNK_BYTES)))
        if self._num_missing == 0 or len(buffer) == 0:
            return 0
        chunk = self._read(min(self._num_missing, len(buffer), CHUNK_BYTES))
        buffer[: len(chunk)] = chunk
        self._num_missing -= len(chunk)
        return len(chunk)

    def close(self) -> None:
        # A response that was read to its end has given its connection back already.
        if self._response is not None:
            self._response.close()

    def _read(self, max_bytes: int) -> bytes:
        """Take what has come in, or wait for more; read() would wait until it has max_bytes."""
        assert self._response is not None
        began = monotonic()
        try:
            chunk = self._response.read1(max_bytes)
        except _TRANSPORT_ERRORS as error:
            raise _transport_fault(error) from error
        if not chunk:
            raise Fault("truncated", f"{self._num_missing} bytes are missing")
        self._waited_s += monotonic() - began
        self._waited_bytes += len(chunk)
        if self._waited_s >= READ_TIMEOUT_S:
            if self._waited_bytes < MIN_BYTES_PER_S * self._waited_s:
                raise Fault("timeout", f"{self._waited_bytes} bytes in {self._waited_s:.1f} s")
            self._waited_s, self._waited_bytes = 0.0, 0
        return chunk


def _get_s3(uri: str, byte_range: str, version: str | None) -> Answer:
    bucket, key = _bucket_and_key(uri)
    condition = {} if version is None else {"IfMatch": version}
    with _named_failures(uri):
        answer = _s3_client(*_client_key()).get_object(
            Bucket=bucket, Key=key, Range=byte_range, **condition
        )
    metadata = answer["ResponseMetadata"]
    # The StreamingBody around it can only wait for as many bytes as were asked for.
    return Answer(metadata["HTTPStatusCode"], metadata["HTTPHeaders"], answer["Body"]._raw_stream)


def _get_http(uri: str, byte_range: str, version: str | None) -> Answer:
    headers = {"Range": byte_range, "Accept-Encoding": "identity"}
    # On a weak ETag the whole object would be sent, always.
    if version is not None and not version.startswith("W/"):
        headers["If-Range"] = version
    url = uri
    for _ in range(MAX_REDIRECTS + 1):
        with _named_failures(uri):
            response = _http_pool(os.getpid()).request(
                "GET",
                url,
                headers=headers,
                timeout=urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=READ_TIMEOUT_S),
                retries=False,
                redirect=False,
                preload_content=False,
                decode_content=False,
            )
        location = response.get_redirect_location()
        if not location and 200 <= response.status < 300:
            return Answer(response.status, response.headers, response)
        response.close()
        if not location:
            raise _refusal(uri, response.status, response.reason or "")
        url = urljoin(url, location)
    raise OSError(f"{uri}: more than {MAX_REDIRECTS} redirects; name the place where it lies")


@contextmanager
def _named_failures(uri: str) -> Iterator[None]:
    """Turn what boto3 and urllib3 raise into a Fault or into a failure that names the object."""
    try:
        yield
    except botocore.exceptions.ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        raise _refusal(uri, status, error.response.get("Error", {}).get("Code", "")) from error
    except _CREDENTIAL_ERRORS as error:
        raise PermissionError(f"{uri}: {error}; {_CREDENTIALS}") from error
    except urllib3.exceptions.LocationValueError as error:
        raise OSError(f"{uri}: no URL that can be read ({error}); correct it") from error
    except _TRANSPORT_ERRORS as error:
        raise _transport_fault(error) from error
    except botocore.exceptions.BotoCoreError as error:
        sentence = " ".join(str(error).split())
        raise OSError(f"{uri}: {sentence}; correct the URI or the AWS settings") from error


def _transport_fault(error: BaseException) -> Fault:
    # A refused connection is among urllib3's timeouts.
    refused = isinstance(error, urllib3.exceptions.NewConnectionError)
    if isinstance(error, _TIMEOUTS) and not refused:
        return Fault("timeout", error)
    for cause in error.args:
        if isinstance(cause, http.client.IncompleteRead):
            return Fault("truncated", cause)
    return Fault("connection", error)


def _refusal(uri: str, status: int, code: str) -> Exception:
    if code in _RETRIED_CODES or status in _RETRIED_STATUSES or not 300 <= status < 500:
        return Fault(f"status {status}", code)
    said = str(status) if code in ("", str(status)) else f"{status} {code}"
    match status:
        case 404:
            return FileNotFoundError(
                f"{uri}: not in the store ({said}); compare the name with a listing of the bucket "
                "or server, or index the shards that are there"
            )
        case 401 | 403:
            return PermissionError(f"{uri}: access denied ({said}); {_CREDENTIALS}")
        case 412:
            return ObjectChanged(
                f"{uri}: replaced while it was read ({said}); index the shards anew when nothing "
                "writes to them"
            )
        case 416:
            return PastTheEnd()
    return OSError(f"{uri}: refused by the store ({said}); check the URI, region and endpoint")


def _bucket_and_key(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def _client_key() -> tuple[int, str | None]:
    # Connections must not be shared with a process that was forked off.
    environment = os.environ
    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
    return os.getpid(), endpoint or None


@cache
def _s3_client(process_id: int, endpoint: str | None) -> Any:
    # Here because it takes longer to import than all the rest.
    import boto3
    from botocore.config import Config

    # Only making a client is not safe among threads, and each has a session of its own.
    return boto3.session.Session().client(
        "s3",
        endpoint_url=endpoint,
        config=Config(
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            retries={"mode": "standard", "total_max_attempts": 1},
            max_pool_connections=32,
            tcp_keepalive=True,
            response_checksum_validation="when_required",
            s3={"addressing_style": "path"} if endpoint else None,
        ),
    )


@cache
def _http_pool(process_id: int) -> urllib3.PoolManager:
    return urllib3.PoolManager(maxsize=32)

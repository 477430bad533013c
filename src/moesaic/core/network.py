"""A site's way to other machines: its proxies, certificate authorities and client certificate, from the environment.

Every library and program has variables of its own for these. :func:`site_variables` completes them from the common
ones, so that whatever opens a connection agrees; what is set for one of them alone stays as it is.

===================================  ====================================================================
``https_proxy``, ``http_proxy``      address of a proxy; upper case counts where lower case is not set
``no_proxy``                         hosts, domains and networks that are asked directly; this machine is
``SSL_CERT_FILE``                    certificate authorities, one PEM file; else ``REQUESTS_CA_BUNDLE``
``SSL_CLIENT_CERT``                  a client's certificate with its key, one PEM file
===================================  ====================================================================
"""

import ipaddress
import os
import ssl
import urllib.request
from base64 import b64encode
from collections.abc import Mapping
from contextlib import suppress
from urllib.parse import unquote, urlsplit

from moesaic.core.errors import ConfigError

CLIENT_CERTIFICATE = "SSL_CLIENT_CERT"
"""uv's name for it."""
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
_AUTHORITIES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
"""Variables that are for every connection; the first that is set counts."""
_AUTHORITIES_OF = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "PIP_CERT")
"""What reads them: OpenSSL, httpx and uv; requests, so MLflow; pip."""
_CERTIFICATE_OF = ("PIP_CLIENT_CERT", "MLFLOW_TRACKING_CLIENT_CERT_PATH")
_HERE = ("localhost", "127.0.0.1", "::1")


def site_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """The environment variables with those of each library completed from the common ones."""
    complete = dict(variables)
    for name in _PROXIES:
        value = variables.get(name, variables.get(name.upper()))
        if value is None and name in ("http_proxy", "https_proxy"):
            value = _for_all(variables)
        if name == "no_proxy" and any(complete.get(proxy) for proxy in _PROXIES[:3]):
            value = _with_this_machine(value or "")
        if value is not None:
            complete[name] = complete[name.upper()] = value
    authorities = next((given for name in _AUTHORITIES if (given := variables.get(name))), None)
    _complete(complete, _AUTHORITIES_OF, authorities)
    _complete(complete, _CERTIFICATE_OF, variables.get(CLIENT_CERTIFICATE))
    return complete


def use_site_variables() -> None:
    """Complete this process's environment variables, for the libraries that read them and the programs it starts."""
    os.environ.update(site_variables(os.environ))


def proxy_for(url: str, variables: Mapping[str, str] | None = None) -> str | None:
    """The proxy that an address is asked through; None: directly.

    Args:
        url: with its scheme.
        variables: None for this process's.
    """
    variables = site_variables(os.environ if variables is None else variables)
    parts = urlsplit(url)
    proxy = variables.get(f"{parts.scheme}_proxy") or variables.get("all_proxy")
    host = parts.hostname or ""
    if not proxy or _is_here(host) or _is_exempt(host, parts.port, variables.get("no_proxy", "")):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def proxy_headers(proxy: str) -> dict[str, str]:
    """What shows the user of a proxy's address to it, for libraries that do not read it there."""
    parts = urlsplit(proxy)
    if not parts.username:
        return {}
    user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {"proxy-authorization": f"Basic {b64encode(user.encode()).decode()}"}


def opener(
    url: str, *handlers: urllib.request.BaseHandler, shows_certificate: bool = True
) -> urllib.request.OpenerDirector:
    """What opens an address by the site's proxy and certificates."""
    proxy = proxy_for(url)
    by_proxy = urllib.request.ProxyHandler({"http": proxy, "https": proxy} if proxy else {})
    secure = [urllib.request.HTTPSHandler(context=tls_context(shows_certificate))] if url.startswith("https:") else []
    return urllib.request.build_opener(by_proxy, *secure, *handlers)


def tls_context(shows_certificate: bool = True) -> ssl.SSLContext:
    """What our own connections trust, and the certificate that they show.

    Args:
        shows_certificate: False for a client without one.

    Raises:
        ConfigError: if a file that a variable names is missing or cannot be read.
    """
    variables = site_variables(os.environ)
    check_files(variables)
    context = ssl.create_default_context()
    if authorities := variables.get("SSL_CERT_FILE"):
        try:
            context.load_verify_locations(authorities)
        except (OSError, ValueError) as broken:
            raise ConfigError(
                f"SSL_CERT_FILE is {authorities!r}, which holds no certificates in PEM ({broken}); correct it"
            ) from broken
    if shows_certificate and (certificate := variables.get(CLIENT_CERTIFICATE)):
        try:
            context.load_cert_chain(certificate)
        except (OSError, ValueError) as broken:
            raise ConfigError(
                f"{CLIENT_CERTIFICATE} is {certificate!r}, which is no PEM file of a certificate and its key: {broken}"
            ) from broken
    return context


def check_files(variables: Mapping[str, str]) -> None:
    """Refuse variables that name files which cannot be read.

    Raises:
        ConfigError: that names the first.
    """
    for name in (*_AUTHORITIES_OF, CLIENT_CERTIFICATE, *_CERTIFICATE_OF):
        if (value := variables.get(name)) and not os.access(value, os.R_OK):
            raise ConfigError(f"{name} is {value!r}, which is no file that can be read; correct it, or unset it")


def _for_all(variables: Mapping[str, str]) -> str | None:
    """``all_proxy``, which some libraries do not read; they do not know SOCKS either."""
    proxy = variables.get("all_proxy", variables.get("ALL_PROXY", ""))
    return proxy if proxy and not proxy.startswith("socks") else None


def _with_this_machine(no_proxy: str) -> str:
    """As all libraries read it: ``*`` stands alone or not at all."""
    named = [name.strip().removeprefix("*.") for name in no_proxy.split(",") if name.strip()]
    return "*" if "*" in named else ",".join([*named, *(host for host in _HERE if host not in named)])


def _complete(variables: dict[str, str], names: tuple[str, ...], value: str | None) -> None:
    for name in names if value else ():
        variables[name] = variables.get(name) or value or ""


def _is_here(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost" or host.endswith(".localhost")


def _is_exempt(host: str, port: int | None, no_proxy: str) -> bool:
    """Whether ``no_proxy`` names it: as host, domain, host and port, or as a network that holds its address."""
    for name in (part.strip().lower().lstrip(".") for part in no_proxy.split(",")):
        if name == "*" or (name and (name in (host, f"{host}:{port}") or host.endswith(f".{name}"))):
            return True
        with suppress(ValueError):
            if ipaddress.ip_address(host) in ipaddress.ip_network(name, strict=False):
                return True
    return False

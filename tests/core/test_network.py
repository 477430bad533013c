"""Proxies, authorities and certificates of a site: one rule for all that opens a connection."""

import ssl
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.core.errors import ConfigError
from moesaic.core.network import check_files, proxy_for, proxy_headers, site_variables, tls_context

PROXY = "http://proxy.site.test:3128"


@pytest.mark.parametrize("upper", [False, True])
def test_both_cases_of_a_proxys_variable_count(upper: bool) -> None:
    given = {"https_proxy": PROXY, "no_proxy": "internal.site.test"}
    given = {name.upper() if upper else name: value for name, value in given.items()}
    assert proxy_for("https://server.site.test/v1", given) == PROXY
    assert proxy_for("http://server.site.test/v1", given) is None
    assert proxy_for("https://internal.site.test", given) is None
    complete = site_variables(given)
    assert complete["https_proxy"] == complete["HTTPS_PROXY"] == PROXY
    assert complete["no_proxy"] == complete["NO_PROXY"] == "internal.site.test,localhost,127.0.0.1,::1"


def test_lower_case_counts_first_and_an_empty_one_turns_the_proxy_off() -> None:
    assert proxy_for("http://a.test", {"http_proxy": "http://low:1", "HTTP_PROXY": "http://up:1"}) == "http://low:1"
    assert proxy_for("http://a.test", {"http_proxy": "", "HTTP_PROXY": "http://up:1"}) is None


def test_one_proxy_for_all_and_one_without_scheme() -> None:
    assert (
        proxy_for("http://a.test", {"ALL_PROXY": PROXY}) == proxy_for("https://a.test", {"all_proxy": PROXY}) == PROXY
    )
    assert "http_proxy" not in site_variables({"all_proxy": "socks5://proxy:1080"})
    assert proxy_for("http://a.test", {"http_proxy": "proxy:3128"}) == "http://proxy:3128"


@pytest.mark.parametrize(
    ("no_proxy", "url", "direct"),
    [
        ("site.test", "https://site.test", True),
        ("site.test", "https://a.site.test", True),
        (".site.test", "https://a.site.test", True),
        ("*.site.test", "https://a.site.test", True),
        ("site.test", "https://website.test", False),
        ("SITE.test", "https://a.Site.Test", True),
        ("a.site.test:8443", "https://a.site.test:8443", True),
        ("a.site.test:8443", "https://a.site.test", False),
        ("x, *", "https://b.test", True),
        ("10.0.0.0/8", "https://10.1.2.3:9000", True),
        ("10.0.0.0/8", "https://11.1.2.3", False),
        ("fd00::/8", "https://[fd00::1]:9000", True),
        ("", "https://b.test", False),
        ("", "http://localhost:8000", True),
        ("", "http://127.0.0.1:8000", True),
        ("", "http://127.8.0.1:8000", True),
        ("", "http://[::1]:8000", True),
    ],
)
def test_what_is_asked_directly(no_proxy: str, url: str, direct: bool) -> None:
    variables = {"http_proxy": PROXY, "https_proxy": PROXY, "no_proxy": no_proxy}
    assert proxy_for(url, variables) == (None if direct else PROXY)


@given(st.dictionaries(st.sampled_from(["no_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"]), st.text(max_size=12)))
def test_any_values_are_read_and_completing_twice_changes_nothing(variables: dict[str, str]) -> None:
    proxy_for("https://10.0.0.1:443/x", variables)
    assert site_variables(site_variables(variables)) == site_variables(variables)


def test_authorities_and_a_certificate_reach_every_library_that_has_none_of_its_own() -> None:
    complete = site_variables({"SSL_CERT_FILE": "/ca.pem", "SSL_CLIENT_CERT": "/me.pem", "PIP_CERT": "/pips.pem"})
    assert (complete["REQUESTS_CA_BUNDLE"], complete["PIP_CERT"]) == ("/ca.pem", "/pips.pem")
    assert complete["PIP_CLIENT_CERT"] == complete["MLFLOW_TRACKING_CLIENT_CERT_PATH"] == "/me.pem"
    assert site_variables({"REQUESTS_CA_BUNDLE": "/ca.pem"})["SSL_CERT_FILE"] == "/ca.pem"
    assert site_variables({"AWS_CA_BUNDLE": "/s3.pem"}) == {"AWS_CA_BUNDLE": "/s3.pem"}


def test_a_proxys_user_is_shown_in_a_header() -> None:
    assert proxy_headers("http://me:p%40ss@proxy:1") == {"proxy-authorization": "Basic bWU6cEBzcw=="}
    assert proxy_headers(PROXY) == {}


def test_files_that_are_none_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").write_text("no certificate")
    with pytest.raises(ConfigError, match=r"SSL_CERT_FILE is '/none.pem', which is no file"):
        check_files({"SSL_CERT_FILE": "/none.pem"})
    for variable in ("SSL_CERT_FILE", "SSL_CLIENT_CERT"):
        with monkeypatch.context() as patch, pytest.raises(ConfigError, match=f"{variable} is .*PEM"):
            patch.setenv(variable, str(tmp_path / "text"))
            tls_context()
    assert tls_context().verify_mode == ssl.CERT_REQUIRED

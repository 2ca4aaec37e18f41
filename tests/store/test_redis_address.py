from __future__ import annotations

import pytest

from kvrag.store.redis_address import RedisAddress, RedisUrlError

parse = RedisAddress.parse


@pytest.mark.parametrize(
    ("url", "kind", "nodes", "db"),
    [
        ("redis://localhost", "single", (("localhost", 6379),), 0),
        ("redis://localhost:7000/3", "single", (("localhost", 7000),), 3),
        ("REDIS://10.0.0.1/?db=2", "single", (("10.0.0.1", 6379),), 2),
        ("redis://[fe80::1]:7000", "single", (("fe80::1", 7000),), 0),
        ("redis+sentinel://a,b:1/main", "sentinel", (("a", 26379), ("b", 1)), 0),
        ("redis+sentinel://a/main/4", "sentinel", (("a", 26379),), 4),
        ("rediss+cluster://a:1,b", "cluster", (("a", 1), ("b", 6379)), 0),
    ],
)
def test_places(url, kind, nodes, db):
    address = parse(url)
    assert (address.kind, address.nodes, address.db) == (kind, nodes, db)
    assert address.tls == url.startswith("rediss")
    assert parse(str(address)) == address


def test_login_is_decoded():
    assert parse("redis://me:p%40ss%2F@h").login == {"username": "me", "password": "p@ss/"}
    assert parse("redis://:p%3Aq@h").login == {"password": "p:q"}
    assert parse("redis://h").login == {}


def test_a_socket():
    address = parse("unix://:pw@/run/my%20redis/s.sock?db=1")
    assert (address.path, address.db) == ("/run/my redis/s.sock", 1)
    assert address.login == {"password": "pw"}
    assert address.nodes == ()


def test_options_of_tls_and_sentinel():
    address = parse(
        "rediss+sentinel://u:p@a/main?ssl_ca_certs=/ca.pem&ssl_check_hostname=false"
        "&sentinel_password=sp&client_name=me"
    )
    assert address.service == "main"
    assert address.sentinel == {"password": "sp"}
    assert address.options == {
        "ssl_ca_certs": "/ca.pem",
        "ssl_check_hostname": False,
        "client_name": "me",
    }


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "begins with one of"),
        ("localhost:6379", "begins with one of"),
        ("http://localhost", "redis://, rediss://"),
        ("redis://", "no host"),
        ("redis://h:0", "no host"),
        ("redis://h:70000", "no host"),
        ("redis://a,b", "several hosts"),
        ("redis://h/x", "whole number"),
        ("redis://h/1/2", "more than one database"),
        ("redis://h/1?db=1", "more than one database"),
        ("redis://h?socket_timeout=5", "not known"),
        ("redis://h?ssl_ca_certs=x", "not known"),
        ("redis://h#x", "%23"),
        ("rediss://h?ssl_cert_reqs=maybe", "required, optional or none"),
        ("rediss://h?ssl_check_hostname=maybe", "true or false"),
        ("redis+sentinel://h", "names the service"),
        ("redis+cluster://h/1", "database 0 alone"),
        ("unix://host/s", "socket's path"),
        ("unix://", "socket's path"),
        ("redis://[::1", "malformed|no host"),
    ],
)
def test_what_is_no_url_is_told(url, reason):
    with pytest.raises(RedisUrlError, match=reason):
        parse(url)


@pytest.mark.parametrize(
    "url",
    [
        "redis://user:s3cret@h:x/0",
        "redis://user:s3cret/@h/0",
        "redis://user:s3@cret@h/x",
        "redis://user:s3cret@a,b/0",
        "redis://user:s3cret#@h",
        "rediss://h?ssl_password=s3cret&nothing=1",
        "s3cret://h",
        "redis://user:s3cret@[h/0",
        "redis://:p?s3cret@h:6379/0",
        "redis://user?s3cret=1@h/0",
        "redis://user?s3cret@h/0",
        "redis+sentinel://user:1/s3cret@h",
        "redis+sentinel://h/main?sentinel_password=p&s3cret",
    ],
)
def test_a_refusal_tells_no_secret(url):
    with pytest.raises(RedisUrlError) as caught:
        parse(url)
    assert "cret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_secrets_are_masked_in_what_is_shown_and_in_what_others_say():
    address = parse("rediss+sentinel://me:p%40ss@a/main?sentinel_password=sp3&ssl_password=tls9")
    for shown in (str(address), repr(address)):
        assert not any(secret in shown for secret in ("me:", "p@ss", "p%40ss", "sp3", "tls9"))
    said = address.masked("ERR unknown command 'AUTH' with args 'me' 'p@ss' p%40ss sp3 tls9")
    assert said == "ERR unknown command 'AUTH' with args '***' '***' *** *** ***"

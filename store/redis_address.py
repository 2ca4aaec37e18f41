"""Where a Redis is and how to sign in, read from one URL.

    redis://[[user]:password@]host[:port][/db]           rediss:// the same over TLS
    unix://[[user]:password@]/path/of/socket[?db=1]
    redis+sentinel://[…@]host[:port],…/service[/db]      rediss+sentinel://
    redis+cluster://[…@]host[:port],…                    rediss+cluster://

Behind `?`: `db`, `client_name`, for TLS `ssl_ca_certs`, `ssl_ca_path`, `ssl_certfile`,
`ssl_keyfile`, `ssl_password`, `ssl_cert_reqs` and `ssl_check_hostname`, as redis-py has them, and
for Sentinel itself `sentinel_username` and `sentinel_password`. Special characters are
percent-encoded. Nothing here connects, and nothing that it shows holds a secret.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import parse_qsl, quote, unquote, urlsplit

__all__ = ["RedisAddress", "RedisUrlError"]

Kind = Literal["single", "unix", "sentinel", "cluster"]
Option = str | int | bool

_SCHEMES: dict[str, tuple[Kind, bool]] = {
    "redis": ("single", False),
    "rediss": ("single", True),
    "unix": ("unix", False),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
}
_PORT, _SENTINEL_PORT = 6379, 26379
_TLS_OPTIONS = frozenset(
    (
        "ssl_ca_certs",
        "ssl_ca_path",
        "ssl_certfile",
        "ssl_keyfile",
        "ssl_password",
        "ssl_cert_reqs",
        "ssl_check_hostname",
    )
)
_SENTINEL_OPTIONS = frozenset(("sentinel_username", "sentinel_password"))
_SECRETS = ("password", "sentinel_password", "ssl_password")
_NODE = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[^\[\]:@]+)(?::(?P<port>\d{1,5}))?")
_MASK = "***"


class RedisUrlError(ValueError):
    """A URL that names no Redis. The message says what is wrong, and never holds a secret."""


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """What a URL says. `str()` and `repr()` mask its secrets.

    `nodes`: (host, port) of the server, of the sentinels, or of some nodes of the cluster; none for
    a unix socket, which has a `path`. `service`: the name that the sentinels know. `login`: user
    name and password, and `options`, both under the names that redis-py has for them. `sentinel`:
    user name and password of the sentinels themselves.
    """

    scheme: str
    nodes: tuple[tuple[str, int], ...] = ()
    path: str = ""
    service: str = ""
    db: int = 0
    login: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Option] = field(default_factory=dict)
    sentinel: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, url: str) -> RedisAddress:
        """The address that a URL names. Raises `RedisUrlError`."""
        scheme, separator, _ = url.partition("://")
        if not separator or scheme.lower() not in _SCHEMES:
            raise RedisUrlError(
                f"a Redis URL begins with one of {', '.join(f'{name}://' for name in _SCHEMES)}"
            )
        scheme = scheme.lower()
        kind, tls = _SCHEMES[scheme]
        try:
            parts = urlsplit(url)
        except ValueError as exc:
            raise RedisUrlError(f"the URL is malformed ({type(exc).__name__})") from None
        if parts.fragment:
            raise RedisUrlError("a Redis URL has no part behind '#'; in a password write %23")
        userinfo, _, hosts = parts.netloc.rpartition("@")
        default_port = _SENTINEL_PORT if kind == "sentinel" else _PORT
        # First: a password with an unquoted '?' or '/' ends the hosts, and is no option or service.
        nodes = () if kind == "unix" else _nodes(hosts, default_port, many=kind != "single")
        options = _options(parts.query, kind, tls=tls)
        path = [unquote(piece) for piece in parts.path.split("/")[1:] if piece]
        service = ""
        if kind == "sentinel":
            if not path:
                raise RedisUrlError(
                    "a URL of Sentinel names the service behind its hosts: "
                    "redis+sentinel://host:26379/service"
                )
            if "@" in parts.path:
                raise RedisUrlError(
                    "the service of Sentinel has no '@'; in a password write %2F for '/'"
                )
            service = path.pop(0)
        if kind == "unix":
            if hosts or not path:
                raise RedisUrlError("a unix:// URL has the socket's path: unix:///run/redis.sock")
            path = []
        return cls(
            scheme=scheme,
            nodes=nodes,
            path=unquote(parts.path) if kind == "unix" else "",
            service=service,
            db=_db(path, options.pop("db", None), kind),
            login=_login(userinfo),
            sentinel={
                name.removeprefix("sentinel_"): str(options.pop(name))
                for name in sorted(_SENTINEL_OPTIONS & options.keys())
            },
            options=options,
        )

    @property
    def kind(self) -> Kind:
        return _SCHEMES[self.scheme][0]

    @property
    def tls(self) -> bool:
        return _SCHEMES[self.scheme][1]

    def __str__(self) -> str:
        login = f"{_MASK}@" if self.login else ""
        if self.kind == "unix":
            return f"{self.scheme}://{login}{self.path}?db={self.db}"
        hosts = ",".join(
            f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.nodes
        )
        place = f"/{self.service}" if self.service else ""
        return f"{self.scheme}://{login}{hosts}{place}/{self.db}"

    def __repr__(self) -> str:
        return f"RedisAddress({str(self)!r})"

    def masked(self, text: str) -> str:
        """`text`, which came from elsewhere, without this address's secrets."""
        for secret in self._secrets():
            for form in (secret, quote(secret, safe=""), quote(secret)):
                text = text.replace(form, _MASK)
        return text

    def _secrets(self) -> list[str]:
        found = [
            *self.login.values(),
            *self.sentinel.values(),
            *(str(self.options[name]) for name in _SECRETS if name in self.options),
        ]
        return sorted(filter(None, found), key=len, reverse=True)


def _options(query: str, kind: Kind, *, tls: bool) -> dict[str, Option]:
    allowed = {"db", "client_name"}
    if tls:
        allowed |= _TLS_OPTIONS
    if kind == "sentinel":
        allowed |= _SENTINEL_OPTIONS
    options: dict[str, Option] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in allowed:
            # Not its name: of a password with an unquoted '?' or '&' the rest would stand in it.
            raise RedisUrlError(
                "an option behind '?' is not known in such a URL; "
                f"known are {', '.join(sorted(allowed))}; in a password write %3F and %26"
            )
        options[name] = _flag(name, value) if name == "ssl_check_hostname" else value
    reqs = options.get("ssl_cert_reqs", "required")
    if reqs not in ("required", "optional", "none"):
        raise RedisUrlError("option 'ssl_cert_reqs' must be required, optional or none")
    return options


def _flag(name: str, value: str) -> bool:
    if value.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise RedisUrlError(f"option {name!r} must be true or false")
    return value.lower() in ("true", "1", "yes")


def _nodes(hosts: str, default_port: int, *, many: bool) -> tuple[tuple[str, int], ...]:
    nodes = []
    for text in hosts.split(","):
        match = _NODE.fullmatch(text)
        port = int(match["port"] or default_port) if match is not None else 0
        if match is None or not 1 <= port <= 65535:
            # Not the text itself: a password with an unquoted '@' or '/' would stand in it.
            raise RedisUrlError(
                "the URL names no host as host:port; special characters of a password must be "
                "percent-encoded"
            )
        nodes.append((match["host"].strip("[]"), port))
    if len(nodes) > 1 and not many:
        raise RedisUrlError("several hosts need redis+sentinel:// or redis+cluster://")
    return tuple(nodes)


def _db(path: list[str], option: Option | None, kind: Kind) -> int:
    if len(path) > 1 or (path and option is not None):
        raise RedisUrlError("the URL names more than one database")
    text = str(path[0] if path else option if option is not None else 0)
    if not re.fullmatch(r"\d{1,6}", text, re.ASCII):
        raise RedisUrlError("the database must be a whole number, as in redis://host:6379/1")
    if kind == "cluster" and int(text):
        raise RedisUrlError("a cluster has database 0 alone")
    return int(text)


def _login(userinfo: str) -> dict[str, str]:
    username, _, password = userinfo.partition(":")
    given = {"username": unquote(username), "password": unquote(password)}
    return {name: value for name, value in given.items() if value}

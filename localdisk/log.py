"""Events for syslog/journal under the identifier `localdisk`: one plain line each."""

from __future__ import annotations

import syslog

from localdisk.errors import Error, plain

syslog.openlog("localdisk", syslog.LOG_PID, syslog.LOG_DAEMON)


def event(what: str, **fields: object) -> None:
    """Log `what` with `name=value` fields; values are escaped and bounded."""
    _write(syslog.LOG_INFO, what, fields)


def problem(what: str, **fields: object) -> None:
    """Log as `event` does, at warning level."""
    _write(syslog.LOG_WARNING, what, fields)


def _write(level: int, what: str, fields: dict[str, object]) -> None:
    parts = [plain(what), *(f"{name}={_shown(value)}" for name, value in fields.items())]
    syslog.syslog(level, " ".join(parts))


def _shown(value: object) -> str:
    """A value as bounded text.  An error's fields are bounded already, so its advice is never cut off."""
    return str(value).splitlines()[-1] if isinstance(value, Error) else plain(value)

"""sudo with the settings of hardening guides: a start works whatever is set for all commands.

Each setting is tried in a file that sudo reads before our rule, and in a file that it reads after our rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.bed import host
from tests.bed.shell import attempt, run
from tests.bed.storage import FileStorage
from tests.kernel.steps import THICK, configure, equals_source, start, stop

pytestmark = pytest.mark.usefixtures("volume_group", "libvirt", "throwaway")

SUDOERS = Path("/etc/sudoers.d")
EVERYWHERE = (SUDOERS / "00_hardened", SUDOERS / "99_hardened")

HARDENED = (
    "Defaults noexec",
    "Defaults intercept",
    "Defaults intercept, intercept_type=trace",
    "Defaults log_subcmds, log_exit_status",
    "Defaults use_pty, requiretty",
    "Defaults:vdsm use_pty, requiretty, noexec",
    "Defaults log_input, log_output",
    "Defaults command_timeout=1",
    "Defaults umask=0777, umask_override",
    "Defaults !env_reset, setenv",
    'Defaults env_keep += "PATH LD_PRELOAD LVM_SYSTEM_DIR", !secure_path',
    "Defaults env_file=/etc/hardened.env",
    "Defaults fdexec=always",
    "Defaults runcwd=/nonexistent",
    "Defaults runas_check_shell",
    "Defaults mail_always, mail_all_cmnds, mailerpath=/bin/false",
    "Defaults lecture=always, passwd_timeout=1, timestamp_timeout=0, passwd_tries=1",
    "Defaults rootpw, insults, stay_setuid, closefrom=3",
    "Defaults logfile=/nonexistent/sudo.log, !ignore_logfile_errors, !ignore_audit_errors",
    "Defaults log_servers=127.0.0.1:1, log_server_timeout=5",
)


@contextmanager
def sudoers(text: str, *paths: Path) -> Iterator[None]:
    """These files of sudo's say this."""
    try:
        for path in paths:
            path.write_text(f"{text}\n")
            path.chmod(0o440)
        run("visudo", "-c")
        yield
    finally:
        for path in paths:
            path.unlink()


@pytest.fixture(autouse=True)
def shells() -> Iterator[None]:
    """root's shell is none that runas_check_shell accepts; there is a file for env_file."""
    environment, known = Path("/etc/hardened.env"), Path("/etc/shells")
    before = known.read_text()
    environment.write_text("PYTHONHOME=/nonexistent\nPATH=/nonexistent\n")
    known.write_text("/bin/nothing\n")
    configure()
    yield
    known.write_text(before)
    environment.unlink()


@pytest.mark.parametrize("text", HARDENED)
def test_a_start_on_a_hardened_host(file_storage: FileStorage, text: str) -> None:
    image = file_storage.template(8 << 20, seed=1)
    with sudoers(text, *EVERYWHERE):
        vm = start(image)
        assert equals_source(image)
        stop(vm, image, custom=THICK)
    assert not host.logical_volumes()


def test_vdsm_cannot_set_variables() -> None:
    """`setenv` for all commands would let vdsm choose LD_PRELOAD for what root runs."""
    words = ("sudo", "-n", "LD_PRELOAD=/tmp/x.so", str(host.PROGRAM), "helper")
    with sudoers("Defaults setenv", *EVERYWHERE):
        done = attempt(*words, user="vdsm")
    assert done.returncode == 1
    assert "you are not allowed to set the following environment variables" in done.stderr

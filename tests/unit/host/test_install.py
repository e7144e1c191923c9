"""install and uninstall on a directory that stands for a host: what is there before, after and in between."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from localdisk import atomic_file, config, lock, log, run
from localdisk.errors import CommandFailed, ConfigRefused, InstallRefused, NoVolumeGroup, WorkUnfinished
from localdisk.host import files, install, uninstall
from localdisk.vdsm.hook_call import POINTS
from localdisk.volumes.local_disk import DELETING, UPDATING
from localdisk.volumes.lvm import VolumeGroup
from localdisk.zipapp import bootstrap, extract
from tests.fakes import OTHER_VOLUME, VM, VOLUME, FakeHost, tags

LINKS = tuple(files.hook_link(point) for point in sorted(POINTS))
FILES = {
    files.PROGRAM: 0o755,
    files.CONFIG: 0o644,
    files.SUDOERS: 0o440,
    files.CRON: 0o644,
    **dict.fromkeys(files.UDEV_RULES, 0o644),
}
OLDER_RULES = (files.OLDER_SUDOERS, files.OLDER_UDEV_RULE)
OLDER = f"{files.HOOKS}/after_disk_prepare/localdisk"
OLDER_ASIDE = f"{files.HOOKS_ASIDE}/after_disk_prepare/localdisk"


class Image:
    """A root directory, and the program to put there."""

    def __init__(self, top: Path, program: str) -> None:
        self.top, self.program = top, program
        top.mkdir()

    def __call__(self, path: str) -> Path:
        return self.top / path.lstrip("/")

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        self(path).parent.mkdir(parents=True, exist_ok=True)
        self(path).write_text(text)
        self(path).chmod(mode)

    def install(self, dry_run: bool = False) -> list[str]:
        lines = list(install.install(self.program, str(self.top), dry_run))
        return [line.replace(str(self.top), "") for line in lines]

    def uninstall(self, dry_run: bool = False) -> list[str]:
        lines = list(uninstall.uninstall(str(self.top), dry_run))
        return [line.replace(str(self.top), "") for line in lines]

    def files(self) -> dict[str, str]:
        """Everything but directories: what a file says, where a link leads."""
        found = {}
        for directory, _, names in os.walk(self.top):
            for path in (Path(directory, name) for name in names):
                is_link = path.is_symlink()
                text = os.readlink(path) if is_link else path.read_bytes().decode(errors="replace")
                found[f"/{path.relative_to(self.top)}"] = text
        return found

    def state(self) -> dict[str, tuple[object, ...]]:
        """All that a change would show: times, owners and modes, of directories too."""
        paths = [self.top, *self.top.rglob("*")]
        found = ((path, path.lstat()) for path in paths)
        return {
            str(path): (status.st_ino, status.st_mtime_ns, status.st_mode, status.st_uid, status.st_gid)
            for path, status in found
        }


@pytest.fixture(name="visudo")
def fixture_visudo(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What visudo was asked about; it says yes."""
    judged: list[str] = []

    def fake_run(argv: tuple[str, ...], text: str = "") -> str:
        assert tuple(argv[:2]) == ("visudo", "-cf"), "nothing else runs for another root directory"
        judged.append(text if argv[2] == "-" else Path(argv[2]).read_text())
        return ""

    monkeypatch.setattr(run, "run", fake_run)
    return judged


@pytest.fixture(name="program")
def fixture_program(tmp_path: Path) -> str:
    path = tmp_path / "localdisk-new"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("__main__.py", "")
    return str(path)


@pytest.fixture(name="image")
def fixture_image(tmp_path: Path, program: str, visudo: list[str]) -> Image:
    del visudo
    return Image(tmp_path / "image", program)


# -- what is put where


def test_places_are_what_others_use() -> None:
    assert (files.TREES, files.CONFIG) == (bootstrap.TREES, config.DEFAULT_PATH)
    assert files.TREES_BESIDE == files.PROGRAM + bootstrap.BESIDE
    assert [os.path.basename(path) for path in files.UDEV_RULES] == [
        "12-localdisk.rules",
        "58-localdisk.rules",
    ]


def test_a_clean_image(image: Image, visudo: list[str]) -> None:
    lines = image.install()
    assert image.files().keys() == {*FILES, *LINKS}
    for path, mode in FILES.items():
        assert stat.S_IMODE(image(path).stat().st_mode) == mode, path
    for link in LINKS:
        assert os.readlink(image(link)) == files.PROGRAM
        assert stat.S_IMODE(image(link).parent.stat().st_mode) == 0o755
    assert image(files.PROGRAM).read_bytes() == Path(image.program).read_bytes()
    assert {*visudo} == {files.sudoers(files.PROGRAM)} == {image(files.SUDOERS).read_text()}
    assert image(files.CRON).read_text() == files.cron(files.PROGRAM, ())
    told = [*(f"wrote {path} (mode {mode:04o})" for path, mode in FILES.items())]
    told += [f"linked {link} to {files.PROGRAM}" for link in LINKS]
    assert {line for line in lines if not line.startswith("made directory ")} == {
        *told,
        f"left {files.TREES} to the first run of the program, which extracts itself there",
    }
    assert lines[0] == "made directory /usr"


def test_again_changes_nothing(image: Image) -> None:
    image.install()
    before = image.state()
    assert image.install() == ["all of localdisk is in its place below , nothing was changed"]
    assert image.install(dry_run=True) == image.install()
    assert image.state() == before


def test_dry_run_changes_nothing(image: Image) -> None:
    before = image.state()
    would = image.install(dry_run=True)
    assert image.state() == before
    made = image.install()[:-1]
    for verbs in (("make", "made"), ("write", "wrote"), ("link", "linked")):
        would = [line.replace(f"would {verbs[0]} ", f"{verbs[1]} ") for line in would]
    assert would == made
    before = image.state()
    assert image.uninstall(dry_run=True)
    assert image.state() == before


def test_what_differs_is_made_right(image: Image) -> None:
    image.install()
    good = image.files()
    image.write(files.CRON, "something else")
    image(files.SUDOERS).chmod(0o644)
    image(files.UDEV_RULES[0]).unlink()
    image(files.UDEV_RULES[1]).unlink()
    image(files.UDEV_RULES[1]).symlink_to("/dev/null")
    image(LINKS[0]).unlink()
    image(LINKS[0]).symlink_to("/opt/old/localdisk")
    image(f"{files.HOOKS}/after_vm_start").mkdir()
    image(f"{files.HOOKS}/after_vm_start/50_localdisk").symlink_to(files.PROGRAM)
    image(f"{files.HOOKS}/before_vm_start/90_again").symlink_to(files.PROGRAM)
    image.write(atomic_file.temporary_name(files.CRON), "left by a killed run")
    image.write(atomic_file.temporary_name(files.CONFIG), "left by a killed run")
    image.install()
    image.uninstall()
    image.install()
    assert image.files() == good


def test_a_newer_program(image: Image) -> None:
    image.install()
    old = image(files.PROGRAM).stat()
    with zipfile.ZipFile(image.program, "w") as file:
        file.writestr("__main__.py", "pass")
    with open(image(files.PROGRAM), "rb") as running:
        first, *rest = image.install()
        assert running.read() != image(files.PROGRAM).read_bytes(), "a file that is open stays as it is"
    assert first == f"wrote {files.PROGRAM} (mode 0755)"
    assert len(rest) == 1
    assert image(files.PROGRAM).stat().st_ino != old.st_ino


def test_run_from_its_place_it_stays(image: Image) -> None:
    image.install()
    image.program = str(image(files.PROGRAM))
    assert image.install() == ["all of localdisk is in its place below , nothing was changed"]


def test_the_configuration_is_never_overwritten(image: Image) -> None:
    image.write(files.CONFIG, f"volume_group: other\nvms: {{{VM}: {{volume_group: fast}}}}\n", 0o600)
    before = image(files.CONFIG).stat()
    image.install()
    image.uninstall()
    image.install()
    assert image(files.CONFIG).stat() == before
    for path in files.UDEV_RULES:
        assert image(path).read_text() == files.udev_rule(["other", "fast"])


def test_the_example_configures_what_the_rules_are_for(image: Image) -> None:
    image.install()
    written = config.parse(image(files.CONFIG).read_bytes(), "")
    assert written == config.parse(b"", "")
    assert image(files.UDEV_RULES[0]).read_text() == files.udev_rule(written.volume_groups)


def test_an_image_has_its_own_configuration(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    image.write("/live.yaml", "volume_group: of-this-system\n")
    monkeypatch.setattr(config, "DEFAULT_PATH", str(image("/live.yaml")))
    image.install()
    assert image(files.UDEV_RULES[0]).read_text() == files.udev_rule(["ovirt-local"])


def test_a_refused_configuration(image: Image) -> None:
    image.write(files.CONFIG, "nonsense: 1\n")
    before = image.state()
    with pytest.raises(ConfigRefused):
        image.install()
    assert image.state() == before


@pytest.mark.parametrize("collectors", [(), files.COLLECTORS[:1], files.COLLECTORS[1:]])
def test_metrics_where_they_are_collected(image: Image, collectors: tuple[str, ...]) -> None:
    image.install()
    for path in collectors:
        image(path).mkdir(parents=True)
    image.install()
    lines = image(files.CRON).read_text().splitlines()[1:]
    assert lines == [
        f"*/10 * * * * root {files.PROGRAM} gc >/dev/null",
        *(f"* * * * * root {files.PROGRAM} status --prometheus {path}/localdisk.prom" for path in collectors),
    ]
    for path in collectors:
        image.write(f"{path}/localdisk.prom", "")
        image.write(f"{path}/other.prom", "")
    image.uninstall()
    left = {files.CONFIG, *(f"{path}/other.prom" for path in collectors)}
    assert image.files().keys() == left


# -- other programs' files


def test_the_older_hook_goes_aside_and_comes_back(image: Image) -> None:
    image.write(OLDER, "#!/bin/sh", 0o755)
    image.write(f"{files.HOOKS}/after_vm_start/60_LocalDisk", "#!/bin/sh", 0o755)
    for path in OLDER_RULES:
        image.write(path, "rule")
    before = image.files()
    lines = image.install()
    assert f"moved {OLDER} to {OLDER_ASIDE}, two hooks for local disks would copy twice" in lines
    aside = {OLDER_ASIDE, f"{files.HOOKS_ASIDE}/after_vm_start/60_LocalDisk"}
    aside |= {f"{path}.aside" for path in OLDER_RULES}
    assert image.files().keys() == {*FILES, *LINKS, *aside}
    assert image.uninstall()[0].startswith("removed ")
    assert image.files() == {**before, files.CONFIG: config.example_text()}
    assert not image(files.HOOKS_ASIDE).exists()


def test_before_the_older_hook_goes_ours_is_at_before_vm_start(image: Image) -> None:
    """A VM that starts between its going and our coming is made local there."""
    image.write(OLDER, "#!/bin/sh", 0o755)
    lines = image.install()
    moved = next(n for n, line in enumerate(lines) if line.startswith("moved "))
    assert lines.index(f"linked {files.hook_link('before_vm_start')} to {files.PROGRAM}") < moved
    assert lines[moved + 1] == f"linked {files.hook_link('after_disk_prepare')} to {files.PROGRAM}"


def test_the_older_hook_is_updated_by_its_package(image: Image) -> None:
    image.write(OLDER, "old", 0o755)
    image.install()
    image.write(OLDER, "new", 0o755)
    image.install()
    assert image(OLDER_ASIDE).read_text() == "new"
    image.write(OLDER, "newest", 0o755)
    image.uninstall()
    assert (image(OLDER).read_text(), image(OLDER_ASIDE).read_text()) == ("newest", "new")


def test_a_file_with_our_links_name(image: Image) -> None:
    path = files.hook_link("after_disk_prepare")
    image.write(path, "#!/bin/sh", 0o755)
    image.install()
    assert os.readlink(image(path)) == files.PROGRAM
    image.uninstall()
    assert image(path).read_text() == "#!/bin/sh"


def test_other_hooks_and_rules_stay(image: Image) -> None:
    others = {
        f"{files.HOOKS}/after_disk_prepare/10_other": 0o755,
        f"{files.HOOKS}/after_disk_prepare/localdisk.rpmsave": 0o644,
        f"{files.HOOKS}/README": 0o644,
        "/etc/sudoers.d/50_vdsm": 0o440,
        "/etc/udev/rules.d/12-vdsm-lvm.rules": 0o644,
        "/etc/cron.d/other": 0o644,
        "/usr/local/libexec/other": 0o755,
    }
    for path, mode in others.items():
        image.write(path, "other", mode)
    before = {path: image(path).stat() for path in others}
    image.install()
    image.uninstall()
    assert {path: image(path).stat() for path in others} == before


# -- broken off


class Killed(BaseException):
    pass


def breaking(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The process ends at the `number`th call that changes something, before it or right after."""
    calls = iter(range(number, -1, -1))

    def breaks(name: str, real: Callable[..., object]) -> None:
        def call(*words: object, **named: object) -> object:
            left = next(calls, None)
            if left == 0:
                raise Killed
            done = real(*words, **named)
            if left == 1 and name in ("replace", "symlink"):
                raise Killed
            return done

        monkeypatch.setattr(os, name, call)

    for name in ("mkdir", "replace", "symlink", "unlink", "fsync"):
        breaks(name, getattr(os, name))


def prepared(image: Image) -> None:
    image.write(OLDER, "#!/bin/sh", 0o755)
    image.write(files.OLDER_SUDOERS, "rule")
    image.write(files.UDEV_RULE_BEFORE, "rule")
    image(f"{files.HOOKS}/before_vm_start").mkdir()
    image(f"{files.HOOKS}/before_vm_start/60_localdisk").symlink_to(files.PROGRAM)


@pytest.mark.parametrize("doing", ["install", "uninstall"])
def test_killed_anywhere_and_run_again(
    tmp_path: Path, program: str, visudo: list[str], monkeypatch: pytest.MonkeyPatch, doing: str
) -> None:
    del visudo
    whole = Image(tmp_path / "whole", program)
    prepared(whole)
    whole.install()
    if doing == "uninstall":
        whole.uninstall()
    number, was_killed = 0, True
    while was_killed:
        image = Image(tmp_path / f"image-{number}", program)
        prepared(image)
        if doing == "uninstall":
            image.install()
        with monkeypatch.context() as patch:
            breaking(patch, number)
            try:
                getattr(image, doing)()
                was_killed = False
            except Killed:
                pass
        getattr(image, doing)()
        assert image.files() == whole.files(), number
        shutil.rmtree(image.top)
        number += 1
    assert number > 15


def test_killed_then_uninstalled(
    tmp_path: Path, program: str, visudo: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Temporary files go, too: a SIGKILL leaves them."""
    del visudo
    image = Image(tmp_path / "image", program)
    with monkeypatch.context() as patch:
        patch.setattr(atomic_file, "removed_on_failure", lambda _path: contextlib.nullcontext())
        patch.setattr(os, "replace", raising)
        for _ in range(2):
            with pytest.raises(Killed):
                image.install()
    assert image.files().keys() == {atomic_file.temporary_name(files.PROGRAM)}
    image.uninstall()
    assert image.files() == {}


def raising(*_words: object) -> None:
    raise Killed


@pytest.mark.parametrize("version", ["1.8.29", "1.9.5p2", "1.9.13p3", "1.9.15p5"])
def test_what_an_older_sudo_does_not_know_is_left_out(
    image: Image, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """As the visudo of each of these versions judged: those of EL8, EL9, Debian 12 and EL10."""
    came_with = {"1.8.29": 0, "1.9.5p2": 3, "1.9.13p3": 5, "1.9.15p5": 5}
    unknown = files.NEWER_SUDO_OPTIONS[came_with[version] :]

    def judge(argv: Sequence[str], text: str = "") -> str:
        text = text if argv[2] == "-" else Path(argv[2]).read_text()
        if any(option in text for option in unknown):
            raise CommandFailed(tuple(argv), 1, f"{argv[2]}:19:40: unknown defaults entry")
        return ""

    monkeypatch.setattr(run, "run", judge)
    image.install()
    text = image(files.SUDOERS).read_text()
    known = files.NEWER_SUDO_OPTIONS[: came_with[version]]
    assert text == files.sudoers(files.PROGRAM, known)
    assert text.count("\nDefaults") == 6 + len(known)
    assert text.endswith(f"\nvdsm ALL=(root) NOPASSWD: {TAGS} {files.PROGRAM} helper\n")
    image.install()
    assert image(files.SUDOERS).read_text() == text


TAGS = "EXEC: NOSETENV: NOLOG_INPUT: NOLOG_OUTPUT:"


def test_a_refused_sudo_rule_leaves_the_old_one(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    image.write(files.SUDOERS, "old", 0o440)

    def refuse(argv: tuple[str, ...], **_: str) -> str:
        raise CommandFailed(tuple(argv), 1, "syntax error")

    monkeypatch.setattr(run, "run", refuse)
    with pytest.raises(CommandFailed):
        image.install()
    assert image(files.SUDOERS).read_text() == "old"
    assert not image(atomic_file.temporary_name(files.SUDOERS)).exists()


# -- nonsense


def refused(program: str, root: str) -> str:
    with pytest.raises(InstallRefused) as refusal:
        list(install.install(program, root))
    return str(refusal.value)


def test_nonsense_roots(image: Image, tmp_path: Path) -> None:
    assert refused(image.program, "/nonexistent").startswith("/nonexistent is no directory : ")
    assert refused(image.program, image.program).endswith(
        "is no directory : name the root directory of an image"
    )
    (tmp_path / "link").symlink_to("/")
    for root in ("/", "/tmp/..", str(tmp_path / "link")):
        assert "is this system's own root directory : leave out --root" in refused(image.program, root)


def test_what_is_no_built_file(image: Image) -> None:
    assert "cannot be copied to a host : run the one file" in refused(__file__, str(image.top))


def test_directories_where_files_belong(image: Image) -> None:
    image(files.CRON).mkdir(parents=True)
    assert "/etc/cron.d/localdisk is a directory : move it away" in refused(image.program, str(image.top))


def test_a_file_where_a_directory_belongs(image: Image) -> None:
    image.write("/usr/libexec", "")
    assert "/usr/libexec is no directory : move it away" in refused(image.program, str(image.top))


@pytest.mark.parametrize("directory", ["/etc", "/etc/cron.d", "/usr/libexec/vdsm", "/usr/local/libexec"])
def test_links_that_lead_out_of_the_image(image: Image, tmp_path: Path, directory: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    image(directory).parent.mkdir(parents=True, exist_ok=True)
    image(directory).symlink_to(outside)
    assert f"{directory} leads out of" in refused(image.program, str(image.top))
    assert not list(outside.iterdir())
    (outside / "cron.d").mkdir()
    (outside / "cron.d/localdisk").touch()
    (outside / "localdisk").touch()
    before = set(outside.rglob("*"))
    try:
        image.uninstall()
    except InstallRefused as refusal:
        assert "leads out of" in str(refusal)  # noqa: PT017 (either it refuses or there is nothing to remove)
    assert set(outside.rglob("*")) == before


def test_links_that_stay_in_the_image(image: Image) -> None:
    image("/srv/libexec").mkdir(parents=True)
    image("/usr").mkdir()
    image("/usr/libexec").symlink_to("../srv/libexec")
    image.install()
    assert os.readlink(image("/srv/libexec/vdsm/hooks/before_vm_start/50_localdisk")) == files.PROGRAM


# -- uninstall


def test_uninstall(image: Image) -> None:
    image.install()
    image.write(f"{files.TREES}/x/files", "")
    image.write(f"{files.TREES_BESIDE}/x/files", "")
    image.write(f"{lock.RUN}/x.lock", "")
    lines = image.uninstall()
    assert image.files().keys() == {files.CONFIG}
    gone = {*FILES, *LINKS} - {files.CONFIG}
    assert lines[-1] == f"left {files.CONFIG}"
    assert gone <= {line.replace("removed ", "") for line in lines}
    assert image.uninstall() == [f"left {files.CONFIG}"]


@pytest.fixture(name="live")
def fixture_live(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, image: Image) -> tuple[Image, FakeHost]:
    """The image is the live system: each place is below it, and LVM answers."""
    fake = FakeHost()
    for name in (
        "HOOKS",
        "HOOKS_ASIDE",
        "CONFIG",
        "SUDOERS",
        "CRON",
        "PROGRAM",
        "TREES",
        "TREES_BESIDE",
        "UDEV_RULE_BEFORE",
        "OLDER_SUDOERS",
        "OLDER_UDEV_RULE",
    ):
        monkeypatch.setattr(files, name, str(image(getattr(files, name))))
    for name in ("UDEV_RULES", "COLLECTORS"):
        monkeypatch.setattr(files, name, tuple(str(image(path)) for path in getattr(files, name)))
    monkeypatch.setattr(config, "DEFAULT_PATH", files.CONFIG)
    monkeypatch.setattr(lock, "RUN", str(tmp_path / "run"))
    for module in (install, uninstall):
        monkeypatch.setattr(module, "LOCK", str(tmp_path / "run/install.lock"))
    monkeypatch.setattr(log, "event", lambda _line: None)
    monkeypatch.setattr(run, "run", lambda argv, **_: commands.append(" ".join(argv)))
    monkeypatch.setattr(
        VolumeGroup, "read", lambda _name, devices=(): VolumeGroup.from_report(fake.report(), devices)
    )
    commands.clear()
    return image, fake


commands: list[str] = []


def test_what_a_program_at_another_place_extracted(
    live: tuple[Image, FakeHost], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Uninstall takes it, if it is that program which runs; trees of anything else it does not know."""
    image, _ = live
    image.write("opt/localdisk.extracted/build/files", "")
    trees = image("opt/localdisk.extracted")
    for own, is_there in ((str(tmp_path / "src"), True), (str(trees), False)):
        monkeypatch.setattr(uninstall, "own_trees", lambda own=own: own)
        list(uninstall.uninstall(force=True))
        assert trees.exists() == is_there


def test_live(live: tuple[Image, FakeHost]) -> None:
    image, fake = live
    lines = list(install.install(image.program))
    asked = [command for command in commands if command.startswith("visudo -cf ")]
    assert asked[-1] == f"visudo -cf {atomic_file.temporary_name(files.SUDOERS)}"
    assert commands[len(asked) :] == [
        "udevadm control --reload",
        "udevadm trigger --settle --action=change --sysname-match=dm-*",
    ]
    assert "ran udevadm control --reload" in lines
    assert os.listdir(lock.RUN) == []
    commands.clear()
    assert list(install.install(image.program)) == ["all of localdisk is in its place, nothing was changed"]
    assert [command.split()[0] for command in commands] == ["visudo"]
    commands.clear()
    fake.add(VOLUME, tags(ours=False))
    (line,) = list(install.install(image.program))[:-1]  # again and again, until somebody decides
    assert line.startswith(f"ovirt-local/{VOLUME}  VM {VM}  64 MiB  is vdsm's older hook's, kept until you")
    assert [*install.install(image.program, dry_run=True)][:-1] == [line]
    fake.volumes.clear()
    commands.clear()
    fake.add(VOLUME, tags())
    lines = list(uninstall.uninstall())
    assert commands == ["udevadm control --reload"]
    assert lines[-2] == f"left {files.CONFIG}"
    assert lines[-1].startswith("left 1 local disk(s) in volume group ")
    assert not os.path.exists(lock.RUN)
    assert image.files().keys() == {"/etc/localdisk.yaml"}
    assert list(uninstall.uninstall())[-2:] == lines[-2:]
    cached = {"localdisk", f"TEMPLATE_{OTHER_VOLUME}"}
    fake.add(OTHER_VOLUME, cached)
    (last,) = list(uninstall.uninstall())[-1:]
    how = f"removed by the file that you installed: remove ovirt-local/{OTHER_VOLUME}"
    assert last == f"left the template cache, which no VM needs; {how}"
    fake.add(OTHER_VOLUME, {*cached, "UPDATING"})
    with pytest.raises(WorkUnfinished, match=r"template LV .* is unfinished"):
        list(uninstall.uninstall())


def test_another_install_was_faster(live: tuple[Image, FakeHost], monkeypatch: pytest.MonkeyPatch) -> None:
    image, _ = live

    real = lock.holding

    @contextlib.contextmanager
    def waiting(path: str, pause: lock.Pause) -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(lock, "holding", real)
            list(install.install(image.program))
        with real(path, pause):
            yield

    monkeypatch.setattr(lock, "holding", waiting)
    assert list(install.install(image.program)) == ["all of localdisk is in its place, nothing was changed"]


def test_uninstall_refuses_while_something_is_unfinished(live: tuple[Image, FakeHost]) -> None:
    image, fake = live
    list(install.install(image.program))
    before = image.files()

    def refusal() -> str:
        with pytest.raises(WorkUnfinished) as error:
            list(uninstall.uninstall())
        assert image.files() == before
        return str(error.value)

    fake.add(VOLUME, tags(UPDATING))
    assert f"{VOLUME} is unfinished : stop the VMs" in refusal()
    fake.add(VOLUME, tags(DELETING))
    assert f"{VOLUME} is not erased and removed yet : " in refusal()
    fake.add(VOLUME, tags(), lv_device_open="open", lv_active="active")
    assert f"{VOLUME} is in use by VM {VM} : " in refusal()
    with lock.holding(lock.disk_lock(VOLUME), lambda _seconds: None):
        assert f"{VOLUME}.lock is held (and 1 more) : " in refusal()
    list(uninstall.uninstall(force=True))
    assert image.files().keys() == {"/etc/localdisk.yaml"}


def test_uninstall_without_a_volume_group(
    live: tuple[Image, FakeHost], monkeypatch: pytest.MonkeyPatch
) -> None:
    image, _ = live

    def read(name: str, _devices: object) -> VolumeGroup:
        raise NoVolumeGroup(vg=name)

    monkeypatch.setattr(VolumeGroup, "read", read)
    list(install.install(image.program))
    assert list(uninstall.uninstall())[-1] == f"left {files.CONFIG}"


def test_trees_of_other_builds(live: tuple[Image, FakeHost], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those go that no process runs from."""
    image, _ = live
    trees = Path(files.TREES)
    for name in ("ours", "old", "used"):
        (trees / name / "site-packages/localdisk").mkdir(parents=True)
        (trees / name / extract.FILES).touch()
    (trees / ".lock").touch()
    monkeypatch.setattr(install, "__file__", str(trees / "ours/site-packages/localdisk/host/install.py"))
    with open(trees / "used" / extract.FILES, "rb") as used:
        fcntl.flock(used, fcntl.LOCK_SH)
        lines = list(install.install(image.program))
        assert f"removed what other builds extracted to {trees}: old" in lines
        assert list(install.install(image.program)) == [
            "all of localdisk is in its place, nothing was changed"
        ]
    assert sorted(os.listdir(trees)) == [".lock", "ours", "used"]


def test_the_rule_names_the_program_as_hooks_call_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """/usr/local is a link on some hosts; check compares with where the program really is."""
    (tmp_path / "real").mkdir()
    (tmp_path / "local").symlink_to("real")
    monkeypatch.setattr(files, "PROGRAM", str(tmp_path / "local" / "localdisk"))
    assert install._called("") == str(tmp_path / "real" / "localdisk")
    assert install._called(str(tmp_path)) == files.PROGRAM

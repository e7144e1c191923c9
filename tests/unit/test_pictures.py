"""The pictures' converters, on little texts and traces; and what the pages show."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from lxml import etree

from tests.pictures import svg, terminal, way
from tests.pictures.draw import TITLES, scenes
from tests.pictures.terminal import Run, Style
from tests.readme import DOCS, PAGES

KIB = 1 << 10
VM, VOLUME = "5d1f0a58-0000-4000-8000-000000000001", "5d1f0a58-0000-4000-8000-000000000002"


def parsed(text: str) -> Any:
    """The root of a well-formed SVG that asks for nothing from outside."""
    root = etree.fromstring(text.encode())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert not root.xpath(
        "//*[local-name()='script' or local-name()='image' or local-name()='foreignObject']"
    )
    assert not root.xpath("//@*[local-name()='href' or starts-with(local-name(), 'on')]")
    assert not re.search(r"url\(|@import", text)
    return root


def words(root: Any) -> list[str]:
    return [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]


# -- terminals


@pytest.mark.parametrize(
    ("line", "runs"),
    [
        ("", []),
        ("a b  c", [Run(0, "a b", Style()), Run(5, "c", Style())]),
        ("\033[32mrunning\033[0m  x", [Run(0, "running", Style(2)), Run(9, "x", Style())]),
        ("\033[1m\033[31mx\033[39my\033[22mz", [
            Run(0, "x", Style(1, bold=True)), Run(1, "y", Style(bold=True)), Run(2, "z", Style()),
        ]),
        ("\033[2;36mx\033[my", [Run(0, "x", Style(6, dim=True)), Run(1, "y", Style())]),
        ("\033[?25l\033[Hx\033[K\033(By", [Run(0, "x", Style()), Run(1, "y", Style())]),
    ],
)  # fmt: skip
def test_what_a_terminal_is_sent(line: str, runs: list[Run]) -> None:
    assert terminal.parse(line) == [runs]


def test_a_style_goes_on_in_the_next_line() -> None:
    assert terminal.parse("\033[1ma\r\nb\n\033[0mc") == [
        [Run(0, "a", Style(bold=True))],
        [Run(0, "b", Style(bold=True))],
        [Run(0, "c", Style())],
    ]


def test_markup_and_control_characters_are_text() -> None:
    root = parsed(terminal.picture('a "title" <&>', ['<b> & "q" \x07\x00\033[31m]]>\033[0m \ufffe'], 40))
    assert words(root) == ['<b> & "q" \ufffd\ufffd', "]]>", "\ufffd"]
    assert root.get("aria-label") == 'a "title" <&>'


def test_one_frame_does_not_move() -> None:
    text = terminal.picture("status", ["one\ntwo"], 100)
    root = parsed(text)
    assert words(root) == ["one", "two"]
    assert "animation" not in text
    assert (float(root.get("width")), float(root.get("height"))) == (812, 68)


def test_frames_take_turns() -> None:
    """Where nothing moves the first one is seen, and no other."""
    text = terminal.picture("watch", ["one", "two", "three"], 100)
    root = parsed(text)
    assert words(root) == ["one", "two", "three"]
    assert [group.get("class") for group in root.iter("{*}g")] == [
        "frame frame0",
        "frame frame1",
        "frame frame2",
    ]
    assert "animation:turn 6s step-end infinite" in text
    assert "33.3333%{visibility:hidden}" in text
    assert ".frame0{visibility:visible}" in text


# -- the way of the data


def span(pid: int, user: str, line: str, start: int, end: int) -> dict[str, Any]:
    return {"pid": pid, "parent": 1, "user": user, "argv": line.split(), "start": start, "end": end}


def hook(pid: int, point: str, start: int, end: int) -> dict[str, Any]:
    return span(pid, "vdsm", f"python3 -IS /usr/libexec/vdsm/hooks/{point}/50_localdisk", start, end)


SPANS = [
    span(1, "root", "virsh -c qemu:///system define /dev/stdin", 0, 90),
    span(2, "root", "nice -n -20 /usr/libexec/vdsm/hooks/after_disk_prepare/50_localdisk", 90, 100),
    hook(2, "after_disk_prepare", 100, 1100),
    span(3, "root", "sudo -n /usr/local/libexec/localdisk helper", 150, 200),
    span(3, "root", "python3 -IS /usr/local/libexec/localdisk helper", 200, 1090),
    span(4, "root", "lvm fullreport ovirt-local", 250, 300),
    span(5, "root", "virsh --readonly list --uuid", 300, 350),
    span(6, "root", f"lvcreate --name {VOLUME} --addtag UPDATING --addtag VM_{VM}", 400, 500),
    span(7, "vdsm", "setpriv --pdeathsig KILL -- qemu-img convert -p a b", 500, 520),
    span(7, "vdsm", "qemu-img convert -p a b", 520, 900),
    span(8, "root", f"lvchange --deltag UPDATING ovirt-local/{VOLUME}", 950, 1050),
    hook(9, "before_vm_start", 1200, 1500),
    span(10, "root", "lvm fullreport ovirt-local", 1300, 1400),
    span(11, "root", "virsh -c qemu:///system create /dev/stdin", 1600, 9000),
    hook(12, "after_vm_destroy", 9100, 9500),
    span(14, "root", f"lvchange --addtag DELETING ovirt-local/{VOLUME}", 9110, 9190),
    span(13, "root", f"lvremove --yes ovirt-local/{VOLUME}", 9200, 9300),
    span(15, "vdsm", "virsh -r -c qemu:///system list --all --uuid", 9501, 9600),
]
SCENE = {
    "ids": {"vm": VM, "volume": VOLUME},
    "size": 64 << 20,
    "where": "nowhere <here>",
    "spans": SPANS,
    "samples": [
        {"at": 530, "written": 0, "told": False},
        {"at": 700, "written": 8 << 20, "told": True},
        {"at": 890, "written": 32 << 20, "told": False},
    ],
    "files": {f"/rhev/x/images/i/{VOLUME}": False, f"/dev/ovirt-local/{VOLUME}": True},
}


def test_what_only_runs_another_program_is_one_with_it() -> None:
    (copy,) = (step for step in way.steps(SPANS) if step.pid == 7)
    assert (copy.argv[0], copy.start, copy.end) == ("setpriv", 500, 900)
    assert [step.argv[0] for step in way.steps(SPANS) if step.pid == 3] == ["sudo", "python3"]
    (prepare,) = (step for step in way.steps(SPANS) if step.pid == 2)
    assert (prepare.argv[0], prepare.user, prepare.start) == ("python3", "vdsm", 100)


def test_lanes() -> None:
    lanes = [step.lane for step in way.steps(SPANS)]
    assert lanes == [
        *("vdsm", "hook", "helper", "helper", "lvm", "helper", "lvm", "hook", "lvm"),
        *("hook", "lvm", "vdsm", "hook", "lvm", "lvm"),
    ]


def test_hook_points_have_one_scale_and_what_is_between_them_is_cut_out() -> None:
    pieces = way.pieces(way.steps(SPANS))
    points = ["", "after_disk_prepare", "", "before_vm_start", "", "after_vm_destroy"]
    assert [piece.point for piece in pieces] == points
    assert [round(piece.right - piece.left) for piece in pieces[::2]] == [way.CUT, way.CUT_EMPTY, way.CUT]
    scales = {round((p.right - p.left) / (p.end - p.start), 3) for p in pieces[1::2]}
    assert len(scales) == 1
    assert (pieces[0].left, round(pieces[-1].right)) == (way.LEFT, way.RIGHT)
    assert all(one.right == next_.left for one, next_ in zip(pieces, pieces[1:]))


def test_a_trace_as_swimlanes() -> None:
    root = parsed(way.picture("One start & stop", **SCENE))
    shown = words(root)
    for expected in (
        *("after_disk_prepare", "before_vm_start", "after_vm_destroy", "UPDATING", "ready", "1,000 ms"),
        *("lvcreate", "lvchange", "lvremove", "qemu-img convert", "define", "create", "(VM runs)"),
        *("One start & stop", "Measured nowhere <here>."),
        "32 MiB written for 64 MiB",
        "lvcreate --name <volume> --addtag UPDATING --addtag VM_<vm>",
        "/dev/ovirt-local/<volume>",
        "2× 50–100 ms",
    ):
        assert expected in shown
    right = max(float(rect.get("x")) + float(rect.get("width")) for rect in root.iter("{*}rect"))
    assert right <= way.WIDTH


def test_a_trace_without_a_copy_has_no_data() -> None:
    spans = [
        hook(2, "after_disk_prepare", 100, 700),
        span(4, "root", f"lvchange --deltag STOPPED_5 ovirt-local/{VOLUME}", 350, 450),
        hook(8, "before_vm_start", 4000, 4500),
        hook(12, "after_vm_destroy", 9100, 9500),
        span(14, "root", f"lvchange --addtag STOPPED_7 ovirt-local/{VOLUME}", 9110, 9190),
    ]
    scene = {**SCENE, "spans": spans, "samples": [], "files": {}}
    shown = words(parsed(way.picture("a restart", **scene)))
    assert [word for word in shown if word in ("kept", "ready", "UPDATING", "DELETING")] == [
        "kept",
        "ready",
        "kept",
    ]
    assert "data" not in shown
    assert "qemu-img convert" not in shown


def test_long_words_and_ids_are_cut_short() -> None:
    argv = ["/usr/sbin/lvcreate", "x" * 71, f"IU_{VOLUME}", f"SOURCE_{'0' * 32}"]
    expected = f"lvcreate {'x' * 60}… IU_<image> SOURCE_<fingerprint>"
    assert way.shown(argv, {VOLUME: "image"}) == expected


# -- what is passed from one to the other, and what comes out


def test_scenes_are_found_among_other_lines(capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["boot: running\n", 'PICTURE {"scene": "watch", "columns": 100, "frames": ["a"]}\n', "end\n"]
    assert list(scenes(lines)) == [("watch", {"columns": 100, "frames": ["a"]})]
    assert capsys.readouterr().out == "boot: running\nend\n"


def test_attributes_are_escaped() -> None:
    parsed(svg.document(1, 2.50, '"<', "", [svg.text(1, 2.0, "&", kind='"<&')]))


def pictures_of(page: Path) -> list[Path]:
    """Those with words for who does not see them."""
    return [page.parent / name for name in re.findall(r"!\[[^\]]{20,}\]\(([^)]+)\)", page.read_text())]


def test_the_pages_show_every_picture_and_say_what_is_on_it() -> None:
    shown = [path for page in PAGES for path in pictures_of(page)]
    assert sorted(shown) == sorted(DOCS.glob("*.svg"))


@pytest.mark.parametrize("name", TITLES)
def test_pictures_are_good_and_small(name: str) -> None:
    path = Path(DOCS / f"{name}.svg")
    parsed(path.read_text())
    assert path.stat().st_size < 30 * KIB

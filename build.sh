#!/usr/bin/env bash
# Build, show, test and measure localdisk.
#
#   ./build.sh          build dist/localdisk, the one file that is copied to a host
#   ./build.sh demo     the whole life of a VM's local disk on real LVM and real libvirt, narrated
#   ./build.sh test     lint, types, unit tests, then the tests that need a kernel; with --all, all of the crash
#                       matrix instead of a selection
#   ./build.sh bench    the table of measurements
#   ./build.sh pictures docs/*.svg of the README, drawn from a real run
#   ./build.sh fuzz N   broken input for everything that reads what others wrote, N seconds long
#   ./build.sh pins     pins.txt anew, after a version in pyproject.toml was changed
#
# Each gets what it needs itself: Debian packages with apt (as root or through sudo), Python packages into
# .venv.  Tests and demo run in a throw-away kernel unless this machine has device-mapper and we are root.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")"

PYTHON=/usr/bin/python3
PYTHONS=(3.9 3.10 3.11 3.12 3.13) # the file runs on each

# What Python needs to build; then what the test bed needs: a kernel, LVM, sudo and libvirt for it.
BUILD_PACKAGES=(python3 python3-venv)
BED_PACKAGES=(qemu-system-x86 qemu-utils kmod udev e2fsprogs iproute2 hostname
  lvm2 thin-provisioning-tools sudo util-linux libvirt-daemon-system libvirt-clients dbus procps)
# The guest's kernel where this machine's own will not do: the first is faster, the others come where it
# cannot be had.
GUEST_PACKAGES=(user-mode-linux)
OTHER_GUEST_PACKAGES=(linux-image-amd64 busybox-static file)
# Prometheus' promtool and node_exporter read the metrics and their alert rules.
TEST_PACKAGES=(shellcheck prometheus prometheus-node-exporter)

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

# need PACKAGE...: install the Debian packages that are not there yet
need() {
  local package missing=()
  for package in "$@"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  [ "${#missing[@]}" -gt 0 ] || return 0
  echo "installing: ${missing[*]}" >&2
  as_root apt-get update -qq >&2
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
}

# A virtual environment with the pinned packages, made anew when a pin changes.
venv() {
  local stamp=.venv/pins
  if ! cat pyproject.toml tests/requirements.txt | cmp -s - "$stamp"; then
    rm -rf .venv
    "$PYTHON" -m venv .venv
    pip_quietly install -r tests/requirements.txt "${PINS[@]}"
    cat pyproject.toml tests/requirements.txt >"$stamp"
  fi
}

pip_quietly() {
  .venv/bin/python -m pip --disable-pip-version-check -qq "$@"
}

# Ansible, in an environment of its own, for examples/ansible.
need_ansible() {
  local pins=tests/requirements-ansible.txt
  if ! cmp -s "$pins" .venv/ansible/pins; then
    rm -rf .venv/ansible
    "$PYTHON" -m venv .venv/ansible
    .venv/ansible/bin/python -m pip --disable-pip-version-check -qq install -r "$pins"
    cp "$pins" .venv/ansible/pins
  fi
}

# pip_for PYTHON COMMAND...: pip, choosing wheels for that Python on x86-64; manylinux is what EL9's glibc has
pip_for() {
  pip_quietly "${@:2}" --no-deps --only-binary=:all: --implementation cp --python-version "$1" \
    --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux_2_28_x86_64
}

# Write pins.txt anew: the run-time packages of pyproject.toml with the hashes of their wheels.
write_pins() {
  local wheels=build/wheels python
  rm -rf "$wheels"
  for python in "${PYTHONS[@]}"; do
    pip_for "$python" download -d "$wheels" "${PINS[@]}"
  done
  "$PYTHON" - "$wheels" "${PINS[@]}" >pins.txt <<'EOF'
import hashlib, pathlib, sys
print("# What is packed into dist/localdisk, for each Python; `./build.sh pins` writes this file.")
files = list(pathlib.Path(sys.argv[1]).iterdir())
for pin in sys.argv[2:]:
    stem = pin.replace("==", "-").replace("_", "-").lower() + "-"
    wheels = [file for file in files if file.name.replace("_", "-").lower().startswith(stem)]
    hashes = sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in wheels)
    print(" \\\n    ".join([pin, *(f"--hash=sha256:{each}" for each in hashes)]))
EOF
  rm -rf build
}

# The run-time packages, as pyproject.toml pins them.
pins() {
  "$PYTHON" - <<'EOF'
import re
text = open("pyproject.toml").read()
block = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.S | re.M).group(1)
print("\n".join(re.findall(r'^\s+"([^"]+)"', block, re.M)))
EOF
}

prepare() {
  need "${BUILD_PACKAGES[@]}"
  mapfile -t PINS < <(pins)
  venv
}

# merge FROM INTO: what two Pythons' packages both have must be the same; what is compiled has names of its own
merge() {
  local file
  while IFS= read -r -d '' file; do
    [ ! -e "$2/$file" ] || cmp "$1/$file" "$2/$file"
  done < <(cd "$1" && find . -type f ! -path '*.dist-info/*' -print0)
  cp -r "$1/." "$2/"
}

build() {
  local tree=build/tree python lock
  exec {lock}<build.sh
  flock "$lock" # two at once would be in each other's way
  rm -rf build
  mkdir -p "$tree" dist
  for python in "${PYTHONS[@]}"; do
    pip_for "$python" install --target "build/$python" --no-compile --require-hashes -r pins.txt
    rm -rf "build/$python/bin"
    merge "build/$python" "$tree"
  done
  cp -r localdisk "$tree/"
  mkdir -p "$tree/localdisk/schema" "$tree/localdisk/examples"
  cp schema/localdisk.schema.json "$tree/localdisk/schema/"
  cp examples/minimal.yaml "$tree/localdisk/examples/"
  rm -f "$tree"/localdisk/{first,front}.py
  # What run time does not need: headers and sources of lxml, tests, caches, type stubs of packages.
  find "$tree" \( -name '*.pxd' -o -name '*.pxi' -o -name '*.pyx' -o -name '*.h' -o -name '*.c' -o -name '*.pyi' \
    -o -name '*.rng' -o -name '*.xsl' \) -delete
  find "$tree" -depth -type d \( -name __pycache__ -o -name tests -o -name isoschematron -o -name includes \
    -o -name html -o -name benchmarks \) -exec rm -rf {} +
  find "$tree" -path '*.dist-info/*' -type f ! -iname '*licen[cs]e*' ! -iname 'copying*' -delete
  find "$tree" -name py.typed -delete
  find "$tree" -type d -empty -delete
  # Of lxml only the tree and what it imports.
  find "$tree/lxml" -type f ! -name '__init__.py' ! -name 'etree.*' ! -name '_elementpath.*' -delete
  find "$tree" -type d -empty -delete
  # -I: nothing from the environment; -S: nothing from the host's site-packages, whose .pth files and
  # sitecustomize would otherwise run as root.  It also saves a tenth of a hook run without the property.
  .venv/bin/shiv --reproducible --site-packages "$tree" --entry-point localdisk.cli:main \
    --python "$PYTHON -IS" --output-file build/localdisk.shiv
  "$PYTHON" - <<'EOF'
# shiv's own __main__.py and bootstrap give way to ours; everything else, times included, stays as shiv made it.
import json, os, zipfile
OURS = (("__main__.py", "first.py"), ("front.py", "front.py"), ("unpack.py", "unpack.py"))
SHIVS = ("__main__.py", "_bootstrap/", "environment.json")
with open("build/localdisk.shiv", "rb") as file:
    shebang = file.readline()
with zipfile.ZipFile("build/localdisk.shiv") as old, open("build/localdisk", "wb") as file:
    file.write(shebang)
    build_id = json.loads(old.read("environment.json"))["build_id"]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name, source in OURS:
            info = zipfile.ZipInfo(name, old.infolist()[0].date_time)  # stored: no zlib is imported
            info.external_attr = 0o644 << 16
            new.writestr(info, open(f"localdisk/{source}").read().replace("@BUILD_ID@", build_id))
        for info in old.infolist():
            if not info.is_dir() and not info.filename.startswith(SHIVS):
                new.writestr(info, old.read(info), info.compress_type)
os.chmod("build/localdisk", 0o755)
EOF
  mv build/localdisk dist/localdisk
  rm -rf build
  echo "dist/localdisk: $(stat -c %s dist/localdisk) bytes, $(dist/localdisk --version)" >&2
  exec {lock}<&-
}

lint() {
  .venv/bin/ruff check --quiet localdisk tests
  .venv/bin/ruff format --check --quiet localdisk tests
  .venv/bin/mypy --no-error-summary
  (cd examples/ansible && PATH="$OLDPWD/.venv/ansible/bin:$PATH" ansible-lint --offline -q --profile production .)
  shellcheck build.sh .ci/run tests/bed/guest.sh tests/bed/usermode.sh
}

# The unit tests, 200 random chains by the cache's way of copying, and the unit tests under each of the other
# Pythons that the file is for and this machine has.
units() {
  local python job jobs=()
  .venv/bin/python -m pytest -q
  LOCALDISK_CHAINS=200 .venv/bin/python -m pytest -q tests/test_copy.py -k test_random_chains
  for python in $(.venv/bin/python -m tests.pythons); do
    units_under "$python" &
    jobs+=($!)
  done
  for job in "${jobs[@]}"; do
    wait "$job"
  done
}

units_under() {
  local venv log
  venv=.venv/$(basename "$1")
  log=$venv/log
  if [ ! -e "$venv/ready" ]; then
    "$1" -m venv "$venv"
    grep -E '^(pytest|hypothesis)==' tests/requirements.txt >"$venv/requirements.txt"
    "$venv/bin/python" -m pip --disable-pip-version-check -qq install -r "$venv/requirements.txt" "${PINS[@]}"
    touch "$venv/ready"
  fi
  if ! "$venv/bin/python" -m pytest -q -p no:cacheprovider >"$log" 2>&1; then
    tail -n 50 "$log"
    return 1
  fi
  echo "$1: $(tail -n 1 "$log")"
}

# bed COMMAND...: run it as root on a real kernel with device-mapper, on disks of DISK_SIZE MiB
bed() {
  as_root .venv/bin/python -m tests.bed.boot --disk-size "${DISK_SIZE:-8192}" -- .venv/bin/python "$@"
}

# What the test bed needs, a guest's kernel included where the machine's own will not do.
need_bed() {
  need "${BED_PACKAGES[@]}"
  .venv/bin/python -c 'import sys; from tests.bed import boot; sys.exit(boot.why_not_here() is None)' || return 0
  need "${GUEST_PACKAGES[@]}" || true
  as_root .venv/bin/python -c 'import sys; from tests.bed import boot; sys.exit(boot.why_not_usermode() is not None)' ||
    need "${OTHER_GUEST_PACKAGES[@]}"
}

# The tests that need a kernel, a file after the other, the longest first: two at a time in guests, one on the
# machine's own kernel.
kernel_tests() {
  local files=(test_faults.py test_cache.py test_model.py test_hostile.py test_tenants.py privilege test_gc.py
    test_life.py test_check.py test_stale.py test_kills.py test_refusals.py test_install.py test_status.py test_bed.py
    test_ansible.py::test_the_life_of_a_host)
  local file guests=2 running=0 verdict=0
  .venv/bin/python -c 'import sys; from tests.bed import boot; sys.exit(boot.why_not_here() is None)' || guests=1
  mkdir -p .bed
  for file in "${files[@]}"; do
    if [ $running = $guests ]; then
      wait -n || verdict=$?
      running=$((running - 1))
    fi
    kernel_test "$file" &
    running=$((running + 1))
  done
  while [ $running != 0 ]; do
    wait -n || verdict=$?
    running=$((running - 1))
  done
  return $verdict
}

kernel_test() {
  local log=.bed/log-${1%%:*} verdict=0 began=$SECONDS
  bed -m pytest -v --durations 5 "tests/integration/$1" >"$log" 2>&1 || verdict=$?
  cat "$log"
  echo "$1: exit status $verdict after $((SECONDS - began)) s"
  return $verdict
}

prepare
case "${1:-build}" in
  build) build ;;
  pins) write_pins ;;
  fuzz)
    pip_quietly install atheris==3.0.0
    .venv/bin/python -m tests.fuzz --seconds "${2:-600}"
    ;;
  demo)
    need_bed
    build
    bed -m tests.demo
    ;;
  test)
    need "${TEST_PACKAGES[@]}"
    need_ansible
    need_bed
    build
    sha256sum dist/localdisk >.venv/built
    build
    sha256sum --check --quiet .venv/built # built twice, it is the same file
    lint
    units
    kernel_tests
    as_root .venv/bin/python -m tests.crash "${@:2}"
    ;;
  pictures)
    need tmux
    need_bed
    build
    bed -m tests.pictures.record | .venv/bin/python -m tests.pictures.draw
    ;;
  bench)
    need_bed
    build
    .venv/bin/python -m tests.bench here
    bed -m tests.bench bed
    DISK_SIZE=24576 bed -m tests.bench cache
    ;;
  *)
    echo "build.sh: unknown command $1 : see the head of this file" >&2
    exit 2
    ;;
esac
